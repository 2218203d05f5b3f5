"""Wall clocks of a drill: libfaketime, preloaded into an instance, reads its offset from a file at every call.

CLOCK_MONOTONIC and CLOCK_BOOTTIME stay true, as they do when an administrator or NTP steps a machine's clock.
"""

from __future__ import annotations

from pathlib import Path

_LIBRARIES = (
    "lib/*/faketime/libfaketimeMT.so.1",
    "lib/faketime/libfaketimeMT.so.1",
    "lib64/faketime/libfaketimeMT.so.1",
)
# libfaketime 0.9.10 answers an absolute clock_nanosleep with EINVAL, so that time.sleep raises where no clock is faked.
_SITE_CUSTOMIZE = """\
import select
import time


def _sleep(seconds):
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    select.select((), (), (), seconds)


time.sleep = _sleep
"""


def library() -> Path | None:
    for pattern in _LIBRARIES:
        found = sorted(Path("/usr").glob(pattern))
        if found:
            return found[0]
    return None


def why_unavailable() -> str | None:
    """Why this machine cannot do it, for the user; None if it can."""
    return None if library() is not None else "a clock step needs libfaketime (package faketime)"


class Clocks:
    """One file per instance with the offset of its wall clock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, name: str) -> dict[str, str]:
        """The environment with which the instance must be started."""
        self._directory.mkdir(mode=0o755, exist_ok=True)
        (self._directory / "sitecustomize.py").write_text(_SITE_CUSTOMIZE, encoding="ascii")
        self.step(name, 0)
        found = library()
        assert found is not None  # noqa: S101
        return {
            "LD_PRELOAD": str(found),
            "FAKETIME_TIMESTAMP_FILE": str(self._directory / name),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
            "NO_FAKE_STAT": "1",
            "PYTHONPATH": str(self._directory),
        }

    def step(self, name: str, seconds: int) -> None:
        """Set the wall clock off by so much from the machine's."""
        new = self._directory / f"{name}.new"
        new.write_text(f"{seconds:+d}\n", encoding="ascii")
        new.chmod(0o644)
        new.replace(self._directory / name)
