"""Object stores: a directory and S3, behind one port (`instance_manager.ports.ObjectStore`)."""

CALLS_IN_FLIGHT_MAX = 32
"""Of one store: archive.parallel (12 at most), archive.backup.parallel (8), a look at all backups (8), and a few single ones."""
CALLS_KEPT_MAX = 4
"""Threads that wait for the next call: as many as upload or restore at once by default."""
