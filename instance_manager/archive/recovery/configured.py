"""The configuration of a server that was restored by hand: the source's would bind its addresses and use its archive."""

from __future__ import annotations

import asyncio
from pathlib import Path

from instance_manager.postgres.configuration import AUTO_CONF, POSTGRESQL_CONF, render_settings
from instance_manager.postgres.control_data import read_control_data
from instance_manager.postgres.files import write_atomically
from instance_manager.postgres.server import LocalServer

_HEADER = """\
# Written by `instance-manager restore`. The source's settings are beside, in {source}: take over what you need,
# but not its archive_command: two servers never write to one archive.
"""
_HBA = """\
# Written by `instance-manager restore`; the source's is beside, in pg_hba.conf.source.
local all all peer
host all all 127.0.0.1/32 scram-sha-256
"""


async def configure_restored(server: LocalServer) -> None:
    """Local addresses, no archive, and what a standby's or a recovery's settings must at least be. OSError."""
    control = await read_control_data(server)
    settings: dict[str, str | int | float | bool] = {
        "listen_addresses": server.listen_address,
        "port": server.port,
        "unix_socket_directories": str(server.socket_directory),
        "archive_mode": "off",
        "wal_level": control.wal_level,
        "max_connections": control.hot_standby.max_connections,
        "max_worker_processes": control.hot_standby.max_worker_processes,
        "max_wal_senders": control.hot_standby.max_wal_senders,
        "max_prepared_transactions": control.hot_standby.max_prepared_transactions,
        "max_locks_per_transaction": control.hot_standby.max_locks_per_transaction,
    }
    await asyncio.to_thread(_write, server, settings)


def _write(server: LocalServer, settings: dict[str, str | int | float | bool]) -> None:
    data = server.data_directory
    _set_aside(data / POSTGRESQL_CONF)
    _set_aside(data / "pg_hba.conf")
    _set_aside(data / AUTO_CONF)
    text = _HEADER.format(source=f"{POSTGRESQL_CONF}.source") + render_settings(settings)
    write_atomically(data / POSTGRESQL_CONF, text.encode(), run_as=server.run_as)
    write_atomically(data / "pg_hba.conf", _HBA.encode(), run_as=server.run_as)
    write_atomically(data / AUTO_CONF, b"", run_as=server.run_as)


def _set_aside(path: Path) -> None:
    source = path.with_name(f"{path.name}.source")
    if path.exists() and not source.exists():
        path.rename(source)
