"""No read-write Postgres without a permit, and none of its processes after it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from supervisor_harness import Harness, agent_and_harness, is_alive, lock_is_free, now_s, state_of, until

from instance_manager.supervisor.exit_codes import ExitCode

KILL_WITHIN_S = 1.0


def test_a_read_write_start_is_refused_without_a_permit_of_exactly_its_epoch() -> None:
    with agent_and_harness() as (harness, agent):
        start = {"mode": "read_write", "argv": ["/bin/sleep", "60"], "env": {}}
        assert "no permit" in agent.refused("start", epoch=5, **start)
        agent.permit(epoch=5, hard_s=5)
        assert "of epoch 5" in agent.refused("start", epoch=6, **start)
        assert "of epoch 5" in agent.refused("start", epoch=4, **start)
        assert harness.log("postgres_started") == []


def test_a_read_write_start_is_refused_past_soft() -> None:
    with agent_and_harness() as (_, agent):
        agent.permit(epoch=5, soft_s=0.0, hard_s=5)
        error = agent.refused("start", mode="read_write", epoch=5, argv=["/bin/sleep", "60"], env={})
        assert "soft" in error


def test_a_promotion_is_refused_without_a_permit_and_the_standby_gets_no_signal() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby")
        assert "no permit" in agent.refused("promote", epoch=1)
        agent.permit(epoch=2, hard_s=5)
        assert "of epoch 2" in agent.refused("promote", epoch=1)
        agent.do("signal", signal="HUP")
        until("the later signal arrived", (postgres.folder / "reloaded").exists)
        assert not (postgres.folder / "promoted").exists()


def test_a_promotion_with_a_permit_signals_the_postmaster_and_from_then_on_the_permit_counts() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby")
        agent.permit(epoch=1, hard_s=1.0)
        agent.do("promote", epoch=1)
        until("the postmaster was told", (postgres.folder / "promoted").exists)
        event = agent.expect("postgres_exited")
        assert (event["reason"], event["mode"]) == ("fenced", "read_write")


def test_a_standby_needs_no_permit() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "plain")
        hard_s = agent.permit(epoch=1, hard_s=0.3)
        until("the permit ran out", lambda: now_s() > hard_s + 0.3)
        agent.do("tick")
        assert len(postgres.alive()) == 2


def test_at_hard_everything_is_killed_even_what_is_stopped_stubborn_or_orphaned() -> None:
    with agent_and_harness() as (harness, agent):
        hard_s = agent.permit(epoch=1, hard_s=2.0)
        kinds = ("plain", "stubborn", "stopped", "busy", "orphan", "stubborn", "busy")
        postgres = harness.start_postgres(agent, "read_write", *kinds, epoch=1)
        assert len(postgres.alive()) == len(kinds) + 1
        assert now_s() < hard_s, "too slow a machine for this test"
        until("all are dead", lambda: not postgres.alive(), KILL_WITHIN_S + 2)
        assert hard_s <= now_s() <= hard_s + KILL_WITHIN_S
        event = agent.expect("postgres_exited", pid=postgres.pid)
        assert (event["reason"], event["signal"], event["exit_code"]) == ("fenced", signal.SIGKILL, None)
        assert event["remaining_killed"] == len(kinds)
        assert postgres.commits()[-1] <= hard_s + KILL_WITHIN_S
        assert harness.log("postgres_killed")[0]["took_s"] < KILL_WITHIN_S


def test_at_hard_nobody_is_asked_even_if_the_agent_is_frozen() -> None:
    with agent_and_harness("--heartbeat-timeout-s", "30") as (harness, agent):
        hard_s = agent.permit(epoch=1, hard_s=1.2)
        postgres = harness.start_postgres(agent, "read_write", "busy", epoch=1)
        os.kill(agent.pid, signal.SIGSTOP)
        until("all are dead", lambda: not postgres.alive())
        assert hard_s <= now_s() <= hard_s + KILL_WITHIN_S
        assert is_alive(agent.pid)


def test_an_extended_permit_keeps_postgres_running() -> None:
    with agent_and_harness() as (harness, agent):
        first_hard_s = agent.permit(epoch=1, hard_s=1.2)
        postgres = harness.start_postgres(agent, "read_write", epoch=1)
        agent.permit(epoch=1, hard_s=7)
        until("the first deadline passed", lambda: now_s() > first_hard_s + 0.2)
        agent.do("tick")
        assert postgres.alive() == [postgres.pid]


def test_an_absurd_deadline_is_capped_at_the_command_lines_limit() -> None:
    with agent_and_harness("--hard-s", "0.8") as (harness, agent):
        agent.permit(epoch=1, hard_s=1e9)
        given_s = now_s()
        harness.start_postgres(agent, "read_write", epoch=1)
        agent.expect("postgres_exited", reason="fenced")
        assert now_s() < given_s + 0.8 + KILL_WITHIN_S


def test_garbage_and_refused_permits_keep_the_old_deadline() -> None:
    with agent_and_harness() as (harness, agent):
        hard_s = agent.permit(epoch=3, hard_s=1.2)
        postgres = harness.start_postgres(agent, "read_write", "busy", epoch=3)
        late = {"soft": hard_s + 5, "hard": hard_s + 6}
        agent.socket.send(b"\xff\x00 garbage")
        agent.socket.send(b'{"type":"permit","epoch":3,"soft":1,"hard":Infinity}')
        agent.refused("permit", epoch=2, **late)
        agent.refused("permit", epoch="3", **late)
        agent.refused("permit", epoch=3, soft=hard_s + 6, hard=hard_s + 5)
        agent.refused("prolong", epoch=3, **late)
        assert len(postgres.alive()) == 2
        agent.expect("postgres_exited", reason="fenced")
        assert hard_s <= now_s() <= hard_s + KILL_WITHIN_S
        assert len(harness.log("bad_message")) == 4


def test_the_end_of_the_link_keeps_the_old_deadline() -> None:
    with agent_and_harness("--heartbeat-timeout-s", "30") as (harness, agent):
        hard_s = agent.permit(epoch=1, hard_s=1.2)
        postgres = harness.start_postgres(agent, "read_write", "busy", epoch=1)
        agent.command("close")
        agent.socket.close()
        until("the supervisor saw it", lambda: harness.log("agent_closed_link"))
        assert now_s() < hard_s
        assert len(postgres.alive()) == 2
        until("all are dead", lambda: not postgres.alive())
        assert hard_s <= now_s() <= hard_s + KILL_WITHIN_S


def test_revoking_the_epoch_kills_a_read_write_postgres_before_the_answer() -> None:
    with agent_and_harness() as (harness, agent):
        agent.permit(epoch=4, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", "busy", "stopped", epoch=4)
        agent.do("revoke", epoch=4)
        assert postgres.alive() == []
        agent.expect("postgres_exited", reason="fenced")
        assert "revoked" in agent.refused("permit", epoch=4, soft=now_s() + 5, hard=now_s() + 5)
        agent.permit(epoch=5, hard_s=5)


def test_revoking_leaves_a_standby_alone() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "plain")
        agent.do("revoke", epoch=4)
        assert len(postgres.alive()) == 2


def test_a_later_epoch_takes_over_a_running_read_write_postgres() -> None:
    with agent_and_harness() as (harness, agent):
        agent.permit(epoch=4, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", epoch=4)
        agent.permit(epoch=5, hard_s=7)
        agent.do("revoke", epoch=4)
        assert postgres.alive() == [postgres.pid]


def test_kill_is_answered_when_no_process_is_left_and_another_start_is_possible_then() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "plain", "stopped", "orphan")
        argv = postgres.argv(harness.folder)
        assert "is left" in agent.refused("start", mode="standby", epoch=None, argv=argv, env={})
        agent.do("kill")
        assert postgres.alive() == []
        event = agent.expect("postgres_exited")
        assert (event["reason"], event["remaining_killed"]) == ("killed", 3)
        second = harness.start_postgres(agent, "standby", "plain")
        assert len(second.alive()) == 2


def test_kill_without_postgres_is_answered_at_once() -> None:
    with agent_and_harness() as (_, agent):
        agent.do("kill")


def test_when_the_postmaster_dies_all_backends_are_killed_before_the_event() -> None:
    with agent_and_harness() as (harness, agent):
        agent.permit(epoch=1, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", "busy", "stubborn", "stopped", "orphan", epoch=1)
        os.kill(postgres.pid, signal.SIGKILL)
        event = agent.expect("postgres_exited")
        assert postgres.alive() == []
        assert (event["reason"], event["signal"], event["remaining_killed"]) == ("exit", signal.SIGKILL, 4)


def test_a_postmaster_that_ended_by_itself_has_its_log_written_to_the_end() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "plain", "log=0.05")
        agent.do("signal", signal="INT")
        event = agent.expect("postgres_exited")
        assert (event["exit_code"], event["remaining_killed"]) == (0, 0)
        assert (postgres.folder / "logged").read_text() == "all"


def test_a_log_collector_that_does_not_end_is_killed_after_a_moment() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "log=60")
        asked_s = now_s()
        agent.do("signal", signal="INT")
        assert agent.expect("postgres_exited")["remaining_killed"] == 1
        assert now_s() - asked_s < 2
        assert postgres.alive() == []


def test_where_more_than_a_log_collector_is_left_all_of_it_is_killed_at_once() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "log=0.1", "log=0.1")
        agent.do("signal", signal="INT")
        assert agent.expect("postgres_exited")["remaining_killed"] == 2
        assert not (postgres.folder / "logged").exists()


def test_the_permit_of_a_postmaster_that_ended_counts_on_until_its_log_is_written() -> None:
    with agent_and_harness() as (harness, agent):
        hard_s = agent.permit(epoch=1, hard_s=3.0)
        postgres = harness.start_postgres(agent, "read_write", "log=60", epoch=1)
        until("the permit is nearly over", lambda: now_s() >= hard_s - 0.05)
        agent.do("signal", signal="INT")
        event = agent.expect("postgres_exited")
        assert (event["reason"], event["remaining_killed"]) == ("fenced", 1)
        assert now_s() < hard_s + 1
        assert postgres.alive() == []


def test_a_postmaster_that_was_killed_gives_its_log_collector_no_time() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "log=0.1")
        os.kill(postgres.pid, signal.SIGKILL)
        assert agent.expect("postgres_exited")["remaining_killed"] == 1
        assert not (postgres.folder / "logged").exists()


def test_an_orderly_exit_of_postgres_is_told_with_its_code() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "plain")
        agent.do("signal", signal="INT")
        event = agent.expect("postgres_exited", pid=postgres.pid)
        assert (event["reason"], event["exit_code"], event["signal"]) == ("exit", 0, None)


def test_a_program_that_cannot_be_executed_is_an_exit_with_127() -> None:
    with agent_and_harness() as (harness, agent):
        agent.do("start", mode="standby", epoch=None, argv=["/nonexistent/postgres"], env={})
        assert agent.expect("postgres_exited")["exit_code"] == 127
        assert "No such file" in harness.log("postgres_exited")[0]["exec_error"]


def test_signals_and_promotions_without_postgres_are_refused() -> None:
    with agent_and_harness() as (_, agent):
        assert "not running" in agent.refused("signal", signal="INT")
        agent.permit(epoch=1, hard_s=5)
        assert "not running" in agent.refused("promote", epoch=1)


def test_postgres_runs_as_its_own_user_in_its_own_session() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby")
        facts = (postgres.folder / "ready").read_text()
        uid = postgres.folder.stat().st_uid
        assert uid != 0
        assert f"uid={uid} " in facts
        assert f"sid={postgres.pid}" in facts
        assert "[0" not in facts, "no group of root"


def test_the_fence_leaves_the_agent_and_its_children_alone() -> None:
    with agent_and_harness() as (harness, agent):
        agent.command("child 60")
        agent.command("daemonise 60")
        harness.start_postgres(agent, "standby", "orphan")
        agent.do("kill")
        agent.expect("postgres_exited")
        agent.do("tick")
        sessions = [os.getsid(pid) for pid in harness.living() if pid != harness.supervisor.pid]
        assert sessions == [agent.pid] * 3, "the agent, its child and its orphan"


def test_a_lock_that_postgres_inherited_does_not_go_to_the_agent() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby")
        assert not lock_is_free(harness.lock_file)
        holders = {pid for pid in (harness.supervisor.pid, postgres.pid, agent.pid) if holds(pid, harness.lock_file)}
        assert holders == {harness.supervisor.pid, postgres.pid}


@contextlib.contextmanager
def filesystem(folder: Path) -> Iterator[Path]:
    """A small filesystem of its own, writable for all, that may be left frozen."""
    image, mounted = folder / "image", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)
    try:
        mounted.chmod(0o777)
        yield mounted
    finally:
        subprocess.run(["fsfreeze", "-u", str(mounted)], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_killed_process_in_uninterruptible_sleep_completes_the_fence_but_blocks_the_next_start() -> None:
    with agent_and_harness() as (harness, agent), filesystem(harness.folder) as mounted:
        subprocess.run(["fsfreeze", "-f", str(mounted)], check=True)
        postgres = harness.start_postgres(agent, "standby", f"write={mounted}/file", "plain")
        [stuck] = until("one hangs", lambda: [pid for pid in postgres.children if state_of(pid) == "D"])
        agent.send(type="kill", id=1000)
        event = agent.expect("postgres_exited", reason="killed")
        assert event["remaining_killed"] == 2
        assert postgres.alive() == [stuck]
        assert [process[0] for process in harness.log("postgres_killed")[0]["dying"]] == [stuck]
        argv = postgres.argv(harness.folder)
        assert "is left" in agent.refused("start", mode="standby", epoch=None, argv=argv, env={})
        assert not agent.has("reply", id=1000)
        subprocess.run(["fsfreeze", "-u", str(mounted)], check=True)
        assert agent.expect("reply", id=1000)["ok"]
        assert postgres.alive() == []
        harness.start_postgres(agent, "standby")


def test_a_fence_that_cannot_be_completed_ends_the_supervisor_itself() -> None:
    # No process can be made to survive SIGKILL, so here the supervisor takes every one that it still sees for running.
    blind = (
        "import instance_manager.supervisor.fence as f, instance_manager.supervisor.__main__ as m, os;"
        "f.can_only_die = lambda process: False; os._exit(m.main())"
    )
    with Harness("--kill-budget-s", "0.000001", start=False) as harness:
        harness.start(program=("-c", blind))
        agent = harness.agent()
        postgres = harness.start_postgres(agent, "standby", "stopped", "stubborn")
        agent.send(type="kill", id=1)
        assert harness.exit_code() == ExitCode.FENCE_INCOMPLETE
        until("what it saw is dead", lambda: postgres.alive() == [])
        assert harness.log("fence_incomplete")


def holds(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    return any(fd.exists() and fd.samefile(path) for fd in Path(f"/proc/{pid}/fd").iterdir())
