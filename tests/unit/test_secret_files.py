"""Secrets and certificates that are replaced: what is done, when, by whom, and that a failure is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from instance_manager.agent import secret_files
from instance_manager.agent.context import Context
from instance_manager.agent.secret_files import SecretFiles, keep_certificates, supervised
from instance_manager.agent.supervisor_link import SupervisorSilent
from instance_manager.certificate_sets import Certificates
from instance_manager.core.roles import Role
from instance_manager.postgres.server import LocalPostgresError


class Instance:
    """What the watchers see of an instance, and what they have done to it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "secret"
        self.path.write_text("one")
        self.done: list[str] = []
        self.failing = 0
        self.pauses = 0
        self.context = SimpleNamespace(
            configuration=SimpleNamespace(secrets=SimpleNamespace(files={"application_password": self.path})),
            role=Role.PRIMARY,
            gate_open=True,
            journal=SimpleNamespace(note=lambda what, why: self.done.append(f"note {what}")),
            database=SimpleNamespace(create_roles=self._create_roles, answers=True),
            clock=SimpleNamespace(sleep=self._sleep),
            remarks={},
        )

    async def _create_roles(self) -> None:
        if self.failing:
            self.failing -= 1
            raise LocalPostgresError("no session")
        self.done.append("roles")

    def write_passfile(self) -> None:
        self.done.append("passfile")

    async def _sleep(self, _: float) -> None:
        self.pauses += 1
        if self.pauses > 3:
            raise asyncio.CancelledError
        await asyncio.sleep(0)

    def files(self) -> SecretFiles:
        return SecretFiles(cast(Context, self.context), self)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(tmp_path)


async def run(watcher: Callable[[], Awaitable[None]]) -> None:
    """Four rounds."""
    with contextlib.suppress(asyncio.CancelledError):
        await watcher()


async def test_an_agent_begins_with_the_secrets_as_they_are(instance: Instance) -> None:
    files = instance.files()
    await files.look()
    await files.look()
    assert instance.done == ["passfile", "roles"]


async def test_a_changed_secret_is_written_for_replication_and_told_to_postgres(instance: Instance) -> None:
    files = instance.files()
    await files.look()
    instance.done.clear()
    instance.path.write_text("another")
    await files.look()
    assert instance.done == ["passfile", "note secrets", "roles"]


@pytest.mark.parametrize(("role", "gate_open"), [(Role.STANDBY, False), (Role.PROMOTING, False), (Role.PRIMARY, False)])
async def test_only_an_open_primary_changes_roles(instance: Instance, role: Role, gate_open: bool) -> None:
    instance.context.role, instance.context.gate_open = role, gate_open
    files = instance.files()
    await files.look()
    assert instance.done == ["passfile"]
    instance.context.role, instance.context.gate_open = Role.PRIMARY, True
    await files.look()
    assert instance.done == ["passfile", "roles"]


async def test_what_failed_is_done_the_next_time_and_told_meanwhile(instance: Instance) -> None:
    files = instance.files()
    instance.failing = 1
    with pytest.raises(LocalPostgresError):
        await files.look()
    await files.look()
    assert instance.done == ["passfile", "roles"]
    instance.failing, instance.done = 100, []
    instance.path.write_text("another")
    await run(files.keep)
    assert instance.context.remarks["secrets"] == ("secrets: no session",)


class Sets:
    """Certificates of which `news` are new, one after another."""

    replaced_at_start: tuple[str, ...] = ()

    def __init__(self, *news: tuple[str, ...]) -> None:
        self._news = list(news)

    def look(self) -> tuple[str, ...]:
        return self._news.pop(0) if self._news else ()

    def remarks(self, _: float) -> tuple[str, ...]:
        return ("tls.peers: ends soon",)


async def keep(instance: Instance, sets: Sets, failing: int = 0) -> None:
    left = failing

    async def renew() -> None:
        instance.done.append("renew")

    async def reload() -> None:
        nonlocal left
        if left:
            left -= 1
            raise SupervisorSilent("no answer to signal within 5 s")
        instance.done.append("reload")

    await run(lambda: keep_certificates(cast(Context, instance.context), cast(Certificates, sets), renew, reload))


async def test_each_use_of_a_new_certificate_is_served_anew_once(instance: Instance) -> None:
    await keep(instance, Sets(("peers", "control", "postgres")))
    assert instance.done == ["renew", "note certificates", "reload", "note certificates"]
    assert instance.context.remarks["certificates"] == ("tls.peers: ends soon",)


async def test_what_was_replaced_before_this_agent_is_told_to_a_postgres_that_outlived_the_last_one(
    instance: Instance,
) -> None:
    sets = Sets()
    sets.replaced_at_start = ("postgres",)
    await keep(instance, sets)
    assert instance.done == ["reload", "note certificates"]


async def test_a_reload_that_the_supervisor_did_not_answer_is_owed(instance: Instance) -> None:
    """Else Postgres serves the old certificate to its end, and the members refuse it then."""
    await keep(instance, Sets((), ("postgres",)), failing=1)
    assert instance.done == ["reload", "note certificates"]


class SlowSets(Sets):
    """The disk stalls at the first look: it has its result when nobody waits for it any more."""

    def __init__(self, *news: tuple[str, ...]) -> None:
        super().__init__(*news)
        self._given_up = threading.Event()
        self._looks = 0

    def look(self) -> tuple[str, ...]:
        found = super().look()
        self._looks += 1
        if self._looks == 1:
            self._given_up.wait(10)
        else:
            self._given_up.set()
        return found


async def test_what_a_look_replaced_that_came_back_too_late_is_used_all_the_same(
    instance: Instance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used = ["renew", "note certificates", "reload", "note certificates"]
    ends_s = time.monotonic() + 5

    async def sleep(_: float) -> None:
        await asyncio.sleep(0.01)
        if instance.done == used or time.monotonic() > ends_s:
            raise asyncio.CancelledError

    monkeypatch.setattr(secret_files, "LOOK_DEADLINE_S", 0.1)
    instance.context.clock.sleep = sleep
    await keep(instance, SlowSets(("peers", "postgres")))
    assert instance.done == used
    assert "TimeoutError; tried again" in caplog.text


async def test_postgres_is_reloaded_when_it_answers_and_not_before(instance: Instance) -> None:
    instance.context.database.answers = False
    await keep(instance, Sets(("postgres",)))
    assert instance.done == []

    instance.pauses, after_two = 0, iter((False, False, True, True))

    async def sleep(_: float) -> None:
        instance.context.database.answers = next(after_two)
        await instance._sleep(0)

    instance.context.clock.sleep = sleep
    await keep(instance, Sets(("postgres",)))
    assert instance.done == ["reload", "note certificates"]


async def test_what_fails_unexpectedly_is_begun_again_and_ends_nothing(
    instance: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def broken() -> None:
        nonlocal tries
        tries += 1
        raise ZeroDivisionError

    with contextlib.suppress(asyncio.CancelledError):
        await supervised("a duty", broken, instance.context.clock)
    assert tries == 4
    assert "a duty failed; begun again in 1 s" in caplog.text
