"""The commands, as the real console entry and in this process, against a served control socket."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from test_cli_status_view import HEALTHY
from test_config import GOOD, with_value

from instance_manager import cli
from instance_manager.coordination.local import LocalCoordination
from instance_manager.core.record import Holder, initial_record
from instance_manager.core.types import MemberId
from instance_manager.demo_locator import RunningDemo, write_running_demo
from instance_manager.http import server
from instance_manager.http.details import Details
from instance_manager.http.ports import ControlProgress, ControlResult, MalformedCall, UnknownCall
from instance_manager.status import ClusterStatus, Probes

ENTRY = Path(sys.executable).with_name("instance-manager")


class Instance:
    """Remembers what it was asked; `answers` overrides the result of a verb."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.answers: dict[str, ControlResult] = {}

    def probes(self) -> Probes:
        raise NotImplementedError

    def status(self) -> ClusterStatus:
        return HEALTHY

    def details(self) -> Details:
        raise NotImplementedError

    async def metrics(self) -> bytes:
        raise NotImplementedError

    async def answer_peer(self, call: str, body: bytes) -> bytes:
        raise NotImplementedError

    def tell_peer(self, call: str, body: bytes) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def control(self, verb: str, arguments: dict[str, object]) -> AsyncIterator[ControlProgress | ControlResult]:
        self.asked.append((verb, arguments))
        if arguments.get("name") == "nobody":
            raise MalformedCall("no instance 'nobody'; there are demo-1, demo-2")
        if verb == "reload":
            raise UnknownCall("reload")
        yield ControlProgress(progress=f"{verb} is at work")
        yield self.answers.get(verb, ControlResult(ok=True, message=f"{verb} is done", status=HEALTHY))


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="im-") as directory:
        yield Path(directory)


@pytest.fixture
def instance(short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instance]:
    """Served on `short`/control.sock by another thread; its socket is what the environment names."""
    served = Instance()
    loop = asyncio.new_event_loop()

    async def start() -> None:
        await runner.setup()
        await web.UnixSite(runner, str(short / "control.sock")).start()

    runner = web.AppRunner(server.control_application(served), access_log=None)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(5)
    monkeypatch.setenv("INSTANCE_MANAGER_SOCKET", str(short / "control.sock"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    yield served
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(autouse=True)
def no_demo(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.delenv("INSTANCE_MANAGER_SOCKET", raising=False)


Captured = pytest.CaptureFixture[str]


def entry(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ENTRY, *arguments], capture_output=True, text=True, timeout=20, env={**os.environ, **environment}
    )


def configuration_file(directory: Path) -> Path:
    content = with_value("instance.directory", str(directory))
    content["coordination"]["local"] = {"directory": str(directory / "s"), "locks_directory": str(directory / "l")}
    content["secrets"] = {key: str(directory / key) for key in GOOD["secrets"]}
    for key in GOOD["secrets"]:
        (directory / key).write_text("secret-secret-secret")
        (directory / key).chmod(0o600)
    path = directory / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# The real console entry


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "instance_manager", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "switchover" in result.stdout
    for module in ("aiohttp", "asyncio", "asyncpg", "msgspec", "yaml", "instance_manager.config"):
        assert f" {module}\n" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unheard-of",),
        ("fence",),
        ("unfence",),
        ("reinit",),
        ("run",),
        ("config",),
        ("config", "check"),
        ("status", "--socket", "/a", "--config", "/b"),
        ("status", "--timeout", "0"),
        ("status", "--timeout", "soon"),
        ("switchover", "demo-2"),
        ("failover",),
        ("run", "--config", "/nowhere.yaml"),
        ("config", "check", "--config", "/nowhere.yaml"),
        ("status", "--config", "/nowhere.yaml"),
        ("lease", "--config", "/nowhere.yaml"),
    ],
    ids=" ".join,
)
def test_wrong_use_exits_2_with_the_reason(arguments: tuple[str, ...], capsys: Captured) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    assert code == 2
    assert told.err
    assert not told.out


def test_the_console_entry_exits_as_documented(short: Path) -> None:
    assert entry("--version").stdout.startswith("instance-manager ")
    wrong = entry("fence")
    assert wrong.returncode == 2
    assert "NAME" in wrong.stderr
    absent = entry("status", "--socket", str(short / "absent"))
    assert absent.returncode == 1
    assert "no such socket" in absent.stderr
    assert "instance-manager run --config FILE" in absent.stderr
    unchecked = entry("failover")
    assert unchecked.returncode == 2
    assert "--allow-data-loss" in unchecked.stderr


def test_run_of_a_bad_configuration_exits_2_with_every_reason(short: Path) -> None:
    content = with_value("instance.name", "demo-9")
    content["timings"] = {"hard_s": 9.5}
    (short / "c.yaml").write_text(yaml.safe_dump(content))
    result = entry("run", "--config", str(short / "c.yaml"))
    assert result.returncode == 2
    assert "hard_s" in result.stderr
    assert "demo-9" in result.stderr
    assert list(short.iterdir()) == [short / "c.yaml"]


def test_run_becomes_the_supervisor(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []

    def execv(path: str, argv: list[str]) -> None:
        became.append([path, *argv])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    path = configuration_file(short)
    with pytest.raises(SystemExit):
        cli.main(["run", "--config", str(path)])
    assert became[0][:2] == [sys.executable, sys.executable]
    assert "instance_manager.supervisor" in became[0]
    assert (short / "state").is_dir()
    assert (short / "l").is_dir()


def test_run_as_the_real_entry_ends_as_the_supervisor_does(short: Path) -> None:
    path = configuration_file(short)
    (short / "l").mkdir()
    (short / "l" / "demo-1.lock").mkdir()
    result = entry("run", "--config", str(path))
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["process"], line["message"], line["fields"]["code"]) == ("supervisor", "exit", result.returncode)
    assert result.returncode != 0


def test_config_check_says_good_or_what_is_missing(short: Path, capsys: Captured) -> None:
    path = configuration_file(short)
    assert cli.main(["config", "check", "--config", str(path)]) == 0
    assert f"{path}: good" in capsys.readouterr().out
    (short / "peer_token").unlink()
    assert cli.main(["config", "check", "--config", str(path)]) == 2
    assert "secrets.peer_token" in capsys.readouterr().err


# Verbs


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["switchover"], ("switchover", {"to": None})),
        (["switchover", "--to", "demo-2"], ("switchover", {"to": "demo-2"})),
        (["fence", "demo-2"], ("fence", {"name": "demo-2"})),
        (["unfence", "demo-2"], ("unfence", {"name": "demo-2"})),
        (["restart"], ("restart", {"name": None})),
        (["restart", "demo-2"], ("restart", {"name": "demo-2"})),
        (["reinit", "demo-2"], ("reinit", {"name": "demo-2"})),
        (["pause"], ("pause", {})),
        (["resume"], ("resume", {})),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_verb_says_what_happened_and_the_new_state(
    instance: Instance, capsys: Captured, arguments: list[str], asked: tuple[str, dict[str, object]]
) -> None:
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert instance.asked == [asked]
    assert f"{asked[0]} is at work" in told.err
    assert told.out.splitlines()[:3] == [
        f"{asked[0]} is done",
        "",
        "demo: primary demo-1, clients are let in, epoch 3, timeline 2",
    ]


def test_a_verb_that_was_not_done_exits_1(instance: Instance, capsys: Captured) -> None:
    instance.answers["switchover"] = ControlResult(ok=False, message="demo-2 does not stream", status=HEALTHY)
    assert cli.main(["switchover"]) == 1
    assert "demo-2 does not stream" in capsys.readouterr().out


def test_a_name_that_does_not_exist_exits_2_with_those_that_do(instance: Instance, capsys: Captured) -> None:
    assert cli.main(["fence", "nobody"]) == 2
    assert "there are demo-1, demo-2" in capsys.readouterr().err


def test_a_verb_that_this_instance_does_not_know_exits_2(instance: Instance) -> None:
    assert cli.main(["reload"]) == 2


def test_an_answer_that_does_not_come_is_told_as_unknown(short: Path, capsys: Captured) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(short / "silent"))
        silent.listen()
        assert cli.main(["pause", "--socket", str(short / "silent"), "--timeout", "0.2"]) == 1
    assert "may have been done or not" in capsys.readouterr().err


# Status


def test_status_is_one_screen_of_80_by_24(instance: Instance, capsys: Captured) -> None:
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "at risk: nothing" in lines


def test_status_as_json_has_everything(instance: Instance, capsys: Captured) -> None:
    assert cli.main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["primary"] == "demo-1"
    assert len(status["instances"]) == 3
    assert status["decisions"][0]["reason"] == "demo-1 holds epoch 3, look 0"


def test_watch_goes_on_until_it_is_interrupted(
    instance: Instance, capsys: Captured, monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    rounds = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 2:
            monkeypatch.setenv("INSTANCE_MANAGER_SOCKET", str(short / "gone"))
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert cli.main(["status", "--watch"]) == 130
    told = capsys.readouterr().out
    assert told.count("demo: primary demo-1") == 2
    assert "no instance answers" in told


def test_a_reader_that_leaves_is_no_error_message(instance: Instance, short: Path) -> None:
    command = f"{ENTRY} status --watch --socket {short / 'control.sock'} | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


# Which instance


def test_the_running_demos_instances_are_tried_in_turn(
    instance: Instance, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSTANCE_MANAGER_SOCKET")
    write_running_demo(RunningDemo(short, {"demo-1": short / "dead", "demo-2": short / "control.sock"}))
    assert cli.main(["pause"]) == 0
    assert instance.asked == [("pause", {})]


def test_of_the_running_demo_the_named_instance_is_asked_first(
    instance: Instance, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSTANCE_MANAGER_SOCKET")
    sockets = {"demo-1": short / "dead", "demo-2": short / "control.sock"}
    write_running_demo(RunningDemo(short, sockets))
    for name, first in (("demo-2", "control.sock"), ("demo-1", "dead")):
        namespace = cli._parser([]).parse_args(["fence", name])
        assert cli._sockets(namespace)[0] == short / first


def test_a_configuration_names_its_own_control_socket(instance: Instance, short: Path) -> None:
    assert cli.main(["pause", "--config", str(configuration_file(short))]) == 0


def test_without_any_instance_the_ways_to_name_one_are_told(capsys: Captured) -> None:
    assert cli.main(["status"]) == 1
    told = capsys.readouterr().err
    assert "--socket PATH" in told
    assert "INSTANCE_MANAGER_SOCKET" in told


def test_a_demo_that_died_without_a_word_is_told(short: Path, capsys: Captured) -> None:
    write_running_demo(RunningDemo(short, {"demo-1": short / "dead"}))
    assert cli.main(["status"]) == 1
    assert "instance-manager demo" in capsys.readouterr().err


# Failover (R15)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_failover_shows_what_is_lost_before_it_asks_and_only_then_acts(
    instance: Instance, capsys: Captured, typed: Callable[[str], None]
) -> None:
    instance.answers["failover"] = ControlResult(ok=True, message="lost: demo-1 and what only it has", status=HEALTHY)
    typed("demo\n")
    assert cli.main(["failover", "--allow-data-loss"]) == 0
    assert instance.asked == [("failover", {"preview": True}), ("failover", {"allow_data_loss": True})]
    told = capsys.readouterr().out
    assert told.index("12/3456789A") < told.index("lost: demo-1") < told.index("Type the cluster's name (demo)")


@pytest.mark.parametrize("text", ["", "yes\n", "demo-1\n", "DEMO\n"])
def test_failover_without_the_clusters_name_does_nothing(
    instance: Instance, capsys: Captured, typed: Callable[[str], None], text: str
) -> None:
    typed(text)
    assert cli.main(["failover", "--allow-data-loss"]) == 2
    assert instance.asked == [("failover", {"preview": True})]
    assert "nothing was done" in capsys.readouterr().err


def test_failover_with_yes_shows_and_does_not_ask(
    instance: Instance, capsys: Captured, typed: Callable[[str], None]
) -> None:
    typed("")
    assert cli.main(["failover", "--allow-data-loss", "--yes"]) == 0
    assert len(instance.asked) == 2
    assert "INSTANCE" in capsys.readouterr().out


def test_a_failover_that_is_refused_at_its_preview_ends_there(instance: Instance, capsys: Captured) -> None:
    instance.answers["failover"] = ControlResult(ok=False, message="demo-2 refuses: it sees the primary")
    assert cli.main(["failover", "--allow-data-loss", "--yes"]) == 1
    assert len(instance.asked) == 1
    assert "sees the primary" in capsys.readouterr().out


# Lease


def test_lease_shows_what_the_instance_says(instance: Instance, capsys: Captured) -> None:
    instance.answers["lease"] = ControlResult(ok=True, message="Name:  demo")
    assert cli.main(["lease"]) == 0
    assert capsys.readouterr().out == "Name:  demo\n"


def test_lease_of_a_dead_instance_is_read_from_the_store(short: Path, capsys: Captured) -> None:
    path = configuration_file(short)
    assert cli.main(["lease", "--config", str(path)]) == 1
    assert "StoreUnavailable" in capsys.readouterr().err
    (short / "s").mkdir()
    assert cli.main(["lease", "--config", str(path)]) == 0
    assert "there is no record" in capsys.readouterr().out
    record = initial_record(
        cluster_name="demo",
        cluster_uid="u1",
        mode="synchronous",
        lease_duration_s=10,
        holder=Holder(member_id=MemberId("demo_1_01234567"), incarnation="8f1e2d3c4b5a6978"),
    )
    asyncio.run(LocalCoordination(short / "s", short / "l").create(replace(record, paused=True), deadline_s=2))
    assert cli.main(["lease", "--config", str(path)]) == 0
    told = capsys.readouterr()
    assert "read from the store itself" in told.err
    assert "yes: no failover" in told.out
    (short / "s" / "lease.json").write_text("x")
    assert cli.main(["lease", "--config", str(path)]) == 1
    assert "UnreadableFile" in capsys.readouterr().err
