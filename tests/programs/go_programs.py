"""Programs for tests that are built with Go from modules, once, into the user's cache. Tests only look for them there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPORT_INTERVAL_S = 15.0

Say = Callable[[str], None]


class Unavailable(Exception):
    """A program can be had in no way; the text says which, and what was tried."""


@dataclass(frozen=True, slots=True)
class GoProgram:
    name: str
    package: str
    module: Path
    """The folder of the go.mod whose tool it is; its go.sum says what the sources must be."""
    linker_flags: str = ""


def cache_directory(name: str) -> Path:
    """One folder per program and version, so that a new one never mixes with an old one."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "instance-manager" / name


@contextlib.contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Only one process at a time fetches or builds."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching the programs; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(programs: Iterable[GoProgram], cache: Path, say: Say) -> str | None:
    """Each into `cache`, whole or not at all; the reason why not, else None."""
    for program in programs:
        if shutil.which("go") is None:
            return "build: there is no go (1.24 or later)"
        try:
            _build_one(program, cache / program.name, say)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else error
            return f"build of {program.name}: {detail}"
    return None


def _build_one(program: GoProgram, path: Path, say: Say) -> None:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    say(f"{program.name}: listing packages (the first time, modules are downloaded)")
    listed = subprocess.run(
        ["go", "list", "-deps", program.package],
        cwd=program.module,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    total = len(listed.stdout.split())
    new = path.with_name(f"{path.name}.new")
    command = ["nice", "-n", "10", "go", "build", "-v", "-p", str(os.cpu_count() or 1), "-trimpath", "-buildvcs=false"]
    began_s = time.monotonic()
    with subprocess.Popen(
        [*command, "-ldflags", f"-s -w {program.linker_flags}".strip(), "-o", str(new), program.package],
        cwd=program.module,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as build:
        assert build.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(build.stderr,), daemon=True)
        reader.start()
        while build.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                build.wait(REPORT_INTERVAL_S)
            minutes = (time.monotonic() - began_s) / 60
            say(f"{program.name}: {len(lines)} of at most {total} packages compiled, {minutes:.1f} minutes")
        reader.join()
    if build.returncode != 0:
        raise subprocess.CalledProcessError(build.returncode, "go build", stderr="".join(lines[-20:]))
    new.replace(path)
