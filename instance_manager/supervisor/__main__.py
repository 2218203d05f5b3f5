"""The supervisor's command line; see `python -m instance_manager.supervisor --help`."""

import argparse
import contextlib
import math
import os
import sys

from instance_manager.supervisor import fence, processes
from instance_manager.supervisor.companion import COMPANION_SEPARATOR
from instance_manager.supervisor.exit_codes import ExitCode
from instance_manager.supervisor.log import Log
from instance_manager.supervisor.options import Options
from instance_manager.supervisor.supervisor import Supervisor

KUBERNETES_TERMINATION_LOG = "/dev/termination-log"


def main() -> ExitCode:
    """Run one supervisor and return its exit code."""
    arguments = _parse_arguments()
    incarnation = os.urandom(8).hex()
    log = Log(arguments.name, incarnation)
    is_pid_1 = os.getpid() == 1
    termination_log = arguments.termination_log
    if termination_log is None and is_pid_1 and os.path.exists(KUBERNETES_TERMINATION_LOG):  # noqa: PTH110
        termination_log = KUBERNETES_TERMINATION_LOG
    if termination_log is not None:
        # First of all: a container that ended before this line ran is no proof of anybody's death (R9).
        _write_incarnation(termination_log, incarnation, log)
    if (problem := _namespace_problem(is_pid_1)) is not None:
        log.failure("shared_pid_namespace", problem=problem)
        return ExitCode.SHARED_PID_NAMESPACE
    credentials = None
    if os.geteuid() == 0:
        try:
            credentials = processes.credentials_of(arguments.postgres_user)
        except (KeyError, ValueError) as error:
            log.failure("bad_postgres_user", user=arguments.postgres_user, error=str(error))
            return ExitCode.BAD_USAGE
    if not is_pid_1:
        processes.become_subreaper()
    options = Options(
        name=arguments.name,
        lock_file=arguments.lock_file,
        hard_s=arguments.hard_s,
        heartbeat_timeout_s=arguments.heartbeat_timeout_s,
        kill_budget_s=arguments.kill_budget_s,
        shutdown_timeout_s=arguments.shutdown_timeout_s,
        agent_argv=tuple(arguments.agent_argv),
        postgres_credentials=credentials,
        companion_argv=tuple(arguments.companion_argv),
    )
    supervisor = Supervisor(options, incarnation, log)
    processes.lock_memory()
    return supervisor.run()


def _parse_arguments() -> argparse.Namespace:
    # With a width it need not import shutil, and with that the libraries of all compressions, to ask a terminal for one.
    parser = argparse.ArgumentParser(
        prog="python -m instance_manager.supervisor",
        description=__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),
    )
    parser.add_argument("--name", required=True, help="the instance's name, for the log")
    parser.add_argument(
        "--lock-file", required=True, help="locked until the supervisor and every Postgres process is gone"
    )
    parser.add_argument("--hard-s", type=_seconds, default=8.0, help="no write permit lasts longer than this from now")
    parser.add_argument(
        "--heartbeat-timeout-s", type=_seconds, default=3.0, help="an agent silent this long is restarted"
    )
    parser.add_argument("--kill-budget-s", type=_seconds, default=1.0, help="the time killing Postgres may take")
    parser.add_argument(
        "--shutdown-timeout-s", type=_seconds, default=25.0, help="after SIGTERM, Postgres is killed then"
    )
    parser.add_argument("--postgres-user", default="postgres", help="whom Postgres runs as when this runs as root")
    parser.add_argument("--termination-log", help="gets the incarnation; default: /dev/termination-log when PID 1")
    parser.add_argument(
        "agent_argv",
        nargs="+",
        metavar="ARGV",
        help=f"after --, the agent's command; after a further {COMPANION_SEPARATOR}, one that is kept running beside it",
    )
    arguments = parser.parse_args()
    arguments.companion_argv = []
    if COMPANION_SEPARATOR in arguments.agent_argv:
        at = arguments.agent_argv.index(COMPANION_SEPARATOR)
        arguments.companion_argv = arguments.agent_argv[at + 1 :]
        arguments.agent_argv = arguments.agent_argv[:at]
        if not arguments.agent_argv or not arguments.companion_argv:
            parser.error(f"a command is missing before or after {COMPANION_SEPARATOR}")
    return arguments


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _write_incarnation(path: str, incarnation: str, log: Log) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, incarnation.encode())
        finally:
            os.close(fd)
    except OSError as error:
        # Not fatal: without it a death is never proven, which costs time at a failover and no data.
        log.failure("termination_log_unwritable", path=path, error=str(error))


def _namespace_problem(is_pid_1: bool) -> str | None:
    """Why this supervisor's end would not prove the end of all it started (R9); None if all is well."""
    if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115
        return "/proc shows another PID namespace"
    if not is_pid_1:
        if os.path.exists(KUBERNETES_TERMINATION_LOG):  # noqa: PTH110
            return "in a Kubernetes container and not PID 1: the pod shares its PID namespace, or an init stands before"
        return None
    table = fence.read_processes()
    own = {process.pid for process in fence.descendants(table, [1])}
    others = sorted(pid for pid in table if pid not in own)
    return f"processes of others: {others[:10]}" if others else None


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)  # no finalisers: where the fence failed, every millisecond counts
