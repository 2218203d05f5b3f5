"""pgbench as a load beside the write probe, begun again whenever a failover ends it. Runs until SIGTERM.

python -m instance_manager.drill.load PGBENCH CONNECTION_STRING SCALE
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import FrameType

from instance_manager.demo.processes import end_with_parent

_RETRY_S = 0.2


class _Ended(Exception):
    pass


def main(pgbench: str, connection_string: str, scale: str) -> int:
    """Fill the tables, say `ready`, then run transactions until SIGTERM."""

    def end(_: int, __: FrameType | None) -> None:
        raise _Ended

    signal.signal(signal.SIGTERM, end)
    try:
        while _run([pgbench, "--initialize", "--quiet", f"--scale={scale}", connection_string]) != 0:
            time.sleep(_RETRY_S)
        print("ready", flush=True)
        while True:
            _run([pgbench, "--no-vacuum", "--client=4", "--jobs=1", "--time=3600", connection_string])
            time.sleep(_RETRY_S)
    except _Ended:
        return 0


def _run(argv: list[str]) -> int:
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
        preexec_fn=end_with_parent(signal.SIGKILL),
    ).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
