"""What a primary sees of its standbys, and an instance of its own disk and Postgres; a pause of its own proves nothing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from agent_builders import A, B
from agent_fakes import HandClock, VirtualClock
from agent_instance import configuration

from instance_manager.agent import health as health_module
from instance_manager.agent.beat import Beat
from instance_manager.agent.database import Database
from instance_manager.agent.health import DiskProbe, Health
from instance_manager.agent.postgres_port import LocalPostgres
from instance_manager.agent.standby_watch import MAXIMUM_STABLE_NEEDED_S, StandbyWatch, Walsender
from instance_manager.agent.supervisor_link import SupervisorLink
from instance_manager.core.quorum import StandbyHealth
from instance_manager.core.types import Lsn, MemberId
from instance_manager.postgres.server import DeadlinePassed
from instance_manager.postgres.sql import SqlUnavailable


class Standbys:
    """A primary that looks every 0.5 s at standbys that reply, freeze, or go away."""

    def __init__(self) -> None:
        self.watch = StandbyWatch(stable_s=1.0, silent_after_s=2.0)
        self.now_s = 1000.0
        self.replies: dict[MemberId, int] = {}

    def streams(self, *members: MemberId, for_s: float = 0.5, frozen: bool = False) -> None:
        ends_s = self.now_s + for_s
        while self.now_s < ends_s:
            self.now_s += 0.5
            senders = []
            for member in members:
                if not frozen:
                    self.replies[member] = self.replies.get(member, 0) + 1
                senders.append(Walsender(member, "streaming", Lsn(200), f"reply {self.replies.get(member, 0)}"))
            self.watch.look(senders, self.now_s)

    def freezes(self, member: MemberId, *, for_s: float) -> None:
        self.streams(member, for_s=for_s, frozen=True)

    def gone(self, *, for_s: float = 0.5) -> None:
        self.streams(for_s=for_s)

    def health(self, member: MemberId, *, first: bool = False) -> StandbyHealth:
        return self.watch.health(member, self.now_s, eligible=True, first=first)


def test_a_standby_that_was_never_seen_is_lost_for_ever() -> None:
    health = Standbys().health(A)
    assert not health.streaming
    assert health.lost_for_s == float("inf")


def test_section_4_a_standby_that_replies_streams_without_interruption() -> None:
    at = Standbys()
    at.streams(A, for_s=5)
    health = at.health(A)
    assert health.streaming
    assert health.lost_for_s == 0
    assert health.streaming_for_s == pytest.approx(4.5)
    assert at.health(A, first=True).stable_needed_s == 0


def test_section_4_a_moving_position_is_a_sign_of_life_without_a_reply_time() -> None:
    watch = StandbyWatch(stable_s=1.0, silent_after_s=2.0)
    for tenth in range(50):
        watch.look([Walsender(A, "streaming", Lsn(tenth), None)], 1000 + tenth / 10)
    assert watch.health(A, 1005, eligible=True, first=False).streaming


def test_section_4_a_silent_standby_is_lost_since_it_was_last_heard_of() -> None:
    at = Standbys()
    at.streams(A, for_s=3)
    at.freezes(A, for_s=1.5)
    assert at.health(A).streaming
    at.freezes(A, for_s=1.5)
    health = at.health(A)
    assert not health.streaming
    assert health.lost_for_s == pytest.approx(3.0)
    assert health.streaming_for_s == 0


def test_who_replies_each_second_is_heard_and_a_second_without_a_reply_is_noticed_before_it_counts() -> None:
    at = Standbys()
    at.streams(A, B, for_s=3)
    at.freezes(A, for_s=0.5)
    assert at.watch.all_are_heard
    at.freezes(A, for_s=0.5)
    assert not at.watch.all_are_heard
    assert at.health(A).streaming
    at.streams(A, for_s=0.5)
    assert at.watch.all_are_heard, "who has gone is not waited for"


def test_section_4_a_standby_without_a_walsender_is_lost_at_once() -> None:
    at = Standbys()
    at.streams(A, for_s=3)
    at.gone()
    health = at.health(A)
    assert not health.streaming
    assert health.lost_for_s == 0
    at.gone(for_s=2)
    assert at.health(A).lost_for_s == pytest.approx(2.0)


def test_section_4_a_standby_in_catchup_does_not_stream() -> None:
    watch = StandbyWatch(stable_s=1.0, silent_after_s=2.0)
    for tenth in range(50):
        watch.look([Walsender(A, "catchup", Lsn(tenth), f"{tenth}")], 1000 + tenth / 10)
    assert not watch.health(A, 1005, eligible=True, first=False).streaming


def test_section_4_the_silence_of_one_is_not_the_other_ones() -> None:
    at = Standbys()
    at.streams(A, B, for_s=3)
    at.streams(B, for_s=3)
    assert not at.health(A).streaming
    assert at.health(B).streaming


def test_r12_flapping_doubles_the_time_that_a_standby_must_stream() -> None:
    at = Standbys()
    needed = []
    for _ in range(9):
        at.streams(A, for_s=2)
        at.gone()
        needed.append(at.health(A).stable_needed_s)
    assert needed[:6] == [1, 2, 4, 8, 16, 32]
    assert needed[6:] == [MAXIMUM_STABLE_NEEDED_S] * 3


def test_r12_a_standby_that_streamed_for_long_has_its_flapping_forgotten() -> None:
    at = Standbys()
    for _ in range(4):
        at.streams(A, for_s=2)
        at.gone()
    at.streams(A, for_s=60)
    assert at.health(A).stable_needed_s == 8
    at.streams(A, for_s=70)
    assert at.health(A).stable_needed_s == 1


def test_r12_a_pause_of_the_primary_is_not_the_silence_of_its_standbys() -> None:
    at = Standbys()
    at.streams(A, for_s=3)
    at.now_s += 30
    at.freezes(A, for_s=0.5)
    health = at.health(A)
    assert health.streaming
    assert health.stable_needed_s == 1


def test_r12_after_a_pause_of_the_primary_silence_counts_from_its_end() -> None:
    at = Standbys()
    at.streams(A, for_s=3)
    at.now_s += 30
    at.freezes(A, for_s=3)
    health = at.health(A)
    assert not health.streaming
    assert health.lost_for_s == pytest.approx(2.5)


def test_r12_a_pause_of_the_primary_is_no_sign_of_life_of_a_lost_standby() -> None:
    """A frozen standby whose walsender is half open was dropped; after a pause it streams, stably enough to be added."""
    at = Standbys()
    at.streams(A, for_s=3)
    at.freezes(A, for_s=5)
    at.now_s += 5
    at.freezes(A, for_s=1.5)
    assert not at.health(A).streaming


# Disk and SQL.


class Probing:
    """A DiskProbe whose rounds are made by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.clock = HandClock()
        self.probe = DiskProbe((directory,), self.clock, 1.0)
        self.monkeypatch = monkeypatch

    def round(self, error: OSError | None = None, takes_s: float = 0.0) -> None:
        def write(path: Path) -> None:
            self.clock.time_s += takes_s
            self.probe.stop()
            if error is not None:
                raise error

        self.monkeypatch.setattr(health_module, "_write_and_flush", write)
        self.probe._stop.clear()
        self.probe._run()


def healthy(clock: Any, probe: DiskProbe, ask_sql: Callable[[float], Any] | None = None, free_bytes: int = 0) -> Health:
    async def fine(_: float) -> None:
        return None

    return Health(
        clock, Beat(clock), probe, ask_sql or fine, timeout_s=4.0, interval_s=1.0, minimum_free_bytes=free_bytes
    )


def test_section_3_a_disk_that_answers_is_healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at = Probing(monkeypatch, tmp_path)
    health = healthy(at.clock, at.probe)
    at.clock.time_s += 3.9
    at.round()
    at.clock.time_s += 3.9
    assert health.unhealthy() is None


def test_section_3_a_stalled_disk_is_unhealthy_after_the_timeout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at = Probing(monkeypatch, tmp_path)
    health = healthy(at.clock, at.probe)
    at.clock.time_s += 4.1
    assert health.unhealthy() == "no write to the volume has come back for 4.1 s"


def test_section_3_a_write_proves_the_disk_for_when_it_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at = Probing(monkeypatch, tmp_path)
    health = healthy(at.clock, at.probe)
    at.round(takes_s=4.5)
    assert health.unhealthy() is not None


def test_section_3_a_disk_with_errors_is_unhealthy_and_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at = Probing(monkeypatch, tmp_path)
    health = healthy(at.clock, at.probe)
    at.clock.time_s += 4.1
    at.round(OSError(errno.EIO, "Input/output error", "/v/.disk-probe"))
    found = health.unhealthy()
    assert found is not None
    assert "Input/output error: /v/.disk-probe" in found
    at.round()
    assert health.unhealthy() is None


def test_a_volume_is_full_below_its_minimum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at = Probing(monkeypatch, tmp_path)
    assert not healthy(at.clock, at.probe, free_bytes=1 << 60).is_full
    at.round()
    assert healthy(at.clock, at.probe, free_bytes=1 << 60).is_full
    assert not healthy(at.clock, at.probe, free_bytes=1).is_full


def test_a_probe_really_writes_and_follows_no_link(tmp_path: Path) -> None:
    clock = HandClock()
    probe = DiskProbe((tmp_path,), clock, 1.0)
    probe.stop()
    health_module._write_and_flush(tmp_path / ".disk-probe")
    assert (tmp_path / ".disk-probe").stat().st_size == 4096
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        health_module._write_and_flush(tmp_path / "link")


def test_section_3_a_pause_of_this_process_is_neither_the_disks_nor_postgres(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at = Probing(monkeypatch, tmp_path)
    health = healthy(at.clock, at.probe)
    health.expect_sql(True)
    at.clock.time_s += 60
    health.was_paused()
    assert health.unhealthy() is None
    at.clock.time_s += 4.1
    assert health.unhealthy() is not None


async def test_section_3_postgres_that_answers_no_new_connection_is_unhealthy_only_when_it_should_answer(
    tmp_path: Path,
) -> None:
    clock = VirtualClock()
    probe = DiskProbe((tmp_path,), clock, 1.0)
    answers = True

    async def ask(_: float) -> None:
        if not answers:
            raise TimeoutError("no answer")

    health = healthy(clock, probe, ask)
    running = asyncio.create_task(health.run())
    try:
        answers = False
        for _ in range(10):
            probe.last_good_s = clock.now_s()
            await clock.sleep(1)
        assert health.unhealthy() is None
        health.expect_sql(True)
        await clock.sleep(3.5)
        probe.last_good_s = clock.now_s()
        assert health.unhealthy() is None
        await clock.sleep(0.6)
        probe.last_good_s = clock.now_s()
        found = health.unhealthy()
        assert found is not None
        assert "no answer" in found
        answers = True
        await clock.sleep(1.1)
        assert health.unhealthy() is None
    finally:
        running.cancel()


def database_whose_postmaster(answer: Callable[[], None], directory: Path) -> Database:
    """The real one, over a Postgres of which nothing but new connections matters."""

    async def answers_new_connection(*, deadline_s: float) -> None:
        answer()

    postgres = SimpleNamespace(
        running=SimpleNamespace(settings_file=None),
        inspect_at_start=lambda: None,
        answers_new_connection=answers_new_connection,
    )
    return Database(
        configuration(directory, "p"),
        cast(LocalPostgres, postgres),
        cast(SupervisorLink, SimpleNamespace(postgres=None)),
        VirtualClock(),
        Beat(VirtualClock()),
        on_change=lambda: None,
    )


@pytest.mark.parametrize(
    ("error", "alive"),
    [
        (None, True),
        (SqlUnavailable("the database system is starting up", "57P03"), True),
        (SqlUnavailable("the database system is not yet accepting connections", "57P03"), True),
        (SqlUnavailable("the database system is shutting down", "57P03"), False),
        (SqlUnavailable("terminating connection due to administrator command", "57P01"), False),
        (SqlUnavailable("[Errno 2] No such file or directory"), False),
        (DeadlinePassed("connecting over the Unix socket", 2.0), False),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
async def test_section_3_a_postmaster_that_starts_up_is_alive_and_one_that_shuts_down_or_is_silent_is_not(
    tmp_path: Path, error: Exception | None, alive: bool
) -> None:
    """A long recovery must not be killed in a loop (cloudnative-pg#11024), nor a postmaster be waited for that never answers."""

    def answer() -> None:
        if error is not None:
            raise error

    clock = VirtualClock()
    probe = DiskProbe((tmp_path,), clock, 1.0)
    health = healthy(clock, probe, database_whose_postmaster(answer, tmp_path).answers_new_connection)
    running = asyncio.create_task(health.run())
    try:
        # From its very start: it need not have answered before.
        health.expect_sql(True)
        await clock.sleep(3.9)
        probe.last_good_s = clock.now_s()
        assert health.unhealthy() is None
        await clock.sleep(2)
        found = health.unhealthy()
        assert (found is None) == alive
        assert alive or str(error) in str(found)
    finally:
        running.cancel()
