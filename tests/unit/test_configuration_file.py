"""The configuration file is watched: an error keeps what was good, and is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from instance_manager.agent import configuration_file
from instance_manager.agent.configuration_file import Signature, keep_reading, signature
from instance_manager.agent.context import Journal
from instance_manager.config import ConfigurationError
from instance_manager.postgres.server import LocalPostgresError


class RealClock:
    def now_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class MountedFile:
    """As the kubelet mounts a ConfigMap: a link into a folder that is replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory / "c.yaml"
        self.path.symlink_to("..data/c.yaml")
        self.put("first")

    def put(self, content: str) -> None:
        version = self._directory / f"..{content}"
        version.mkdir()
        (version / "c.yaml").write_text(content)
        new = self._directory / "..new"
        new.symlink_to(version.name)
        new.rename(self._directory / "..data")


Lines = list[tuple[str, str]]


async def watched(
    mounted: MountedFile, seen: Signature | None, reload: Callable[[], Awaitable[str]], enough: Callable[[], bool]
) -> Lines:
    lines: Lines = []
    clock = RealClock()
    journal = Journal(clock, lambda what, why, _: lines.append((what, why)))
    task = asyncio.create_task(keep_reading(mounted.path, seen, reload, journal, clock))
    async with asyncio.timeout(5):
        while not enough():  # noqa: ASYNC110 - the file has no event of its own
            await asyncio.sleep(0.01)
    # It has looked again since, and done nothing more.
    await asyncio.sleep(0.1)
    task.cancel()
    return lines


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration_file, "LOOK_EVERY_S", 0.01)


@pytest.fixture
def mounted(tmp_path: Path) -> MountedFile:
    return MountedFile(tmp_path)


async def test_what_comes_into_the_place_of_the_file_is_taken_over_once(mounted: MountedFile) -> None:
    read: list[str] = []

    async def reload() -> str:
        read.append(mounted.path.read_text())
        return "reloaded"

    seen = signature(mounted.path)
    mounted.put("second")
    assert await watched(mounted, seen, reload, lambda: len(read) > 0) == [("configuration", "reloaded")]
    assert read == ["second"]


async def test_an_error_is_told_once_and_the_next_good_one_is_taken_over(mounted: MountedFile) -> None:
    read: list[str] = []

    async def reload() -> str:
        read.append(mounted.path.read_text())
        if len(read) == 1:
            mounted.put("third")
            raise ConfigurationError("c.yaml: Expected `int`, got `str` - at `$.cluster.instances`")
        return "reloaded"

    seen = signature(mounted.path)
    mounted.put("second")
    lines = await watched(mounted, seen, reload, lambda: len(read) > 1)
    assert read == ["second", "third"]
    assert [what for what, _ in lines] == ["configuration refused", "configuration"]
    assert "$.cluster.instances" in lines[0][1]


async def test_what_could_not_be_taken_over_for_another_reason_is_tried_again(mounted: MountedFile) -> None:
    tries = 0

    async def reload() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise LocalPostgresError("it is just being stopped")
        return "reloaded"

    seen = signature(mounted.path)
    mounted.put("second")
    assert await watched(mounted, seen, reload, lambda: tries >= 3) == [("configuration", "reloaded")]


async def test_a_file_that_is_away_for_a_moment_is_no_change(mounted: MountedFile) -> None:
    looked = asyncio.Event()

    async def reload() -> str:
        raise AssertionError("nothing has changed")

    seen = signature(mounted.path)
    mounted.path.unlink()
    assert signature(mounted.path) is None
    asyncio.get_running_loop().call_later(0.2, looked.set)
    asyncio.get_running_loop().call_later(0.1, lambda: mounted.path.symlink_to("..data/c.yaml"))
    assert await watched(mounted, seen, reload, looked.is_set) == []
