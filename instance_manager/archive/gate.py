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
        self._readable_for: str | None = None

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
            self._writable_for, self._readable_for = whose, orders.system_identifier
            self._status.archive = "ok"

    async def require_readable(self, orders: Orders, *, again: bool = False) -> None:
        """StoreRefused: nothing there is this system's, so nothing may be told as absent. ObjectStoreError otherwise.

        `again`: look although it was found right before; an archive may be emptied while it is read.
        """
        if self._readable_for == orders.system_identifier and not again:
            return
        async with self._turn:
            try:
                await self._check_readable(orders)
            except ForeignArchive as error:
                self._status.archive = str(error)
                raise StoreRefused(str(error)) from error
            except ObjectStoreError as error:
                self._status.archive = str(error)
                raise
            self._readable_for = orders.system_identifier
            self._status.archive = "ok"

    async def _check_readable(self, orders: Orders) -> None:
        lineage = await read_lineage(self._store, self._layout, deadline_s=GATE_DEADLINE_S)
        if lineage is not None:
            if lineage.system_identifier != orders.system_identifier:
                raise ForeignArchive(
                    f"the archive {self._layout.server} is of the system {lineage.system_identifier}, "
                    f"not of {orders.system_identifier}: mend archive.server_name or prefix"
                )
            return
        async for _ in self._store.entries(self._layout.wals, deadline_s=GATE_DEADLINE_S):
            return  # another tool's: each file is checked for itself
        raise ForeignArchive(
            f"there is no archive at {self._layout.server}: mend archive.server_name, prefix or bucket; an archive that is "
            "not there is not one that ends here"
        )
