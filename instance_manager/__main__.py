"""`python -m instance_manager` is `instance-manager`."""

import sys

from instance_manager.cli import main

if __name__ == "__main__":
    sys.exit(main())
