"""The values of `archive_command` and `restore_command`, and the program that they run.

What Postgres makes of exit codes decides over data: above 125 in archive_command restarts its archiver uncounted; 1 to 125 in
restore_command is "not there", and ends a recovery with a promotion. So a shell line maps what the client ends with, also
where the client could not start or was killed:

| command | 0 | proven absent | not allowed now | anything else |
|---|---|---|---|---|
| archive_command | 0 | | 126 | 1 |
| restore_command, standby | 0 | 1 | 1 | 1: Postgres streams, and asks again |
| restore_command, recovery and rewind | 0 | 1 | | 126: Postgres stops |

Of a segment that was sent ahead and has a receipt the shell says "archived" by itself (`receipts`).

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
COMMAND_MAX_BYTES = 1023
"""Of an archive_command, with its names in it."""
PERL = Path("/usr/bin/perl")
"""Starts in 3 ms where Python takes 15; an essential part of every Debian."""


class NoInterpreter(Exception):
    """No Perl and no Python that Postgres's user may run."""


def install_client(state_directory: Path, run_as: RunAs | None) -> Path:
    """Copy the client to where Postgres's user can read it, in Perl and in Python; the latter's path. Blocks on the disk.

    And what the shell looks at first.
    """
    path = state_directory / CLIENT
    for source, target in (("client.py", path), ("client.pl", quick(path)), ("receipt.sh", _receipt_script(path))):
        text = importlib.resources.files(__package__).joinpath(source).read_text()
        write_atomically(target, text.encode(), mode=0o644, run_as=run_as)
    return path


def quick(client: Path) -> Path:
    """The Perl one beside the Python one."""
    return client.with_suffix(".pl")


def _receipt_script(client: Path) -> Path:
    return client.with_name("archive_receipt.sh")


def interpreter(run_as: RunAs | None) -> Path:
    """What runs the client: Perl; else this Python, or the system's where this one lies in a directory closed to others."""
    return PERL if os.access(PERL, os.X_OK) else python_for(run_as)


def python_for(run_as: RunAs | None) -> Path:
    """A Python for Postgres's user. NoInterpreter."""
    own = Path(os.path.realpath(sys.executable))
    if run_as is None or all(parent.stat().st_mode & 0o001 for parent in (own, *own.parents)):
        return own
    if SYSTEM_PYTHON.exists():
        return SYSTEM_PYTHON
    raise NoInterpreter(
        f"{own} cannot be run by {run_as.user_name}, and there is neither {PERL} nor {SYSTEM_PYTHON}: install one of them"
    )


def archive_command(
    interpreter: Path, client: Path, socket: Path, allows: Path | None = None, receipts: Path | None = None
) -> str:
    """Above 125 only where `allows` ends it, whatever becomes of the client. `receipts` need `allows`, see there."""
    if allows is None:
        return f"{client_words(interpreter, client, socket)} push %f || exit 1"
    ask = client_words(interpreter, client, socket)
    run = f"{ask} push %f {_word(allows)}"
    if receipts is not None:
        # Each path once: Postgres before 16 cuts a command off at `COMMAND_MAX_BYTES`, without a word.
        look = f'set -- %f "%p" {_word(allows)} {_word(receipts)}; . {_word(_receipt_script(client))}'
        run = f'{look}; {ask} push "$1" "$3"'
    return f"{run}; case $? in 0) exit 0;; {NOT_ALLOWED}) exit 126;; *) exit 1;; esac"


def restore_command(interpreter: Path, client: Path, socket: Path, mode: Mode) -> str:
    """1 only where it does no harm: proven absence, or a standby that will ask again."""
    run = f'{client_words(interpreter, client, socket)} fetch {mode} %f "%p"'
    otherwise = 1 if mode == "standby" else 126
    return f"{run}; case $? in 0) exit 0;; {ABSENT}) exit 1;; *) exit {otherwise};; esac"


def client_words(interpreter: Path, client: Path, socket: Path) -> str:
    """The client's command line, up to what it is to do; for a shell, and `%` doubled for Postgres.

    Isolated from the environment, in either language.
    """
    options, file = ("-f -T", quick(client)) if interpreter == PERL else ("-I -S", client)
    return f"{_word(interpreter)} {options} {_word(file)} {_word(socket)}"


def _word(path: Path) -> str:
    return shlex.quote(str(path)).replace("%", "%%")
