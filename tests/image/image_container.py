"""One instance in a container of the image, as restricted as in a pod: read-only root, no capability, a volume."""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import yaml
from image_engine import CommandFailed, Engine, unique_name

UID = 999
READY_DEADLINE_S = 60.0
POLL_S = 0.1
DATA_DIRECTORY = "/var/lib/postgresql/instance/data"
SECRETS = ("peer_token", "replication_password", "application_password", "monitoring_password")
_FETCH = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())
except urllib.error.HTTPError as error:
    sys.exit(error.read().decode())
"""

CONFIGURATION = {
    "cluster": {"name": "one", "uid": "4e016cebc430b597"},
    "instance": {"name": "one-0", "directory": "/var/lib/postgresql/instance"},
    "members": [{"name": "one-0", "host": "127.0.0.1", "postgres_port": 5432, "http_port": 8008}],
    "coordination": {"local": {"directory": "/srv/coordination/store", "locks_directory": "/srv/coordination/locks"}},
    "secrets": {name: f"/etc/instance-manager/secrets/{name}" for name in SECRETS},
}


@dataclass(frozen=True, slots=True)
class Container:
    engine: Engine
    name: str
    application_password: str

    def execute(self, *command: str) -> str:
        """Run a command in the container; CommandFailed."""
        return self.engine.call("exec", self.name, *command)

    def fetch(self, path: str) -> str:
        """GET from the instance's HTTP server, from inside: the container has no network. CommandFailed unless 200."""
        return self.execute("python", "-I", "-c", _FETCH, f"http://127.0.0.1:8008{path}")

    def sql(self, statement: str) -> str:
        """As an application does: over TCP, with its password."""
        options = "host=127.0.0.1 user=app dbname=app"
        return self.engine.call(
            "exec",
            "--env",
            f"PGPASSWORD={self.application_password}",
            self.name,
            "psql",
            "-XAtqd",
            options,
            "-c",
            statement,
        ).strip()

    def wait_ready(self) -> None:
        """Of an instance that was started for the first time."""
        # No process may be put beside a supervisor that only starts: it takes them for those of a shared PID namespace.
        self.wait(self._supervisor_started, READY_DEADLINE_S)
        self.wait(lambda: self.fetch("/readyz"), READY_DEADLINE_S)

    def kill_and_restart(self) -> int:
        """SIGKILL to the whole container, and start it again; the exit code of the killed one."""
        self.engine.call("kill", "--signal", "KILL", self.name)
        self.engine.call("wait", self.name)
        code = self.exit_code()
        self.engine.call("start", self.name)
        self.wait(lambda: self._supervisor_started(2), READY_DEADLINE_S)
        self.wait(lambda: self.fetch("/readyz"), READY_DEADLINE_S)
        return code

    def _supervisor_started(self, times: int = 1) -> None:
        if self.logs().count('"message": "agent_started"') < times:
            raise CommandFailed("the supervisor has not started")

    def wait(self, condition: Callable[[], object], deadline_s: float) -> None:
        """Until `condition` does not fail; AssertionError with its last failure and the container's log."""
        end_s = time.monotonic() + deadline_s
        while True:
            try:
                condition()
            except CommandFailed as error:
                if time.monotonic() > end_s:
                    raise AssertionError(f"not in {deadline_s:g} s: {error}\n{self.logs()}") from error
                time.sleep(POLL_S)
            else:
                return

    def logs(self) -> str:
        result = self.engine.attempt("logs", self.name)
        return (result.stdout + result.stderr).decode("utf-8", "replace")

    def stop(self, grace_s: int) -> float:
        """SIGTERM, and SIGKILL after the grace; returns how long it took, in seconds."""
        begun_s = time.monotonic()
        self.engine.call("stop", "--time", str(grace_s), self.name)
        return time.monotonic() - begun_s

    def exit_code(self) -> int:
        (state,) = json.loads(self.engine.call("inspect", "--format", "json", self.name))
        assert not state["State"]["Running"], "the container still runs"
        code: int = state["State"]["ExitCode"]
        return code

    def control_data(self) -> dict[str, str]:
        """What pg_controldata says of the volume, from another container."""
        text = self.engine.run(
            ["--entrypoint", "pg_controldata", "--volume", f"{self.name}-data:/var/lib/postgresql:ro"], [DATA_DIRECTORY]
        )
        lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        return {key.strip(): value.strip() for key, value in lines}


@contextlib.contextmanager
def started(engine: Engine) -> Iterator[Container]:
    """A fresh instance, not ready yet; the container and its volumes are removed at the end."""
    container = Container(engine, unique_name(), secrets.token_hex(16))
    name = container.name
    volumes = {
        f"{name}-data": "/var/lib/postgresql",
        f"{name}-configuration": "/etc/instance-manager:ro",
        f"{name}-coordination": "/srv/coordination",
    }
    try:
        _fill(engine, f"{name}-configuration", "/etc/instance-manager", _configuration_files(container))
        _fill(engine, f"{name}-coordination", "/srv/coordination", {"store/": b"", "locks/": b""})
        mounts = [word for source, target in volumes.items() for word in ("--volume", f"{source}:{target}")]
        # As a pod of the `restricted` standard with readOnlyRootFilesystem and emptyDirs.
        engine.call(
            "run",
            "--detach",
            *("--name", name, "--network", "none"),
            *engine.run_options,
            *("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/run"),
            *(("--read-only-tmpfs=false",) if engine.command[0] == "podman" else ()),
            *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
            *mounts,
            engine.image,
        )
        yield container
    finally:
        engine.attempt("rm", "--force", name)
        for volume in volumes:
            engine.attempt("volume", "rm", "--force", volume)


def _configuration_files(container: Container) -> Mapping[str, bytes]:
    files = {f"secrets/{secret}": secrets.token_hex(16).encode() for secret in SECRETS}
    files["secrets/application_password"] = container.application_password.encode()
    return {"instance-manager.yaml": yaml.safe_dump(CONFIGURATION).encode(), **files}


def _fill(engine: Engine, volume: str, directory: str, files: Mapping[str, bytes]) -> None:
    """Write files of Postgres's user into a new volume, by a container: the same with any engine, root or not."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.uid = entry.gid = UID
            entry.mode = 0o400
            if name.endswith("/"):
                entry.type, entry.mode = tarfile.DIRTYPE, 0o700
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    engine.run(
        ["--interactive", "--user", "0", "--entrypoint", "tar", "--volume", f"{volume}:{directory}"],
        ["--extract", "--directory", directory],
        stdin=archive.getvalue(),
    )
