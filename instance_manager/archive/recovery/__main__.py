"""`python -m instance_manager.archive.recovery --config FILE --into DIRECTORY`: the first primary of a new cluster, recovered.

Started by the agent instead of initdb where `bootstrap.recovery` says so; a process of its own, so that its memory and its threads
never touch the lease. Each line of standard output is progress; the last one of standard error is why it failed. The directory is kept after
a failure, and resumed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout
from instance_manager.archive.lineage import ForeignArchive, read_lineage
from instance_manager.archive.recovery.origin import ORIGIN_FILE, Origin, render_origin
from instance_manager.archive.recovery.replay import ReplaySettings
from instance_manager.archive.recovery.restore import RestoreFailed, RestoreSettings, restore
from instance_manager.archive.recovery.target import TargetInvalid, make_target
from instance_manager.archive.where import make_store
from instance_manager.config import Configuration, ConfigurationError, load_configuration
from instance_manager.config_sections import RecoverySection
from instance_manager.core.types import format_lsn
from instance_manager.ports import ObjectStoreError
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import LocalServer, RunAs

DEADLINE_S = 60.0


async def recover(configuration: Configuration, section: RecoverySection, into: Path, bin_directory: Path) -> str:
    """What was reached. RestoreFailed; TargetInvalid; ForeignArchive; ObjectStoreError."""
    server_name = section.archive.server_name
    if server_name is None:
        raise RestoreFailed("bootstrap.recovery.archive.server_name: is missing")
    store = make_store(section.archive)
    try:
        lineage = await read_lineage(store, Layout(server_name, Codec(section.archive.codec)), deadline_s=DEADLINE_S)
        codec = section.archive.codec if lineage is None else lineage.codec
        server = LocalServer(
            data_directory=into,
            socket_directory=configuration.socket_directory,
            state_directory=configuration.state_directory,
            listen_address=configuration.listen_host,
            port=configuration.me.postgres_port,
            bin_directory=bin_directory,
            run_as=RunAs.of_user(configuration.instance.run_as) if os.geteuid() == 0 else None,
        )
        target = section.target
        done = await restore(
            server,
            store,
            Layout(server_name, Codec(codec)),
            make_target(
                time=target.time,
                lsn=target.lsn,
                xid=target.xid,
                name=target.name,
                immediate=target.immediate,
                timeline=None if target.timeline is None else str(target.timeline),
                inclusive=not target.exclusive,
            ),
            RestoreSettings(
                parallel=section.archive.parallel,
                replay=ReplaySettings(accept_end=section.accept_end, outage_patience_s=section.outage_patience_s),
                tablespaces=section.tablespaces,
            ),
            backup=section.backup,
            on_progress=lambda text: print(text, flush=True),
        )
        origin = Origin(server_name, "" if lineage is None else lineage.cluster_uid)
        await asyncio.to_thread(write_atomically, into / ORIGIN_FILE, render_origin(origin), run_as=server.run_as)
    finally:
        await store.close()
    return f"recovered to {format_lsn(done.reached.lsn)}, now on timeline {done.reached.timeline}"


async def _until_told(configuration: Configuration, arguments: argparse.Namespace) -> str:
    """Cancelled by SIGTERM or SIGINT, which stops Postgres in order."""
    section = configuration.bootstrap.recovery
    if section is None:
        raise ConfigurationError("there is no section `bootstrap.recovery`: nothing to do")
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await recover(configuration, section, arguments.into, arguments.bin_directory)


def main() -> int:
    """The exit code: 2 for a configuration or a target that cannot be used."""
    parser = argparse.ArgumentParser(prog="instance_manager.archive.recovery", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the instance's configuration file")
    parser.add_argument("--into", type=Path, required=True, help="where the data directory is made")
    parser.add_argument("--bin-directory", type=Path, required=True, help="Postgres's programs")
    arguments = parser.parse_args()

    try:
        configuration = load_configuration(arguments.config)
        print(asyncio.run(_until_told(configuration, arguments)), flush=True)
    except (ConfigurationError, TargetInvalid) as error:
        print(error, file=sys.stderr)
        return 2
    except (RestoreFailed, ForeignArchive, ObjectStoreError) as error:
        print(error, file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("interrupted; it goes on from here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
