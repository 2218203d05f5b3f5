"""How a supervisor begins and ends, and what it leaves behind: nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from supervisor_harness import Harness, agent_and_harness, is_alive, lock_is_free, now_s, until

from instance_manager.supervisor.exit_codes import ExitCode

RSS_LIMIT_KIB = 16 * 1024


def test_sigterm_is_passed_on_once_and_the_agents_goodbye_ends_all_in_order() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "plain")
        harness.supervisor.send_signal(signal.SIGTERM)
        assert agent.expect("terminate") == {"type": "terminate", "signal": "TERM"}
        harness.supervisor.send_signal(signal.SIGTERM)
        agent.do("signal", signal="INT")
        agent.expect("postgres_exited", exit_code=0)
        agent.do("goodbye")
        assert harness.exit_code() == ExitCode.ORDERLY
        assert harness.living() == []
        assert len(harness.log("terminating")) == 1
        assert postgres.alive() == []


def test_goodbye_stops_what_is_left() -> None:
    with agent_and_harness() as (harness, agent):
        agent.command("daemonise 60")
        postgres = harness.start_postgres(agent, "standby", "stubborn", "orphan")
        agent.do("goodbye")
        assert harness.exit_code() == ExitCode.ORDERLY
        assert postgres.alive() == []
        assert harness.living() == []


def test_an_agent_that_does_not_finish_is_not_waited_for_beyond_the_deadline() -> None:
    with agent_and_harness("--shutdown-timeout-s", "0.6") as (harness, agent):
        agent.permit(epoch=1, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", "stubborn", "stopped", epoch=1)
        harness.supervisor.send_signal(signal.SIGINT)
        agent.expect("terminate")
        begun_s = now_s()
        assert harness.exit_code() == ExitCode.SHUTDOWN_DEADLINE
        assert 0.3 < now_s() - begun_s < 2
        assert postgres.alive() == []
        assert harness.living() == []


def test_an_agent_that_dies_during_the_shutdown_is_replaced_and_told_of_it() -> None:
    with agent_and_harness() as (harness, agent):
        harness.supervisor.send_signal(signal.SIGTERM)
        agent.expect("terminate")
        os.kill(agent.pid, signal.SIGKILL)
        second = harness.agent()
        assert second.hello["terminating"] is True
        second.do("goodbye")
        assert harness.exit_code() == ExitCode.ORDERLY


def test_sigquit_kills_everything_at_once() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "stubborn", "stopped")
        harness.supervisor.send_signal(signal.SIGQUIT)
        assert harness.exit_code(2) == ExitCode.QUIT
        assert postgres.alive() == []
        assert harness.living() == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--name", "x", "--lock-file", "/nonexistent/folder/lock", "--", "/bin/true"],
        ["--name", "x", "--lock-file", "lock", "--hard-s", "nan", "--", "/bin/true"],
        ["--name", "x", "--lock-file", "lock", "--postgres-user", "root", "--", "/bin/true"],
        ["--name", "x", "--lock-file", "lock", "--postgres-user", "nobody-of-that-name", "--", "/bin/true"],
        ["--name", "x", "--lock-file", "lock"],
    ],
    ids=["nothing", "no such folder", "no number", "postgres as root", "no such user", "no agent"],
)
def test_a_wrong_command_line_ends_with_its_code_before_anything_starts(arguments: list[str], tmp_path: Path) -> None:
    with Harness(start=False) as harness:
        command = [*harness.python, "-m", "instance_manager.supervisor", *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, timeout=10)
        assert done.returncode == ExitCode.BAD_USAGE
        assert done.stderr or done.stdout


def test_an_agent_that_can_never_be_executed_ends_the_supervisor() -> None:
    hasty = (
        "import instance_manager.supervisor.backoff as s, instance_manager.supervisor.__main__ as m, os;"
        "s.FIRST_BACKOFF_S = s.LONGEST_BACKOFF_S = 0.01; os._exit(m.main())"
    )
    with Harness(start=False) as harness:
        harness.start("/nonexistent/agent", program=("-c", hasty))
        assert harness.exit_code() == ExitCode.AGENT_CANNOT_START
        failures = harness.log("agent_died")
        assert len(failures) == 10
        assert "No such file" in failures[0]["exec_error"]


def test_a_second_supervisor_waits_for_the_lock_and_takes_over_when_it_is_free() -> None:
    with agent_and_harness() as (harness, agent):
        harness.start()
        first, second = harness.supervisors
        agent.do("tick")
        first.send_signal(signal.SIGQUIT)
        first.wait(5)
        successor = harness.agent()
        assert successor.hello["incarnation"] != agent.hello["incarnation"]
        assert harness.lock_file.read_text() == f"{successor.hello['incarnation']} {second.pid}\n"


def test_a_lock_that_stays_busy_ends_the_second_supervisor_with_a_clear_message() -> None:
    hasty = (
        "import instance_manager.supervisor.supervisor as s, instance_manager.supervisor.__main__ as m, os;"
        "s.LOCK_ATTEMPTS = 3; os._exit(m.main())"
    )
    with agent_and_harness() as (harness, agent):
        harness.start(program=("-c", hasty))
        assert harness.exit_code() == ExitCode.LOCK_BUSY
        message = harness.log("lock_busy")[0]["error"]
        assert agent.hello["incarnation"] in message
        assert "another supervisor or a Postgres left behind" in message


def test_a_supervisor_that_waits_for_the_lock_can_be_stopped() -> None:
    with agent_and_harness() as (harness, _):
        harness.start()
        # It has installed its handlers once it blocks the wake-up signals' default.
        until("it waits", lambda: harness.catches(harness.supervisor.pid, signal.SIGTERM))
        harness.supervisor.send_signal(signal.SIGTERM)
        assert harness.exit_code(5) == ExitCode.ORDERLY


def test_the_lock_is_held_until_the_supervisor_and_every_postgres_process_are_gone() -> None:
    with agent_and_harness() as (harness, agent):
        postgres = harness.start_postgres(agent, "standby", "stubborn", "plain")
        harness.supervisor.kill()
        harness.supervisor.wait()
        until(
            "the postmaster and the agent died with it", lambda: not is_alive(postgres.pid) and not is_alive(agent.pid)
        )
        for child in postgres.children:
            assert is_alive(child)
            assert not lock_is_free(harness.lock_file)
            os.kill(child, signal.SIGKILL)
        until("the lock is free", lambda: lock_is_free(harness.lock_file), 2)


def test_the_incarnation_is_the_termination_message() -> None:
    with Harness("--termination-log", "/dev/null") as harness:
        harness.agent()
        assert harness.log("termination_log_unwritable") == []
    with Harness(start=False) as harness:
        path = harness.folder / "termination-log"
        harness.options = ("--termination-log", str(path))
        harness.start()
        agent = harness.agent()
        assert path.read_text() == agent.hello["incarnation"]


def test_a_supervisor_at_work_needs_less_than_16_mib() -> None:
    with agent_and_harness() as (harness, agent):
        agent.permit(epoch=1, hard_s=7)
        postgres = harness.start_postgres(agent, "read_write", *["plain"] * 20, epoch=1)
        for number in range(500):
            agent.send(type="tick", id=number)
            agent.expect("reply", id=number)
        agent.do("kill")
        agent.expect("postgres_exited", pid=postgres.pid)
        status = Path(f"/proc/{harness.supervisor.pid}/status").read_text().splitlines()
        rss_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
        print(f"VmRSS {rss_kib} KiB")
        assert 0 < rss_kib < RSS_LIMIT_KIB


def test_a_supervisor_whose_log_nobody_reads_goes_on() -> None:
    read_fd, write_fd = os.pipe()
    with Harness(start=False) as harness:
        harness.start(stderr=write_fd)
        os.close(write_fd)
        agent = harness.agent()
        for _ in range(2000):
            agent.send(type="unknown")
            agent.do("tick")
        # Once somebody reads again, the first line says how many were lost.
        os.set_blocking(read_fd, False)
        while True:
            try:
                os.read(read_fd, 65536)
            except BlockingIOError:
                break
        agent.send(type="unknown")
        agent.do("tick")
        record = json.loads(until("a line", lambda: os.read(read_fd, 65536)))
        os.close(read_fd)
        assert record["fields"]["dropped_lines"] > 100


UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def test_as_pid_1_of_a_namespace_it_does_all_it_does_elsewhere() -> None:
    with Harness(wrapper=UNSHARE) as harness:
        agent = harness.agent()
        hard_s = agent.permit(epoch=1, hard_s=1.5)
        postgres = harness.start_postgres(agent, "read_write", "busy", "stopped", "orphan", epoch=1)
        agent.command("daemonise 0.01")
        event = agent.expect("postgres_exited", reason="fenced")
        assert hard_s <= now_s() <= hard_s + 1
        assert event["remaining_killed"] == 3
        assert postgres.commits()[-1] <= hard_s + 1
        assert harness.log("started")[0]["pid"] == 1
        agent.do("goodbye")
        assert harness.exit_code() == ExitCode.ORDERLY


def test_as_pid_1_its_death_takes_everything_with_it() -> None:
    with Harness(wrapper=UNSHARE) as harness:
        agent = harness.agent()
        harness.start_postgres(agent, "standby", "stubborn", "stopped", "orphan")
        init = until("PID 1", lambda: harness.pid_1_of_namespace())
        os.kill(init, signal.SIGKILL)
        until("all are gone", lambda: not harness.living(), 3)
        assert lock_is_free(harness.lock_file)


def test_as_pid_1_it_refuses_to_run_beside_processes_of_others() -> None:
    with Harness(start=False) as harness:
        gate = harness.folder / "gate"
        os.mkfifo(gate)
        harness.wrapper = (*UNSHARE, "sh", "-c", f'read line < {gate}; exec "$@"', "sh")
        harness.start()
        init = until("PID 1", harness.pid_1_of_namespace)
        nsenter = [shutil.which("nsenter") or "", "-t", str(init), "-p", "sleep", "60"]
        with subprocess.Popen(nsenter, env=harness.environment) as other:
            until("it runs", lambda: len(harness.living()) >= 4)
            gate.write_text("go\n")
            assert harness.exit_code() == ExitCode.SHARED_PID_NAMESPACE
            other.wait(5)
        assert "processes of others" in harness.log("shared_pid_namespace")[0]["problem"]


def test_it_refuses_a_proc_of_another_namespace() -> None:
    with Harness(wrapper=("unshare", "--pid", "--fork", "--kill-child")) as harness:
        assert harness.exit_code() == ExitCode.SHARED_PID_NAMESPACE


def test_the_supervisor_does_not_load_what_only_a_terminal_needs() -> None:
    """Its memory is locked, and each pod pays for it: reading its command line loaded the libraries of all compressions."""
    program = (
        "import sys; from instance_manager.supervisor import __main__ as program; "
        "sys.argv = ['supervisor', '--name', 'a', '--lock-file', 'b', '--', 'agent']; program._parse_arguments(); "
        "print(*sorted({'shutil', 'lzma', 'bz2', 'zlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
