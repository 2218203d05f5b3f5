"""The third child: kept running, and of no weight to anything else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supervisor_harness import PYTHON, FakeAgent, Harness, is_alive, now_s, state_of, until

from instance_manager.supervisor.exit_codes import ExitCode

# A child of its own and an orphan, so that it is seen which of them a fence takes for Postgres's.
COMPANION = """
import os, sys, time
if os.fork() == 0:
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "600"])
    os._exit(0)
os.wait()
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""


@contextmanager
def with_companion(*options: str, script: str = COMPANION) -> Iterator[tuple[Harness, FakeAgent, Path]]:
    """A supervisor with an agent and a companion; the file to which each life of it adds its pid."""
    with Harness(*options, start=False) as harness:
        pids = harness.folder / "companions"
        agent = (PYTHON, "-I", "-S", str(harness.folder / "agent_process.py"), str(harness.folder / "agents"))
        harness.start(*agent, "---", PYTHON, "-I", "-S", "-c", script, str(pids))
        yield harness, harness.agent(), pids


def lives(pids: Path) -> list[int]:
    return [int(pid) for pid in pids.read_text().split()] if pids.exists() else []


def nth(pids: Path, count: int) -> int:
    """The pid of its n-th life, once that has begun."""
    return until(f"{count} lives", lambda: lives(pids)[count - 1 : count])[0]


def test_a_companion_that_dies_is_started_again_and_nobody_else_notices() -> None:
    with with_companion() as (harness, agent, pids):
        agent.permit(epoch=1, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", "busy", epoch=1)
        first = nth(pids, 1)
        os.kill(first, signal.SIGKILL)
        second = nth(pids, 2)
        assert second != first
        os.kill(second, signal.SIGKILL)
        nth(pids, 3)
        assert [line["restart_in_s"] for line in harness.log("companion_died")] == [0, 0.5]
        assert len(postgres.alive()) == 2
        assert is_alive(agent.pid)
        assert len(harness.log("agent_started")) == 1


def test_a_fence_and_the_end_of_an_agent_leave_the_companion_and_its_processes_alone() -> None:
    with with_companion() as (harness, agent, pids):
        companion = nth(pids, 1)
        agent.permit(epoch=1, hard_s=0.5)
        postgres = harness.start_postgres(agent, "read_write", "busy", "orphan", epoch=1)
        agent.expect("postgres_exited", reason="fenced")
        assert postgres.alive() == []
        os.kill(agent.pid, signal.SIGKILL)
        harness.agent()
        of_companion = [pid for pid in harness.living() if os.getsid(pid) == companion]
        assert len(of_companion) == 2, "it and its orphan"
        assert lives(pids) == [companion]


def test_a_frozen_companion_holds_up_neither_permit_nor_fence_nor_the_end() -> None:
    with with_companion() as (harness, agent, pids):
        companion = nth(pids, 1)
        os.kill(companion, signal.SIGSTOP)
        until("it stands still", lambda: state_of(companion) == "T")
        hard_s = agent.permit(epoch=1, hard_s=1.0)
        harness.start_postgres(agent, "read_write", "busy", epoch=1)
        agent.expect("postgres_exited", reason="fenced")
        assert now_s() - hard_s < 1.0
        began_s = now_s()
        agent.do("goodbye")
        assert harness.exit_code() == ExitCode.ORDERLY
        assert now_s() - began_s < 3.0
        assert harness.living() == []


def test_an_agent_that_finds_it_hanging_has_it_killed_and_started_again() -> None:
    with with_companion() as (_, agent, pids):
        companion = nth(pids, 1)
        os.kill(companion, signal.SIGSTOP)
        agent.do("restart_companion")
        assert nth(pids, 2) != companion
        assert not is_alive(companion)


def test_a_companion_that_cannot_be_executed_is_tried_again_more_and_more_rarely_and_ends_nothing() -> None:
    with Harness(start=False) as harness:
        agent_argv = (PYTHON, "-I", "-S", str(harness.folder / "agent_process.py"), str(harness.folder / "agents"))
        harness.start(*agent_argv, "---", "/nowhere/archiver")
        agent = harness.agent()
        until("three tries", lambda: len(harness.log("companion_died")) >= 3)
        told = harness.log("companion_died")
        assert [line["restart_in_s"] for line in told[:3]] == [0, 0.5, 1.0]
        assert "No such file" in told[0]["exec_error"]
        agent.do("goodbye")
        assert harness.exit_code() == ExitCode.ORDERLY


def test_a_separator_without_a_command_behind_it_is_wrong_use(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "instance_manager.supervisor", "--name", "a", "--lock-file", str(tmp_path / "l")]
    for words in (["true", "---"], ["---", "true"]):
        ended = subprocess.run([*command, "--", *words], capture_output=True, text=True, check=False, timeout=30)
        assert ended.returncode == ExitCode.BAD_USAGE
        assert "a command is missing before or after ---" in ended.stderr
