"""What each answer of an API server means for a write, and what of a Lease is kept, believed or damaged."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from coordination_records import EVERYTHING, FIRST, HOLDER
from coordination_stores import PlainAccess, eventually, lease_store
from fake_api_server import FakeApiServer, Fault

from instance_manager.coordination import kubernetes_api
from instance_manager.coordination.kubernetes import KubernetesCoordination, UnreadableLease, has_ended
from instance_manager.coordination.kubernetes_api import ApiServer
from instance_manager.coordination.kubernetes_lease import SUMMARY, from_lease, holder_of, to_lease
from instance_manager.core.record import Holder
from instance_manager.core.types import MemberId
from instance_manager.ports import Conflict, OutcomeUnknown, StoreUnavailable

PREFIX = "instance-manager.dev/"


# What an answer means


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        ({"status": 429, "headers": {"Retry-After": "1"}}, StoreUnavailable),
        ({"status": 429}, StoreUnavailable),
        ({"status": 503, "headers": {"Retry-After": "1"}}, StoreUnavailable),
        ({"status": 503, "applied": True}, OutcomeUnknown),
        ({"status": 500, "applied": True}, OutcomeUnknown),
        ({"status": 502, "applied": True, "body": "bad gateway"}, OutcomeUnknown),
        ({"status": 504, "applied": True}, OutcomeUnknown),
        ({"status": 409, "applied": True, "body": "a proxy's own conflict"}, OutcomeUnknown),
        ({"status": 200, "applied": True, "body": "{}"}, OutcomeUnknown),
        ({"status": 200, "applied": True, "body": "half an ans"}, OutcomeUnknown),
        ({"cut": True, "applied": True}, OutcomeUnknown),
        ({"hang": True, "applied": True}, OutcomeUnknown),
        ({"status": 401}, StoreUnavailable),
        ({"status": 403}, StoreUnavailable),
        ({"status": 400}, StoreUnavailable),
        ({"status": 422}, StoreUnavailable),
        ({"status": 307, "headers": {"Location": "/elsewhere"}}, StoreUnavailable),
        ({"status": 404, "body": "404 page not found"}, StoreUnavailable),
    ],
    ids=str,
)
async def test_r1_what_an_answer_to_a_write_means(
    lease: KubernetesCoordination,
    api_server: FakeApiServer,
    method: str,
    fault: dict[str, Any],
    meaning: type[Exception],
) -> None:
    stored = await lease.create(FIRST, deadline_s=2) if method == "PUT" else None
    before = len(api_server.requests)
    api_server.faults.append(Fault(method, **fault))
    wanted = replace(FIRST, renewals=1)
    if stored is None:
        write = lease.create(wanted, deadline_s=0.3)
    else:
        write = lease.replace(wanted, version=stored.version, deadline_s=0.3)
    with pytest.raises(meaning):
        await write
    # Never twice: the first may have been applied, and the second would be a conflict with it.
    assert len(api_server.requests) == before + 1
    found = api_server.objects.get(("leases", "demo"))
    applied = found is not None and from_lease(found).renewals == 1
    assert applied == fault.get("applied", False)


async def test_nobody_listening_is_certainly_not_applied(api: ApiServer, access: PlainAccess) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        access.server = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(StoreUnavailable, match="refused"):
        await lease_store(api).create(FIRST, deadline_s=1)


async def test_a_name_that_does_not_resolve_is_certainly_not_applied(api: ApiServer, access: PlainAccess) -> None:
    access.server = "http://no-such-host.invalid:6443"
    with pytest.raises(StoreUnavailable):
        await lease_store(api).create(FIRST, deadline_s=2)


async def test_a_tls_handshake_that_fails_is_certainly_not_applied_and_the_authority_is_read_again(
    api_server: FakeApiServer,
) -> None:
    class Tls(PlainAccess):
        async def open(self) -> ssl.SSLContext | None:
            self.opened += 1
            return ssl.create_default_context()

    access = Tls(api_server.url.replace("http://", "https://"))
    api = ApiServer(access)
    with pytest.raises(StoreUnavailable):
        await lease_store(api).create(FIRST, deadline_s=2)
    await api.close()
    assert api_server.requests == []


async def test_a_connection_that_is_never_accepted_is_certainly_not_applied(
    api: ApiServer, access: PlainAccess
) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        access.server = f"http://127.0.0.1:{address[1]}"
        with pytest.raises(StoreUnavailable, match="not connected"):
            await lease_store(api).create(FIRST, deadline_s=0.3)
        for each in waiting:
            each.close()


async def test_a_write_over_a_kept_connection_that_the_server_has_closed_is_unknown_and_not_repeated(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    stored = await lease.create(FIRST, deadline_s=2)
    api_server.faults.append(Fault("PUT", cut=True, applied=True))
    with pytest.raises(OutcomeUnknown):
        await lease.replace(replace(FIRST, renewals=1), version=stored.version, deadline_s=2)
    assert api_server.count("PUT", "leases") == 1


async def test_r3_only_an_api_server_that_names_this_lease_says_that_there_is_none(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    assert await lease.read(deadline_s=2) is None
    for body in ("404 page not found", "{}", '{"kind": "Status", "reason": "NotFound", "details": {"kind": "leases"}}'):
        api_server.faults.append(Fault("GET", status=404, body=body))
        with pytest.raises(StoreUnavailable):
            await lease.read(deadline_s=2)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut": True}, {"hang": True}, {"body": "x"}])
async def test_a_read_that_fails_is_an_unavailable_store(
    lease: KubernetesCoordination, api_server: FakeApiServer, fault: dict[str, Any]
) -> None:
    await lease.create(FIRST, deadline_s=2)
    api_server.faults.append(Fault("GET", **fault))
    with pytest.raises(StoreUnavailable):
        await lease.read(deadline_s=0.2)
    assert (await lease.read(deadline_s=2)) is not None


async def test_a_missing_permission_is_told_with_what_the_role_needs(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    api_server.forbidden = {("GET", "leases"), ("POST", "leases")}
    with pytest.raises(StoreUnavailable, match=r"the Role needs `get` on leases in coordination\.k8s\.io, name demo"):
        await lease.read(deadline_s=2)
    with pytest.raises(StoreUnavailable, match="the Role needs `create` on leases"):
        await lease.create(FIRST, deadline_s=2)


async def test_retry_after_is_obeyed_without_asking_and_never_for_longer_than_a_renewal_can_wait(
    lease: KubernetesCoordination, api_server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(kubernetes_api, "monotonic_s", lambda: now_s)
    api_server.faults.append(Fault("GET", status=429, headers={"Retry-After": "30"}))
    with pytest.raises(StoreUnavailable):
        await lease.read(deadline_s=2)
    asked = len(api_server.requests)
    now_s += 1.9
    with pytest.raises(StoreUnavailable, match="patience"):
        await lease.read(deadline_s=2)
    assert len(api_server.requests) == asked
    now_s += 0.2
    assert await lease.read(deadline_s=2) is None


async def test_a_token_that_is_refused_is_read_again(
    api_server: FakeApiServer, access: PlainAccess, lease: KubernetesCoordination
) -> None:
    api_server.token, access.token, access.newer = "new", "old", "new"
    with pytest.raises(StoreUnavailable, match="does not know who asks"):
        await lease.read(deadline_s=2)
    assert await lease.read(deadline_s=2) is None


# The object


async def test_kubectl_get_lease_shows_the_holders_pod_and_describe_its_facts(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    await lease.create(FIRST, deadline_s=2)
    found = api_server.lease()
    assert found["spec"] == {
        "holderIdentity": "demo-1_0123abcd_8f1e2d3c4b5a6978",
        "leaseDurationSeconds": 10,
        "leaseTransitions": 1,
    }
    annotations = found["metadata"]["annotations"]
    assert annotations[f"{PREFIX}holder-pod-uid"] == "uid-of-demo-1"
    assert annotations[f"{PREFIX}mode"] == "synchronous"
    assert annotations[f"{PREFIX}voters"] == "none"
    assert annotations[SUMMARY].startswith("demo-1 becomes primary in epoch 1; ")
    assert found["metadata"]["labels"] == {f"{PREFIX}cluster": "demo"}


async def test_what_others_wrote_into_the_lease_is_kept(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    await lease.create(FIRST, deadline_s=2)
    found = api_server.lease()
    owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "demo", "uid": "1"}
    found["metadata"] |= {"ownerReferences": [owner], "finalizers": ["example.org/keep"]}
    found["metadata"]["annotations"]["example.org/note"] = "theirs"
    found["metadata"]["labels"]["team"] = "payments"
    found["spec"]["preferredHolder"] = "somebody"
    api_server.put("leases", found)
    for _ in range(2):
        stored = await lease.read(deadline_s=2)
        assert stored is not None
        await lease.replace(replace(stored.record, renewals=5), version=stored.version, deadline_s=2)
    metadata = api_server.lease()["metadata"]
    assert metadata["annotations"]["example.org/note"] == "theirs"
    assert metadata["labels"] == {"team": "payments", f"{PREFIX}cluster": "demo"}
    assert metadata["ownerReferences"] == [owner]
    assert metadata["finalizers"] == ["example.org/keep"]
    assert api_server.lease()["spec"]["preferredHolder"] == "somebody"


async def test_a_lease_that_was_replaced_by_a_namesake_is_a_conflict(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    stored = await lease.create(FIRST, deadline_s=2)
    api_server.delete("leases", "demo")
    other = to_lease(FIRST, name="demo", namespace="test", holder_pod_uid=None)
    api_server.put("leases", other)
    with pytest.raises(Conflict):
        await lease.replace(FIRST, version=stored.version, deadline_s=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("quorum", "voters", "epoch", "paused", "position", "write-id", "cluster-uid")),
        ("quorum", "-1"),
        ("quorum", "01"),
        ("voters", "demo-2"),
        ("voters", "demo_2_89abcdef, demo_2_89abcdef"),
        ("mode", "some"),
        ("epoch", "2"),
        ("lease-duration", "11 s"),
        ("lease-duration", "inf s"),
        ("timelines", "1, 2"),
        ("timelines", "1, 2 from 1 at 0 in epoch 3"),
        ("position", "5"),
        ("release", "by somebody"),
        ("switchover", "to demo-2"),
        ("paused", "maybe"),
        ("fenced", "Demo_2"),
        ("from-a-later-version", "1"),
    ],
)
async def test_r3_a_damaged_annotation_is_no_record_and_is_repaired_by_its_version(
    lease: KubernetesCoordination, api_server: FakeApiServer, key: str, value: str | None
) -> None:
    await lease.create(FIRST, deadline_s=2)
    found = api_server.lease()
    if value is None:
        del found["metadata"]["annotations"][f"{PREFIX}{key}"]
    else:
        found["metadata"]["annotations"][f"{PREFIX}{key}"] = value
    api_server.put("leases", found)
    with pytest.raises(UnreadableLease) as seen:
        await lease.read(deadline_s=2)
    repaired = await lease.replace(FIRST, version=seen.value.version, deadline_s=2)
    assert await lease.read(deadline_s=2) == repaired


@pytest.mark.parametrize(
    "spec",
    [
        {"leaseTransitions": 2},
        {"leaseTransitions": None},
        {"leaseDurationSeconds": 15},
        {"holderIdentity": "somebody"},
        {"holderIdentity": "demo-1_0123abcd_8f1e2d3c4b5a6978_x"},
        {"holderIdentity": "demo_1_0123abcd"},
    ],
    ids=str,
)
async def test_r3_a_spec_that_contradicts_the_annotations_is_damaged(
    lease: KubernetesCoordination, api_server: FakeApiServer, spec: dict[str, Any]
) -> None:
    await lease.create(FIRST, deadline_s=2)
    found = api_server.lease()
    found["spec"] |= spec
    api_server.put("leases", found)
    with pytest.raises(UnreadableLease):
        await lease.read(deadline_s=2)


async def test_a_lease_that_is_none_of_ours_is_damaged_and_never_absent(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    api_server.put("leases", {"metadata": {"name": "demo"}, "spec": {"holderIdentity": "controller-0"}})
    with pytest.raises(UnreadableLease):
        await lease.read(deadline_s=2)
    with pytest.raises(Conflict):
        await lease.create(FIRST, deadline_s=2)


def test_times_that_the_api_server_cannot_take_are_left_out() -> None:
    odd = replace(FIRST, renewed_at="just now", acquired_at="2026-11-21T13:04:00.000000Z")
    lease = to_lease(odd, name="demo", namespace="test", holder_pod_uid=None)
    assert "renewTime" not in lease["spec"]
    assert lease["spec"]["acquireTime"] == "2026-11-21T13:04:00.000000Z"
    assert from_lease(lease) == replace(odd, renewed_at="")


def test_everything_fits_into_an_object_and_back() -> None:
    for record in (FIRST, EVERYTHING, replace(EVERYTHING, release=None, holder=HOLDER, switchover=None)):
        assert from_lease(to_lease(record, name="demo", namespace="test", holder_pod_uid="u")) == record
    assert holder_of("") is None


# Hints


async def hints(store: KubernetesCoordination, found: asyncio.Queue[None]) -> None:
    async for _ in store.changes():
        found.put_nowait(None)


@pytest.fixture
async def hinted(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> AsyncIterator[tuple[asyncio.Queue[None], FakeApiServer]]:
    await lease.create(FIRST, deadline_s=2)
    found = asyncio.Queue[None]()
    task = asyncio.create_task(hints(lease, found))
    for _ in range(2):  # one to begin with, one for what the watch finds
        await asyncio.wait_for(found.get(), 2)
    yield found, api_server
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_renewals_are_no_hints_and_a_change_beside_them_is(
    hinted: tuple[asyncio.Queue[None], FakeApiServer], lease: KubernetesCoordination
) -> None:
    found, _ = hinted
    stored = await lease.read(deadline_s=2)
    assert stored is not None
    for number in range(3):
        renewed = replace(
            stored.record,
            renewals=number + 1,
            write_id=f"{number}" * 16,
            renewed_at=f"2026-11-21T13:05:0{number}.000000Z",
        )
        stored = await lease.replace(renewed, version=stored.version, deadline_s=2)
    await lease.replace(replace(stored.record, paused=True), version=stored.version, deadline_s=2)
    await asyncio.wait_for(found.get(), 2)
    assert found.empty()


async def test_a_watch_that_ends_is_begun_again_and_what_was_missed_is_hinted(
    hinted: tuple[asyncio.Queue[None], FakeApiServer],
) -> None:
    found, server = hinted
    began = server.count("WATCH", "leases")
    server.end_watches()
    await asyncio.wait_for(found.get(), 2)
    await eventually(lambda: server.count("WATCH", "leases") > began and server.watches > 0)
    assert server.watches == 1


async def test_a_watch_that_is_refused_is_tried_again_with_pauses(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    api_server.forbidden = {("GET", "leases")}
    found = asyncio.Queue[None]()
    task = asyncio.create_task(hints(lease, found))
    await asyncio.sleep(1)
    task.cancel()
    assert 2 <= api_server.count("WATCH", "leases") <= 4


# Proof of death


def pod(uid: str = "uid-of-demo-1", **state: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "demo-1", "uid": uid},
        "status": {"phase": "Running", "containerStatuses": [{"name": "postgres", **state}]},
    }


def terminated(message: str) -> dict[str, Any]:
    return {"terminated": {"exitCode": 137, "message": message}}


LIFE = HOLDER.incarnation


@pytest.mark.parametrize(
    ("found", "dead"),
    [
        (pod(state=terminated(LIFE)), True),
        (pod(state=terminated(f"{LIFE}\n")), True),
        (pod(state={"running": {}}, lastState=terminated(LIFE)), True),
        (pod(state={"waiting": {"reason": "CrashLoopBackOff"}}, lastState=terminated(LIFE)), True),
        (pod(state={"running": {}}), False),
        (pod(state={"running": {}}, restartCount=3), False),
        (pod(state={"running": {}}, lastState=terminated("an earlier life")), False),
        (pod(state=terminated("")), False),
        (pod(state=terminated("The container could not be located when the pod was deleted")), False),
        (pod("uid of a namesake", state={"running": {}}), False),
        (pod("uid of a namesake", state=terminated(LIFE)), False),
        ({"metadata": {"name": "demo-1", "uid": "uid-of-demo-1"}, "status": {"phase": "Failed"}}, False),
        (
            {
                "metadata": {"name": "demo-1", "uid": "uid-of-demo-1"},
                "status": {"phase": "Failed", "reason": "NodeLost"},
            },
            False,
        ),
        ({}, False),
    ],
)
async def test_r9_only_the_last_words_of_that_very_life_in_that_very_pod_prove_its_end(
    lease: KubernetesCoordination, api_server: FakeApiServer, found: dict[str, Any], dead: bool
) -> None:
    assert has_ended(found, "uid-of-demo-1", LIFE) == dead
    await lease.create(FIRST, deadline_s=2)
    if found:
        api_server.objects["pods", "demo-1"] = found
    assert await lease.is_proven_dead(HOLDER, deadline_s=1) == dead


async def test_r9_a_life_that_the_record_does_not_name_or_an_api_server_that_does_not_answer_prove_nothing(
    lease: KubernetesCoordination, api_server: FakeApiServer
) -> None:
    api_server.objects["pods", "demo-1"] = pod(state=terminated(LIFE))
    assert not await lease.is_proven_dead(HOLDER, deadline_s=1)
    await lease.create(FIRST, deadline_s=2)
    other = Holder(member_id=MemberId("demo_1_0123abcd"), incarnation="ffffffffffffffff")
    assert not await lease.is_proven_dead(other, deadline_s=1)
    api_server.faults.append(Fault("GET", hang=True))
    assert not await lease.is_proven_dead(HOLDER, deadline_s=0.2)
    assert await lease.is_proven_dead(HOLDER, deadline_s=1)


async def test_r9_the_pod_of_the_holder_stays_recorded_when_another_writes(
    lease: KubernetesCoordination, api_server: FakeApiServer, api: ApiServer
) -> None:
    stored = await lease.create(FIRST, deadline_s=2)
    namesake = KubernetesCoordination(api, namespace="test", lease="demo", pod_name="demo-1", pod_uid="a later pod")
    await namesake.replace(replace(FIRST, paused=True), version=stored.version, deadline_s=2)
    assert api_server.lease()["metadata"]["annotations"][f"{PREFIX}holder-pod-uid"] == "uid-of-demo-1"
