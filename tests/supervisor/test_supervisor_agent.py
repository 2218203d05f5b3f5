"""The agent may die, hang and talk nonsense: Postgres serves on, and the next agent finds everything."""

import json
import os
import signal
import socket

import pytest
from supervisor_harness import agent_and_harness, is_alive, now_s, until

from instance_manager.supervisor.backoff import Backoff


def test_the_first_agent_is_told_a_clean_beginning() -> None:
    with agent_and_harness() as (harness, agent):
        hello = dict(agent.hello)
        incarnation, started_s, at_s = (hello.pop(key) for key in ("incarnation", "started_s", "now_s"))
        assert len(bytes.fromhex(incarnation)) == 8
        assert started_s <= at_s <= now_s()
        assert hello == {
            "type": "hello",
            "postgres": None,
            "permit": None,
            "revoked_epoch": -1,
            "agent_restarts": 0,
            "reaped": 0,
            "terminating": False,
        }
        assert harness.lock_file.read_text() == f"{incarnation} {harness.supervisor.pid}\n"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_agent_is_replaced_while_postgres_serves_on_and_the_next_finds_the_permit(end: signal.Signals) -> None:
    with agent_and_harness("--heartbeat-timeout-s", "0.7") as (harness, agent):
        agent.do("revoke", epoch=2)
        hard_s = agent.permit(epoch=3, soft_s=6, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", "busy", epoch=3)
        agent.command("child 60")
        os.kill(agent.pid, end)
        second = harness.agent()
        assert not is_alive(agent.pid)
        assert second.hello["incarnation"] == agent.hello["incarnation"]
        assert second.hello["postgres"]["pid"] == postgres.pid
        assert second.hello["postgres"]["mode"] == "read_write"
        assert second.hello["permit"] == {"epoch": 3, "soft": pytest.approx(hard_s - 1), "hard": hard_s}
        assert second.hello["revoked_epoch"] == 2
        assert second.hello["agent_restarts"] == 1
        assert len(postgres.alive()) == 2
        agents = [pid for pid in harness.living() if os.getsid(pid) == agent.pid]
        assert agents == [], "its children are gone with it"


def test_a_silent_agent_is_told_from_a_talking_one_by_its_messages() -> None:
    with agent_and_harness("--heartbeat-timeout-s", "0.7") as (harness, agent):
        begun_s = now_s()
        until("several timeouts passed", lambda: now_s() > begun_s + 1.5)
        assert harness.log("agent_silent") == []
        agent.command("quiet")
        until("it was noticed", lambda: harness.log("agent_silent"), 3)


def test_garbage_is_no_sign_of_life() -> None:
    with agent_and_harness("--heartbeat-timeout-s", "0.7") as (harness, agent):
        agent.command("quiet")

        def noticed() -> bool:
            try:
                agent.socket.send(b"garbage")
            except OSError:
                return True
            return bool(harness.log("agent_silent"))

        until("it was noticed", noticed, 3)
        assert harness.agent().pid != agent.pid


def test_late_messages_over_a_dead_agents_socket_have_no_effect() -> None:
    with agent_and_harness() as (harness, agent):
        agent.permit(epoch=1, hard_s=2)
        postgres = harness.start_postgres(agent, "read_write", epoch=1)
        os.kill(agent.pid, signal.SIGKILL)
        second = harness.agent()
        late = json.dumps({"type": "permit", "epoch": 1, "soft": now_s() + 7, "hard": now_s() + 7})
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            agent.socket.send(late.encode())
        event = second.expect("postgres_exited", pid=postgres.pid)
        assert event["reason"] == "fenced"
        assert now_s() < second.hello["permit"]["hard"] + 1


def test_an_agent_that_reads_nothing_is_replaced_and_never_holds_up_the_supervisor() -> None:
    with agent_and_harness() as (harness, agent):
        for number in range(20000):
            try:
                agent.socket.send(json.dumps({"type": "tick", "id": number}).encode())
            except (BrokenPipeError, ConnectionResetError):
                break
        second = harness.agent()
        assert "unread" in harness.log("agent_link_broken")[0]["reason"]
        second.do("tick")


def test_orphans_are_reaped() -> None:
    with agent_and_harness() as (harness, agent):
        agent.command("daemonise 0.01")
        until("it is reaped", lambda: not harness.children_of_supervisor("Z") and len(harness.living()) == 2)
        os.kill(agent.pid, signal.SIGKILL)
        assert harness.agent().hello["reaped"] == 2


def test_the_agents_end_of_the_link_is_a_sequenced_packet_socket_that_keeps_messages_apart() -> None:
    with agent_and_harness() as (_, agent):
        assert agent.socket.type == socket.SOCK_SEQPACKET
        agent.send(type="tick", id=1)
        agent.send(type="tick", id=2)
        agent.expect("reply", id=2)
        agent.expect("reply", id=1)


def test_the_wait_before_a_restart_doubles_and_is_forgotten_after_a_good_run() -> None:
    backoff = Backoff()
    assert [backoff.after_run_of(1.0) for _ in range(8)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert backoff.after_run_of(30.0) == 0.0
    assert backoff.after_run_of(1.0) == 0.5


def test_a_reload_signal_is_passed_on_to_the_agent() -> None:
    with agent_and_harness() as (harness, agent):
        harness.supervisor.send_signal(signal.SIGHUP)
        agent.expect("reload")


def test_user_signals_are_ignored() -> None:
    with agent_and_harness() as (harness, agent):
        harness.supervisor.send_signal(signal.SIGUSR1)
        harness.supervisor.send_signal(signal.SIGUSR2)
        agent.do("tick")
