"""What is read of the files of Postgres's log, what is kept in mind, and what is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instance_manager.postgres_log import files as under_test
from instance_manager.postgres_log.files import FINISHED_AFTER_S, SEEN_FOR_S, LogFiles, start_file

FIRST, SECOND = "postgres-20261129-010000", "postgres-20261129-020000"


class Place:
    """A log directory and a data directory, with a clock that the test moves."""

    def __init__(self, root: Path) -> None:
        self.log, self.data = root / "log", root / "data"
        self.log.mkdir()
        self.data.mkdir()
        self.now_s = 100.0
        self.files = self.another()

    def another(self) -> LogFiles:
        """As the next agent has it."""
        return LogFiles(self.log, self.data, lambda: self.now_s)

    def write(self, name: str, content: bytes) -> None:
        with (self.log / name).open("ab") as file:
            file.write(content)

    def writes_now(self, *names: str) -> None:
        words = {"log": "stderr", "json": "jsonlog", "csv": "csvlog"}
        (self.data / "current_logfiles").write_text(
            "".join(f"{words[name.rpartition('.')[2]]} {self.log / name}\n" for name in names)
        )

    def all(self, files: LogFiles | None = None) -> list[bytes]:
        """All records that are whole, told and saved."""
        files = files or self.files
        found = []
        files.look()
        while (batch := files.next()) is not None:
            found += batch.records
            files.told(batch)
        files.save()
        return found

    def names(self) -> set[str]:
        return {path.name for path in self.log.iterdir() if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_record_that_is_written_in_parts_is_told_once_and_whole(place: Place) -> None:
    place.write(f"{FIRST}.json", b'{"a": 1}\n{"b"')
    assert place.all() == [b'{"a": 1}']
    place.write(f"{FIRST}.json", b": 2}")
    assert place.all() == []
    place.write(f"{FIRST}.json", b"\n")
    assert place.all() == [b'{"b": 2}']


def test_a_record_of_csv_ends_where_its_quotes_do(place: Place) -> None:
    one, two, three = b'"a ""quoted""\nstatement, \n\n with lines",1', b'"b",2', b'3,"\n"'
    content = b"\n".join((one, two, three)) + b"\n"
    for cut in range(1, len(content)):
        path = place.log / f"{FIRST}.csv"
        path.unlink(missing_ok=True)
        place.files = place.another()
        path.write_bytes(content[:cut])
        found = place.all()
        path.write_bytes(content)
        assert found + place.all() == [one, two, three], cut


def test_another_agent_goes_on_where_the_one_before_was(place: Place) -> None:
    place.write(f"{FIRST}.json", b'"a"\n"b"\n')
    assert place.all() == [b'"a"', b'"b"']
    place.write(f"{FIRST}.json", b'"c"\n')
    assert place.all(place.another()) == [b'"c"']


def test_an_agent_that_died_before_it_had_told_leaves_the_records_to_the_next(place: Place) -> None:
    place.write(f"{FIRST}.json", b'"a"\n')
    place.files.look()
    batch = place.files.next()
    assert batch is not None
    place.files.told(batch)
    assert place.all(place.another()) == [b'"a"']


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": "x"}'])
def test_places_that_cannot_be_read_cost_repetitions_only(place: Place, content: bytes) -> None:
    place.write(f"{FIRST}.json", b'"a"\n')
    place.all()
    (place.log / ".relayed" / "places.json").write_bytes(content)
    assert place.all(place.another()) == [b'"a"']


def test_what_was_told_is_deleted_when_postgres_writes_the_next(place: Place) -> None:
    place.write(f"{FIRST}.json", b'"a"\n')
    place.writes_now(f"{FIRST}.json", f"{FIRST}.log")
    place.write(f"{FIRST}.log", b"")
    assert place.all() == [b'"a"']
    place.files.tidy()
    assert f"{FIRST}.json" in place.names()
    place.write(f"{SECOND}.json", b'"b"\n')
    place.files.look()
    place.now_s += 2 * SEEN_FOR_S
    place.files.tidy()
    assert f"{FIRST}.json" in place.names(), "the next one is not told of in current_logfiles yet"
    place.writes_now(f"{SECOND}.json", f"{FIRST}.log")
    place.files.tidy()
    assert place.names() == {f"{FIRST}.log", f"{SECOND}.json"}
    assert place.all() == [b'"b"']


def test_the_file_that_postgres_writes_stays_even_when_a_clock_was_set_back(place: Place) -> None:
    place.write(f"{SECOND}.json", b'"a"\n')
    place.all()
    place.write(f"{FIRST}.json", b'"b"\n')
    place.writes_now(f"{FIRST}.json")
    assert place.all() == [b'"b"']
    place.now_s += 2 * FINISHED_AFTER_S
    place.files.tidy()
    assert f"{FIRST}.json" in place.names()


def test_what_was_not_told_is_not_deleted(place: Place) -> None:
    place.write(f"{FIRST}.json", b'"a"\n')
    place.write(f"{SECOND}.json", b"")
    place.writes_now(f"{SECOND}.json")
    place.files.look()
    place.now_s += 2 * FINISHED_AFTER_S
    place.files.tidy()
    assert place.all() == [b'"a"']


def test_the_half_record_of_a_server_that_was_killed_is_told_when_the_next_file_is_there(place: Place) -> None:
    place.write(f"{FIRST}.json", b'{"message": "ha')
    assert place.all() == []
    place.write(f"{SECOND}.json", b'"b"\n')
    place.files.look()
    place.now_s += 2 * SEEN_FOR_S
    assert place.all() == [b'{"message": "ha', b'"b"']


def test_the_files_of_each_start_go_when_there_is_a_later_one(place: Place) -> None:
    for number in range(3):
        place.write(f"start-20261129-01000{number}-abcdef01.log", b"LOG:  x\n")
    assert len(place.all()) == 3
    place.now_s += 2 * FINISHED_AFTER_S
    place.files.tidy()
    assert place.names() == {"start-20261129-010002-abcdef01.log"}


def test_a_new_start_file_is_one_that_is_read(place: Place) -> None:
    start_file(place.log).write_bytes(b"FATAL:  x\n")
    assert place.all() == [b"FATAL:  x"]


def test_other_files_are_neither_read_nor_deleted(place: Place) -> None:
    for name in ("postgres.log", "notes.txt", "postgres-20261129-010000.json.gz"):
        place.write(name, b"x\n")
    place.write(f"{FIRST}.json", b'"a"\n')
    assert place.all() == [b'"a"']


def test_beyond_its_bound_the_oldest_is_given_up_and_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "WAITING_MAX_BYTES", 10_000)
    monkeypatch.setattr(under_test, "READ_BYTES", 1000)
    lines = [json.dumps({"n": number, "pad": "x" * 80}).encode() + b"\n" for number in range(1000)]
    place.write(f"{FIRST}.json", b"".join(lines[:600]))
    place.write(f"{SECOND}.json", b"".join(lines[600:]))
    place.files.look()
    lost = place.files.give_up_oldest()
    assert place.files.waiting_bytes <= 10_000
    left = [json.loads(raw)["n"] for raw in place.all()]
    assert left == list(range(lost, 1000))
    assert len(left) >= 1


def test_a_record_that_is_too_long_is_left_out_and_the_next_is_told(place: Place) -> None:
    place.write(f"{FIRST}.json", b'{"a": "' + b"x" * 3_000_000 + b'"}\n"b"\n')
    place.files.look()
    found, dropped = [], 0
    while (batch := place.files.next()) is not None:
        found += batch.records
        dropped += batch.dropped
        place.files.told(batch)
    assert (found, dropped) == ([b'"b"'], 1)


def test_a_file_that_became_shorter_is_read_from_its_start(place: Place) -> None:
    place.write(f"{FIRST}.json", b'"a"\n"b"\n')
    place.all()
    (place.log / f"{FIRST}.json").write_bytes(b'"c"\n')
    assert place.all() == [b'"c"']
