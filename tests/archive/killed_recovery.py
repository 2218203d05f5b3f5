"""`restore` as a program that kills itself, as the machine would, right before its Nth step.

A step is a question of Postgres, a segment that is placed or taken, and a change of who reads (which is one more right after it).

python killed_recovery.py N ARGUMENTS...    # of `instance-manager`
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from instance_manager.archive.recovery.hidden_server import HiddenServer
from instance_manager.archive.recovery.placing import InPgWal
from instance_manager.archive.recovery.serving import RecoveryArchive
from instance_manager.cli import main


class Steps:
    def __init__(self, last: int) -> None:
        self.left = last

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def count(self, of: type, name: str, *, after: bool = False) -> None:
        function: Callable[..., Any] = getattr(of, name)

        @functools.wraps(function)
        def counted(*words: Any, **named: Any) -> Any:
            self.step()
            result = function(*words, **named)
            if after:
                self.step()
            return result

        setattr(of, name, counted)


def run() -> None:
    steps = Steps(int(sys.argv[1]))
    steps.count(RecoveryArchive, "_fetch")
    steps.count(InPgWal, "_take_place")
    steps.count(InPgWal, "hand_over")
    steps.count(HiddenServer, "change_way", after=True)
    sys.argv[1:] = sys.argv[2:]
    main()


if __name__ == "__main__":
    run()
