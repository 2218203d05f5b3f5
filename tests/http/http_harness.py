"""A service with settable answers, and a configuration on free loopback ports."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from instance_manager.config import Configuration
from instance_manager.config_sections import (
    ClusterSection,
    CoordinationSection,
    InstanceSection,
    LocalCoordinationSection,
    MemberSection,
    SecretsSection,
)
from instance_manager.http.details import Details, HistoryLine, MemberAddress, ReplicationLine, ServerDetails
from instance_manager.http.ports import ControlProgress, ControlResult, MalformedCall, UnknownCall
from instance_manager.status import ClusterStatus, Probes

TOKEN = "0123456789abcdef-token"

STATUS = ClusterStatus(
    cluster="demo",
    told_by="demo-1",
    primary="demo-1",
    epoch=3,
    timeline=2,
    system_identifier="7300000000000000001",
    lease_age_s=0.5,
    lease_readable=True,
    seconds_to_fence=5.5,
    durability="preferred",
    voters=("demo-2",),
    quorum=1,
    synchronous_wanted=1,
    synchronous_standby_names='ANY 1 ("demo_2_01234567")',
    paused=False,
    fenced=(),
    accepts_clients=True,
    at_risk=(),
    instances=(),
    decisions=(),
)


DETAILS = Details(
    name="demo-1",
    cluster="demo",
    role="primary",
    postgres="running",
    has_data=True,
    receiving=False,
    voter=False,
    holds_every_commit=False,
    has_primary=True,
    paused=False,
    timeline=2,
    system_identifier="7300000000000000001",
    record_age_s=0.5,
    server=ServerDetails(
        version_number=150018,
        started="2026-11-21 10:00:00.123456+00",
        flushed_lsn=0x3000060,
        received_lsn=None,
        replayed_lsn=None,
        replayed_timestamp=None,
        replay_paused=False,
        pending_restart=(),
        replication=(
            ReplicationLine(
                user="replicator",
                application_name="demo_2_01234567",
                client_address="10.0.0.2",
                state="streaming",
                sync_state="quorum",
                sync_priority=1,
            ),
        ),
    ),
    addresses={
        "demo-1": MemberAddress(host="10.0.0.1", postgres_port=5432, http_port=8008),
        "demo-2": MemberAddress(host="fd00::2", postgres_port=5433, http_port=8009),
    },
    history=(HistoryLine(timeline=1, lsn=0x3000000, epoch=3),),
    tags={},
    maximum_lag_bytes=16 << 20,
    settings={"ttl": 10.0},
)


def standby_details(**changes: Any) -> Details:
    """Of a streaming standby of `demo-1` that votes, as one of several."""
    assert DETAILS.server is not None
    server = replace(DETAILS.server, flushed_lsn=None, received_lsn=0x3000060, replayed_lsn=0x3000000, replication=())
    usual = {"name": "demo-2", "role": "standby", "receiving": True, "voter": True, "server": server}
    return replace(DETAILS, **{**usual, **changes})


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def primary_probes() -> Probes:
    return Probes(
        taken_s=now_s(),
        role="primary",
        alive=True,
        started=True,
        ready=True,
        accepts_writes=True,
        accepts_reads=True,
        lag_bytes=None,
        replay_lag_bytes=None,
        timeline=2,
    )


def standby_probes() -> Probes:
    return replace(primary_probes(), role="standby", accepts_writes=False, lag_bytes=1000, replay_lag_bytes=2_000_000)


@dataclass
class FakeService:
    """`control` knows the verbs echo, slow, fails, endless; `answer_peer` knows echo, hang, refuse and break."""

    snapshot: Probes = field(default_factory=primary_probes)
    scrapes_wait: asyncio.Event | None = None
    scrape: bytes = b"# HELP up 1.\n# TYPE up gauge\nup 1\n"
    told: ClusterStatus = STATUS
    about: Details = DETAILS
    asked: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    """The verbs that were carried out, with their arguments."""
    finished: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    say: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0
    """Peers that are being told something."""

    def probes(self) -> Probes:
        return self.snapshot

    def status(self) -> ClusterStatus:
        return self.told

    def details(self) -> Details:
        return self.about

    async def metrics(self) -> bytes:
        if self.scrapes_wait is not None:
            await self.scrapes_wait.wait()
        return self.scrape

    async def answer_peer(self, call: str, body: bytes) -> bytes:
        match call:
            case "echo":
                return body
            case "hang":
                await asyncio.sleep(60)
                return b""
            case "refuse":
                raise MalformedCall("not what refuse takes")
            case "break":
                raise ZeroDivisionError("broken")
            case _:
                raise UnknownCall(f"no such call: {call}")

    async def tell_peer(self, call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """`count` tells 1, 2, 3 as `say` is set, then ends; `echo` the body and then nothing; `break` and `refuse` fail."""
        self.listeners += 1
        try:
            match call:
                case "echo":
                    yield body
                    await asyncio.Event().wait()
                case "count":
                    for number in range(1, 4):
                        yield str(number).encode()
                        await self.say.wait()
                        self.say.clear()
                case "break":
                    yield b"one"
                    raise ZeroDivisionError("broken")
                case "refuse":
                    raise MalformedCall("the body is empty")
                case _:
                    raise UnknownCall(f"no such call: {call}")
        finally:
            self.listeners -= 1

    async def control(self, verb: str, arguments: dict[str, object]) -> AsyncIterator[ControlProgress | ControlResult]:
        self.asked.append((verb, arguments))
        match verb:
            case "switchover" | "failover" | "restart" | "reload" | "reinit" | "fence" | "unfence" | "pause" | "resume":
                yield ControlProgress(progress="one")
                yield ControlResult(ok=arguments.get("name") != "broken", message=f"{verb} ended")
            case "echo":
                yield ControlResult(ok=True, message=str(arguments), status=STATUS)
            case "slow":
                yield ControlProgress(progress="one")
                await self.go_on.wait()
                yield ControlProgress(progress="two")
                self.finished.append(verb)
                yield ControlResult(ok=False, message="no")
            case "fails":
                yield ControlProgress(progress="one")
                raise ZeroDivisionError("broken")
            case "endless":
                yield ControlProgress(progress="one")
            case "refuse":
                raise MalformedCall("name is missing")
            case _:
                raise UnknownCall(f"no such command: {verb}")


_next_port = itertools.count(os.getpid() * 89)


def free_port() -> int:
    """Of those from which the kernel takes none for outgoing connections: such a one may be gone before a server binds it."""
    while True:
        port = 10000 + next(_next_port) % 5000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def make_configuration(directory: Path) -> Configuration:
    token_file = directory / "peer-token"
    token_file.write_text(f"{TOKEN}\n")
    (directory / "i").mkdir(exist_ok=True)
    return Configuration(
        cluster=ClusterSection(name="demo", uid="uid-1"),
        instance=InstanceSection(name="demo-1", directory=directory / "i"),
        members=(
            MemberSection(name="demo-1", host="127.0.0.1", postgres_port=free_port(), http_port=free_port()),
            MemberSection(name="demo-2", host="127.0.0.1", postgres_port=free_port(), http_port=free_port()),
        ),
        coordination=CoordinationSection(
            local=LocalCoordinationSection(directory=directory / "lease", locks_directory=directory / "locks")
        ),
        secrets=SecretsSection(
            peer_token=token_file,
            replication_password=directory / "r",
            application_password=directory / "a",
            monitoring_password=directory / "m",
        ),
    )
