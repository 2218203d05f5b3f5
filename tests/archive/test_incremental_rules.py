"""Incremental backups without a server: what of a file is sent, the file's format, chains, and what may go."""

from __future__ import annotations

import hashlib
import json
import tarfile
from array import array
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from archive_harness import chain_of as timelines
from backup_harness import LAYOUT
from hypothesis import given
from hypothesis import strategies as st
from test_retention import DAY_S, info_at, listed_at

from instance_manager.archive.backup.catalogue import (
    Listed,
    NoSuchBackup,
    State,
    chain_of,
    list_backups,
    with_chains,
)
from instance_manager.archive.backup.data_files import DataFile
from instance_manager.archive.backup.expire import expire
from instance_manager.archive.backup.increment import (
    MAGIC,
    ChangedBlocks,
    Delta,
    FormatInvalid,
    RelationFile,
    header,
    increment_bytes,
    incremental_name,
    parse_header,
    relation_file,
)
from instance_manager.archive.backup.increment_from import CHAIN_MAX, ServerFacts, choose_parent
from instance_manager.archive.backup.info import parse_info, render_info
from instance_manager.archive.backup.manifest import Manifest
from instance_manager.archive.backup.names import BackupNames, is_backup_id
from instance_manager.archive.backup.page_checksums import PAGE_BYTES, PAGES_PER_FILE
from instance_manager.archive.backup.removal import BackupKept, delete_backup, keep_backup
from instance_manager.archive.backup.retention import Policy, expiry, stands_on
from instance_manager.archive.backup.standing import Mark, holders_of
from instance_manager.archive.backup.summaries import (
    IncrementRefused,
    Span,
    first_uncovered,
    is_gap,
    spans_between,
)
from instance_manager.archive.backup.tar_stream import Flow, Member, TarContent
from instance_manager.archive.codecs import Codec
from instance_manager.archive.content import MemoryContent
from instance_manager.archive.recovery.combine import CannotCombine, ManifestWriter, require_means, room_for
from instance_manager.archive.recovery.extract import Destination
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.codec import to_json
from instance_manager.core.types import Lsn, Timeline, TimelineChain
from instance_manager.ports import ObjectStore
from instance_manager.postgres.server import LocalServer

FILE = RelationFile(1663, 5, 16384, 0)
SERVER = ServerFacts(system_identifier="1", major=15, has_checksums=True)


def changes(*blocks: int, file: RelationFile = FILE) -> ChangedBlocks:
    found = ChangedBlocks()
    if blocks:
        found.change(file, array("I", blocks))
    return found


# What of a file is sent


def test_only_main_forks_of_relations_go_in_part() -> None:
    assert relation_file("base/5/1259") == RelationFile(1663, 5, 1259, 0)
    assert relation_file("base/5/INCREMENTAL.1259.3") == RelationFile(1663, 5, 1259, 3)
    assert relation_file("global/1262") == RelationFile(1664, 0, 1262, 0)
    assert relation_file("PG_17_202406281/5/1259.1", 16400) == RelationFile(16400, 5, 1259, 1)
    for name in (
        "base/5/1259_vm",
        "base/5/1259_fsm",
        "base/5/1259_init",
        "base/5/PG_VERSION",
        "global/pg_control",
        "PG_VERSION",
    ):
        assert relation_file(name) is None
    assert relation_file("base/5/1259", 16400) is None
    assert relation_file("PG_17_202406281/5/1259") is None
    assert incremental_name("base/5/1259.1") == "base/5/INCREMENTAL.1259.1"


def test_what_a_summary_names_is_sent_and_nothing_else() -> None:
    assert changes().to_send(FILE, 10 * PAGE_BYTES) == []
    assert changes(3, 7, 12).to_send(FILE, 10 * PAGE_BYTES) == [3, 7], "the last is beyond the file's end"
    assert changes(*range(9)).to_send(FILE, 10 * PAGE_BYTES) == list(range(9))
    assert changes(*range(10)).to_send(FILE, 10 * PAGE_BYTES) is None, "all of it: whole"
    assert changes().to_send(FILE, 0) is None
    assert changes().to_send(FILE, 10 * PAGE_BYTES + 1) is None


def test_what_was_made_anew_goes_whole_and_what_was_cut_off_is_sent_from_there() -> None:
    made = changes(3)
    made.limit(*FILE[:3], 0)
    assert made.to_send(FILE, 10 * PAGE_BYTES) is None
    cut = changes(3, 9)
    cut.limit(*FILE[:3], 8)
    cut.limit(*FILE[:3], 9)
    assert cut.to_send(FILE, 10 * PAGE_BYTES) == [3, 8, 9], "the lowest counts, and what is behind it is new"
    assert cut.to_send(FILE, 8 * PAGE_BYTES) == [3]
    second = FILE._replace(segment=1)
    assert cut.to_send(second, 10 * PAGE_BYTES) is None
    far = changes()
    far.limit(*FILE[:3], PAGES_PER_FILE + 3)
    assert far.to_send(FILE, 10 * PAGE_BYTES) == []
    assert far.to_send(second, 5 * PAGE_BYTES) == [3, 4]
    assert far.to_send(second, 40 * PAGE_BYTES) is None, "more than nine tenths"


def test_a_new_database_goes_whole_and_so_does_what_the_backup_before_has_not() -> None:
    found = changes(1)
    found.limit(1663, 5, 0, 0)
    assert found.to_send(FILE, 10 * PAGE_BYTES) is None
    assert found.to_send(FILE._replace(database=6), 10 * PAGE_BYTES) == []
    assert Delta(FILE, changes(1), frozenset()).to_send(10 * PAGE_BYTES) is None
    assert Delta(FILE, changes(1), frozenset({FILE})).to_send(10 * PAGE_BYTES) == [1]


@given(st.sets(st.integers(0, 200)), st.integers(1, 220))
def test_every_block_that_changed_is_sent_once_in_order(blocks: set[int], length: int) -> None:
    sent = changes(*blocks).to_send(FILE, length * PAGE_BYTES)
    expected = sorted(block for block in blocks if block < length)
    assert sent == (None if len(expected) > 0.9 * length else expected)


# The format


def test_a_header_is_padded_only_before_blocks() -> None:
    assert header([], 7) == MAGIC.to_bytes(4, "little") + bytes(4) + (7).to_bytes(4, "little")
    assert parse_header(header([], 7)) == ([], 7, 12)
    found = header([1, 5], 9)
    assert len(found) == PAGE_BYTES
    assert parse_header(found) == ([1, 5], 9, PAGE_BYTES)
    exact = list(range((PAGE_BYTES - 12) // 4))
    assert len(header(exact, 3000)) == PAGE_BYTES
    assert len(header([*exact, 2999], 3000)) == 2 * PAGE_BYTES
    for count in (0, 1, len(exact), len(exact) + 1):
        assert increment_bytes(count) == len(header(list(range(count)), 1)) + count * PAGE_BYTES
    for wrong in (b"", b"\0" * 12, found[:14]):
        with pytest.raises(FormatInvalid):
            parse_header(wrong)


def tar_of(content: TarContent) -> dict[str, bytes]:
    with tarfile.open(fileobj=BytesIO(b"".join(content.chunks()))) as tar:
        return {info.name: opened.read() for info in tar if (opened := tar.extractfile(info)) is not None}


def test_an_incremental_file_in_a_tar_holds_the_blocks_as_they_are_when_it_is_read(tmp_path: Path) -> None:
    pages = [bytes([number]) * PAGE_BYTES for number in range(20)]
    path = tmp_path / "16384"
    path.write_bytes(b"".join(pages))
    delta = Delta(FILE, changes(2, 3, 15, 19, 30), frozenset({FILE}))
    file = DataFile(path, "base/5/16384", 0, delta=delta)
    content = TarContent([file], Codec("none"), Flow(), checksums_before=None)
    held = tar_of(content)
    stored = held["base/5/INCREMENTAL.16384"]
    assert stored == header([2, 3, 15, 19], 20) + pages[2] + pages[3] + pages[15] + pages[19]
    (member,) = content.outcome.members
    assert member == Member("base/5/INCREMENTAL.16384", len(stored), member.mode, hashlib.sha256(stored).hexdigest())
    assert (content.outcome.content_bytes, content.outcome.whole_bytes) == (len(stored), 20 * PAGE_BYTES)
    path.write_bytes(b"".join(pages[:10]))
    assert tar_of(content)["base/5/INCREMENTAL.16384"] == header([2, 3], 10) + pages[2] + pages[3]


# Summaries


def at(number: int) -> Lsn:
    return Lsn(number * 0x100)


def test_summaries_cover_a_span_only_without_a_gap_and_on_its_timeline() -> None:
    one = Timeline(1)
    span = Span(one, at(10), at(40))
    whole = [Span(one, at(5), at(20)), Span(one, at(20), at(50))]
    assert first_uncovered(span, reversed(whole)) is None
    assert first_uncovered(span, whole[:1]) == at(20)
    assert first_uncovered(span, whole[1:]) == at(10)
    assert first_uncovered(span, [Span(Timeline(2), at(0), at(50))]) == at(10)
    gap = [Span(one, at(5), at(20)), Span(one, at(21), at(50))]
    assert first_uncovered(span, gap) == at(20)
    assert is_gap(span, at(20), [span], gap)
    assert not is_gap(span, at(20), [span], whole[:1]), "it may yet come"
    after = Span(Timeline(2), at(40), at(60))
    assert is_gap(span, at(20), [span, after], [whole[0], Span(Timeline(2), at(40), at(50))])


def test_the_log_between_two_backups_follows_the_history() -> None:
    before = replace(info_at(1), begin_lsn=at(10), end_lsn=at(12))
    chain = timelines((2, 1, at(20)), (3, 2, at(30)))
    assert spans_between(before, TimelineChain(Timeline(1)), at(15)) == [Span(Timeline(1), at(10), at(15))]
    assert spans_between(before, chain, at(50)) == [
        Span(Timeline(1), at(10), at(20)),
        Span(Timeline(2), at(20), at(30)),
        Span(Timeline(3), at(30), at(50)),
    ]
    skipped = timelines((5, 1, at(20)))
    assert [each.timeline for each in spans_between(before, skipped, at(50))] == [1, 5]
    with pytest.raises(IncrementRefused, match="behind the fork"):
        spans_between(replace(before, end_lsn=at(25)), chain, at(50))
    with pytest.raises(IncrementRefused, match="last checkpoint is from before"):
        spans_between(before, TimelineChain(Timeline(1)), at(11))


# Chains


def increment_at(day: int, parent: Listed | str, state: State = "done", **changed: Any) -> Listed:
    full = listed_at(day, state, **changed)
    parent_id = parent if isinstance(parent, str) else parent.backup_id
    backup_id = full.backup_id + "i"
    info = None if full.info is None else replace(full.info, backup_id=backup_id, parent_id=parent_id)
    return replace(full, backup_id=backup_id, info=info, parent_id=parent_id)


def test_a_chain_begins_with_the_full_one() -> None:
    full = listed_at(0)
    first = increment_at(1, full)
    second = increment_at(2, first)
    assert chain_of([full, first, second], second) == (full, first, second)
    assert chain_of([full, first, second], full) == (full,)
    with pytest.raises(NoSuchBackup, match=f"{first.backup_id} stands on {full.backup_id}"):
        chain_of([first, second], second)
    assert stands_on([full, first, second], full.backup_id) == [first.backup_id, second.backup_id]


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ("done", "done"),
        ("damaged", "damaged"),
        ("failed", "orphaned"),
        ("deleting", "orphaned"),
        ("unreadable", "orphaned"),
    ],
)
def test_what_is_wrong_with_a_backup_is_wrong_with_all_that_stands_on_it(parent: State, expected: State) -> None:
    full = listed_at(0, parent)
    first = increment_at(1, full)
    second = increment_at(2, first)
    assert [each.state for each in with_chains([full, first, second])] == [parent, expected, expected]
    assert [each.state for each in with_chains([first, second])] == ["orphaned", "orphaned"]


def own(listed: Listed, **changed: Any) -> Listed:
    """With a manifest, as what we took."""
    manifest = Manifest(backup_id=listed.backup_id, instance="orders-1", was_standby=False, tars=(), has_checksums=True)
    return replace(listed, manifest=replace(manifest, **changed))


def test_the_newest_good_backup_of_the_servers_history_is_stood_on() -> None:
    chain = timelines((2, 1, 25 * (1 << 20)))
    before, dead, after = own(listed_at(0)), own(listed_at(3)), own(listed_at(4, timeline=2))
    assert choose_parent([before, dead], chain, SERVER, None).backup_id == before.backup_id
    assert choose_parent([before, dead, after], chain, SERVER, None).backup_id == after.backup_id
    assert choose_parent([before, dead, after], chain, SERVER, before.backup_id).backup_id == before.backup_id
    for listed, server, text in (
        ([before], replace(SERVER, system_identifier="2"), "not part of this server's history"),
        ([before], replace(SERVER, major=18), "is of Postgres 15, with checksums: the server is 18"),
        ([before], replace(SERVER, has_checksums=False), "with checksums: the server is 15, without"),
        ([own(listed_at(0), has_checksums=None)], SERVER, "an earlier version took it"),
        ([listed_at(0)], SERVER, "barman took"),
        ([own(listed_at(0, "damaged"))], SERVER, "is damaged"),
        ([], SERVER, "there is no backup that it could stand on"),
    ):
        with pytest.raises(IncrementRefused, match=text):
            choose_parent(listed, chain, server, None)
    with pytest.raises(IncrementRefused, match="there is no backup 'x'"):
        choose_parent([before], chain, SERVER, "x")


def test_no_more_than_so_many_stand_on_one_another() -> None:
    backups = [own(listed_at(0))]
    for day in range(1, CHAIN_MAX):
        backups.append(own(increment_at(day, backups[-1])))
    with pytest.raises(IncrementRefused, match="no more may"):
        choose_parent(backups, TimelineChain(Timeline(1)), SERVER, backups[-1].backup_id)
    assert choose_parent(backups, TimelineChain(Timeline(1)), SERVER, None).length == CHAIN_MAX - 1


# What may go


def going(listed: list[Listed], policy: Policy) -> list[int]:
    places = {each.backup_id: place for place, each in enumerate(listed)}
    return [places[each.backup_id] for each in expiry(listed, policy).backups]


def three_chains() -> list[Listed]:
    """Of a full one and two incremental ones each, a day apart."""
    found: list[Listed] = []
    for day in range(0, 9, 3):
        found.append(listed_at(day))
        found += [first := increment_at(day + 1, found[-1]), increment_at(day + 2, first)]
    return found


def test_the_count_is_of_chains_and_a_chain_goes_from_its_end() -> None:
    listed = three_chains()
    assert going(listed, Policy(count=1)) == [2, 1, 0, 5, 4, 3]
    assert going(listed, Policy(count=2)) == [2, 1, 0]
    assert going(listed[:8], Policy(count=3)) == []
    assert going(listed[:4], Policy(count=1)) == [2, 1, 0]


def test_a_window_keeps_all_that_the_oldest_of_it_stands_on() -> None:
    listed = three_chains()
    # Three days back from day 8 is day 5, which stands on days 4 and 3.
    assert going(listed, Policy(window_s=3 * DAY_S)) == [2, 1, 0]
    assert going(listed, Policy(window_s=2 * DAY_S)) == [2, 1, 0, 5, 4, 3]
    kept = expiry(listed, Policy(window_s=3 * DAY_S)).wal
    assert kept is not None
    assert kept.from_number == 30


def test_a_keep_holds_what_it_stands_on_and_nothing_else() -> None:
    listed = three_chains()
    listed[1] = replace(listed[1], keep="full")
    assert going(listed, Policy(count=1)) == [2, 5, 4, 3]
    found = expiry(listed, Policy(count=1)).wal
    assert found is not None
    assert found.from_number == 0


def test_nothing_goes_on_which_something_stands_that_stays() -> None:
    old, new = listed_at(0), listed_at(2)
    late = increment_at(3, old)
    assert going([old, new, late], Policy(count=1)) == [], "the newest backup stands on the oldest"
    assert going([old, new, late, listed_at(4)], Policy(count=1)) == [2, 0, 1]
    begun = increment_at(9, old, "incomplete")
    assert going([old, new, begun], Policy(count=1)) == []
    assert going([old, new, replace(begun, state="deleting")], Policy(count=1)) == [0]
    assert going([increment_at(0, "gone", "orphaned"), new], Policy(count=1)) == [0]


async def put_chain(store: ObjectStore, *listed: Listed) -> None:
    """What tells of them in an archive."""
    for each in listed:
        names = BackupNames(LAYOUT, each.backup_id)
        assert each.info is not None
        info = replace(each.info, backup_label=None)
        await store.create(names.begun, MemoryContent.of(to_json(Mark("x", each.parent_id))), deadline_s=5)
        await store.create(names.info, MemoryContent.of(render_info(info)), deadline_s=5)


async def test_a_deletion_and_a_backup_that_begins_on_it_see_one_another(directory_store: DirectoryStore) -> None:
    store = directory_store
    full, first = listed_at(0), increment_at(1, listed_at(0))
    await put_chain(store, full, first)
    assert [
        (each.backup_id, each.parent_id, each.state) for each in await list_backups(store, LAYOUT, deadline_s=5)
    ] == [
        (full.backup_id, None, "done"),
        (first.backup_id, full.backup_id, "done"),
    ]
    names, above = BackupNames(LAYOUT, full.backup_id), BackupNames(LAYOUT, first.backup_id)
    with pytest.raises(BackupKept, match=f"needed by {first.backup_id}.*delete those first"):
        await delete_backup(store, names, deadline_s=5)
    assert await store.info(names.deleting, deadline_s=5) is None
    # One whose deletion has begun, and may be taken back, still stands on it; one that is half gone does not.
    await store.create(above.deleting, MemoryContent.of(b"{}"), deadline_s=5)
    assert await holders_of(store, names, deadline_s=5) == [first.backup_id]
    await store.delete(above.info, deadline_s=5)
    assert await holders_of(store, names, deadline_s=5) == []
    # One that is being taken has a mark and nothing else.
    await store.create(
        BackupNames(LAYOUT, "20251130T000000i").begun,
        MemoryContent.of(to_json(Mark("x", full.backup_id))),
        deadline_s=5,
    )
    with pytest.raises(BackupKept, match="20251130T000000i"):
        await delete_backup(store, names, deadline_s=5)


async def test_expiry_removes_a_chain_whole_and_leaves_one_that_is_kept(directory_store: DirectoryStore) -> None:
    store = directory_store
    listed = three_chains()
    await put_chain(store, *listed)
    await keep_backup(store, BackupNames(LAYOUT, listed[4].backup_id), "full", deadline_s=5)
    done = await expire(store, LAYOUT, Policy(count=1))
    assert [each.backup_id for each in await list_backups(store, LAYOUT, deadline_s=5)] == sorted(
        listed[place].backup_id for place in (3, 4, 6, 7, 8)
    )
    assert len(done.backups) == 4


# What is written about it


def test_backup_info_names_the_parent_of_an_incremental_one_and_barmans_words_make_none() -> None:
    info = replace(info_at(1), backup_id="20251102T000000i", parent_id="20251101T000000")
    assert parse_info(info.backup_id, render_info(info)) == info
    assert parse_info("20251102T000000", render_info(info)).parent_id is None
    assert (
        BackupNames(LAYOUT, info.backup_id).info == "orders/instance-manager/incremental/20251102T000000i/backup.info"
    )
    assert BackupNames(LAYOUT, "20251102T000000").info == "orders/base/20251102T000000/backup.info"
    assert is_backup_id("20251102T000000i")
    assert not is_backup_id("20251102T000000ii")


def test_a_manifest_is_json_with_the_hash_of_all_before_it() -> None:
    writer = ManifestWriter(replace(info_at(1), system_identifier="7654321"))
    members = [
        Member("base/1", 0, 0o700, None),
        Member("base/1/2", 5, 0o600, "ab" * 32),
        Member('a\udcff"', 1, 0o600, "cd" * 32),
    ]
    content = writer.head() + writer.files("", members) + writer.files("pg_tblspc/9/", members[1:2]) + writer.end()
    found = json.loads(content)
    assert found["PostgreSQL-Backup-Manifest-Version"] == 2
    assert found["System-Identifier"] == 7654321
    assert [each.get("Path") for each in found["Files"]] == ["base/1/2", None, "pg_tblspc/9/base/1/2"]
    assert bytes.fromhex(found["Files"][1]["Encoded-Path"]) == b'a\xff"'
    assert found["WAL-Ranges"] == [{"Timeline": 1, "Start-LSN": "0/A00028", "End-LSN": "0/A00128"}]
    before = content[: content.rindex(b'"Manifest-Checksum"')]
    assert found["Manifest-Checksum"] == hashlib.sha256(before).hexdigest()


def sized(listed: Listed, size_bytes: int, whole_bytes: int | None) -> Listed:
    assert listed.info is not None
    return replace(
        own(listed, whole_bytes=whole_bytes), info=replace(listed.info, size_bytes=size_bytes, version_number=170000)
    )


async def test_the_room_that_a_restore_needs_is_said_before_it_begins(tmp_path: Path) -> None:
    full = sized(listed_at(0), 3 << 30, None)
    first = sized(increment_at(1, full), 1 << 30, 4 << 30)
    assert room_for([full, first]).needed_bytes == 8 << 30
    assert "8.0 GiB on disk for a while: 4.0 GiB for the backups and 4.0 GiB" in str(room_for([full, first]))
    huge = sized(increment_at(1, full), 1 << 60, 1 << 60)
    server = server_at(tmp_path)
    with pytest.raises(CannotCombine, match=f"pg_combinebackup is not there.*--backup {full.backup_id}"):
        await require_means(server, [full, first], Destination(tmp_path / "data", {}, None))
    for version, chain, text in (
        (16, [full, first], "is of Postgres 16, and the backups are of Postgres 17"),
        (17, [full, huge], "make room"),
    ):
        program(tmp_path, version)
        with pytest.raises(CannotCombine, match=text):
            await require_means(server, chain, Destination(tmp_path / "data", {}, None))


def program(directory: Path, major: int) -> None:
    """Says which version it is."""
    path = directory / "pg_combinebackup"
    path.write_text(f"#!/bin/sh\necho 'pg_combinebackup (PostgreSQL) {major}.1'\n")
    path.chmod(0o755)


def server_at(directory: Path) -> LocalServer:
    return LocalServer(
        data_directory=directory / "data",
        socket_directory=directory,
        state_directory=directory,
        listen_address="127.0.0.1",
        port=5432,
        bin_directory=directory,
        run_as=None,
    )
