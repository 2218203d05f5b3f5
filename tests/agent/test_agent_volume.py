"""The volume's memory: nothing that was promised is lost under another save, a full disk, a reboot or a copy."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_builders import A, B, P

from instance_manager.agent import volume as volume_module
from instance_manager.agent.volume import Volume, VolumeDirectory, VolumeUnusable
from instance_manager.codec import from_json
from instance_manager.core.types import Epoch, MemberName
from instance_manager.core.voting import VolumeState
from instance_manager.postgres.files import write_atomically


def loaded(directory: Path, *, now_s: float = 1000.0, boot_id: str = "boot-1") -> Volume:
    made = Volume(VolumeDirectory(directory, None), boot_id=boot_id, chance=random.Random())
    made.load(now_s=now_s, lease_duration_s=10.0)
    return made


def on_disk(directory: Path) -> VolumeState:
    return from_json((directory / "volume.json").read_bytes(), VolumeState)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A disk on which nothing can be written while there is a reserve; collects the names of what was tried."""
    tried: list[str] = []

    def write(path: Path, content: bytes, **options: Any) -> None:
        tried.append(path.name)
        if (path.parent / ".reserve").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, content, **options)

    monkeypatch.setattr(volume_module, "write_atomically", write)
    return tried


async def test_p6_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    before = loaded(tmp_path)
    await before.save(lambda state: state.promising(Epoch(7), A))
    after = loaded(tmp_path)
    assert after.state == before.state
    assert (after.state.promised_epoch, after.state.promised_to) == (7, A)


async def test_p6_concurrent_saves_lose_nothing(tmp_path: Path) -> None:
    volume = loaded(tmp_path)
    await asyncio.gather(
        volume.save(lambda state: state.promising(Epoch(7), A)),
        volume.save(lambda state: replace(state, starts=state.starts + 1)),
        volume.new_member(MemberName("b")),
        volume.save(lambda state: replace(state, starts=state.starts + 1)),
        volume.save(lambda state: state.seen(Epoch(9))),
    )
    found = on_disk(tmp_path)
    assert found == volume.state
    assert (found.promised_epoch, found.highest_epoch, found.starts) == (7, 9, 2)
    assert found.member_id is not None


async def test_section_4_of_two_concurrent_promises_of_one_epoch_one_is_refused(tmp_path: Path) -> None:
    volume = loaded(tmp_path)
    made = await asyncio.gather(
        volume.save(lambda state: state.promising(Epoch(7), A)),
        volume.save(lambda state: state.promising(Epoch(7), B)),
        return_exceptions=True,
    )
    assert [type(each) for each in made] == [type(None), ValueError]
    assert on_disk(tmp_path).promised_to == A


@pytest.mark.parametrize("what", ["promised_epoch", "highest_epoch", "recorded_epoch"])
async def test_r3_an_epoch_never_goes_back(tmp_path: Path, what: str) -> None:
    volume = loaded(tmp_path)
    await volume.save(
        lambda state: replace(state, promised_epoch=Epoch(7), highest_epoch=Epoch(7), recorded_epoch=Epoch(7))
    )

    def back(state: VolumeState) -> VolumeState:
        changes: dict[str, Any] = {what: Epoch(6)}
        return replace(state, **changes)

    with pytest.raises(ValueError, match="never forgotten"):
        await volume.save(lambda state: back(state))
    assert getattr(on_disk(tmp_path), what) == getattr(volume.state, what) == 7


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"promised_epoch": "seven"}', b"\xff\xfe"])
async def test_p6_a_state_that_cannot_be_read_is_an_error_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "volume.json").write_bytes(content)
    with pytest.raises(VolumeUnusable):
        loaded(tmp_path)
    assert (tmp_path / "volume.json").read_bytes() == content


async def test_r6_a_copied_directory_is_no_member_but_what_it_promised_stays_promised(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    volume = loaded(original)
    await volume.new_member(MemberName("a"))
    await volume.save(lambda state: state.promising(Epoch(7), A))
    shutil.copytree(original, copy)
    found = loaded(copy).state
    assert found.member_id is None
    assert (found.promised_epoch, found.promised_to) == (7, A)
    assert found.volume_id != volume.state.volume_id
    assert loaded(original).state.member_id == volume.state.member_id


async def test_r6_every_new_directory_is_a_new_member(tmp_path: Path) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: replace(state.promising(Epoch(7), A), was_primary=True))
    first = await volume.new_member(MemberName("a"))
    second = await volume.new_member(MemberName("a"))
    assert first != second
    assert on_disk(tmp_path).member_id == second
    assert not on_disk(tmp_path).was_primary
    assert on_disk(tmp_path).promised_epoch == 7


async def test_r11_after_a_reboot_an_extension_binds_for_the_whole_duration(tmp_path: Path) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: replace(state, extension_epoch=Epoch(5), extension_until_s=900_000.0))
    found = loaded(tmp_path, now_s=12.0, boot_id="boot-2").state
    assert found.extension_until_s == 22.0
    assert found.boot_id == "boot-2"


async def test_r11_within_one_boot_an_extension_ends_when_it_was_said_to(tmp_path: Path) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: replace(state, extension_until_s=1008.0))
    assert loaded(tmp_path, now_s=1001.0).state.extension_until_s == 1008.0


async def test_on_a_full_disk_the_reserve_is_given_up_for_a_promise(tmp_path: Path, full: list[str]) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: state.promising(Epoch(7), A))
    assert (tmp_path / ".reserve").stat().st_size >= volume_module.RESERVE_BYTES
    full.clear()
    await volume.save(lambda state: state.promising(Epoch(8), B))
    assert full == ["volume.json", "volume.json"]
    assert on_disk(tmp_path).promised_to == B


async def test_after_a_full_disk_the_reserve_is_laid_aside_again(tmp_path: Path, full: list[str]) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: state.seen(Epoch(7)))
    await volume.save(lambda state: state.seen(Epoch(8)))
    assert not (tmp_path / ".reserve").exists()
    await volume.save(lambda state: state.seen(Epoch(9)))
    assert (tmp_path / ".reserve").exists()


async def test_p6_a_failed_write_leaves_the_old_state_in_memory_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: state.promising(Epoch(7), A))

    def fail(path: Path, content: bytes, **_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(volume_module, "write_atomically", fail)
    with pytest.raises(VolumeUnusable, match="Input/output error"):
        await volume.save(lambda state: state.promising(Epoch(8), B))
    assert (volume.state.promised_epoch, volume.state.promised_to) == (7, A)
    assert on_disk(tmp_path) == volume.state
    monkeypatch.undo()
    await volume.save(lambda state: state.promising(Epoch(8), P))
    assert on_disk(tmp_path).promised_to == P


async def test_p6_a_state_that_was_never_persisted_is_written_even_if_it_is_as_before(tmp_path: Path) -> None:
    volume = loaded(tmp_path)
    await volume.save(lambda state: state)
    assert on_disk(tmp_path) == volume.state


def test_p6_a_write_whose_operation_was_ended_never_lands_over_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation is ended amid its save; a promise that is made then comes after it, and is not forgotten on the disk."""
    stalled, go_on = threading.Event(), threading.Event()

    def write(path: Path, content: bytes, **options: Any) -> None:
        if path.name == "volume.json" and not stalled.is_set():
            stalled.set()
            go_on.wait(5)
        write_atomically(path, content, **options)

    async def scenario() -> None:
        volume = loaded(tmp_path)
        ended = asyncio.create_task(volume.save(lambda state: state.seen(Epoch(7))))
        assert await asyncio.to_thread(stalled.wait, 5)
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        promise = asyncio.create_task(volume.save(lambda state: state.promising(Epoch(8), B)))
        # Whoever does not wait for the late one is done by now.
        await asyncio.wait([promise], timeout=0.5)
        go_on.set()
        await promise
        await asyncio.get_running_loop().shutdown_default_executor()
        assert volume.state.promised_epoch == 8
        assert on_disk(tmp_path) == volume.state

    monkeypatch.setattr(volume_module, "write_atomically", write)
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as real_time:
        real_time.run(scenario())


def test_p6_a_write_that_was_given_up_at_its_deadline_never_lands_over_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stalls under promise 7 and is given up. Promise 8 is not made before 7 has come back, one way or the other."""
    stalled, go_on, landed = threading.Event(), threading.Event(), threading.Event()

    def write(path: Path, content: bytes, **options: Any) -> None:
        if path.name == "volume.json" and not stalled.is_set():
            stalled.set()
            go_on.wait(5)
            write_atomically(path, content, **options)
            landed.set()
        else:
            write_atomically(path, content, **options)

    async def scenario() -> None:
        volume = loaded(tmp_path)
        with pytest.raises(VolumeUnusable):
            await volume.save(lambda state: state.promising(Epoch(7), A))
        with pytest.raises(VolumeUnusable):
            await volume.save(lambda state: state.promising(Epoch(8), B))
        assert volume.state.promised_epoch == 0
        go_on.set()
        await asyncio.to_thread(landed.wait, 1)
        async with asyncio.timeout(5):
            while True:
                try:
                    await volume.save(lambda state: state.promising(Epoch(8), B))
                except VolumeUnusable:
                    await asyncio.sleep(0)
                else:
                    break

    monkeypatch.setattr(volume_module, "write_atomically", write)
    monkeypatch.setattr(volume_module, "WRITE_DEADLINE_S", 0.05)
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as real_time:
        real_time.run(scenario())
    assert on_disk(tmp_path).promised_epoch == 8
