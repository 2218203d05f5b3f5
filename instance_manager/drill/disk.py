"""Volumes of a drill: each instance's directory is a small ext4 of its own on a loop device, to be frozen or filled.

A frozen file system lets every write and fsync hang in uninterruptible sleep, as a lost storage network does: not even
SIGKILL takes effect until it is thawed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

VOLUME_BYTES = 3 * 1024**3
_DEADLINE_S = 30.0
_BALLAST = "ballast-of-the-drill"
_STEPS_BYTES = (64 * 1024**2, 1024**2, 4096)


class DiskFailed(Exception):
    """A command failed; the text is its own."""


def why_unavailable() -> str | None:
    """Why this machine cannot do it, for the user; None if it can."""
    if os.geteuid() != 0:
        return "disk faults need root"
    programs = ("losetup", "mkfs.ext4", "fsfreeze", "mount", "umount")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return f"disk faults need {', '.join(missing)} (packages mount, e2fsprogs, util-linux)"
    if not Path("/dev/loop-control").exists():
        return "disk faults need loop devices (/dev/loop-control)"
    return None


class Volumes:
    """One per instance, mounted over its directory. `close` thaws, unmounts and deletes all, whatever their state."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self._mounted: dict[str, Path] = {}
        self._frozen: set[str] = set()

    def open(self, directories: Sequence[tuple[str, Path]]) -> None:
        """Make and mount them. DiskFailed: nothing is left."""
        try:
            self._images.mkdir(mode=0o700, exist_ok=True)
            for name, directory in directories:
                image = self._images / f"{name}.img"
                with image.open("wb") as file:
                    file.truncate(VOLUME_BYTES)
                _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1", str(image))
                _run("mount", "-o", "loop", str(image), str(directory))
                self._mounted[name] = directory
                (directory / "lost+found").rmdir()
                directory.chmod(0o755)
        except BaseException:
            self.close()
            raise

    def freeze(self, name: str) -> None:
        self._frozen.add(name)
        _run("fsfreeze", "--freeze", str(self._mounted[name]))

    def thaw(self, name: str) -> None:
        if name in self._frozen:
            _run("fsfreeze", "--unfreeze", str(self._mounted[name]))
            self._frozen.discard(name)

    def fill(self, name: str) -> None:
        """Leave no free byte."""
        with (self._mounted[name] / _BALLAST).open("ab") as file:
            for step_bytes in _STEPS_BYTES:
                while True:
                    try:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step_bytes)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise DiskFailed(f"{file.name}: {error.strerror}") from error
                        break

    def empty(self, name: str) -> None:
        (self._mounted[name] / _BALLAST).unlink(missing_ok=True)

    def close(self) -> None:
        """Their processes must be gone; a volume that is still in use is detached and goes with its last user."""
        for name in list(self._mounted):
            with contextlib.suppress(DiskFailed):
                self.thaw(name)
            directory = self._mounted.pop(name)
            try:
                _run("umount", str(directory))
            except DiskFailed:
                with contextlib.suppress(DiskFailed):
                    _run("umount", "--lazy", str(directory))
        shutil.rmtree(self._images, ignore_errors=True)


def _run(*argv: str) -> None:
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True, timeout=_DEADLINE_S)
    except subprocess.CalledProcessError as error:
        raise DiskFailed(f"{' '.join(argv)}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DiskFailed(f"{' '.join(argv)}: {error}") from error
