"""A container's probes, called as its pod specifies: HTTP only, from the pod's own node.

Before the startup probe has succeeded the others do not run; the first call comes after `initialDelaySeconds`.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable

from kube_api import Object
from pod_volumes import UnsupportedPod

Connect = Callable[[int, float], socket.socket]
"""(port, timeout in seconds) to the pod's own address; OSError."""


class Probe:
    """One probe of one run of the container."""

    def __init__(self, kind: str, specification: Object, container: Object, started_s: float) -> None:
        if "httpGet" not in specification:
            raise UnsupportedPod(f"a {kind} probe that is not httpGet")
        get = specification["httpGet"]
        self.kind = kind
        self.period_s = float(specification.get("periodSeconds", 10))
        self._path: str = get.get("path", "/")
        self._port = _number_of(get["port"], container)
        self._timeout_s = float(specification.get("timeoutSeconds", 1))
        self._failures_allowed = int(specification.get("failureThreshold", 3))
        self._successes_needed = int(specification.get("successThreshold", 1))
        self._successes = self._failures = 0
        self.next_s = started_s + float(specification.get("initialDelaySeconds", 0))
        self.passed = False
        """For startup and readiness."""
        self.failed = False
        """For startup and liveness: the container is to be killed."""
        self.calls: list[tuple[float, bool]] = []
        """When each call began, and whether it succeeded."""

    def call(self, now_s: float, connect: Connect) -> str:
        """One call; what it answered, for the log of a test that fails."""
        # On a grid, as the kubelet's ticker: a slow answer moves the next call not.
        self.next_s = max(self.next_s + self.period_s, now_s)
        succeeded, answer = self._get(connect)
        self.calls.append((now_s, succeeded))
        if succeeded:
            self._successes, self._failures = self._successes + 1, 0
            self.passed = self.passed or self._successes >= self._successes_needed
        else:
            self._successes, self._failures = 0, self._failures + 1
            if self._failures >= self._failures_allowed:
                self.passed, self.failed = False, True
        return f"{self.kind} {answer}"

    def _get(self, connect: Connect) -> tuple[bool, str]:
        connection = http.client.HTTPConnection("pod", self._port)
        try:
            connection.sock = connect(self._port, self._timeout_s)
            connection.request("GET", self._path, headers={"User-Agent": "kube-probe/tests", "Connection": "close"})
            answer = connection.getresponse()
            text = answer.read(1024).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return False, f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return 200 <= answer.status < 400, f"{answer.status}: {text[:200]}"


class Probes:
    """All probes of one run of the container."""

    def __init__(self, container: Object, started_s: float) -> None:
        made = {
            kind: Probe(kind, container[f"{kind}Probe"], container, started_s)
            for kind in ("startup", "liveness", "readiness")
            if f"{kind}Probe" in container
        }
        self._startup, self._liveness, self._readiness = (made.get(k) for k in ("startup", "liveness", "readiness"))
        self.answers: dict[str, str] = {}
        """The last answer to each."""

    @property
    def started(self) -> bool:
        return self._startup is None or self._startup.passed

    @property
    def ready(self) -> bool:
        return self.started and (self._readiness is None or self._readiness.passed)

    @property
    def failure(self) -> str | None:
        """Why the container is to be killed."""
        for probe in (self._startup, self._liveness):
            if probe is not None and probe.failed:
                return f"{probe.kind} probe failed: {self.answers.get(probe.kind)}"
        return None

    def call_due(self, now_s: float, connect: Connect, *, terminating: bool) -> None:
        """Call what is due. A terminating container is only asked whether it is ready."""
        if not self.started:
            due = [] if terminating else [self._startup]
        else:
            due = [self._readiness] if terminating else [self._liveness, self._readiness]
        for probe in due:
            if probe is not None and now_s >= probe.next_s:
                self.answers[probe.kind] = probe.call(now_s, connect)


def _number_of(port: int | str, container: Object) -> int:
    if isinstance(port, int):
        return port
    for named in container.get("ports", ()):
        if named.get("name") == port:
            return int(named["containerPort"])
    raise UnsupportedPod(f"a probe of a port {port!r} that the container does not name")
