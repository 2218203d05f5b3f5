"""The image under test and the container engine of this machine, found once and outside of any test's deadline."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND_DEADLINE_S = 60.0


class EngineMissing(Exception):
    """No container can be started here; the text says why."""


class CommandFailed(Exception):
    """A command of the engine failed; the text holds all that it printed."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How containers are run on this machine."""

    command: tuple[str, ...]
    run_options: tuple[str, ...]
    image: str
    built_from: str | None = None
    """The commit that was checked out when this session built it; None: it was there, or this is no checkout."""

    def call(self, *arguments: str, stdin: bytes = b"", deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Standard output of one command of the engine; CommandFailed unless it exits with 0."""
        result = self.attempt(*arguments, stdin=stdin, deadline_s=deadline_s)
        if result.returncode != 0:
            output = (result.stdout + result.stderr).decode("utf-8", "replace")
            raise CommandFailed(f"{' '.join(arguments)}: exit code {result.returncode}\n{output}")
        return result.stdout.decode("utf-8", "replace")

    def attempt(
        self, *arguments: str, stdin: bytes = b"", deadline_s: float = COMMAND_DEADLINE_S
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self.command, *arguments], input=stdin, capture_output=True, timeout=deadline_s, check=False
        )

    def run(self, options: Sequence[str], arguments: Sequence[str], *, stdin: bytes = b"") -> str:
        """One container to its end, without a network."""
        return self.call(
            "run", "--rm", "--network", "none", *self.run_options, *options, self.image, *arguments, stdin=stdin
        )

    def shell(self, script: str) -> str:
        """Run a script in a container of the image, as root, so that nothing of the image is hidden."""
        return self.run(["--user", "0", "--entrypoint", "/bin/sh"], ["-c", script])


def unique_name() -> str:
    return f"instance-manager-test-{uuid.uuid4().hex[:12]}"


@cache
def find_engine() -> Engine:
    """Build the image, unless INSTANCE_MANAGER_IMAGE names one, and find how it runs. EngineMissing."""
    given = os.environ.get("INSTANCE_MANAGER_IMAGE")
    built_from = None if given else _commit()
    image = given or _build()
    found = subprocess.run([ROOT / "image" / "engine.sh", image], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise EngineMissing(found.stderr.strip())
    command, run_options = found.stdout.splitlines()
    return Engine(tuple(command.split()), tuple(run_options.split()), image, built_from)


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def _build() -> str:
    """With its progress on the terminal. A build that fails is a failure, not a missing engine."""
    check = subprocess.run(
        [
            "/bin/bash",
            "-c",
            ". image/engine.sh; find_engine || fail 'neither podman nor docker answers; `make image` installs podman'",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode != 0:
        raise EngineMissing(check.stderr.strip())
    image = f"localhost/{unique_name()}"
    subprocess.run([ROOT / "image" / "build.sh"], env={**os.environ, "IMAGE": image}, check=True)
    return image


def forget_image() -> None:
    """Remove what `find_engine` built; its layers stay for the next build."""
    if find_engine.cache_info().currsize and "INSTANCE_MANAGER_IMAGE" not in os.environ:
        engine = find_engine()
        engine.attempt("rmi", engine.image)
