"""Lines on a standard output that others write to as well, and that is read slowly or not at all."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from instance_manager.postgres_log.output import PIECE_BYTES, Output


def test_lines_of_any_length_stay_whole_among_those_of_others_before_a_slow_reader() -> None:
    read_fd, write_fd = os.pipe()
    content = bytearray()
    count = 200

    def read() -> None:
        while chunk := os.read(read_fd, 3000):
            content.extend(chunk)
            time.sleep(0.0005)

    def write_as_another_process() -> None:
        for _ in range(count):
            os.write(write_fd, b"o" * (PIECE_BYTES - 1) + b"\n")

    lines = [b"l" * (30_000 if number % 5 == 0 else 100 + number) + b"\n" for number in range(count)]
    reader = threading.Thread(target=read)
    other = threading.Thread(target=write_as_another_process)
    reader.start()
    other.start()
    output = Output(write_fd)
    taken = 0
    for _ in range(1000):
        taken += output.write(lines[taken:], 0.5)
        if taken == count:
            break
    other.join(30)
    output.close()
    os.close(write_fd)
    reader.join(30)
    os.close(read_fd)
    assert taken == count
    found = bytes(content).split(b"\n")[:-1]
    assert [line for line in found if line.startswith(b"l")] == [line[:-1] for line in lines]
    assert {line for line in found if not line.startswith(b"l")} == {b"o" * (PIECE_BYTES - 1)}


def test_a_reader_that_does_not_read_costs_the_stated_time_and_keeps_what_was_taken() -> None:
    read_fd, write_fd = os.pipe()
    output = Output(write_fd)
    lines = [b"x" * 1000 + b"\n"] * 200
    begun_s = time.monotonic()
    taken = output.write(lines, 0.2)
    assert 0.15 < time.monotonic() - begun_s < 5
    assert 0 < taken < 200
    assert os.get_blocking(write_fd), "O_NONBLOCK would be everybody's"
    assert len(os.read(read_fd, 1_000_000)) == taken * 1001
    for fd in (read_fd, write_fd):
        os.close(fd)
    output.close()


def test_a_reader_that_is_gone_is_no_error() -> None:
    read_fd, write_fd = os.pipe()
    output = Output(write_fd)
    os.close(read_fd)
    assert output.write([b"x\n"], 0.05) == 0
    os.close(write_fd)
    output.close()


def test_a_file_takes_every_line_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before\n")
    with path.open("r+b") as file:
        output = Output(file.fileno())
        assert output.write([b"a\n", b"b" * 100_000 + b"\n"], 1.0) == 2
        output.close()
    assert path.read_bytes() == b"before\na\n" + b"b" * 100_000 + b"\n"
