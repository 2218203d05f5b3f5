"""Where the running demo of this user is: a file that `instance-manager demo` writes and every command reads."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "current-demo"
_BYTES_MAX = 64 * 1024


class DemoLocatorError(Exception):
    """The file cannot be trusted, read or written; the text says why."""


@dataclass(frozen=True, slots=True)
class RunningDemo:
    """One demo: its directory, and the control socket of each instance by name."""

    directory: Path
    sockets: dict[str, Path]


def locator_directory() -> Path:
    """$XDG_RUNTIME_DIR, or /tmp/instance-manager-<uid>."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "instance-manager"
    return Path(f"/tmp/instance-manager-{os.geteuid()}")  # noqa: S108 - made with 0700 and its owner is checked


def write_running_demo(demo: RunningDemo) -> Path:
    """Tell every command where the demo is; returns the file."""
    directory = locator_directory()
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        _check_ours(directory)
        content = json.dumps(
            {"directory": str(demo.directory), "sockets": {name: str(path) for name, path in demo.sockets.items()}}
        )
        descriptor, new = tempfile.mkstemp(dir=directory, prefix=FILE_NAME)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content + "\n")
        Path(new).rename(directory / FILE_NAME)
    except OSError as error:
        raise DemoLocatorError(f"{directory}: {error.strerror or error}") from error
    return directory / FILE_NAME


def read_running_demo() -> RunningDemo | None:
    """The demo that was told last and not taken back; None without one. It may have died without a word."""
    path = locator_directory() / FILE_NAME
    try:
        if not path.parent.is_dir():
            return None
        _check_ours(path.parent)
        with path.open("rb") as file:
            content = json.loads(file.read(_BYTES_MAX))
        return RunningDemo(
            Path(content["directory"]), {str(name): Path(socket) for name, socket in content["sockets"].items()}
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DemoLocatorError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DemoLocatorError(f"{path} is not what the demo writes; remove it") from error


def remove_running_demo(directory: Path) -> None:
    """Take it back, if it is still the demo in `directory` that is told there."""
    with contextlib.suppress(DemoLocatorError, OSError):
        found = read_running_demo()
        if found is not None and found.directory == directory:
            (locator_directory() / FILE_NAME).unlink()


def _check_ours(directory: Path) -> None:
    """Anybody may make a folder in /tmp: one that is not ours could lead commands to somebody else's socket."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise DemoLocatorError(f"{directory} does not belong to you alone; remove it")
