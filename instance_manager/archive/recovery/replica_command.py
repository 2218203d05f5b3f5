"""`python -m instance_manager.archive.recovery.replica_command --config FILE --into DIRECTORY`: a standby's directory from an archive.

Started by the agent where a standby has to be made from nothing; a process of its own, so that its memory and its threads never touch
the lease. Standard input is a ReplicaRequest as JSON. Each line of standard output is progress; the last one of standard error is why
there is no directory. The exit code is NOT_FROM_ARCHIVE where the primary is the better source.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from instance_manager.archive.recovery.replica import make_replica
from instance_manager.archive.recovery.replica_choice import NotFromArchive, choose, require_cheaper
from instance_manager.archive.recovery.replica_places import make_places
from instance_manager.archive.recovery.replica_request import NOT_FROM_ARCHIVE, ReplicaRequest
from instance_manager.archive.recovery.restore import RestoreFailed
from instance_manager.codec import from_json
from instance_manager.config import Configuration, ConfigurationError, load_configuration
from instance_manager.core.types import format_lsn
from instance_manager.ports import ObjectStoreError
from instance_manager.postgres.directory import DirectoryRefused, working_in
from instance_manager.postgres.server import LocalServer, RunAs


async def make(configuration: Configuration, request: ReplicaRequest, into: Path, bin_directory: Path) -> str:
    """What it was made from. NotFromArchive; RestoreFailed; ObjectStoreError; DirectoryRefused; OSError."""
    server = LocalServer(
        data_directory=configuration.data_directory,
        socket_directory=configuration.socket_directory,
        state_directory=configuration.state_directory,
        listen_address=configuration.listen_host,
        port=configuration.me.postgres_port,
        bin_directory=bin_directory,
        run_as=RunAs.of_user(configuration.instance.run_as) if os.geteuid() == 0 else None,
    )
    async with AsyncExitStack() as stack:
        choice = await choose(configuration, request, stack)
        if configuration.bootstrap.replicas_from == "auto":
            require_cheaper(choice)
        # Postgres inherits it: whoever comes after a kill waits until that has ended too.
        lock = stack.enter_context(working_in(into))
        await asyncio.to_thread(make_places, choice.tablespaces | choice.younger, server)
        reached = await make_replica(
            replace(server, data_directory=into, kept_open=(lock,)),
            choice,
            request,
            on_progress=lambda text: print(text, flush=True),
            on_failure=lambda text: print(text, file=sys.stderr, flush=True),
        )
    return f"{choice}, replayed to {format_lsn(reached)}"


async def _until_told(arguments: argparse.Namespace, request: ReplicaRequest) -> str:
    """Cancelled by SIGTERM or SIGINT, which stops Postgres in order."""
    configuration = load_configuration(arguments.config)
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await make(configuration, request, arguments.into, arguments.bin_directory)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="instance_manager.archive.recovery.replica_command", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the instance's configuration file")
    parser.add_argument("--into", type=Path, required=True, help="an empty directory")
    parser.add_argument("--bin-directory", type=Path, required=True, help="Postgres's programs")
    arguments = parser.parse_args()
    try:
        request = from_json(sys.stdin.buffer.read(), ReplicaRequest)
        print(asyncio.run(_until_told(arguments, request)), flush=True)
    except NotFromArchive as error:
        print(error, file=sys.stderr)
        return NOT_FROM_ARCHIVE
    except (RestoreFailed, ConfigurationError, ObjectStoreError, DirectoryRefused, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
