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

from instance_manager.config import Configuration
from instance_manager.config_sections import (
    ClusterSection,
    CoordinationSection,
    InstanceSection,
    LocalCoordinationSection,
    MemberSection,
    SecretsSection,
)
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
    finished: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    say: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0
    """Peers that are being told something."""

    def probes(self) -> Probes:
        return self.snapshot

    def status(self) -> ClusterStatus:
        return STATUS

    async def metrics(self) -> bytes:
        if self.scrapes_wait is not None:
            await self.scrapes_wait.wait()
        return b"# HELP up 1.\n# TYPE up gauge\nup 1\n"

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
        match verb:
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
