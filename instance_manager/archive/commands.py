"""The values of `archive_command` and `restore_command`, and the program that they run.

What Postgres makes of exit codes decides over data: above 125 in archive_command restarts its archiver uncounted; 1 to 125 in
restore_command is "not there", and ends a recovery with a promotion. So a shell line maps what the client ends with, also
where the client could not start or was killed:

| command | 0 | proven absent | not allowed now | anything else |
|---|---|---|---|---|
| archive_command | 0 | | 126 | 1 |
| restore_command, standby | 0 | 1 | 1 | 1: Postgres streams, and asks again |
| restore_command, recovery and rewind | 0 | 1 | | 126: Postgres stops |

"Not allowed now" is a primary that is about to stop. 126 ends Postgres's own archiver at once; after a 1 it would try twice
more, a second apart, and the shutdown, and whoever takes over, would wait for that.

The `restore_command` of a server under an agent is `restore_command.sh` (`postgres.promotion`), which calls this client in the
mode `standby`: `client_words`.
"""

from __future__ import annotations

import importlib.resources
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from instance_manager.archive.client import ABSENT, NOT_ALLOWED
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import RunAs

if TYPE_CHECKING:
    from instance_manager.archive.fetch import Mode

CLIENT = "archive_client.py"
SYSTEM_PYTHON = Path("/usr/bin/python3")


class NoInterpreter(Exception):
    """No Python that Postgres's user may run."""


def install_client(state_directory: Path, run_as: RunAs | None) -> Path:
    """Copy the client to where Postgres's user can read it. Blocks on the disk."""
    text = importlib.resources.files(__package__).joinpath("client.py").read_text()
    path = state_directory / CLIENT
    write_atomically(path, text.encode(), mode=0o644, run_as=run_as)
    return path


def interpreter(run_as: RunAs | None) -> Path:
    """A Python for Postgres's user: this one, or the system's where this one lies in a directory closed to others."""
    own = Path(os.path.realpath(sys.executable))
    if run_as is None or all(parent.stat().st_mode & 0o001 for parent in (own, *own.parents)):
        return own
    if SYSTEM_PYTHON.exists():
        return SYSTEM_PYTHON
    raise NoInterpreter(f"{own} cannot be run by {run_as.user_name}, and there is no {SYSTEM_PYTHON}: install python3")


def archive_command(python: Path, client: Path, socket: Path, allows: Path | None = None) -> str:
    """Above 125 only where `allows` ends it, whatever becomes of the client."""
    if allows is None:
        return f"{client_words(python, client, socket)} push %f || exit 1"
    run = f"{client_words(python, client, socket)} push %f {_word(allows)}"
    return f"{run}; case $? in 0) exit 0;; {NOT_ALLOWED}) exit 126;; *) exit 1;; esac"


def restore_command(python: Path, client: Path, socket: Path, mode: Mode) -> str:
    """1 only where it does no harm: proven absence, or a standby that will ask again."""
    run = f'{client_words(python, client, socket)} fetch {mode} %f "%p"'
    otherwise = 1 if mode == "standby" else 126
    return f"{run}; case $? in 0) exit 0;; {ABSENT}) exit 1;; *) exit {otherwise};; esac"


def client_words(python: Path, client: Path, socket: Path) -> str:
    """The client's command line, up to what it is to do; for a shell, and `%` doubled for Postgres."""
    return f"{_word(python)} -I -S {_word(client)} {_word(socket)}"


def _word(path: Path) -> str:
    return shlex.quote(str(path)).replace("%", "%%")
