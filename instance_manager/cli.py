"""The commands. Each works against the control socket of an instance, says what happened, and shows the new state.

Exit codes: 0 done; 1 not done, or not known whether done; 2 wrong use, nothing was done. What a command does not need is
not imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from instance_manager.http.control_client import Network
    from instance_manager.http.ports import ControlResult
    from instance_manager.status import ClusterStatus

SOCKET_VARIABLE = "INSTANCE_MANAGER_SOCKET"
DEFAULT_TIMEOUT_S = 120.0
WATCH_INTERVAL_S = 1.0
_DELEGATED = {
    "demo": ("instance_manager.demo.command", "start a real three-instance cluster on this machine"),
    "certificates": ("instance_manager.certificates_command", "make an authority and certificates where there is none"),
    "drill": ("instance_manager.drill.command", "inject faults into a cluster and measure what its clients see"),
    "backup": ("instance_manager.archive.backup.command", "take a base backup; verify, delete, keep and expire them"),
    "backups": ("instance_manager.archive.backup.list_command", "which backups there are, and what can be recovered"),
    "restore": ("instance_manager.archive.recovery.command", "recover one machine from an archive, to any moment"),
    "archive": ("instance_manager.archive.command", "does WAL get to the archive and back; is it whole"),
}


class CommandFailed(Exception):
    """Ends the command: `text` to standard error, `code` as its exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        namespace = _parser(arguments).parse_args(arguments)
        code: int = namespace.carry_out(namespace)
        sys.stdout.flush()
    except CommandFailed as failure:
        print(f"instance-manager: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left; nothing more may be written, not even at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    from instance_manager import __version__

    parser = argparse.ArgumentParser(
        prog="instance-manager", description="Manages one PostgreSQL instance of a cluster, and asks it."
    )
    parser.add_argument("--version", action="version", version=f"instance-manager {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run an instance: become its supervisor")
    run.add_argument("--config", type=Path, required=True, metavar="FILE")
    run.set_defaults(carry_out=_run)

    for name, (module, text) in _DELEGATED.items():
        delegated = commands.add_parser(name, help=text, description=text)
        if arguments and arguments[0] == name:
            command = importlib.import_module(module)
            command.add_arguments(delegated)
            delegated.set_defaults(carry_out=command.run)

    status = _talking(commands, "status", "who is primary, why, is anything at risk", _status)
    status.add_argument("--json", action="store_true", help="for machines")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")

    switchover = _talking(commands, "switchover", "hand the primary's role to a standby, losing nothing", _switchover)
    switchover.add_argument("--to", metavar="NAME", help="the standby that is to take over; by default the best")

    failover = _talking(
        commands, "failover", "make the best reachable instance primary although writes are lost", _failover
    )
    failover.add_argument("--allow-data-loss", action="store_true", help="without it nothing is done")
    failover.add_argument("--yes", action="store_true", help="do not ask for the cluster's name")

    for name, text in (
        ("fence", "stop the Postgres of an instance and keep it stopped"),
        ("unfence", "let a fenced instance run again"),
        ("reinit", "throw the data of a standby away and clone it anew"),
    ):
        _talking(commands, name, text, _verb_on_name).add_argument("name", metavar="NAME")
    restart = _talking(commands, "restart", "restart the Postgres of an instance", _verb_on_name)
    restart.add_argument("name", metavar="NAME", nargs="?", help="by default the instance that is asked")
    for name, text in (
        ("reload", "read the configuration again"),
        ("pause", "no failover until resume"),
        ("resume", "failover again after a pause"),
    ):
        _talking(commands, name, text, _verb)

    level = _talking(commands, "log-level", "change how much an instance logs, until its next reload", _log_level)
    level.add_argument("level", choices=("debug", "info", "warning", "error"))

    _talking(commands, "lease", "show the cluster's record", _lease)

    config = commands.add_parser("config", help="about the configuration file")
    config_commands = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = config_commands.add_parser("check", help="is the file valid, and is all there that it names?")
    check.add_argument("--config", type=Path, required=True, metavar="FILE")
    check.set_defaults(carry_out=_config_check)
    return parser


def _talking(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    carry_out: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"The instance asked is that of --socket, --config or --host, else of ${SOCKET_VARIABLE}, else the running demo's.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", type=Path, metavar="PATH", help="control socket of an instance")
    where.add_argument("--config", type=Path, metavar="FILE", help="configuration file of an instance")
    where.add_argument(
        "--host", metavar="HOST:PORT", help="control.listen of an instance, with one or both of the next two"
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="DIR", help="directory with tls.crt, tls.key and ca.crt to show"
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="token to show, as control.token_file")
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="by whom the instance is known; default: ca.crt of --certificate"
    )
    parser.add_argument("--server-name", metavar="NAME", help="that its certificate must have; default: the host")
    parser.add_argument(
        "--timeout", type=_seconds, default=DEFAULT_TIMEOUT_S, metavar="SECONDS", help="give up after this silence"
    )
    parser.set_defaults(carry_out=carry_out, verb=name)
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


def _run(namespace: argparse.Namespace) -> int:
    from instance_manager import launch
    from instance_manager.config import ConfigurationError, load_configuration

    try:
        configuration = load_configuration(namespace.config)
        launch.prepare_directories(configuration)
    except (ConfigurationError, launch.LaunchError) as error:
        raise CommandFailed(str(error), 2) from error
    argv = launch.supervisor_argv(configuration, namespace.config)
    sys.stdout.flush()
    os.execv(argv[0], argv)  # noqa: S606


def _config_check(namespace: argparse.Namespace) -> int:
    from instance_manager.config import ConfigurationError, load_configuration
    from instance_manager.launch import surroundings_problems

    try:
        configuration = load_configuration(namespace.config)
    except ConfigurationError as error:
        raise CommandFailed(str(error), 2) from error
    problems = surroundings_problems(configuration)
    if problems:
        raise CommandFailed("\n".join(f"{namespace.config}: {problem}" for problem in problems), 2)
    timings = configuration.timings
    print(f"{namespace.config}: good")
    print(
        f"cluster {configuration.cluster.name}, instance {configuration.instance.name} of {configuration.instances}, "
        f"durability {configuration.cluster.durability}, a commit is on {configuration.wanted_synchronous_standbys + 1} disks"
    )
    print(f"lease {timings.lease_duration_s:g} s, soft {timings.soft_s:g} s, hard {timings.hard_s:g} s")
    return 0


def _status(namespace: argparse.Namespace) -> int:
    from instance_manager.codec import to_plain

    if namespace.watch:
        return _watch(namespace)
    status = _new_state(_send(namespace, "status", {}))
    if namespace.json:
        print(json.dumps(to_plain(status), indent=2))
    else:
        _print_status(status)
    return 0


def _watch(namespace: argparse.Namespace) -> NoReturn:
    from instance_manager.codec import to_plain
    from instance_manager.launch import terminal_size
    from instance_manager.status_view import render_status
    from instance_manager.wall_clock import local_time

    on_terminal = sys.stdout.isatty()
    while True:
        try:
            status = _new_state(_send(namespace, "status", {}))
        except CommandFailed as failure:
            if failure.code == 2:
                raise
            screen = str(failure)
        else:
            columns, lines = terminal_size()
            screen = (
                json.dumps(to_plain(status))
                if namespace.json
                else render_status(status, columns, height=lines - 2, colour=on_terminal)
            )
        if namespace.json:
            print(screen, flush=True)
        elif on_terminal:
            print(f"\x1b[H\x1b[2J{local_time()}\n{screen}", flush=True)
        else:
            print(f"{local_time()}\n{screen}\n", flush=True)
        time.sleep(WATCH_INTERVAL_S)


def _switchover(namespace: argparse.Namespace) -> int:
    return _tell(_send(namespace, "switchover", {"to": namespace.to}))


def _verb_on_name(namespace: argparse.Namespace) -> int:
    return _tell(_send(namespace, namespace.verb, {"name": namespace.name}))


def _log_level(namespace: argparse.Namespace) -> int:
    return _tell(_send(namespace, "log-level", {"level": namespace.level}))


def _verb(namespace: argparse.Namespace) -> int:
    return _tell(_send(namespace, namespace.verb, {}))


def _failover(namespace: argparse.Namespace) -> int:
    """R15: what is lost is shown before it is agreed to."""
    from instance_manager.status_view import instance_table

    if not namespace.allow_data_loss:
        raise CommandFailed(
            "failover may lose acknowledged writes, and is for a cluster whose primary and quorum do not come back. "
            "Say --allow-data-loss if that is what you want; `switchover` loses nothing",
            2,
        )
    preview = _send(namespace, "failover", {"preview": True})
    if preview.status is not None:
        print(f"cluster {preview.status.cluster}, epoch {preview.status.epoch}, timeline {preview.status.timeline}")
        print(instance_table(preview.status))
    print(preview.message)
    if not preview.ok:
        return 1
    if not namespace.yes:
        cluster = _new_state(preview).cluster
        print(f"Type the cluster's name ({cluster}) to go on: ", end="", flush=True)
        typed = sys.stdin.readline()
        if not typed.endswith("\n"):
            print()
        if typed.strip() != cluster:
            raise CommandFailed("that is not the cluster's name; nothing was done (--yes agrees beforehand)", 2)
    return _tell(_send(namespace, "failover", {"allow_data_loss": True}))


def _lease(namespace: argparse.Namespace) -> int:
    """From the instance; where it does not answer and its configuration is known, from the store itself."""
    try:
        result = _send(namespace, "lease", {})
    except CommandFailed as failure:
        if namespace.config is None or failure.code != 1:
            raise
        print(f"{failure}\nread from the store itself:", file=sys.stderr)
        print(_described_store(namespace))
        return 0
    print(result.message or "the instance said nothing of the record")
    return 0 if result.ok else 1


def _described_store(namespace: argparse.Namespace) -> str:
    import asyncio

    from instance_manager.agent.surroundings import surroundings_of
    from instance_manager.config import load_configuration
    from instance_manager.coordination.describe import describe
    from instance_manager.core.record import StoredRecord
    from instance_manager.ports import CoordinationError

    async def read() -> StoredRecord | None:
        store = surroundings_of(load_configuration(namespace.config)).coordination
        try:
            return await store.read(deadline_s=min(namespace.timeout, 10.0))
        finally:
            await store.close()

    try:
        stored = asyncio.run(read())
    except CoordinationError as error:
        raise CommandFailed(f"{type(error).__name__}: {error}") from error
    return describe(stored) if stored is not None else "there is no record"


def _send(namespace: argparse.Namespace, verb: str, arguments: dict[str, object]) -> ControlResult:
    """The verb's result, its progress shown meanwhile. The first instance that can be reached is asked, and only that."""
    from instance_manager.http import control_client
    from instance_manager.http.ports import ControlResult

    unreachable = []
    for path in _sockets(namespace):
        try:
            for item in control_client.send_command(path, verb, arguments, silence_s=namespace.timeout):
                if isinstance(item, ControlResult):
                    return item
                print(item.progress, file=sys.stderr, flush=True)
        except control_client.InstanceNotReachable as error:
            unreachable.append(str(error))
        except control_client.CommandRefused as error:
            wrong_use = error.http_status in (400, 404, 413)
            raise CommandFailed(f"{verb}: {error}", 2 if wrong_use else 1) from error
        except control_client.AnswerLost as error:
            raise CommandFailed(
                f"{verb}: {error}. It may have been done or not: look with `instance-manager status`"
            ) from error
    raise CommandFailed(
        "no instance answers: "
        + "; ".join(unreachable)
        + ".\nIs it running? Start it with `instance-manager run --config FILE`, or the demo with `instance-manager demo`; "
        "its log tells why it ended"
    )


def _network(namespace: argparse.Namespace) -> Network:
    from instance_manager.http.control_client import Network, parse_host

    try:
        host, port = parse_host(namespace.host)
    except ValueError as error:
        raise CommandFailed(f"--host: {error}", 2) from error
    authority = namespace.ca or (namespace.certificate / "ca.crt" if namespace.certificate is not None else None)
    if authority is None:
        raise CommandFailed("--host needs --ca FILE, by which the instance is known, or --certificate DIR", 2)
    if namespace.certificate is None and namespace.token_file is None:
        raise CommandFailed("--host needs --certificate DIR or --token-file FILE: who asks?", 2)
    token = None
    if namespace.token_file is not None:
        try:
            token = namespace.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandFailed(f"--token-file: {namespace.token_file} cannot be read: {error}", 2) from error
    network = Network(
        host=host,
        port=port,
        authority=authority,
        certificate=namespace.certificate,
        token=token,
        server_name=namespace.server_name,
    )
    try:
        network.context()
    except OSError as error:
        raise CommandFailed(f"--certificate, --ca: cannot be used: {error}", 2) from error
    return network


def _sockets(namespace: argparse.Namespace) -> Sequence[Path | Network]:
    if namespace.host is not None:
        return [_network(namespace)]
    if namespace.socket is not None:
        return [namespace.socket]
    if namespace.config is not None:
        from instance_manager.config import ConfigurationError, load_configuration

        try:
            return [load_configuration(namespace.config).control_socket]
        except ConfigurationError as error:
            raise CommandFailed(str(error), 2) from error
    if from_environment := os.environ.get(SOCKET_VARIABLE):
        return [Path(from_environment)]
    from instance_manager.demo_locator import DemoLocatorError, read_running_demo

    try:
        demo = read_running_demo()
    except DemoLocatorError as error:
        raise CommandFailed(str(error)) from error
    if demo is None or not demo.sockets:
        raise CommandFailed(
            f"which instance? Give --socket PATH or --config FILE, set {SOCKET_VARIABLE}, or start `instance-manager demo`"
        )
    named = getattr(namespace, "name", None)
    return sorted(demo.sockets.values(), key=lambda path: path != demo.sockets.get(named or ""))


def _tell(result: ControlResult) -> int:
    print(result.message)
    if result.status is not None:
        print()
        _print_status(result.status)
    return 0 if result.ok else 1


def _new_state(result: ControlResult) -> ClusterStatus:
    if result.status is None:
        raise CommandFailed(result.message or "the instance told no status")
    return result.status


def _print_status(status: ClusterStatus) -> None:
    from instance_manager.launch import terminal_size
    from instance_manager.status_view import render_status

    columns, lines = terminal_size()
    print(render_status(status, columns, height=lines - 1, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    sys.exit(main())
