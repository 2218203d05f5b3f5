"""Files that must survive a power cut whole: written beside their place, flushed, renamed, and the directory flushed.

Everything here blocks on the disk: call it through `asyncio.to_thread` where a stalled disk must not stop the loop.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from instance_manager.postgres.server import RunAs


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600, run_as: RunAs | None = None) -> None:
    """Replace `path`: after a crash at any moment it holds the old content or the new one, never a part.

    Owned by `run_as` where given. A symbolic link at `path` is replaced, not followed. OSError: nothing was replaced
    (an error of the last flush, of the directory, leaves it open which of the two a crash will show).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if run_as is not None:
                os.fchown(file.fileno(), run_as.uid, run_as.gid)
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def read_if_present(path: Path, *, limit_bytes: int = 16 * 1024 * 1024) -> bytes | None:
    """The content; None: there is no such file. ValueError: longer than `limit_bytes`. OSError otherwise."""
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError:
        return None
    if len(content) > limit_bytes:
        raise ValueError(f"{path} is longer than {limit_bytes} bytes")
    return content


def remove_if_present(path: Path) -> bool:
    """Remove the file and flush its directory; False: there was none."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    fsync_directory(path.parent)
    return True


def fsync_directory(path: Path) -> None:
    """Make the names in the directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of the file `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, *, mode: int = 0o700, run_as: RunAs | None = None) -> None:
    """Create `path` if it is not there, durably, with this mode and owner. FileExistsError: it is no directory."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        if not path.is_dir():
            raise
    path.chmod(mode)
    if run_as is not None:
        os.chown(path, run_as.uid, run_as.gid)
    fsync_directory(path.parent)
