"""The Lease of a cluster on Kubernetes: one `coordination.k8s.io/v1` object, every write conditional on its resourceVersion.

What an answer means, exactly (R1): a write is certainly not applied when nothing was sent, or when the API server itself
says so (409, 404, 4xx, 429, 503 with Retry-After); anything else after sending, a timeout, a reset, 500, 502, 504 or words that
cannot be understood, leaves it unknown. "There is none" is believed only of an API server that names this very Lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator

from instance_manager.coordination.kubernetes_api import Answer, ApiServer, NoAnswer, NotSent, Plain, WatchEnded
from instance_manager.coordination.kubernetes_lease import (
    HOLDER_POD_UID,
    NONE,
    from_lease,
    to_lease,
    without_heartbeat,
)
from instance_manager.core.record import ClusterRecord, Holder, StoredRecord
from instance_manager.ports import Conflict, OutcomeUnknown, RecordUnreadable, StoreUnavailable
from instance_manager.threads import monotonic_s

log = logging.getLogger("instance_manager.coordination")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0


class UnreadableLease(RecordUnreadable):
    """The Lease is there and is no record. By `version` its repair (R3) can be a conditional write like every other."""

    def __init__(self, reason: str, version: str) -> None:
        super().__init__(reason)
        self.version = version


class KubernetesCoordination:
    """`ports.Coordination` on one Lease. `pod_name` and `pod_uid` are this pod's; both empty where this is none."""

    def __init__(self, api: ApiServer, *, namespace: str, lease: str, pod_name: str = "", pod_uid: str = "") -> None:
        self._api = api
        self._namespace = namespace
        self._name = lease
        self._pod = (pod_name, pod_uid)
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._seen: Plain | None = None
        """The object as it last was answered, with what others wrote into it."""
        self._understood: tuple[Plain, ClusterRecord] | None = None
        """What was last found in one: it is asked for more than once."""

    async def read(self, *, deadline_s: float) -> StoredRecord | None:
        """From the store itself: without a resourceVersion the API server asks etcd. UnreadableLease, StoreUnavailable."""
        lease = await self._get(deadline_s)
        if lease is None:
            return None
        try:
            return StoredRecord(self._record_in(lease), _version(lease))
        except ValueError as error:
            raise UnreadableLease(f"the Lease {self._name} is damaged: {error}", _version(lease)) from error

    async def create(self, record: ClusterRecord, *, deadline_s: float) -> StoredRecord:
        """Write the first record; Conflict if there is a Lease of this name, readable or not."""
        answer = await self._write("POST", self._collection, self._object(record, None), deadline_s)
        return self._stored(answer)

    async def replace(self, record: ClusterRecord, *, version: str, deadline_s: float) -> StoredRecord:
        """Write `record` if the store still holds exactly `version`; also that of an `UnreadableLease`."""
        ends_s = monotonic_s() + deadline_s
        before = self._seen
        if before is None or _version(before) != version:
            # What others wrote into the object has to be known, to be kept.
            before = await self._get(deadline_s)
            if before is None:
                raise Conflict(f"the Lease is gone; version {version} was expected")
            if _version(before) != version:
                raise Conflict(f"the Lease is at version {_version(before)}; {version} was expected")
        left_s = max(0.0, ends_s - monotonic_s())
        answer = await self._write("PUT", f"{self._collection}/{self._name}", self._object(record, before), left_s)
        return self._stored(answer)

    async def changes(self) -> AsyncIterator[None]:
        """One hint at once and after every gap in the watch; one for each change that is more than a renewal."""
        last: tuple[object, ...] | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            yield
            try:
                async with contextlib.aclosing(self._watch()) as leases:
                    async for lease in leases:
                        pause_s = FIRST_PAUSE_S
                        now = without_heartbeat(lease)
                        if now != last:
                            last = now
                            yield
            except WatchEnded as end:
                log.debug("the watch on the Lease ended: %s", end)
            # Randomised: the watches of all instances end together when an API server is restarted.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def is_proven_dead(self, holder: Holder, *, deadline_s: float) -> bool:
        """R9: the kubelet reports a container of the holder's pod as terminated, and its last words are the incarnation.

        The pod by name and uid, as the holder itself recorded it. A pod that is missing, another pod of that name, a phase, a
        condition or a node that is not ready say nothing, and neither does a container that only runs again: what counts
        is that the container of that very life ended, with its PID namespace and all that was in it.
        """
        uid = self._holder_pod_uid(holder)
        if uid is None:
            return False
        try:
            answer = await self._api.request(
                "GET", f"/api/v1/namespaces/{self._namespace}/pods/{holder.name}", deadline_s=deadline_s
            )
        except (NotSent, NoAnswer):
            return False
        return answer.is_good and has_ended(answer.content, uid, holder.incarnation)

    async def close(self) -> None:
        await self._api.close()

    def _watch(self) -> AsyncGenerator[Plain]:
        return _objects(self._api, self._collection, f"metadata.name={self._name}")

    async def _get(self, deadline_s: float) -> Plain | None:
        try:
            answer = await self._api.request("GET", f"{self._collection}/{self._name}", deadline_s=deadline_s)
        except (NotSent, NoAnswer) as error:
            raise StoreUnavailable(str(error)) from error
        if answer.says_not_found("leases", self._name):
            return None
        if not answer.is_good:
            raise StoreUnavailable(self._refusal(answer, "get"))
        if not _version(answer.content):
            raise StoreUnavailable(f"{self._api.access.server}: what was answered is no Lease")
        self._seen = answer.content
        return answer.content

    async def _write(self, method: str, path: str, lease: Plain, deadline_s: float) -> Answer:
        # The server is told the deadline too, so that what is unknown to us does not land much later.
        query = {"timeout": f"{max(1, round(deadline_s * 1000))}ms"}
        try:
            answer = await self._api.request(method, path, query=query, body=lease, deadline_s=deadline_s)
        except NotSent as error:
            raise StoreUnavailable(str(error)) from error
        except NoAnswer as error:
            raise OutcomeUnknown(str(error)) from error
        if answer.is_good and _version(answer.content):
            return answer
        if answer.status == 409 and answer.from_api_server:
            raise Conflict(str(answer))
        if method == "PUT" and answer.says_not_found("leases", self._name):
            # Usually 409: an API server creates a missing Lease by an update, unless that names the uid it stands on.
            raise Conflict(f"the Lease is gone: {answer}")
        refused = 300 <= answer.status < 500 and answer.status not in (408, 409)
        if refused or (answer.status == 503 and answer.retry_after_s is not None):
            raise StoreUnavailable(self._refusal(answer, "create" if method == "POST" else "update"))
        raise OutcomeUnknown(f"the API server answered {answer}")

    def _refusal(self, answer: Answer, verb: str) -> str:
        if answer.status == 401:
            return (
                f"the API server does not know who asks ({answer}): is the service account's token mounted and valid?"
            )
        if answer.status == 403:
            return (
                f"not permitted ({answer}): the Role needs `{verb}` on leases in coordination.k8s.io, name {self._name}"
            )
        return f"the API server answered {answer}"

    def _object(self, record: ClusterRecord, before: Plain | None) -> Plain:
        uid = None
        if record.holder is not None:
            # A new holder is always written by itself; whoever changes something else keeps what is there.
            uid = self._holder_pod_uid(record.holder) or (self._pod[1] if record.holder.name == self._pod[0] else None)
        return to_lease(record, name=self._name, namespace=self._namespace, holder_pod_uid=uid, before=before)

    def _holder_pod_uid(self, holder: Holder) -> str | None:
        """As it was read with this very holder; None: not known."""
        seen = self._seen
        with contextlib.suppress(ValueError):
            if seen is not None and self._record_in(seen).holder == holder:
                uid = str(seen["metadata"]["annotations"].get(HOLDER_POD_UID, NONE))
                return uid if uid != NONE else None
        return None

    def _stored(self, answer: Answer) -> StoredRecord:
        self._seen = answer.content
        try:
            return StoredRecord(self._record_in(answer.content), _version(answer.content))
        except ValueError as error:
            raise OutcomeUnknown(f"what was stored is not what was written: {error}") from error

    def _record_in(self, lease: Plain) -> ClusterRecord:
        """ValueError: none. The object must be one that was answered, and that nobody changes."""
        if self._understood is None or self._understood[0] is not lease:
            self._understood = (lease, from_lease(lease))
        return self._understood[1]


def has_ended(pod: Plain, uid: str, incarnation: str) -> bool:
    """Does the kubelet report, for the pod of this uid, that a container ended whose last words are this incarnation?"""
    if (pod.get("metadata") or {}).get("uid") != uid:
        return False
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        for state in (container.get("state") or {}, container.get("lastState") or {}):
            if ((state.get("terminated") or {}).get("message") or "").strip() == incarnation:
                return True
    return False


async def _objects(api: ApiServer, path: str, field_selector: str) -> AsyncGenerator[Plain]:
    # 0: from what the server has in its cache, however old. It is a hint, and is neither worth a question to etcd nor the
    # features that newer servers need of etcd for it.
    query = {"fieldSelector": field_selector, "resourceVersion": "0"}
    async with contextlib.aclosing(api.watch(path, query)) as events:
        async for kind, found in events:
            if kind != "BOOKMARK":
                yield found if kind != "DELETED" else {}


def _version(lease: Plain) -> str:
    return str((lease.get("metadata") or {}).get("resourceVersion") or "")
