"""The local Postgres as the agent uses it: slots of one life after another, stops and starts that nobody has answered."""

from __future__ import annotations

import asyncio
import errno
import json
from collections import deque
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from agent_builders import A, B
from agent_fakes import VirtualClock, settle
from agent_instance import configuration

from instance_manager.agent.beat import Beat
from instance_manager.agent.database import Database
from instance_manager.agent.postgres_port import LocalPostgres, Upstream
from instance_manager.agent.slots import SLOTS_INTERVAL_S
from instance_manager.agent.supervisor_link import PostgresProcess, SupervisorError, SupervisorLink, SupervisorSilent
from instance_manager.core.quorum import NOBODY
from instance_manager.core.types import Epoch, MemberId
from instance_manager.postgres import voting
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.server import LocalPostgresError

MEMBERS = frozenset({A, B})


class Wire:
    """The supervisor's end of the link, by hand: what the agent sent, and what it is told."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self._told: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self.full = False

    def send(self, datagram: bytes) -> None:
        if self.full:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        self.sent.append(json.loads(datagram))

    async def receive(self) -> bytes:
        while not self._told:
            self._arrived.clear()
            await self._arrived.wait()
        return self._told.popleft()

    def tells(self, **message: Any) -> None:
        self._told.append(json.dumps(message).encode())
        self._arrived.set()


class Slots:
    """A server whose slots take as long as a test wants."""

    def __init__(self) -> None:
        self.kept: frozenset[MemberId] | None = None
        self.asked: list[frozenset[MemberId]] = []
        self.takes_s: deque[float] = deque()
        """One call after another; then each is answered at once."""
        self.running = SimpleNamespace(settings_file=None)
        self.allowed: list[object] = []
        """What the archive's commands were allowed, in order."""
        self.disk_is_slow = False
        self.access: Access | None = Access.OPEN
        self.accesses_written: list[Access] = []
        self.replacing = asyncio.Event()

    async def write_files(self, synchronous: object, access: Access, *, standby: bool, upstream: object = None) -> None:
        self.access = access

    async def write_access(self, access: Access) -> None:
        self.access = access
        self.accesses_written.append(access)

    async def written_access(self) -> Access | None:
        return self.access

    async def replace_static(self, _: object) -> tuple[str, ...]:
        await self.replacing.wait()
        return ()

    async def set_standby_signal(self, _: bool) -> None:
        raise LocalPostgresError("as far as this goes here")

    def inspect_at_start(self) -> None:
        return None

    def primary_settings(self, upstream: Upstream) -> str:
        return f"host={upstream.host}"

    def forget(self) -> None:
        return None

    async def allow_archive(self, what: object, *, deadline_s: float) -> None:
        if self.disk_is_slow:
            raise TimeoutError
        self.allowed.append(what)

    async def observe(self, *, deadline_s: float) -> Any:
        return SimpleNamespace(walreceiver=None, is_receiving=False, in_recovery=True)

    async def keep_slots(self, members: Collection[MemberId]) -> None:
        self.asked.append(frozenset(members))
        await asyncio.sleep(self.takes_s.popleft() if self.takes_s else 0)
        self.kept = frozenset(members)


class Server:
    """A real Database over a standby, with the supervisor and the slots in the test's hand."""

    def __init__(self, directory: Path) -> None:
        self.wire, self.slots, self.clock = Wire(), Slots(), VirtualClock()
        self.link = SupervisorLink(self.wire, now_s=self.clock.now_s, on_event=lambda _: None)
        self.link.postgres = PostgresProcess(7, "standby")
        self.database = Database(
            configuration(directory, "a"),
            cast(LocalPostgres, self.slots),
            self.link,
            self.clock,
            Beat(self.clock),
            on_change=lambda: None,
        )
        self.listening = asyncio.create_task(self.link.run())


@pytest.fixture
async def server(tmp_path: Path) -> Any:
    found = Server(tmp_path)
    yield found
    found.listening.cancel()


async def test_old_slots_that_are_dropped_slowly_are_gone_before_a_promotion_makes_the_new_ones(server: Server) -> None:
    server.slots.takes_s.append(3.0)
    looking = asyncio.create_task(server.database._look())
    await settle()
    promoting = asyncio.create_task(server.database.prepare_slots(MEMBERS))
    await asyncio.gather(looking, promoting)
    assert server.slots.asked == [frozenset(), MEMBERS]
    assert server.slots.kept == MEMBERS


async def test_a_first_look_that_comes_after_the_promotion_has_begun_drops_no_slot(server: Server) -> None:
    server.slots.takes_s.append(3.0)
    promoting = asyncio.create_task(server.database.prepare_slots(MEMBERS))
    await settle()
    looking = asyncio.create_task(server.database._look())
    await asyncio.gather(looking, promoting)
    assert server.slots.kept == MEMBERS
    await server.database._look()
    assert server.slots.asked[-1] == MEMBERS


async def test_slots_are_looked_at_again_after_a_while(server: Server) -> None:
    await server.database.prepare_slots(MEMBERS)
    await server.database.prepare_slots(MEMBERS)
    assert server.slots.asked == [MEMBERS]
    await server.clock.sleep(SLOTS_INTERVAL_S)
    await server.database.prepare_slots(MEMBERS)
    assert server.slots.asked == [MEMBERS, MEMBERS]


async def test_r13_a_winner_that_gave_the_lease_back_and_follows_has_no_slots_and_lets_readers_in(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its promotion it made slots and closed the gate, in the life of the server that goes on as a standby."""

    async def follow(*_: object, **__: object) -> None:
        return None

    loaded: list[Access | None] = []

    async def reload() -> None:
        loaded.append(server.slots.access)

    monkeypatch.setattr(voting, "follow", follow)
    monkeypatch.setattr(server.database, "_reload", reload)
    await server.database.prepare_slots(MEMBERS)
    server.slots.access = Access.CLOSED
    await server.database.follow(Upstream(holder=B, epoch=Epoch(7), host="b", port=5432, member_id=A))
    await server.clock.sleep(SLOTS_INTERVAL_S)
    await server.database._look()
    await server.database._look()
    assert server.slots.asked == [MEMBERS, frozenset()]
    assert loaded == [Access.OPEN]


async def test_a_stop_that_the_supervisor_answers_late_is_carried_through(server: Server) -> None:
    """It waits in the supervisor's queue, so whoever asked sees the end of Postgres, and is not told that it failed."""
    stopping = asyncio.create_task(server.database.stop(deadline_s=2.0))
    await server.clock.sleep(6.0)
    assert [message["type"] for message in server.wire.sent] == ["signal"]
    server.wire.tells(type="postgres_exited", pid=7, exit_code=0, signal=None, reason="exit")
    assert await stopping is True
    assert not server.database.running


async def test_a_stop_that_is_never_answered_ends_as_one_that_must_be_killed(server: Server) -> None:
    assert await server.database.stop(deadline_s=2.0) is False
    assert server.database.running


async def test_a_stop_that_the_supervisor_refuses_is_an_error(server: Server) -> None:
    stopping = asyncio.create_task(server.database.stop(deadline_s=2.0))
    await settle()
    server.wire.tells(type="reply", id=server.wire.sent[-1]["id"], ok=False, error="Postgres is not running")
    with pytest.raises(SupervisorError, match="not running"):
        await stopping


async def gives_up_a_start(server: Server) -> int:
    server.link.postgres = None
    with pytest.raises(SupervisorSilent):
        await server.link.start("standby", None, ["postgres"], {})
    number = server.wire.sent[-1]["id"]
    assert isinstance(number, int)
    return number


async def test_a_start_that_was_given_up_may_happen_until_the_supervisor_answers(server: Server) -> None:
    number = await gives_up_a_start(server)
    assert server.link.may_start_yet
    server.wire.tells(type="reply", id=number, ok=True, error=None)
    await settle()
    assert server.link.may_start_yet, "it is answered, and nothing shows yet that it runs"
    server.wire.tells(type="postgres_started", pid=8, mode="standby")
    await settle()
    assert not server.link.may_start_yet
    assert server.link.postgres == PostgresProcess(8, "standby")


async def test_a_start_that_the_supervisor_refuses_late_happens_no_more(server: Server) -> None:
    number = await gives_up_a_start(server)
    server.wire.tells(type="reply", id=number, ok=False, error="a Postgres process is left")
    await settle()
    assert not server.link.may_start_yet


async def test_a_start_that_is_answered_in_time_leaves_nothing_open(server: Server) -> None:
    server.link.postgres = None
    starting = asyncio.create_task(server.link.start("standby", None, ["postgres"], {}))
    await settle()
    server.wire.tells(type="reply", id=server.wire.sent[-1]["id"], ok=True, error=None)
    server.wire.tells(type="postgres_started", pid=8, mode="standby")
    await starting
    assert not server.link.may_start_yet


async def test_a_start_that_could_not_be_sent_happens_never(server: Server) -> None:
    """Else nothing would be started, cloned or resumed here for as long as this agent lives."""
    server.link.postgres = None
    server.wire.full = True
    with pytest.raises(SupervisorError, match="cannot reach the supervisor"):
        await server.link.start("standby", None, ["postgres"], {})
    assert not server.link.may_start_yet


async def test_a_primary_whose_disk_was_slow_when_it_began_archives_as_soon_as_it_can(server: Server) -> None:
    """Else its archive_command would be refused, and its log pile up, until it is started again."""
    server.link.postgres = PostgresProcess(7, "read_write")
    server.slots.disk_is_slow = True
    await server.database._look()
    server.slots.disk_is_slow = False
    await server.database._look()
    await server.database._look()
    assert server.slots.allowed == ["push"]


async def test_a_primary_that_is_to_stop_archives_no_more_whoever_looks_at_it(server: Server) -> None:
    server.link.postgres = PostgresProcess(7, "read_write")
    await server.database._look()
    stopping = asyncio.create_task(server.database.stop(deadline_s=2.0))
    await settle()
    await server.database._look()
    assert server.slots.allowed == ["push", None]
    assert await stopping is False
    await server.database._look()
    assert server.slots.allowed == ["push", None]


async def test_a_stop_that_could_not_be_asked_for_leaves_a_primary_that_archives(server: Server) -> None:
    server.link.postgres = PostgresProcess(7, "read_write")
    server.wire.full = True
    with pytest.raises(SupervisorError):
        await server.database.stop(deadline_s=2.0)
    await server.database._look()
    assert server.slots.allowed == [None, "push"]


async def test_p8_a_reload_of_the_configuration_does_not_open_the_gate_of_a_primary_that_starts_meanwhile(
    server: Server, tmp_path: Path
) -> None:
    """The standby's was open when the reload looked; who starts as primary keeps clients out until its quorum caught up."""
    server.link.postgres = None
    reloading = asyncio.create_task(server.database.reload_configuration(configuration(tmp_path, "a")))
    await settle()
    starting = asyncio.create_task(server.database.start_primary(Epoch(7), NOBODY))
    await settle()
    server.slots.replacing.set()
    await asyncio.gather(reloading, starting, return_exceptions=True)
    assert server.slots.access is Access.CLOSED


@pytest.mark.parametrize("access", [Access.OPEN, Access.CLOSED, None])
async def test_p8_a_reload_brings_the_access_rules_of_the_gate_as_it_is(
    server: Server, tmp_path: Path, access: Access | None
) -> None:
    """None: edited by somebody, and whether clients are in cannot be told."""
    server.link.postgres = None
    server.slots.access = access
    server.slots.replacing.set()
    await server.database.reload_configuration(configuration(tmp_path, "a"))
    assert server.slots.accesses_written == ([access] if access is not None else [])
