"""A stand-in for Postgres: a parent with children in sessions of their own, as a postmaster's backends are.

argv: FOLDER CHILD... where each child is one of `plain`, `stubborn` (ignores SIGTERM and what else it can), `stopped`
(SIGSTOPs itself), `busy` (appends the time to FOLDER/commits all the time), `orphan` (a grandchild whose parent exits),
`write=PATH` (creates that file), `log=SECONDS` (a log collector: so long after the postmaster's end it writes FOLDER/logged and
ends).
Writes FOLDER/pids when all are there. SIGINT and SIGTERM: an orderly end, code 0, that kills all children but the collector.
SIGUSR1 is noted in FOLDER/promoted.
"""

import os
import signal
import sys
import time
from pathlib import Path


def note(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(fd, text.encode())
    os.close(fd)


def backend(folder: str, kind: str) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if kind == "stubborn" else signal.SIG_DFL)
    if kind == "orphan":
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
    note(f"{folder}/children", f"{os.getpid()}\n")
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind.startswith("write="):
        note(kind.removeprefix("write="), "written")
    if kind.startswith("log="):
        postmaster = os.getppid()
        while os.getppid() == postmaster:
            time.sleep(0.001)
        time.sleep(float(kind.removeprefix("log=")))
        note(f"{folder}/logged", "all")
        os._exit(0)
    while kind == "busy":
        note(f"{folder}/commits", f"{time.clock_gettime(time.CLOCK_BOOTTIME)}\n")
        time.sleep(0.001)
    while True:
        signal.pause()


def main() -> None:
    folder, kinds = sys.argv[1], sys.argv[2:]
    children = []
    for kind in kinds:
        pid = os.fork()
        if pid == 0:
            backend(folder, kind)
        children.append(pid)

    def end(_number: int, _frame: object) -> None:
        for pid, kind in zip(children, kinds, strict=True):
            if not kind.startswith("log="):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        os._exit(0)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGQUIT, lambda _number, _frame: os._exit(2))
    signal.signal(signal.SIGHUP, lambda _number, _frame: note(f"{folder}/reloaded", "yes"))
    signal.signal(signal.SIGUSR1, lambda _number, _frame: note(f"{folder}/promoted", "yes"))
    noted = Path(folder, "children")
    while kinds and not (noted.exists() and len(noted.read_text().split()) == len(kinds)):
        time.sleep(0.001)
    note(f"{folder}/ready", f"uid={os.getuid()} gid={os.getgid()} groups={os.getgroups()} sid={os.getsid(0)}")
    while True:
        signal.pause()


main()
