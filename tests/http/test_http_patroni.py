"""Patroni's read routes over real HTTP: the codes and the JSON that its tools expect."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from http_harness import (
    DETAILS,
    STATUS,
    FakeService,
    now_s,
    primary_probes,
    standby_details,
    standby_probes,
)

from instance_manager.http.details import Details
from instance_manager.status import InstanceStatus, Probes

ROUTES = [
    "/",
    "/primary",
    "/read-write",
    "/leader",
    "/master",
    "/standby-leader",
    "/standby_leader",
    "/replica",
    "/read-only",
    "/synchronous",
    "/sync",
    "/read-only-sync",
    "/read-only-synchronous",
    "/quorum",
    "/read-only-quorum",
    "/asynchronous",
    "/async",
    "/health",
    "/liveness",
    "/readiness",
    "/patroni",
    "/cluster",
    "/history",
    "/config",
]

PRIMARY = "/ /primary /read-write /leader /master /read-only /read-only-sync /read-only-synchronous /read-only-quorum"
ALWAYS = "/liveness /patroni /cluster /history /config"
STOPPED = replace(
    primary_probes(), role="stopped", started=False, ready=False, accepts_writes=False, accepts_reads=False
)
QUORUM = standby_details()
SYNC = standby_details(holds_every_commit=True)
ASYNC = standby_details(voter=False)
CLOSED = replace(primary_probes(), accepts_writes=False, accepts_reads=False, ready=False)
NOT_STREAMING = replace(standby_probes(), ready=False)


@pytest.mark.parametrize(
    ("snapshot", "about", "good"),
    [
        (primary_probes(), DETAILS, f"{PRIMARY} /health /readiness"),
        (standby_probes(), QUORUM, "/replica /read-only /quorum /read-only-quorum /health /readiness"),
        (
            standby_probes(),
            SYNC,
            "/replica /read-only /sync /synchronous /read-only-sync /read-only-synchronous /health /readiness",
        ),
        (standby_probes(), ASYNC, "/replica /read-only /async /asynchronous /health /readiness"),
        (CLOSED, DETAILS, "/health"),
        (NOT_STREAMING, replace(ASYNC, receiving=False), "/read-only /health"),
        (STOPPED, replace(DETAILS, role="stopped", postgres="stopped", server=None), ""),
        (standby_probes(), replace(QUORUM, tags={"noloadbalance": True}), "/health /readiness"),
    ],
    ids=[
        "primary",
        "quorum standby",
        "sync standby",
        "async standby",
        "closed",
        "not streaming",
        "stopped",
        "no reads",
    ],
)
async def test_each_route_answers_for_each_state_to_get_head_and_options(
    service: FakeService, client: aiohttp.ClientSession, snapshot: Probes, about: Details, good: str
) -> None:
    service.snapshot, service.about = replace(snapshot, taken_s=now_s()), about
    codes = {}
    for route in ROUTES:
        for method in ("GET", "HEAD", "OPTIONS"):
            async with client.request(method, route) as response:
                body = await response.read()
                codes[route, method] = response.status
                assert (body != b"") == (method == "GET" and route not in ("/liveness", "/readiness"))
    wanted = {*good.split(), *ALWAYS.split()}
    assert codes == {
        (route, method): 200 if route in wanted else 503 for route in ROUTES for method in ("GET", "HEAD", "OPTIONS")
    }


async def test_an_old_snapshot_is_no_primary_and_no_replica(
    service: FakeService, client: aiohttp.ClientSession
) -> None:
    for snapshot, about, routes in (
        (primary_probes(), DETAILS, PRIMARY),
        (standby_probes(), QUORUM, "/replica /quorum"),
    ):
        service.snapshot, service.about = replace(snapshot, taken_s=now_s() - 30), about
        for route in routes.split():
            async with client.get(route) as response:
                assert (route, response.status) == (route, 503)


@pytest.mark.parametrize(
    ("route", "code"),
    [
        ("/replica?tag_zone=a", 200),
        ("/replica?tag_zone=a&tag_ssd=true&tag_weight=3", 200),
        ("/replica?tag_zone=b", 503),
        ("/replica?tag_rack=a", 503),
        ("/read-only?tag_zone=b", 503),
        ("/quorum?tag_zone=a&lag=16MB", 200),
        ("/quorum?tag_zone=a&lag=1MB", 503),
        ("/replica?replication_state=streaming", 200),
        ("/replica?replication_state=in%20archive%20recovery", 503),
        ("/async?lag=much", 400),
        ("/readiness?lag=16MB", 200),
        ("/readiness?lag=1MB", 503),
        ("/readiness?lag=1MB&mode=write", 200),
        ("/readiness?lag=1MB&mode=apply", 503),
        ("/readiness?mode=sideways", 400),
    ],
)
async def test_a_standby_is_asked_for_tags_lag_and_replication_state(
    service: FakeService, client: aiohttp.ClientSession, route: str, code: int
) -> None:
    service.snapshot = standby_probes()
    service.about = standby_details(tags={"zone": "a", "ssd": True, "weight": 3})
    async with client.get(route) as response:
        assert response.status == code


async def test_tags_do_not_count_where_the_primary_is_asked_for(
    service: FakeService, client: aiohttp.ClientSession
) -> None:
    for route in ("/", "/primary", "/leader", "/read-write"):
        async with client.get(f"{route}?tag_zone=nowhere") as response:
            assert (route, response.status) == (route, 200)
    async with client.get("/read-only?tag_zone=nowhere") as response:
        assert response.status == 503


async def test_without_a_lag_readiness_holds_the_clusters_maximum(
    service: FakeService, client: aiohttp.ClientSession
) -> None:
    service.snapshot, service.about = standby_probes(), standby_details(maximum_lag_bytes=2_001_000)
    async with client.get("/readiness") as response:
        assert response.status == 200
    service.about = standby_details(maximum_lag_bytes=2_000_999)
    async with client.get("/readiness") as response:
        assert response.status == 503


async def test_a_primary_describes_itself_as_patroni_does(client: aiohttp.ClientSession) -> None:
    for route in ("/patroni", "/primary", "/"):
        async with client.get(route) as response:
            told = await response.json()
        assert isinstance(told.pop("dcs_last_seen"), int)
        assert isinstance(told.pop("instance_manager")["version"], str)
        assert told == {
            "state": "running",
            "postmaster_start_time": "2026-11-21 10:00:00.123456+00:00",
            "role": "primary",
            "server_version": 150018,
            "xlog": {"location": 50331744},
            "timeline": 2,
            "replication": [
                {
                    "usename": "replicator",
                    "application_name": "demo_2_01234567",
                    "client_addr": "10.0.0.2",
                    "state": "streaming",
                    "sync_state": "quorum",
                    "sync_priority": 1,
                }
            ],
            "database_system_identifier": "7300000000000000001",
            "patroni": {"version": "4.1.4", "scope": "demo", "name": "demo-1"},
        }


async def test_a_standby_describes_itself_as_patroni_does(service: FakeService, client: aiohttp.ClientSession) -> None:
    service.snapshot = standby_probes()
    service.about = standby_details(paused=True, has_primary=False, tags={"zone": "a"})
    async with client.get("/patroni") as response:
        told = await response.json()
    assert told["role"] == "replica"
    assert told["xlog"] == {
        "received_location": 50331744,
        "replayed_location": 50331648,
        "replayed_timestamp": None,
        "paused": False,
    }
    assert told["replication_state"] == "streaming"
    assert (told["pause"], told["cluster_unlocked"], told["quorum_standby"]) == (True, True, True)
    assert told["tags"] == {"zone": "a"}
    assert "sync_standby" not in told
    assert "pending_restart" not in told


@pytest.mark.parametrize(
    ("role", "postgres", "has_data", "state", "patronis_role"),
    [
        ("stopped", "stopped", True, "stopped", "replica"),
        ("cloning", "stopped", False, "creating replica", "uninitialized"),
        ("initialising", "stopped", False, "initializing new cluster", "uninitialized"),
        ("standby", "starting", True, "starting", "replica"),
        ("stopping", "running", True, "stopping", "replica"),
        ("primary", "unresponsive", True, "unknown", "primary"),
    ],
)
async def test_states_have_patronis_names(
    service: FakeService,
    client: aiohttp.ClientSession,
    role: str,
    postgres: str,
    has_data: bool,
    state: str,
    patronis_role: str,
) -> None:
    service.about = replace(DETAILS, role=role, postgres=postgres, has_data=has_data, server=None)
    async with client.get("/patroni") as response:
        told = await response.json()
    assert (told["state"], told["role"]) == (state, patronis_role)
    assert "xlog" not in told


async def test_a_pending_restart_is_told(service: FakeService, client: aiohttp.ClientSession) -> None:
    assert DETAILS.server is not None
    service.about = replace(DETAILS, server=replace(DETAILS.server, pending_restart=("max_connections",)))
    async with client.get("/patroni") as response:
        told = await response.json()
    assert told["pending_restart"] is True
    assert told["pending_restart_reason"] == {"max_connections": {}}


def _instance(name: str, **changes: Any) -> InstanceStatus:
    usual: dict[str, Any] = {
        "name": name,
        "member_id": f"{name}_01234567",
        "role": "standby",
        "reachable": True,
        "postgres": "running",
        "timeline": 2,
        "lsn": "1/00000100",
        "lag_bytes": 16,
        "replay_lag_bytes": 256,
        "receiving": True,
        "voter": True,
    }
    return InstanceStatus(**{**usual, **changes})


async def test_the_cluster_is_told_member_by_member(service: FakeService, client: aiohttp.ClientSession) -> None:
    service.told = replace(
        STATUS,
        paused=True,
        voters=("demo-2", "demo-3"),
        instances=(
            _instance("demo-1", role="primary", receiving=False, voter=False),
            _instance("demo-2"),
            _instance("demo-3", reachable=False),
        ),
    )
    async with client.get("/cluster") as response:
        told = await response.json()
    assert told["scope"] == "demo"
    assert told["pause"] is True
    assert told["members"] == [
        {
            "name": "demo-1",
            "role": "leader",
            "state": "running",
            "api_url": "http://10.0.0.1:8008/patroni",
            "host": "10.0.0.1",
            "port": 5432,
            "timeline": 2,
        },
        {
            "name": "demo-2",
            "role": "quorum_standby",
            "state": "streaming",
            "api_url": "http://[fd00::2]:8009/patroni",
            "host": "fd00::2",
            "port": 5433,
            "timeline": 2,
            "receive_lag": 16,
            "receive_lsn": "1/00000100",
            "replay_lag": 272,
            "replay_lsn": "1/0",
            "lag": 16,
            "lsn": "1/00000100",
        },
        {
            "name": "demo-3",
            "role": "quorum_standby",
            "state": "unknown",
            "timeline": 2,
            "receive_lag": "unknown",
            "receive_lsn": "unknown",
            "replay_lag": "unknown",
            "replay_lsn": "unknown",
            "lag": "unknown",
            "lsn": "unknown",
        },
    ]


@pytest.mark.parametrize(
    ("changes", "role"),
    [
        ({"voters": ("demo-2",), "quorum": 1}, "sync_standby"),
        ({"voters": ("demo-2", "demo-3"), "quorum": 1}, "quorum_standby"),
        ({"voters": ("demo-2",), "quorum": 0}, "replica"),
        ({"voters": ("demo-2",), "quorum": 1, "durability": "asynchronous"}, "replica"),
    ],
)
async def test_a_voter_is_synchronous_when_every_voter_holds_each_commit(
    service: FakeService, client: aiohttp.ClientSession, changes: dict[str, Any], role: str
) -> None:
    service.told = replace(STATUS, instances=(_instance("demo-2"),), **changes)
    async with client.get("/cluster") as response:
        told = await response.json()
    assert told["members"][0]["role"] == role


async def test_the_history_is_told_as_rows(client: aiohttp.ClientSession) -> None:
    async with client.get("/history") as response:
        assert await response.json() == [[1, 0x3000000, "claimed in epoch 3"]]


async def test_the_configuration_can_be_read_and_not_written(client: aiohttp.ClientSession) -> None:
    async with client.get("/config") as response:
        assert await response.json() == {"ttl": 10.0}
    for method in ("PATCH", "PUT", "POST"):
        async with client.request(method, "/config", json={"pause": True}) as response:
            assert response.status == 405


@pytest.mark.parametrize(
    "path", ["/switchover", "/failover", "/restart", "/reload", "/reinitialize", "/fence", "/pause"]
)
async def test_what_changes_state_in_patroni_is_not_on_the_open_port(client: aiohttp.ClientSession, path: str) -> None:
    for method in ("POST", "DELETE", "GET", "PATCH"):
        async with client.request(method, path, json={"leader": "demo-1"}) as response:
            assert response.status == 404


@pytest.mark.parametrize("path", ["/leader", "//leader"])
async def test_vip_manager_is_answered_as_patroni_answers_it(
    service: FakeService, client: aiohttp.ClientSession, path: str
) -> None:
    """The bytes of its `--dcs-type patroni` (checker/patroni_leader_checker.go), once an interval on one kept connection: only the
    code counts, within a second. With its own default for the endpoint, which ends with a slash, the path begins with two."""
    base = client._base_url
    assert base is not None
    asked = f"GET {path} HTTP/1.1\r\nHost: {base.host}:{base.port}\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
    reader, writer = await asyncio.open_connection(base.host, base.port)
    codes = []
    for probes in (primary_probes(), CLOSED, standby_probes(), STOPPED, primary_probes()):
        service.snapshot = probes
        async with asyncio.timeout(1):
            writer.write(asked.encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"^content-length: (\d+)\r$", head, re.IGNORECASE | re.MULTILINE)
            assert length is not None, head
            await reader.readexactly(int(length[1]))
        codes.append(head.split()[1])
    writer.close()
    assert codes == ["200", "503", "503", "503", "200"]
