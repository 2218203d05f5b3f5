"""The role label of the own pod and Events: in the background, never late over something newer, never on a namesake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from coordination_stores import eventually
from fake_api_server import FakeApiServer, Fault

from instance_manager.coordination import kubernetes_publication
from instance_manager.coordination.kubernetes_api import ApiServer
from instance_manager.coordination.kubernetes_pods import Pods
from instance_manager.coordination.kubernetes_publication import KubernetesPublication

ROLE = "instance-manager.dev/role"


def pod(name: str, address: str | None, uid: str = "", **labels: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "uid": uid or f"uid-of-{name}",
            "labels": {
                "instance-manager.dev/cluster": "demo",
                **{f"instance-manager.dev/{k}": v for k, v in labels.items()},
            },
        },
        "spec": {"terminationGracePeriodSeconds": 20},
        "status": {"phase": "Running", **({"podIP": address} if address else {})},
    }


@pytest.fixture
def pods(api: ApiServer) -> Pods:
    return Pods(api, namespace="test", cluster="demo")


@pytest.fixture
async def publication(api: ApiServer, pods: Pods, api_server: FakeApiServer) -> AsyncIterator[KubernetesPublication]:
    api_server.put("pods", pod("demo-1", "10.0.0.1", role="primary"))
    api_server.put("pods", pod("demo-2", "10.0.0.2"))
    found = KubernetesPublication(api, pods, pod_name="demo-1", pod_uid="uid-of-demo-1", shutdown_timeout_s=5)
    task = asyncio.create_task(found.run())
    yield found
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def label(server: FakeApiServer, name: str = "demo-1") -> str | None:
    found: str | None = server.objects["pods", name]["metadata"]["labels"].get(ROLE)
    return found


# Addresses


async def test_addresses_are_the_pods_own_and_follow_a_replaced_pod(
    publication: KubernetesPublication, pods: Pods, api_server: FakeApiServer
) -> None:
    await eventually(lambda: pods.address("demo-2") == "10.0.0.2" and api_server.watches == 1)
    api_server.delete("pods", "demo-2")
    await eventually(lambda: pods.address("demo-2") is None)
    api_server.put("pods", pod("demo-2", None, uid="another"))
    api_server.put("pods", pod("demo-2", "10.0.0.9", uid="another"))
    await eventually(lambda: pods.address("demo-2") == "10.0.0.9")
    assert api_server.count("GET", "pods") == 1


async def test_a_pod_that_has_ended_has_no_address(pods: Pods) -> None:
    ended = pod("demo-2", "10.0.0.2")
    ended["status"]["phase"] = "Failed"
    assert pods.put(ended).address is None


async def test_addresses_are_kept_while_the_api_server_is_away_and_compared_when_it_is_back(
    publication: KubernetesPublication, pods: Pods, api_server: FakeApiServer
) -> None:
    await eventually(lambda: pods.address("demo-2") == "10.0.0.2" and api_server.watches == 1)
    api_server.faults.extend([Fault("GET", status=500), Fault("GET", cut=True)])
    api_server.end_watches()
    await eventually(lambda: not api_server.faults)
    assert pods.address("demo-2") == "10.0.0.2"
    del api_server.objects["pods", "demo-2"]
    api_server.end_watches()
    await eventually(lambda: pods.address("demo-2") is None)


# The label


async def test_the_label_becomes_what_was_published_last(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    publication.publish_role("replica")
    assert await publication.role_is_published(deadline_s=2)
    assert label(api_server) == "replica"
    for _ in range(10):
        publication.publish_role("primary")
        publication.publish_role("replica")
    publication.publish_role("primary")
    assert await publication.role_is_published(deadline_s=2)
    assert label(api_server) == "primary"
    assert label(api_server, "demo-2") is None


async def test_what_is_published_already_is_not_written_again(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    publication.publish_role("primary")
    assert await publication.role_is_published(deadline_s=2)
    publication.publish_role("primary")
    assert await publication.role_is_published(deadline_s=2)
    assert api_server.count("PATCH", "pods") == 0


async def test_a_label_that_somebody_changed_is_mended(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    publication.publish_role("replica")
    assert await publication.role_is_published(deadline_s=2)
    await eventually(lambda: api_server.watches == 1)
    changed = api_server.objects["pods", "demo-1"]
    changed["metadata"]["labels"][ROLE] = "primary"
    api_server.put("pods", changed)
    await eventually(lambda: label(api_server) == "replica")


async def test_waiting_for_the_label_ends_at_its_deadline_and_the_label_comes_later(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    await eventually(lambda: api_server.watches == 1)
    api_server.faults.extend([Fault("PATCH", status=500)] * 3)
    publication.publish_role("replica")
    assert not await publication.role_is_published(deadline_s=0.05)
    assert await publication.role_is_published(deadline_s=3)
    assert label(api_server) == "replica"


async def test_a_change_of_the_pod_meanwhile_is_read_back(
    publication: KubernetesPublication, api_server: FakeApiServer, pods: Pods
) -> None:
    await eventually(lambda: api_server.watches == 1)
    known = pods.get("demo-1")
    assert known is not None
    # The kubelet has written, and this instance has not heard of it yet.
    api_server.objects["pods", "demo-1"]["metadata"]["resourceVersion"] = "999999"
    api_server.latest = 1000000
    publication.publish_role("replica")
    assert await publication.role_is_published(deadline_s=2)
    assert label(api_server) == "replica"


async def test_a_patch_that_lands_late_changes_nothing_any_more(api_server: FakeApiServer, api: ApiServer) -> None:
    late = api_server.put("pods", pod("demo-1", "10.0.0.1"))
    api_server.put("pods", late)  # somebody else wrote since
    answer = await api.request(
        "PATCH",
        "/api/v1/namespaces/test/pods/demo-1",
        body={
            "metadata": {
                "uid": "uid-of-demo-1",
                "resourceVersion": late["metadata"]["resourceVersion"],
                "labels": {ROLE: "primary"},
            }
        },
        deadline_s=2,
    )
    assert answer.status == 409
    assert label(api_server) is None


async def test_a_namesake_of_this_pod_is_never_labelled(api: ApiServer, pods: Pods, api_server: FakeApiServer) -> None:
    api_server.put("pods", pod("demo-1", "10.0.0.7", uid="a later pod"))
    publication = KubernetesPublication(api, pods, pod_name="demo-1", pod_uid="uid-of-demo-1")
    task = asyncio.create_task(publication.run())
    publication.publish_role("primary")
    assert not await publication.role_is_published(deadline_s=0.5)
    task.cancel()
    assert label(api_server) is None
    assert api_server.count("PATCH", "pods") == 0


# Events


def events(server: FakeApiServer) -> list[dict[str, Any]]:
    return [found for (kind, _), found in server.objects.items() if kind == "events"]


async def test_an_event_names_the_pod_and_the_reason(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    publication.publish_event("Promoted", "timeline 2, epoch 3", warning=False)
    await eventually(lambda: any(event["reason"] == "Promoted" for event in events(api_server)))
    found = next(event for event in events(api_server) if event["reason"] == "Promoted")
    assert (found["type"], found["message"]) == ("Normal", "timeline 2, epoch 3")
    assert found["involvedObject"]["uid"] == "uid-of-demo-1"
    assert len(found["firstTimestamp"]) == len("2026-11-21T13:05:00Z")


async def test_a_grace_period_that_leaves_no_time_for_a_shutdown_is_told_once(
    api: ApiServer, pods: Pods, api_server: FakeApiServer
) -> None:
    api_server.put("pods", pod("demo-1", "10.0.0.1"))
    publication = KubernetesPublication(api, pods, pod_name="demo-1", pod_uid="uid-of-demo-1", shutdown_timeout_s=25)
    task = asyncio.create_task(publication.run())
    await eventually(lambda: len(events(api_server)) == 1)
    publication.publish_role("primary")
    assert await publication.role_is_published(deadline_s=2)
    task.cancel()
    (found,) = events(api_server)
    assert (found["reason"], found["type"]) == ("GracePeriodTooShort", "Warning")


async def test_of_a_flood_of_events_few_are_sent_and_the_latest_wait(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    for number in range(500):
        publication.publish_event("Fenced", f"number {number}", warning=True)
    await eventually(lambda: len(events(api_server)) >= kubernetes_publication.EVENTS_AT_ONCE)
    await asyncio.sleep(0.3)
    assert len(events(api_server)) == kubernetes_publication.EVENTS_AT_ONCE
    assert len(publication._events) <= kubernetes_publication.EVENTS_WAITING_MAX
    assert publication._events[-1].message == "number 499"


async def test_an_event_that_is_forbidden_harms_nothing(
    publication: KubernetesPublication, api_server: FakeApiServer
) -> None:
    api_server.forbidden = {("POST", "events")}
    publication.publish_event("Promoted", "x" * 5000, warning=False)
    publication.publish_role("replica")
    assert await publication.role_is_published(deadline_s=2)
    await eventually(lambda: api_server.count("POST", "events") == 1)
    api_server.forbidden = set()
    publication.publish_event("Promoted", "é" * 5000, warning=False)
    await eventually(lambda: len(events(api_server)) == 1)
    assert len(events(api_server)[0]["message"].encode()) <= 1024
