"""Object stores: a directory and S3, behind one port (`instance_manager.ports.ObjectStore`)."""
