"""`python -m instance_manager.archive --config FILE`: started by the supervisor where archiving is configured."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import asyncpg

from instance_manager.archive.archiver import Archiver, ArchiverSettings
from instance_manager.archive.backup.configured import tender_settings
from instance_manager.archive.backup.tender import BackupTender
from instance_manager.archive.backup.watch import BackupWatch
from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.filling import REPLAYED_QUERY, Replayed
from instance_manager.archive.receipts import RECEIPTS
from instance_manager.archive.streaming import FLUSHED_QUERY, Flushed
from instance_manager.archive.where import make_store
from instance_manager.config import Configuration, ConfigurationError, load_configuration
from instance_manager.config_sections import ArchiveSection
from instance_manager.core.types import Timeline, parse_lsn
from instance_manager.heap import use_one_heap
from instance_manager.logs import logging_to
from instance_manager.postgres.server import LocalServer, RunAs
from instance_manager.postgres.sql import LocalSql, SqlUnavailable

log = logging.getLogger("instance_manager.archive")

POSTGRES_DEADLINE_S = 5.0


def settings_of(configuration: Configuration, archive: ArchiveSection, run_as: RunAs | None) -> ArchiverSettings:
    """The archiver's part of the configuration."""
    return ArchiverSettings(
        instance=configuration.instance.name,
        server_name=archive.server_name or configuration.cluster.name,
        wal_directory=configuration.data_directory / "pg_wal",
        socket=configuration.archive_socket,
        postgres_uid=None if run_as is None else run_as.uid,
        receipts=configuration.state_directory / RECEIPTS,
        codec=archive.codec,
        level=archive.level,
        parallel=archive.parallel,
        stream_interval_s=archive.stream_interval_s,
        fetch=FetchSettings(parallel=archive.parallel, prefetch_bytes=archive.prefetch_bytes),
    )


class FlushedBySql:
    """The positions of the local server, over one session that is kept."""

    def __init__(self, server: LocalServer) -> None:
        self._sql = LocalSql(server)

    async def __call__(self) -> Flushed | None:
        """None: it is no primary. LocalPostgresError: no answer."""
        try:
            row = await self._sql.fetchrow(FLUSHED_QUERY, deadline_s=POSTGRES_DEADLINE_S)
        except asyncpg.PostgresError as error:
            raise SqlUnavailable(str(error), error.sqlstate) from error
        return None if row is None else Flushed(Timeline(int(row["timeline"], 16)), parse_lsn(row["lsn"]))

    async def replayed(self) -> Replayed | None:
        """None: it is no standby that streams. LocalPostgresError: no answer."""
        try:
            row = await self._sql.fetchrow(REPLAYED_QUERY, deadline_s=POSTGRES_DEADLINE_S)
        except asyncpg.PostgresError as error:
            raise SqlUnavailable(str(error), error.sqlstate) from error
        return None if row is None else Replayed(Timeline(row["timeline"]), parse_lsn(row["lsn"]))

    async def switch_wal(self) -> None:
        """Finish the segment. LocalPostgresError: not done; a standby refuses."""
        try:
            await self._sql.fetchval("SELECT pg_switch_wal()::text", deadline_s=POSTGRES_DEADLINE_S)
        except asyncpg.PostgresError as error:
            raise SqlUnavailable(str(error), error.sqlstate) from error


async def run(configuration: Configuration, archive: ArchiveSection) -> None:
    """Until SIGTERM or SIGINT."""
    run_as = RunAs.of_user(configuration.instance.run_as) if os.geteuid() == 0 else None
    server = LocalServer(
        data_directory=configuration.data_directory,
        socket_directory=configuration.socket_directory,
        state_directory=configuration.state_directory,
        listen_address=configuration.listen_host,
        port=configuration.me.postgres_port,
        bin_directory=configuration.postgres.bin_directory or Path("/"),
        run_as=run_as,
    )
    settings, store, sql = settings_of(configuration, archive, run_as), make_store(archive), FlushedBySql(server)
    archiver = Archiver(settings, store, sql, replayed=sql.replayed)
    backups = BackupTender(
        tender_settings(archive.backup, settings.instance, instances=configuration.instances),
        server,
        store,
        archiver.layout,
        archiver.orders,
        sql.switch_wal,
    )
    archiver.status.backup = backups.status
    watch = BackupWatch(
        store,
        archiver.layout,
        archiver.orders,
        archiver.status,
        news=lambda: (backups.status.last_backup, backups.over),
    )

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(archiver.run(), name="archiver")
            tasks.create_task(backups.run(), name="backups")
            tasks.create_task(watch.run(), name="what can be recovered")

    task = asyncio.create_task(both())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    gc.freeze()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main() -> int:
    """The exit code: 2 for a configuration that cannot be used."""
    parser = argparse.ArgumentParser(prog="instance_manager.archive", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the instance's configuration file")
    arguments = parser.parse_args()
    use_one_heap()
    try:
        configuration = load_configuration(arguments.config)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    if configuration.archive is None:
        print(f"{arguments.config}: there is no section `archive`: nothing to do", file=sys.stderr)
        return 2
    with logging_to(configuration.instance.name, configuration.log_level, process="archiver"):
        # Each request of boto3 would be a line.
        for noisy in ("botocore", "boto3", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            asyncio.run(run(configuration, configuration.archive))
        except* OSError as errors:
            log.error("the archiver cannot run: %s", errors.exceptions[0])  # noqa: TRY400 - the text says it all
            return_code = 1
        else:
            return_code = 0
    return return_code


if __name__ == "__main__":
    sys.exit(main())
