"""One instance with a real lease keeper, volume and peers over a store, a database and callers in memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

from agent_builders import end, peer_state, volume
from agent_fakes import Keeping, MemoryCoordination

from instance_manager.agent.beat import Beat
from instance_manager.agent.context import Context, Journal
from instance_manager.agent.data_directory import StoppedFacts
from instance_manager.agent.database import Database
from instance_manager.agent.health import Health
from instance_manager.agent.peering import HEARTBEAT_S, EndAnswer, Peers, WatchAnswer
from instance_manager.agent.postgres_port import Upstream
from instance_manager.agent.standby_watch import Walsender
from instance_manager.agent.supervisor_link import PostgresProcess, SupervisorLink
from instance_manager.agent.volume import Volume, VolumeDirectory
from instance_manager.codec import from_json, to_json
from instance_manager.config import Configuration
from instance_manager.config_sections import (
    ClusterSection,
    CoordinationSection,
    Durability,
    InstanceSection,
    LocalCoordinationSection,
    MemberSection,
    SecretsSection,
)
from instance_manager.core.lease import Permit
from instance_manager.core.observation import PeerState, PostgresView
from instance_manager.core.quorum import SynchronousSet
from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, Lsn, MemberId, MemberName, Timeline, TimelineChain, WalEnd
from instance_manager.core.voting import VolumeState
from instance_manager.ports import PeerSilent

Answer = Callable[[bytes], Awaitable[object]]


def configuration(directory: Path, name: str, durability: Durability = "preferred") -> Configuration:
    secret = directory / "secret"
    return Configuration(
        cluster=ClusterSection(name="demo", uid="uid-1", durability=durability),
        instance=InstanceSection(name=name, directory=directory),
        members=tuple(
            MemberSection(name=each, host="127.0.0.1", postgres_port=5432, http_port=8008) for each in ("a", "b", "p")
        ),
        coordination=CoordinationSection(
            local=LocalCoordinationSection(directory=directory, locks_directory=directory)
        ),
        secrets=SecretsSection(
            peer_token=secret, replication_password=secret, application_password=secret, monitoring_password=secret
        ),
    )


class FakeDatabase:
    """A Postgres that does at once what it is told, and writes it to `events`; `on` is done before that."""

    def __init__(self, events: list[str], *, primary: bool) -> None:
        self.events = events
        self.on: dict[str, Callable[[], Awaitable[None]]] = {}
        self.running = True
        self.answers = True
        self.running_read_write = primary
        self.stops = True
        """Within its deadline."""
        self.receiving = False
        self.following: tuple[MemberId, Epoch] | None = None
        self.at: WalEnd | None = end(200)
        self.needs: WalEnd | None = None
        self.judged_by: list[TimelineChain | None] = []
        """The histories by which the stopped directory was looked at."""
        self.started: list[tuple[Upstream | None, TimelineChain | None]] = []
        self.senders: dict[MemberId, int] = {}
        self.set: list[SynchronousSet] = []
        self.recovery_says: list[str] = []
        self.exists = True
        self.is_startable = True
        self.left: tuple[Timeline, ...] = ()
        """Timelines of histories that are not the cluster's."""

    @property
    def directory(self) -> Self:
        return self

    def view(self) -> PostgresView:
        return PostgresView(
            running=self.running,
            mode="read_write" if self.running_read_write else "standby",
            answers=self.answers,
            in_recovery=not self.running_read_write,
            end=self.at,
            receiving=self.receiving,
            silent_for_s=0.0 if self.receiving else float("inf"),
            following=self.following,
        )

    def walsenders(self) -> tuple[Walsender, ...]:
        for member in self.senders:
            self.senders[member] += 1
        return tuple(Walsender(member, "streaming", Lsn(200), f"{reply}") for member, reply in self.senders.items())

    async def _do(self, what: str) -> None:
        if what in self.on:
            await self.on[what]()
        self.events.append(what)

    async def prepare_slots(self, members: frozenset[MemberId]) -> None:
        return None

    async def fill_gaps(self, chain: TimelineChain) -> None:
        return None

    async def dead_ends(self, chain: TimelineChain) -> tuple[Timeline, ...]:
        return self.left

    async def gate_is_open(self) -> bool:
        return True

    async def synchronous_set(self) -> SynchronousSet | None:
        return self.set[-1] if self.set else None

    async def set_synchronous(self, wanted: SynchronousSet) -> None:
        await self._do("synchronous")
        self.set.append(wanted)

    async def barrier(self, timeline: Timeline, *, deadline_s: float) -> None:
        await self._do("barrier")

    async def open_gate(self) -> None:
        await self._do("open gate")

    def checkpoint_soon(self) -> None:
        return None

    async def create_roles(self) -> None:
        return None

    async def initialise(self, on_progress: Callable[[str], None]) -> Any:
        await self._do("initdb")
        for line in self.recovery_says:
            on_progress(line)
        return SimpleNamespace(system_identifier=7002, timeline=Timeline(1), checkpoint_lsn=Lsn(40))

    async def checkpoint(self, *, deadline_s: float) -> None:
        await self._do("checkpoint")

    async def stop(self, *, deadline_s: float, archive_for_s: float = 0.0) -> bool:
        await self._do("stop")
        if self.stops:
            self.running = self.running_read_write = False
        return self.stops

    async def kill(self) -> None:
        await self._do("kill")
        self.running = self.running_read_write = False

    async def start_standby(self, upstream: Upstream | None = None, *, chain: TimelineChain | None = None) -> None:
        await self._do("start standby")
        self.started.append((upstream, chain))
        self.running = True

    async def start_primary(self, epoch: Epoch, opening: SynchronousSet) -> None:
        await self._do("start primary")
        self.running = self.running_read_write = True

    async def stopped_facts(self, chain: TimelineChain | None) -> StoppedFacts:
        self.judged_by.append(chain)
        return StoppedFacts(
            exists=self.exists,
            half_rewound=False,
            foreign=None,
            system_identifier="7001",
            end=self.at,
            needs=self.needs,
        )

    async def shutdown_end(self, chain: TimelineChain | None) -> WalEnd | None:
        return self.at

    async def require_source(self, host: str, port: int, system_identifier: str, timeline: Timeline) -> None:
        await self._do("require source")

    async def rewind(self, host: str, port: int, timeline: Timeline) -> None:
        await self._do("rewind")

    async def set_aside(self) -> None:
        await self._do("set aside")

    async def clone(self, host: str, port: int, system_identifier: str, on_progress: Callable[[str], None]) -> None:
        await self._do("clone")

    async def make_from_archive(
        self, host: str, port: int, record: ClusterRecord, on_progress: Callable[[str], None]
    ) -> str:
        for line in self.recovery_says:
            on_progress(line)
        await self._do("from archive")
        return "backup 1"

    async def stop_following(self, chain: TimelineChain, *, deadline_s: float) -> WalEnd:
        await self._do("stop following")
        assert self.at is not None
        return self.at

    async def proven_end(self, chain: TimelineChain) -> WalEnd | None:
        return self.at

    async def follow(self, upstream: Any) -> None:
        await self._do("follow")


class FakeLink:
    def __init__(self, name: str, events: list[str]) -> None:
        self.postgres: PostgresProcess | None = None
        self.incarnation = f"{name}-life-1"
        self.permit: Permit | None = None
        self._events = events

    async def revoke(self, epoch: Epoch) -> None:
        self._events.append("revoke")


class FakeCaller:
    """Peers as a test wants them: by default each is well, holds everything and promised nothing later."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Answer] = {}
        self.calls: list[tuple[str, str, bytes]] = []
        self.changed = asyncio.Event()
        self.told: list[str] = []
        """Who has told something to whoever listens."""

    def on(self, name: str, call: str, answer: object) -> None:
        async def give(_: bytes) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

        self.answers[name, call] = give

    async def call(self, name: str, call: str, body: bytes, *, deadline_s: float) -> bytes:
        self.calls.append((name, call, body))
        if (name, call) in self.answers:
            return to_json(await self.answers[name, call](body))
        if call == "nudge":
            return b"true"
        raise PeerSilent(f"{name} does not answer {call}")

    async def listen(self, name: str, call: str, body: bytes, *, silence_s: float) -> AsyncGenerator[bytes, None]:
        """Its answer of the moment, again each second and whenever a test has set `changed`; None: the end, in order."""
        self.calls.append((name, call, body))
        while (name, call) in self.answers:
            answer = await self.answers[name, call](body)
            if answer is None:
                return
            self.told.append(name)
            yield to_json(answer)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self.changed.wait()
            self.changed.clear()
        raise PeerSilent(f"{name} does not answer {call}")

    def ends_at(self, name: str, at: WalEnd, **changes: Any) -> None:
        answer = EndAnswer(
            member_id=MemberId(f"{name}_00000000"),
            end=at,
            promised_epoch=Epoch(5),
            highest_epoch=Epoch(5),
            extended_for_s=0.0,
            record=None,
        )
        self.on(name, "end", answer if not changes else EndAnswer(**{**_fields(answer), **changes}))


def _fields(answer: EndAnswer) -> dict[str, Any]:
    return {name: getattr(answer, name) for name in EndAnswer.__dataclass_fields__}


class LoudDirectory(VolumeDirectory):
    """Tells when something has reached the disk, and what."""

    events: list[str]
    states: list[VolumeState]

    def _write(self, content: bytes) -> None:
        super()._write(content)
        self.events.append("volume")
        self.states.append(from_json(content, VolumeState))


class Instance:
    """`async with Instance(...)`: its keeper runs; peers are known by `knows`."""

    def __init__(self, directory: Path, name: str, found: ClusterRecord, durability: Durability = "preferred") -> None:
        self.events: list[str] = []
        self.store = MemoryCoordination()
        self.store.put(found)
        self.member_id = MemberId(f"{name}_00000000")
        self.holder = Holder(member_id=self.member_id, incarnation=f"{name}-life-1")
        self.database = FakeDatabase(self.events, primary=name == "p")
        self.caller = FakeCaller()
        storage = LoudDirectory(directory, None)
        storage.events = self.events
        self.volume_states = storage.states = []
        self.volume = Volume(storage, boot_id="boot-1", chance=random.Random(1))
        self.volume.state = volume(self.member_id)
        self.keeping = Keeping(self.store, self.holder)
        self.keeping.live_volume = lambda: self.volume.state
        self.keeper = self.keeping.keeper
        self.clock = self.keeping.clock
        self.woken = 0
        self.peers = Peers(
            self.caller,
            tuple(MemberName(each) for each in "abp" if each != name),
            self.clock,
            interval_s=0.5,
            record_epoch=lambda: self.keeper.record.epoch if self.keeper.record else Epoch(0),
            on_change=lambda: None,
            on_later_epoch=self.keeper.hint,
        )
        self.context = Context(
            configuration=configuration(directory, name, durability),
            clock=self.clock,
            coordination=self.store,
            link=cast(SupervisorLink, FakeLink(name, self.events)),
            volume=self.volume,
            keeper=self.keeper,
            peers=self.peers,
            database=cast(Database, self.database),
            health=cast(Health, None),
            journal=Journal(self.clock),
            started_s=self.clock.now_s(),
            boot_id="boot-1",
            beat=Beat(self.clock),
            chance=random.Random(1),
        )
        if name == "p":
            self.context.role = Role.PRIMARY
            self.context.gate_open = True
            self.context.opened_s = self.clock.now_s() - 100
        else:
            self.context.role = Role.CANDIDATE

    def knows(self, *names: str, **changes: Any) -> None:
        """As if these peers had just answered a watch."""
        for name in names:
            state: PeerState = peer_state(name, **changes)
            known = self.peers._known[MemberName(name)]
            known.state, known.answers, known.answered_s = state, True, self.clock.now_s()
            self.caller.on(name, "watch", WatchAnswer(digest="1", state=state))

    @property
    def record(self) -> ClusterRecord:
        return self.store.record

    async def __aenter__(self) -> Self:
        await self.keeping.__aenter__()
        self.store.events = self.events
        self.events.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.keeping.__aexit__()
