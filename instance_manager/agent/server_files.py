"""The files by which the agent tells Postgres what to be: settings, access rules, passwords of replication."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from instance_manager.agent.postgres_port import Upstream
from instance_manager.archive import commands
from instance_manager.archive.receipts import RECEIPTS
from instance_manager.config import Configuration
from instance_manager.core.quorum import ALONE, NOBODY, SynchronousSet
from instance_manager.core.types import MemberId
from instance_manager.postgres import bootstrap, directory, host_based_access, promotion
from instance_manager.postgres.archive_commands import ALLOWS
from instance_manager.postgres.binaries import ServerVersion
from instance_manager.postgres.clone import SourceServer
from instance_manager.postgres.configuration import (
    NOBODY_CAN_SATISFY,
    POSTGRESQL_CONF,
    REPLICATION_CONF,
    ClientTls,
    CollectedLog,
    ReplicationSettings,
    StaticSettings,
    TlsFiles,
    changes_that_need_restart,
    render_postgresql_conf,
    render_replication_conf,
    render_synchronous_standby_names,
    replication_conninfo,
)
from instance_manager.postgres.control_data import HotStandbySettings, read_control_data
from instance_manager.postgres.files import read_if_present, write_atomically
from instance_manager.postgres.host_based_access import Access
from instance_manager.postgres.hot_standby import hot_standby_settings_of, settings_for_standby
from instance_manager.postgres.server import LocalPostgresError, LocalServer
from instance_manager.postgres_log.files import FILE_BYTES, LOG_FILENAME
from instance_manager.threads import InOrder
from instance_manager.tls import AUTHORITY, CERTIFICATE, KEY

log = logging.getLogger("instance_manager.agent.server_files")

HBA_CONF = "pg_hba.conf"
PASSFILE = "replication.pgpass"


class ServerFiles:
    """All of them, for one server. What is not `async` blocks on the disk: call it in a thread."""

    def __init__(self, configuration: Configuration, server: LocalServer, version: ServerVersion) -> None:
        self._configuration = configuration
        self._server = server
        self._version = version
        self.writes = InOrder()
        """Of access rules, settings and signal files: none that was cut off lands over a later one (P8)."""

    async def write(
        self, synchronous: SynchronousSet, access: Access, *, standby: bool, upstream: Upstream | None = None
    ) -> None:
        """Everything, before a start. `upstream` is followed from the start."""
        replication = ReplicationSettings(
            synchronous_standby_names=render_set(synchronous),
            restore_command=await asyncio.to_thread(self._install_restore_command),
        )
        if standby:
            control = await read_control_data(self._server)
            replication = replace(
                replication, hot_standby=settings_for_standby(self.wanted_hot_standby(), control.hot_standby)
            )
        if upstream is not None:
            replication = replace(
                replication, primary_conninfo=self.conninfo(upstream), primary_slot_name=upstream.member_id
            )
        with self.writes.one(lambda: self._write_all(replication, access)) as write:
            await asyncio.to_thread(write)

    async def write_rewind_command(self) -> bool:
        """For pg_rewind, which reads a stopped directory's configuration: its own old WAL comes from the archive where it is
        gone from here. False: there is no archive."""
        if self._configuration.archive is None:
            return False
        await asyncio.to_thread(self._write_rewind_command)
        return True

    def replace_static(self, configuration: Configuration) -> tuple[str, ...]:
        """Take over a changed configuration; the names of parameters that need a restart. Nothing is reloaded yet."""
        before = (read_if_present(self._server.data_directory / POSTGRESQL_CONF) or b"").decode()
        self._configuration = configuration
        after = render_postgresql_conf(self._static())
        directory.write_configuration_file(self._server, POSTGRESQL_CONF, after)
        directory.strip_auto_conf_file(self._server)
        return changes_that_need_restart(before, after) if before else ()

    def write_access(self, access: Access) -> None:
        path = self._server.data_directory / HBA_CONF
        write_atomically(path, self._access_text(access).encode(), run_as=self._server.run_as)

    def written_access(self) -> Access | None:
        """Told by the file, which may be of an older configuration; None: it is none of ours."""
        content = read_if_present(self._server.data_directory / HBA_CONF) or b""
        return host_based_access.rendered_access(content.decode(errors="replace"))

    def conninfo(self, upstream: Upstream) -> str:
        return replication_conninfo(
            host=upstream.host,
            port=upstream.port,
            user=host_based_access.REPLICATION_ROLE,
            passfile=self._passfile,
            application_name=upstream.member_id,
            tls=self._client_tls(),
        )

    def source(self, host: str, port: int) -> SourceServer:
        """A member to copy from, by a passfile that is written anew."""
        self._write_passfile()
        return SourceServer(host=host, port=port, passfile=self._passfile, tls=self._client_tls())

    def write_passfile(self) -> None:
        """With the secret as it is now; walreceivers read it at their next connection."""
        self._write_passfile()

    def role_options(self) -> bootstrap.RoleOptions:
        secrets = self._configuration.secrets
        return bootstrap.RoleOptions(
            replication_password=bootstrap.read_secret(secrets.replication_password),
            monitoring_password=bootstrap.read_secret(secrets.monitoring_password),
            application_password=bootstrap.read_secret(secrets.application_password),
            application_owner=self._configuration.postgres.application_owner,
            application_database=self._configuration.postgres.application_database,
            superuser_password=bootstrap.read_secret(secrets.superuser_password)
            if secrets.superuser_password is not None
            else None,
            superuser=self._server.superuser,
        )

    def wanted_hot_standby(self) -> HotStandbySettings:
        parameters = self._configuration.postgres.parameters
        return hot_standby_settings_of(parameters, instances=self._configuration.room_for_instances)

    @property
    def _passfile(self) -> Path:
        # Beside the data directory: neither a clone nor a rewind may rest on a file that it replaces.
        return self._server.state_directory / PASSFILE

    def _write_passfile(self) -> None:
        password = bootstrap.read_secret(self._configuration.secrets.replication_password)
        bootstrap.write_passfile(self._server, self._passfile, password=password)

    def _install_restore_command(self) -> str:
        """What a server under an agent runs; with an archive, the client is put in its place too."""
        words = "" if self._configuration.archive is None else commands.client_words(*self._client())
        return promotion.install_restore_command(self._server, words)

    def _write_rewind_command(self) -> None:
        settings = ReplicationSettings(restore_command=commands.restore_command(*self._client(), "rewind"))
        directory.write_configuration_file(self._server, REPLICATION_CONF, render_replication_conf(settings))

    def _client(self) -> tuple[Path, Path, Path]:
        """Interpreter, client and socket. LocalPostgresError: nobody could run it."""
        run_as = self._server.run_as
        try:
            python = commands.interpreter(run_as)
        except commands.NoInterpreter as error:
            raise LocalPostgresError(str(error)) from error
        return python, commands.install_client(self._server.state_directory, run_as), self._configuration.archive_socket

    def _archive_command(self) -> str | None:
        if self._configuration.archive is None:
            return None
        state = self._server.state_directory
        return commands.archive_command(*self._client(), state / ALLOWS, state / RECEIPTS)

    def _write_all(self, replication: ReplicationSettings, access: Access) -> None:
        server = self._server
        directory.write_configuration_file(server, POSTGRESQL_CONF, render_postgresql_conf(self._static()))
        directory.write_configuration_file(server, REPLICATION_CONF, render_replication_conf(replication))
        self.write_access(access)
        ident = host_based_access.render_ident(agent_os_user=server.agent_os_user, superuser=server.superuser)
        directory.write_configuration_file(server, "pg_ident.conf", ident)
        for warning in directory.strip_auto_conf_file(server):
            log.warning("%s", warning)
        self._write_passfile()

    def _access_text(self, access: Access) -> str:
        postgres, tls = self._configuration.postgres, self._configuration.tls
        by_superuser = self._configuration.secrets.superuser_password is not None
        settings = host_based_access.AccessSettings(
            superuser=self._server.superuser,
            application_networks=postgres.application_networks,
            lines=postgres.host_based_access,
            require_tls=tls is not None and tls.for_postgres is not None and tls.required,
            replication_by_certificate=tls is not None and tls.replication is not None,
            superuser_networks=postgres.application_networks if by_superuser else (),
        )
        return host_based_access.render_hba(settings, access)

    def _static(self) -> StaticSettings:
        return StaticSettings(
            major=self._version.major,
            cluster_name=self._configuration.instance.name,
            listen_address=self._server.listen_address,
            port=self._server.port,
            socket_directory=self._server.socket_directory,
            instances=self._configuration.room_for_instances,
            parameters=self._configuration.postgres.parameters,
            archive_command=self._archive_command(),
            summarize_wal=self._configuration.archive is not None
            and self._configuration.archive.backup.needs_summaries,
            tls=self._server_tls(),
            log=CollectedLog(self._configuration.log_directory, LOG_FILENAME, FILE_BYTES),
        )

    def _server_tls(self) -> TlsFiles | None:
        tls, copies = self._configuration.tls, self._configuration.certificates_directory / "postgres"
        if tls is None or tls.for_postgres is None:
            return None
        return TlsFiles(
            certificate=copies / CERTIFICATE,
            key=copies / KEY,
            authority=copies / AUTHORITY,
            minimum_version=tls.minimum_version,
        )

    def _client_tls(self) -> ClientTls:
        tls, copies = self._configuration.tls, self._configuration.certificates_directory
        if tls is None or tls.for_postgres is None or not tls.required:
            return ClientTls()
        shown = copies / "replication" if tls.replication is not None else None
        return ClientTls(
            sslmode="verify-full",
            root_certificate=copies / "postgres" / AUTHORITY,
            certificate=shown / CERTIFICATE if shown is not None else None,
            key=shown / KEY if shown is not None else None,
        )


def render_set(wanted: SynchronousSet) -> str:
    """The value of `synchronous_standby_names`."""
    if wanted.never_acknowledges:
        return NOBODY_CAN_SATISFY
    return render_synchronous_standby_names(wanted.k, wanted.members)


def parse_set(names: str) -> SynchronousSet | None:
    """What `render_set` wrote; None for anything else."""
    if names == "":
        return ALONE
    if names == NOBODY_CAN_SATISFY:
        return NOBODY
    head, _, rest = names.partition(" (")
    if not head.startswith("ANY ") or not rest.endswith(")"):
        return None
    members = frozenset(MemberId(name.strip().strip('"')) for name in rest[:-1].split(","))
    return SynchronousSet(int(head.removeprefix("ANY ")), members)
