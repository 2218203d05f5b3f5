"""A pod's status as its kubelet reports it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kube_api import Object
from pod_container import End, api_time


@dataclass(slots=True)
class PodStatus:
    """What is known of a pod now; `report` makes the API's form of it."""

    node_address: str
    pod_address: str | None = None
    phase: str = "Pending"
    waiting: tuple[str, str] = ("ContainerCreating", "")
    """Reason and message, while no container runs."""
    container_id: str = ""
    started_at: str = ""
    running: bool = False
    started: bool = False
    ready: bool = False
    restarts: int = 0
    last_end: End | None = None
    last_id: str = ""
    """Of the container that ended last."""
    stays_ended: bool = False
    """No other container follows."""
    _since: dict[str, tuple[bool, str]] = field(default_factory=dict)
    _start_time: str = field(default_factory=api_time)

    def report(self, container: Object, image_id: str) -> Object:
        ended = None if self.last_end is None else self.last_end.state(self.last_id)
        state: Object
        if self.running:
            state = {"running": {"startedAt": self.started_at}}
        elif self.stays_ended and ended is not None:
            state, ended = ended, None
        else:
            reason, message = self.waiting
            state = {"waiting": {"reason": reason, "message": message}}
        status: Object = {
            "phase": self.phase,
            "startTime": self._start_time,
            "hostIP": self.node_address,
            "conditions": [self._condition(*condition) for condition in self._conditions()],
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": image_id,
                    "containerID": self.container_id or None,
                    "ready": self.ready,
                    "started": self.started,
                    "restartCount": self.restarts,
                    "state": state,
                    "lastState": ended or {},
                }
            ],
        }
        if self.pod_address is not None:
            status |= {"podIP": self.pod_address, "podIPs": [{"ip": self.pod_address}]}
        return status

    def _conditions(self) -> list[tuple[str, bool]]:
        return [
            ("PodScheduled", True),
            ("Initialized", True),
            ("ContainersReady", self.ready),
            ("Ready", self.ready),
        ]

    def _condition(self, name: str, holds: bool) -> Object:
        if self._since.get(name, (not holds, ""))[0] != holds:
            self._since[name] = (holds, api_time())
        return {"type": name, "status": str(holds), "lastTransitionTime": self._since[name][1]}
