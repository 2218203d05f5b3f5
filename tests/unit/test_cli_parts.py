"""What the commands stand on: the demo's locator, the log's lines, the record for people, launching."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from test_config import GOOD, with_value

from instance_manager import demo_locator, launch, logs, wall_clock
from instance_manager.config import Configuration, load_configuration
from instance_manager.config_sections import ArchiveSection, S3Section
from instance_manager.config_security import TlsSection
from instance_manager.coordination.describe import describe
from instance_manager.core.record import Holder, Release, StoredRecord, SwitchoverRequest, initial_record
from instance_manager.core.types import (
    Epoch,
    Lsn,
    MemberId,
    MemberName,
    Timeline,
    TimelineChain,
    TimelineSwitch,
    WalEnd,
)
from instance_manager.demo_locator import DemoLocatorError, RunningDemo

# The demo's locator


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_a_running_demo_is_found_until_it_takes_itself_back(runtime: Path) -> None:
    assert demo_locator.read_running_demo() is None
    demo = RunningDemo(Path("/d"), {"demo-1": Path("/d/demo-1/control.sock")})
    path = demo_locator.write_running_demo(demo)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert demo_locator.read_running_demo() == demo
    demo_locator.remove_running_demo(Path("/other"))
    assert demo_locator.read_running_demo() == demo
    demo_locator.remove_running_demo(Path("/d"))
    assert demo_locator.read_running_demo() is None


def test_without_a_runtime_directory_the_place_is_ours_below_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert demo_locator.locator_directory() == Path(f"/tmp/instance-manager-{os.geteuid()}")


def test_a_folder_that_others_can_write_is_not_trusted(runtime: Path) -> None:
    folder = demo_locator.write_running_demo(RunningDemo(Path("/d"), {})).parent
    folder.chmod(0o777)
    with pytest.raises(DemoLocatorError, match="does not belong to you alone"):
        demo_locator.read_running_demo()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"directory": "/d", "sockets": 5}'])
def test_a_file_that_is_not_the_demos_is_told(runtime: Path, content: str) -> None:
    demo_locator.write_running_demo(RunningDemo(Path("/d"), {})).write_text(content)
    with pytest.raises(DemoLocatorError, match="remove it"):
        demo_locator.read_running_demo()


# The log


class Stream(io.StringIO):
    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_log_line_is_one_json_object_of_the_schema() -> None:
    stream = Stream()
    with logs.logging_to("demo-1", "info", stream):
        logging.getLogger("instance_manager.agent").info(
            "took %s", "over", extra={"epoch": 4, "fields": {"name": "x", "path": Path("/p")}}
        )
        logging.getLogger("instance_manager.agent").debug("unseen")
        try:
            raise ZeroDivisionError("broken\nin two")
        except ZeroDivisionError:
            logging.getLogger("a").exception("failed")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 2
    assert list(lines[0]) == ["time", "level", "instance", "process", "message", "fields"]
    assert (lines[0]["level"], lines[0]["process"], lines[0]["message"]) == ("info", "agent", "took over")
    assert lines[0]["fields"] == {
        "logger": "instance_manager.agent",
        "epoch": 4,
        "name": "x",
        "path": "PosixPath('/p')",
    }
    assert len(lines[0]["time"]) == len("2025-01-31T09:08:07.123Z")
    assert "ZeroDivisionError" in lines[1]["fields"]["exception"]


def test_the_level_changes_while_the_log_is_written() -> None:
    stream = Stream()
    with logs.logging_to("demo-1", "info", stream):
        log = logging.getLogger("a")
        log.debug("unseen")
        assert logs.set_level("debug") == "info"
        log.debug("seen")
        with pytest.raises(ValueError, match="no level 'loud'"):
            logs.set_level("loud")
        assert logs.set_level("error") == "debug"
        log.warning("unseen")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["seen"]


def test_on_a_terminal_the_log_is_for_people() -> None:
    stream = Stream(terminal=True)
    with logs.logging_to("demo-1", "info", stream):
        logging.getLogger("instance_manager.agent").warning("slow", extra={"epoch": 4})
    assert stream.getvalue().endswith(" warning demo-1 agent: slow  epoch=4\n")


def test_a_reader_that_stalls_costs_lines_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LINES_WAITING_MAX", 10)
    go_on = threading.Event()

    class Stalled(Stream):
        def write(self, text: str) -> int:
            go_on.wait(5)
            return super().write(text)

    stream = Stalled()
    with logs.logging_to("demo-1", "info", stream):
        for number in range(100):
            logging.getLogger("a").info("line %d", number)
        go_on.set()
        for _ in range(100):
            if '"line 99"' in stream.getvalue() or stream.getvalue().count("\n") >= 10:
                break
            threading.Event().wait(0.05)
        logging.getLogger("a").info("after")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[-1]["message"] == "after"
    dropped = [line["fields"].get("dropped_lines", 0) for line in lines]
    assert sum(dropped) > 0
    assert len(lines) + sum(dropped) == 101


def test_the_time_of_day_is_written_as_kubernetes_writes_it() -> None:
    assert len(wall_clock.timestamp()) == len("2025-01-31T09:08:07.000012Z")
    assert len(wall_clock.local_time()) == len("09:08:07")


# The record for people


def test_a_record_is_described_in_full() -> None:
    holder = Holder(member_id=MemberId("demo_1_01234567"), incarnation="8f1e2d3c4b5a6978")
    record = initial_record(
        cluster_name="demo", cluster_uid="u1", mode="synchronous", lease_duration_s=10, holder=holder
    )
    text = describe(StoredRecord(record, "1-0000000000000000"))
    assert "  Holder Identity:         demo_1_01234567, incarnation 8f1e2d3c4b5a6978" in text.splitlines()
    assert "0  (nobody can be elected)" in text
    voters = frozenset((MemberId("demo_2_01234567"), MemberId("demo_3_01234567")))
    later = replace(
        record,
        holder=None,
        epoch=Epoch(5),
        system_identifier="73",
        voters=voters,
        quorum=1,
        chain=TimelineChain(Timeline(1), (TimelineSwitch(Timeline(3), Timeline(1), Lsn(0x5000060), Epoch(2)),)),
        highest_timeline=Timeline(3),
        release=Release(
            releaser=MemberId("demo_1_01234567"), epoch=Epoch(5), end=WalEnd(Timeline(3), Lsn(16)), target=None
        ),
        switchover=SwitchoverRequest(request_id="r", epoch=Epoch(5), target=MemberName("demo-2")),
        fenced=frozenset((MemberName("demo-3"),)),
        paused=True,
    )
    text = describe(StoredRecord(later, "2-0000000000000000"))
    for part in (
        "<none>",
        "1 -> 3 at 0/5000060 (epoch 2)",
        "1  (2 of 2 promises elect)",
        "demo_2_01234567, demo_3_01234567",
        "by demo_1_01234567 in epoch 5 at 3:0/10, for any that holds it",
        "to demo-2, asked in epoch 5",
        "yes: no failover",
    ):
        assert part in text
    assert "Problems:\n  q 3 does not fit 2 voters" in describe(StoredRecord(replace(later, quorum=3), "3-0"))


# Launching


def configuration_in(directory: Path, **places: Any) -> tuple[Configuration, Path]:
    content = with_value("instance.directory", str(directory / "i"))
    content["coordination"]["local"] = {
        "directory": str(directory / "store"),
        "locks_directory": str(directory / "locks"),
    }
    content["secrets"] = {key: str(directory / key) for key in GOOD["secrets"]}
    for key in GOOD["secrets"]:
        (directory / key).write_text("secret-secret-secret")
        (directory / key).chmod(0o600)
    path = directory / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_configuration(path), path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="im-") as directory:
        yield Path(directory)


def test_the_directories_are_made_for_their_users(short: Path) -> None:
    configuration, _ = configuration_in(short)
    for _ in range(2):
        launch.prepare_directories(configuration)
        for path, mode in (
            (configuration.instance.directory, 0o755),
            (configuration.state_directory, 0o700),
            (configuration.socket_directory, 0o755),
            (short / "locks", 0o700),
        ):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    if os.geteuid() == 0:
        assert configuration.state_directory.stat().st_uid == configuration.socket_directory.stat().st_uid != 0
        assert configuration.instance.directory.stat().st_uid == 0


def test_a_directory_that_cannot_be_made_is_told(short: Path) -> None:
    configuration, _ = configuration_in(short)
    (short / "i").mkdir()
    (short / "i" / "state").write_text("a file")
    with pytest.raises(launch.LaunchError, match="state: cannot be made ready"):
        launch.prepare_directories(configuration)


def test_the_supervisors_command_line_holds_the_timings_and_no_secret(short: Path) -> None:
    configuration, path = configuration_in(short)
    instance = msgspec.structs.replace(configuration.instance, termination_log=Path("/t"))
    argv = launch.supervisor_argv(msgspec.structs.replace(configuration, instance=instance), path)
    text = " ".join(argv)
    assert argv[1:4] == ["-I", "-m", "instance_manager.supervisor"]
    assert "--hard-s 8 --heartbeat-timeout-s 3 --kill-budget-s 1 --shutdown-timeout-s 25" in text
    assert ("--postgres-user nobody" in text) == (os.geteuid() == 0)
    assert "--termination-log /t --" in text
    assert text.endswith(f"-I -m instance_manager.agent --config {path}")
    assert "secret-secret" not in text


def test_the_archiver_is_started_beside_the_agent_only_where_an_archive_is_configured(short: Path) -> None:
    configuration, path = configuration_in(short)
    assert "---" not in launch.supervisor_argv(configuration, path)
    archiving = msgspec.structs.replace(configuration, archive=ArchiveSection(directory=short))
    argv = launch.supervisor_argv(archiving, path)
    assert " ".join(argv).endswith(
        f"-I -m instance_manager.agent --config {path} --- {argv[0]} -I -m instance_manager.archive --config {path}"
    )


def test_certificates_that_an_instance_would_not_start_with_are_told(short: Path) -> None:
    configuration, _ = configuration_in(short)
    tls = TlsSection(directory=short / "certificates")
    assert launch.surroundings_problems(msgspec.structs.replace(configuration, tls=tls)) == (
        f"tls.postgres: {short / 'certificates/tls.crt'} cannot be read: No such file or directory",
        f"tls.peers: {short / 'certificates/tls.crt'} cannot be read: No such file or directory",
    )


def test_what_the_archive_lacks_is_told(short: Path) -> None:
    configuration, _ = configuration_in(short)
    missing = msgspec.structs.replace(configuration, archive=ArchiveSection(directory=short / "archive"))
    assert launch.surroundings_problems(missing) == (
        f"archive.directory: {short / 'archive'} is no directory; create it, or mount it",
    )
    section = ArchiveSection(s3=S3Section(bucket="b", credentials_file=short / "login", ca_file=short / "ca.pem"))
    assert launch.surroundings_problems(msgspec.structs.replace(configuration, archive=section)) == (
        f"archive.s3.credentials_file: {short / 'login'} cannot be read",
        f"archive.s3.ca_file: {short / 'ca.pem'} cannot be read",
    )


def test_what_the_machine_lacks_is_told_all_at_once(short: Path) -> None:
    configuration, _ = configuration_in(short)
    assert launch.surroundings_problems(configuration) == ()
    configuration.secrets.peer_token.unlink()
    configuration.secrets.replication_password.write_text(" \n")
    configuration.secrets.monitoring_password.chmod(0o644)
    postgres = msgspec.structs.replace(configuration.postgres, bin_directory=short)
    instance = msgspec.structs.replace(configuration.instance, directory=short / "no" / "i")
    problems = launch.surroundings_problems(
        msgspec.structs.replace(configuration, postgres=postgres, instance=instance)
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "secrets.peer_token",
        "secrets.replication_password",
        "secrets.monitoring_password",
        "postgres.bin_directory",
        "instance.directory",
    ]
