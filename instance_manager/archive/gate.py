"""The archive as a whole: does the store keep its word, and is it this cluster's? Asked once before it is used."""

from __future__ import annotations

import asyncio

from instance_manager.archive.codecs import CodecName
from instance_manager.archive.counters import ArchiverStatus
from instance_manager.archive.layout import Layout
from instance_manager.archive.lineage import ForeignArchive, claim_archive, read_lineage
from instance_manager.archive.orders import Orders
from instance_manager.archive.stores.probe import probe
from instance_manager.archive.upload import NotArchived
from instance_manager.ports import ObjectStore, ObjectStoreError, StoreRefused

GATE_DEADLINE_S = 20.0


class ArchiveGate:
    """Opens for writing after probe and claim, for reading after the lineage fits; stays open for that system."""

    def __init__(self, store: ObjectStore, layout: Layout, codec: CodecName, status: ArchiverStatus) -> None:
        self._store = store
        self._layout = layout
        self._codec: CodecName = codec
        self._status = status
        self._turn = asyncio.Lock()
        self._writable_for: tuple[str, str] | None = None
        self._readable_for: set[tuple[str, str | None]] = set()

    async def require_writable(self, orders: Orders) -> None:
        """NotArchived: the store cannot be trusted, or the archive is another's; says what to do."""
        whose = (orders.system_identifier, orders.cluster_uid)
        if self._writable_for == whose:
            return
        async with self._turn:
            if self._writable_for == whose:
                return
            try:
                await probe(self._store, self._layout.probe, deadline_s=GATE_DEADLINE_S)
                await claim_archive(
                    self._store,
                    self._layout,
                    system_identifier=orders.system,
                    cluster_uid=orders.cluster_uid,
                    size=orders.size,
                    codec=self._codec,
                    deadline_s=GATE_DEADLINE_S,
                )
            except (ObjectStoreError, ForeignArchive) as error:
                self._status.archive = str(error)
                raise NotArchived(str(error)) from error
            self._writable_for = whose
            self._readable_for.add(whose)
            self._status.archive = "ok"

    async def require_readable(self, orders: Orders, *, any_cluster: bool = False, again: bool = False) -> None:
        """StoreRefused: nothing there is this system's, so nothing may be told as absent. ObjectStoreError otherwise.

        `any_cluster`: also another one's of the same system: it is to be recovered from. `again`: look although it was found right before;
        an archive may be emptied while it is read.
        """
        whose = (orders.system_identifier, None if any_cluster else orders.cluster_uid)
        if whose in self._readable_for and not again:
            return
        async with self._turn:
            try:
                await self._check_readable(*whose)
            except ForeignArchive as error:
                self._status.archive = str(error)
                raise StoreRefused(str(error)) from error
            except ObjectStoreError as error:
                self._status.archive = str(error)
                raise
            self._readable_for.add(whose)
            self._status.archive = "ok"

    async def _check_readable(self, system_identifier: str, cluster_uid: str | None) -> None:
        lineage = await read_lineage(self._store, self._layout, deadline_s=GATE_DEADLINE_S)
        if lineage is not None:
            if lineage.system_identifier != system_identifier:
                raise ForeignArchive(
                    f"the archive {self._layout.server} is of the system {lineage.system_identifier}, "
                    f"not of {system_identifier}: mend archive.server_name or prefix"
                )
            if cluster_uid not in (None, lineage.cluster_uid):
                # Its source and a restored copy go on with the same timeline numbers and positions: no check of a segment would tell.
                raise ForeignArchive(
                    f"the archive {self._layout.server} is of another cluster of the same system, with uid {lineage.cluster_uid}, "
                    f"not {cluster_uid}: give this cluster another archive.server_name"
                )
            return
        async for _ in self._store.entries(self._layout.wals, deadline_s=GATE_DEADLINE_S):
            return  # another tool's: each file is checked for itself
        raise ForeignArchive(
            f"there is no archive at {self._layout.server}: mend archive.server_name, prefix or bucket; an archive that is "
            "not there is not one that ends here"
        )
