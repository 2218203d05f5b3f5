"""One run of a pod's container: the shim that is its parent, its end, and what the kubelet reports of both."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kube_api import Object
from pod_image import Image
from pod_network import PodLink
from pod_volumes import UnsupportedPod

from instance_manager.wall_clock import timestamp

TERMINATION_MESSAGE_BYTES = 4096
_SHIM = Path(__file__).with_name("container_shim.py")
_END_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class End:
    """How a container ended."""

    exit_code: int
    """As the kubelet reports it: 128 and the signal's number for a killed one."""
    reason: str
    message: str
    started_at: str
    finished_at: str

    def state(self, container_id: str) -> Object:
        return {
            "terminated": {
                "exitCode": self.exit_code,
                "reason": self.reason,
                "message": self.message,
                "startedAt": self.started_at,
                "finishedAt": self.finished_at,
                "containerID": container_id,
            }
        }


class RunningContainer:
    """From its start to its end; every process in it is gone when `end` tells how it ended."""

    def __init__(self, specification: Object, directory: Path) -> None:
        """`directory` is new, and this container's alone. OSError."""
        self.id = f"test://{os.urandom(16).hex()}"
        self.started_at = api_time()
        self._message_file = Path(specification["message_file"])
        self.log = Path(specification["log"])
        specification_file = directory / "specification.json"
        specification_file.write_text(json.dumps(specification))
        self._shim = subprocess.Popen(
            [sys.executable, "-I", str(_SHIM), str(specification_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid: int | None = None
        """Of its first process, as the machine sees it; None if it could not start."""
        self._end: End | None = None
        self._ended = threading.Event()
        assert self._shim.stdout is not None
        self._take(self._shim.stdout.readline())
        self._reader = threading.Thread(target=self._follow, name="container", daemon=True)
        self._reader.start()

    @property
    def end(self) -> End | None:
        """None while it runs."""
        return self._end if self._ended.is_set() else None

    def wait(self, seconds: float) -> bool:
        """Whether it ended within this time."""
        return self._ended.wait(seconds)

    def terminate(self) -> None:
        self._say("TERM\n")

    def kill(self) -> None:
        self._say("KILL\n")

    def wait_end(self) -> End:
        """After `kill`."""
        assert self._ended.wait(_END_DEADLINE_S), "a killed container did not end"
        assert self._end is not None
        return self._end

    def _say(self, word: str) -> None:
        assert self._shim.stdin is not None
        try:
            self._shim.stdin.write(word)
            self._shim.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # it has ended

    def _follow(self) -> None:
        assert self._shim.stdout is not None
        for line in self._shim.stdout:
            self._take(line)
        self._shim.wait()
        if self._end is None:
            self._end = self._ended_with(128, "ContainerCannotRun", f"the shim ended with {self._shim.returncode}")
        self._ended.set()
        self._shim.stdout.close()
        assert self._shim.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._shim.stdin.close()

    def _take(self, line: str) -> None:
        match json.loads(line or "{}"):
            case {"pid": pid}:
                self.pid = pid
            case {"error": error}:
                self._end = self._ended_with(128, "StartError", error)
            case {"exit_code": code}:
                self._end = self._ended_with(code, "Error" if code else "Completed", self._message())
            case {"signal": number}:
                self._end = self._ended_with(128 + number, "Error", self._message())

    def _ended_with(self, code: int, reason: str, message: str) -> End:
        return End(code, reason, message, self.started_at, api_time())

    def _message(self) -> str:
        content = self._message_file.read_bytes()[-TERMINATION_MESSAGE_BYTES:]
        return content.decode(errors="replace")


def api_time() -> str:
    """Now as the API writes times: whole seconds."""
    return f"{timestamp()[:19]}Z"


def specification_of(
    pod: Object,
    image: Image,
    link: PodLink,
    directory: Path,
    *,
    environment: Mapping[str, str],
    mounts: list[Object],
    host_files: Mapping[str, str],
) -> Object:
    """What the shim needs, from the pod's one container. UnsupportedPod."""
    container = only_container(pod)
    context = {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}
    user = context.get("runAsUser", image.user)
    if user == 0 and context.get("runAsNonRoot"):
        raise UnsupportedPod("runAsNonRoot, and the user is root")
    groups = [*context.get("supplementalGroups", ()), *([context["fsGroup"]] if "fsGroup" in context else ())]
    message_file = directory / "termination-message"
    message_file.touch()
    message_file.chmod(0o666)
    message_path = container.get("terminationMessagePath", "/dev/termination-log")
    argv = [*(container.get("command") or image.entrypoint)]
    argv += container.get("args") or (() if container.get("command") else image.command)
    return {
        "network_namespace": str(link.namespace_file),
        "place": str(_made(directory / "root")),
        "log": str(directory / "log"),
        "message_file": str(message_file),
        "hostname": pod["spec"].get("hostname") or pod["metadata"]["name"],
        "argv": [expanded(word, environment) for word in argv],
        "environment": {**image.environment, **environment},
        "working_directory": container.get("workingDir", image.working_directory),
        "uid": user,
        "gid": context.get("runAsGroup", user),
        "groups": groups,
        "no_new_privileges": context.get("allowPrivilegeEscalation") is False,
        "read_only_root": context.get("readOnlyRootFilesystem", False),
        "files": [*image.files],
        "links": [*image.links],
        "mounts": [
            *image.mounts,
            *mounts,
            *({"source": source, "target": target, "read_only": True} for target, source in host_files.items()),
            {"source": str(message_file), "target": message_path, "read_only": False},
        ],
    }


def only_container(pod: Object) -> Object:
    """UnsupportedPod: this runner knows pods of one container only."""
    spec = pod["spec"]
    if len(spec["containers"]) != 1 or spec.get("initContainers"):
        raise UnsupportedPod("init containers, or more than one container")
    container: Object = spec["containers"][0]
    if container.get("lifecycle") or container.get("envFrom"):
        raise UnsupportedPod("lifecycle hooks and envFrom")
    return container


def expanded(word: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` of a command or argument; what is not a variable stays as it is."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: environment.get(found[1], found[0]), word)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory
