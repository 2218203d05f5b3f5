"""What this pod tells the cluster around it: its role label, by which Services lead clients to it, and Events.

Everything happens in the background. The label is changed on exactly the version of exactly this pod (uid and
resourceVersion): a request that was given up and lands late can neither undo a later one nor mark a namesake.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from dataclasses import dataclass

from instance_manager.coordination.kubernetes_api import MERGE_PATCH, ApiServer, NoAnswer, NotSent, Plain
from instance_manager.coordination.kubernetes_pods import Pod, Pods
from instance_manager.kubernetes_names import ROLE_LABEL
from instance_manager.ports import PublishedRole
from instance_manager.threads import monotonic_s
from instance_manager.wall_clock import timestamp

log = logging.getLogger("instance_manager.publication")

REQUEST_DEADLINE_S = 2.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
EVENTS_WAITING_MAX = 50
EVENTS_AT_ONCE = 20
SECONDS_PER_EVENT = 6.0
"""On average; `EVENTS_AT_ONCE` may come together."""
MESSAGE_BYTES_MAX = 1024
"""What the API server takes."""


@dataclass(frozen=True, slots=True)
class _Event:
    reason: str
    message: str
    warning: bool
    at: str


class KubernetesPublication:
    """`ports.Publication` on this pod; `run` also keeps `pods` fresh, which tell what the label is."""

    def __init__(
        self, api: ApiServer, pods: Pods, *, pod_name: str, pod_uid: str, shutdown_timeout_s: float = 0.0
    ) -> None:
        self._api = api
        self._pods = pods
        self._name, self._uid = pod_name, pod_uid
        self._shutdown_timeout_s: float | None = shutdown_timeout_s
        self._role: PublishedRole | None = None
        self._look = asyncio.Event()
        self._published = asyncio.Event()
        self._events: deque[_Event] = deque(maxlen=EVENTS_WAITING_MAX)
        self._event_waits = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._tokens, self._counted_s = float(EVENTS_AT_ONCE), monotonic_s()
        pods.on_change = self._pod_changed

    def publish_role(self, role: PublishedRole) -> None:
        if role != self._role:
            self._role = role
            self._published.clear()
            self._look.set()

    async def role_is_published(self, *, deadline_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._published.wait()
        return self._published.is_set()

    def publish_event(self, reason: str, message: str, *, warning: bool) -> None:
        """Of too many the oldest are given up: the log has them all."""
        self._events.append(_Event(reason, message, warning, timestamp()))
        self._all_sent.clear()
        self._event_waits.set()

    async def finish(self, *, deadline_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._published.wait()
                await self._all_sent.wait()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pods.run())
            tasks.create_task(self._keep_label())
            tasks.create_task(self._send_events())

    # The label.

    def _pod_changed(self, pod: Pod) -> None:
        """Somebody may have changed it by hand."""
        if pod.name != self._name:
            return
        if pod.role != self._role:
            self._published.clear()
            self._look.set()
        self._compare_patience(pod)

    def _compare_patience(self, pod: Pod) -> None:
        """Once: the kubelet kills the container after the grace period, whatever is under way."""
        timeout_s, self._shutdown_timeout_s = self._shutdown_timeout_s, None
        if timeout_s is None or pod.grace_period_s is None or pod.grace_period_s > timeout_s:
            return
        self.publish_event(
            "GracePeriodTooShort",
            f"terminationGracePeriodSeconds is {pod.grace_period_s:g}, and instance.shutdown_timeout_s {timeout_s:g}: "
            "raise the one or lower the other, so that a shutdown may end by itself",
            warning=True,
        )

    async def _keep_label(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            await self._look.wait()
            self._look.clear()
            problem = await self._label()
            if problem is None:
                pause_s = FIRST_PAUSE_S
                continue
            if pause_s == FIRST_PAUSE_S * 8:
                log.warning("the role label of this pod cannot be changed: %s", problem)
            with contextlib.suppress(TimeoutError):
                # A new wish does not wait for the pause of the last.
                async with asyncio.timeout(pause_s):
                    await self._look.wait()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._look.set()

    async def _label(self) -> str | None:
        """One try; why it failed, None when the label is what it should be."""
        role = self._role
        if role is None:
            return None
        try:
            pod = self._pods.get(self._name) or await self._ask_for_pod()
            if pod is None:
                return "this pod does not exist any more"
            if pod.uid != self._uid:
                return f"the pod {self._name} is another one by now"
            if pod.role != role:
                if (problem := await self._patch(pod, role)) is not None:
                    return problem
                log.info("the role label of this pod is %s, was %s", role, pod.role)
        except (NotSent, NoAnswer) as error:
            return str(error)
        if role == self._role:
            self._published.set()
        else:
            self._look.set()
        return None

    async def _patch(self, pod: Pod, role: PublishedRole) -> str | None:
        metadata = {"uid": pod.uid, "resourceVersion": pod.version, "labels": {ROLE_LABEL: role}}
        answer = await self._api.request(
            "PATCH",
            f"{self._pods.path}/{self._name}",
            body={"metadata": metadata},
            content_type=MERGE_PATCH,
            deadline_s=REQUEST_DEADLINE_S,
        )
        if answer.is_good:
            self._pods.put(answer.content)
            return None
        if answer.status in (409, 422):
            # Changed meanwhile, or another pod of this name.
            await self._ask_for_pod()
        need = ": the Role needs `patch` on pods" if answer.status == 403 else ""
        return f"{answer}{need}"

    async def _ask_for_pod(self) -> Pod | None:
        answer = await self._api.request("GET", f"{self._pods.path}/{self._name}", deadline_s=REQUEST_DEADLINE_S)
        if answer.says_not_found("pods", self._name):
            return None
        if not answer.is_good:
            raise NoAnswer(str(answer))
        return self._pods.put(answer.content)

    # Events.

    async def _send_events(self) -> None:
        while True:
            await self._event_waits.wait()
            if not self._events:
                self._event_waits.clear()
                self._all_sent.set()
                continue
            await self._until_allowed()
            event = self._events.popleft()
            try:
                answer = await self._api.request(
                    "POST",
                    f"/api/v1/namespaces/{self._pods.namespace}/events",
                    body=self._object(event),
                    deadline_s=REQUEST_DEADLINE_S,
                )
            except NotSent as error:
                log.debug("an event is sent later: %s", error)
                self._events.appendleft(event)
                await asyncio.sleep(LONGEST_PAUSE_S)
            except NoAnswer as error:
                log.info("whether the event %s was stored is not known: %s", event.reason, error)
            else:
                if not answer.is_good:
                    need = ": the Role needs `create` on events" if answer.status == 403 else ""
                    log.warning("the event %s was not stored: %s%s", event.reason, answer, need)

    async def _until_allowed(self) -> None:
        now_s = monotonic_s()
        self._tokens = min(float(EVENTS_AT_ONCE), self._tokens + (now_s - self._counted_s) / SECONDS_PER_EVENT)
        self._counted_s = now_s
        if self._tokens < 1:
            await asyncio.sleep((1 - self._tokens) * SECONDS_PER_EVENT)
        self._tokens -= 1

    def _object(self, event: _Event) -> Plain:
        at = f"{event.at[:19]}Z"
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{self._name}.{secrets.token_hex(8)}", "namespace": self._pods.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": self._name,
                "namespace": self._pods.namespace,
                "uid": self._uid,
            },
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "message": event.message.encode()[:MESSAGE_BYTES_MAX].decode(errors="ignore"),
            "source": {"component": "instance-manager"},
            "reportingComponent": "instance-manager.dev/instance-manager",
            "reportingInstance": self._name,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }
