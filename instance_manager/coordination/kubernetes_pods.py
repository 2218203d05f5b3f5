"""The pods of the cluster: who has which address, and what this pod says of itself.

One list and one watch, by the cluster's label: no polling. What is known is kept while the API server is away, because
that does not move pods; an address that is not known, or not any more, is left to the pod's stable name in DNS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from instance_manager.coordination.kubernetes_api import ApiServer, NoAnswer, NotSent, Plain, WatchEnded
from instance_manager.kubernetes_names import CLUSTER_LABEL, ROLE_LABEL

log = logging.getLogger("instance_manager.coordination")

LIST_DEADLINE_S = 5.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
_OVER = frozenset({"Succeeded", "Failed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    name: str
    uid: str
    version: str
    """resourceVersion, by which a change of it can be conditional."""
    address: str | None
    role: str | None
    """Its role label."""
    grace_period_s: float | None

    @staticmethod
    def of(pod: Plain) -> Pod:
        metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
        grace = (pod.get("spec") or {}).get("terminationGracePeriodSeconds")
        return Pod(
            name=str(metadata.get("name") or ""),
            uid=str(metadata.get("uid") or ""),
            version=str(metadata.get("resourceVersion") or ""),
            address=(status.get("podIP") or None) if status.get("phase") not in _OVER else None,
            role=(metadata.get("labels") or {}).get(ROLE_LABEL),
            grace_period_s=float(grace) if isinstance(grace, int) else None,
        )


@dataclass(slots=True)
class Pods:
    """`run` keeps them fresh; `on_change` is called for each that changed."""

    api: ApiServer
    namespace: str
    cluster: str
    on_change: Callable[[Pod], None] = lambda _: None
    _pods: dict[str, Pod] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    def address(self, name: str) -> str | None:
        pod = self._pods.get(name)
        return pod.address if pod is not None else None

    def get(self, name: str) -> Pod | None:
        return self._pods.get(name)

    def put(self, content: Plain) -> Pod:
        """As somebody was just answered; an older look at it than the one known changes nothing."""
        pod = Pod.of(content)
        known = self._pods.get(pod.name)
        if known is None or known.uid != pod.uid or _is_later(pod.version, known.version):
            self._pods[pod.name] = pod
            self.on_change(pod)
        return self._pods[pod.name]

    async def run(self) -> None:
        """List, then watch from there; for ever, with pauses."""
        pause_s = FIRST_PAUSE_S
        said = ""
        while True:
            try:
                version = await self._list()
                pause_s, said = FIRST_PAUSE_S, ""
                await self._watch(version)
            except WatchEnded as end:
                log.debug("the watch on the pods ended: %s", end)
            except (NotSent, NoAnswer) as error:
                if said == "":
                    said = str(error)
                    log.warning("the pods of the cluster cannot be listed: %s", said)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _list(self) -> str:
        answer = await self.api.request(
            "GET", self.path, query={"labelSelector": self._selector}, deadline_s=LIST_DEADLINE_S
        )
        if not answer.is_good or not isinstance(answer.content.get("items"), list):
            need = ": the Role needs `get`, `list` and `watch` on pods" if answer.status == 403 else ""
            raise NoAnswer(f"{answer}{need}")
        found = [pod for pod in answer.content["items"] if isinstance(pod, dict)]
        names = {Pod.of(pod).name for pod in found}
        for gone in set(self._pods) - names:
            del self._pods[gone]
        for pod in found:
            self.put(pod)
        return str((answer.content.get("metadata") or {}).get("resourceVersion") or "")

    async def _watch(self, version: str) -> None:
        query = {"labelSelector": self._selector, "resourceVersion": version}
        async with contextlib.aclosing(self.api.watch(self.path, query)) as events:
            async for kind, found in events:
                if kind == "DELETED":
                    gone = Pod.of(found)
                    known = self._pods.get(gone.name)
                    if known is not None and known.uid == gone.uid:
                        del self._pods[gone.name]
                elif kind in ("ADDED", "MODIFIED"):
                    self.put(found)

    @property
    def _selector(self) -> str:
        return f"{CLUSTER_LABEL}={self.cluster}"


def _is_later(version: str, than: str) -> bool:
    """Of the same object; etcd's revisions count up."""
    if version.isdigit() and than.isdigit():
        return int(version) > int(than)
    return version != than
