"""The real judges: promtool, Prometheus and postgres_exporter, as `make monitoring-tools` brings them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_UNPACKED = Path(__file__).parents[2] / ".cache/monitoring/usr/bin"


def tool(name: str) -> str:
    """Path of a program; it fails where the program is missing, because a check that is left out is none."""
    found = shutil.which(name) or (str(_UNPACKED / name) if (_UNPACKED / name).exists() else None)
    assert found is not None, f"{name} is missing: run `make monitoring-tools`"
    return found


def promtool(*arguments: str, stdin: bytes = b"") -> tuple[int, str]:
    """Its exit code, and what it printed."""
    done = subprocess.run([tool("promtool"), *arguments], input=stdin, capture_output=True, timeout=100, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(argv: list[str], url: str, *, log: Path, env: dict[str, str] | None = None) -> Iterator[None]:
    """The program while it runs, once `url` answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env={**os.environ, **(env or {})})
    try:
        ends_s = time.monotonic() + 30
        while not answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends_s, log.read_text()
            time.sleep(0.05)  # nothing tells when its port opens
        yield
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own
        return str(answer.read().decode())
