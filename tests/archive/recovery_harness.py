"""Restores of tests: into a server of the test's cluster, which is started afterwards to look at its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from archiving_server import all_archived, archiving, insert, prepared
from backup_harness import LAYOUT, objects, take
from harness import Cluster, PostgresProcess

from instance_manager.archive.fetch import FetchSettings
from instance_manager.archive.layout import Layout
from instance_manager.archive.recovery.replay import ReplaySettings
from instance_manager.archive.recovery.restore import Restored, RestoreSettings, restore
from instance_manager.archive.recovery.target import make_target
from instance_manager.archive.stores.patience import Patience
from instance_manager.archive.wal_names import wal_kind
from instance_manager.ports import ObjectStore
from instance_manager.postgres.server import LocalServer

QUICK = Patience(total_s=60.0, attempt_s=60.0, attempts_max=3, first_pause_s=0.05)
SETTINGS = RestoreSettings(
    parallel=2,
    patience=QUICK,
    fetch=FetchSettings(recovery=replace(QUICK, total_s=10.0, attempt_s=10.0), parallel=2, prefetch_bytes=4 << 20),
    replay=ReplaySettings(outage_patience_s=60),
)

ROWS = 100_000


async def archived(cluster: Cluster, section: dict[str, Any], store: ObjectStore) -> None:
    """A backup, some forty segments, and about in the middle a restore point."""
    server = cluster.add("p")
    with archiving(server, section) as made:
        await prepared(cluster, made)
        await take(made, store)
        await insert(server, 0, ROWS // 2)
        await server.fetchval("SELECT pg_create_restore_point('half')")
        await insert(server, ROWS // 2, ROWS // 2)
        await all_archived(server)
        server.kill()


async def segments_in(store: ObjectStore) -> list[str]:
    names = [LAYOUT.wal_of(name) for name in await objects(store, "orders/wals/")]
    return [name for name in names if name is not None and wal_kind(name) == "segment"]


class Restoration:
    """One target directory."""

    def __init__(self, server: PostgresProcess, store: ObjectStore, layout: Layout = LAYOUT) -> None:
        self.process, self.store, self.layout = server, store, layout
        self.said: list[str] = []
        # Made by copying the template, as every server of a cluster: a restore wants an empty place.
        self.server: LocalServer = replace(server.server, data_directory=server.root / "restored")

    async def run(self, *, backup: str | None = None, changes: dict[str, Any] | None = None, **target: Any) -> Restored:
        settings = replace(SETTINGS, **(changes or {}))
        return await restore(
            self.server,
            self.store,
            self.layout,
            make_target(**target),
            settings,
            backup=backup,
            on_progress=self.said.append,
        )

    async def start(self) -> PostgresProcess:
        """What was restored in the server's own place."""
        data = self.process.data
        data.rename(data.with_name("template"))
        self.server.data_directory.rename(data)
        self.process.set_dynamic(synchronous_standby_names="")
        self.process.configure(archive_mode="off")
        await self.process.start()
        return self.process

    async def numbers(self) -> set[int]:
        server = await self.start()
        return {row["n"] for row in await server.fetch("SELECT n FROM t")}
