"""`instance-manager restore DIRECTORY`: recovery of one machine from an archive.

Exit codes: 0 it can be started; 1 it has not opened; 2 wrong use, nothing was done.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.recovery.configured import configure_restored
from instance_manager.archive.recovery.replay import ReplaySettings
from instance_manager.archive.recovery.restore import RestoreFailed, RestoreSettings, make_plan, restore
from instance_manager.archive.recovery.target import Target, TargetInvalid, make_target
from instance_manager.archive.where import WRONG_USE, Where, WrongUse, add_where, carry_out
from instance_manager.core.types import format_lsn
from instance_manager.postgres.server import LocalServer, RunAs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="DATA_DIRECTORY", help="missing or empty, or left by the same restore"
    )
    add_target_arguments(parser)
    parser.add_argument("--backup", metavar="ID", help="by default the newest before the target")
    parser.add_argument("--accept-end", action="store_true", help="open where the archive ends before the target")
    parser.add_argument("--tablespace", action="append", default=[], metavar="NAME=DIR", help="a new place for one")
    parser.add_argument("--parallel", type=int, default=4, metavar="N")
    parser.add_argument(
        "--outage-patience", type=float, default=3600.0, metavar="SECONDS", help="for a store that fails"
    )
    parser.add_argument(
        "--bin-directory", type=Path, metavar="DIR", help="of Postgres; by default by the backup's version"
    )
    parser.add_argument("--run-as", default="postgres", metavar="USER", help="Postgres's user, where this is root")
    parser.add_argument("--port", type=int, default=5432, help="in the configuration that is written")
    add_where(parser)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """At most one of them; by default all that the archive holds."""
    group = parser.add_argument_group("until when", "by default all that is in the archive")
    group.add_argument("--target-time", metavar="TIME", help="with its zone: '2025-11-28 21:05:00+00'")
    group.add_argument("--target-lsn", metavar="LSN")
    group.add_argument("--target-xid", metavar="XID")
    group.add_argument("--target-name", metavar="NAME", help="of pg_create_restore_point")
    group.add_argument("--target-immediate", action="store_true", help="as soon as the backup is consistent")
    group.add_argument("--target-timeline", metavar="N", help="by default the newest of the archive")
    group.add_argument("--exclusive", action="store_true", help="just before the target, not with it")


def target_of(namespace: argparse.Namespace) -> Target:
    """TargetInvalid."""
    return make_target(
        time=namespace.target_time,
        lsn=namespace.target_lsn,
        xid=namespace.target_xid,
        name=namespace.target_name,
        immediate=namespace.target_immediate,
        timeline=namespace.target_timeline,
        inclusive=not namespace.exclusive,
    )


def run(namespace: argparse.Namespace) -> int:
    """Its exit code."""
    try:
        target, settings = target_of(namespace), _settings(namespace)
        namespace.target = namespace.target.absolute()
        run_as = RunAs.of_user(namespace.run_as) if os.geteuid() == 0 else None
    except (TargetInvalid, WrongUse) as error:
        print(f"instance-manager: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyError:
        print(f"instance-manager: there is no user {namespace.run_as!r}", file=sys.stderr)
        return WRONG_USE
    return carry_out(namespace, partial(_restore, namespace, target, settings, run_as))


async def _restore(
    namespace: argparse.Namespace, target: Target, settings: RestoreSettings, run_as: RunAs | None, where: Where
) -> int:
    data: Path = namespace.target
    try:
        plan = await make_plan(where.store, where.layout, target, backup=namespace.backup)
        server = LocalServer(
            data_directory=data,
            socket_directory=data.parent,
            state_directory=data.parent,
            listen_address="127.0.0.1",
            port=namespace.port,
            bin_directory=find_programs(namespace.bin_directory, plan.info.major),
            run_as=run_as,
        )
        restored = await restore(
            server,
            where.store,
            where.layout,
            target,
            settings,
            backup=namespace.backup,
            on_progress=lambda text: print(text, flush=True),
        )
        await configure_restored(server)
    except RestoreFailed as error:
        print(f"instance-manager: {error}", file=sys.stderr)
        return 1
    reached = restored.reached
    print(f"recovered to {format_lsn(reached.lsn)}" + (f", the transaction of {reached.time}" if reached.time else ""))
    print(f"{data} is shut down on timeline {reached.timeline}, and archives nothing. Start it:")
    user = "" if run_as is None else f"sudo -u {run_as.user_name} "
    print(f"  {user}{server.program('pg_ctl')} -D {data} -l {data.parent / 'postgres.log'} start")
    return 0


def find_programs(given: Path | None, major: int) -> Path:
    """Postgres's programs of the backup's version. RestoreFailed: they are not there."""
    for candidate in (given,) if given is not None else (Path(f"/usr/lib/postgresql/{major}/bin"), Path("/usr/bin")):
        if (candidate / "postgres").exists():
            return candidate
    raise RestoreFailed(f"the backup is of Postgres {major}, whose programs are not here: give --bin-directory")


def _settings(namespace: argparse.Namespace) -> RestoreSettings:
    tablespaces = {}
    for rule in namespace.tablespace:
        name, separator, place = rule.partition("=")
        if not separator or not name or not place.startswith("/"):
            raise WrongUse(f"not NAME=/DIRECTORY: {rule!r}")
        tablespaces[name] = Path(place)
    if not 1 <= namespace.parallel <= 12:
        raise WrongUse("--parallel must be between 1 and 12")
    return RestoreSettings(
        parallel=namespace.parallel,
        fetch=FetchSettings(parallel=namespace.parallel),
        replay=ReplaySettings(accept_end=namespace.accept_end, outage_patience_s=namespace.outage_patience),
        tablespaces=tablespaces,
    )
