"""What the agent tells its archiver, and what of its answers concerns people (docs/archive.md).

`look` is called wherever the agent has looked at everything else: it makes one statement of what holds, and hands over what
differs from the last. Nothing here waits for the archiver: not the Lease, not a promotion, not a shutdown.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from instance_manager.agent.context import Context
from instance_manager.agent.supervisor_link import SupervisorError
from instance_manager.archive.orders import Orders
from instance_manager.core.archive_state import ArchiveState
from instance_manager.core.record import Holder
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, TimelineChain
from instance_manager.postgres.server import LocalPostgresError

log = logging.getLogger("instance_manager.agent.archiving")

TROUBLE_AFTER_S = 5.0
"""Trouble that passes by itself within this time is no news."""
HUNG_AFTER_S = 30.0
"""An archiver that does not answer for this time is killed and started again."""
SIZE_RETRY_S = 1.0
WRITES = frozenset({Role.STARTING, Role.PROMOTING, Role.PRIMARY})
"""Roles in which a server that runs read-write archives: not one that is about to stop."""


class Archiving:
    def __init__(self, context: Context) -> None:
        self._c = context
        self._segment_bytes: int | None = None
        self._news = asyncio.Event()
        self._woken_for: tuple[Epoch, TimelineChain | None] | None = None
        self._trouble_since_s: float | None = None
        self._told: str | None = None
        """The trouble that people were told of, until its end."""
        self._told_gaps = False
        self._killed_s = context.started_s

    async def run(self) -> None:
        """What needs the disk or Postgres: the size of segments, and waking Postgres's own archiver."""
        c = self._c
        if not c.archiver.is_configured:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(c.archiver.run())
            while True:
                await self._news.wait()
                self._news.clear()
                if self._segment_bytes is None and c.database.directory.is_startable:
                    try:
                        self._segment_bytes = await c.database.directory.wal_segment_bytes()
                    except (LocalPostgresError, OSError, ValueError) as error:
                        log.info("the size of WAL segments is not known yet: %s", error)
                        await c.clock.sleep(SIZE_RETRY_S)
                        self._news.set()
                        continue
                    self.look()
                if self._is_to_be_woken():
                    await self._wake_postgres()

    def look(self) -> None:
        """Cheap, and never waits."""
        c = self._c
        if not c.archiver.is_configured:
            return
        if self._segment_bytes is None:
            if c.database.directory.is_startable:
                self._news.set()
            return
        self._remember_primary()
        orders = self._orders(self._segment_bytes)
        if orders is not None:
            c.archiver.give(orders)
        if c.archiver.taken is None:
            self._woken_for = None
        self._follow_trouble()
        self._follow_gaps()
        if self._is_to_be_woken():
            self._news.set()

    def _remember_primary(self) -> None:
        """How far the primary's archive is, for the time when this instance is to go on from there."""
        c = self._c
        record = c.keeper.record
        if record is None or record.holder is None or c.holds_lease:
            return
        archive = self._archive_of(record.holder)
        if archive is not None and archive.position is not None:
            c.archived_to = (record.holder.member_id, archive.position)

    def _archive_of(self, holder: Holder) -> ArchiveState | None:
        """As the primary last told; None: nothing."""
        peer = self._c.peers.views().get(holder.name)
        return peer.state.archive if peer is not None and peer.state is not None else None

    def state(self) -> ArchiveState | None:
        """For people and peers; None where nothing is configured."""
        c = self._c
        if not c.archiver.is_configured:
            return None
        told = c.archiver.state
        since_s = c.archiver.silent_since_s
        if told is None or since_s is not None:
            why = f"the archiver does not answer: {c.archiver.why_silent}" if since_s is not None else None
            return replace(told or ArchiveState(level="unknown"), level="unknown", trouble=why, lag_s=None)
        end = c.database.view().end if c.database.running_read_write else None
        if told.position is None or end is None:
            return told
        return replace(told, lag_bytes=max(0, end.lsn - told.position))

    def _orders(self, segment_bytes: int) -> Orders | None:
        c = self._c
        record = c.keeper.record
        if record is None or record.system_identifier is None:
            return None
        view = c.database.view()
        permit = c.link.permit
        writes = c.holds_lease and c.database.running_read_write and (c.role in WRITES or c.archives_to_the_end)
        permitted = writes and permit is not None and permit.epoch == record.epoch
        followed = view.following[1] if view.following is not None else None
        told = None if record.holder is None or c.holds_lease else self._archive_of(record.holder)
        return Orders(
            role="primary" if writes else "standby",
            epoch=record.epoch,
            permit_until_s=permit.hard_s if permitted and permit is not None else 0.0,
            cluster_uid=record.cluster_uid,
            system_identifier=record.system_identifier,
            wal_segment_bytes=segment_bytes,
            chain=record.chain,
            is_streaming=view.receiving,
            has_gaps=not writes and told is not None and told.gaps > 0,
            # P9: from a promise until its epoch is followed. Who follows nobody has promised, or may at any moment.
            is_withholding=not writes and (followed is None or c.volume.state.promised_epoch > followed),
        )

    def _is_to_be_woken(self) -> bool:
        """Postgres tries three times and then sleeps for a minute: it is woken once the archiver takes what it refused."""
        taken = self._c.archiver.taken
        if taken is None or taken.role != "primary" or not self._c.gate_open:
            return False
        return self._woken_for != (taken.epoch, taken.chain)

    async def _wake_postgres(self) -> None:
        taken = self._c.archiver.taken
        try:
            await self._c.database.wake_archiving()
        except (LocalPostgresError, SupervisorError, OSError, TimeoutError) as error:
            log.info("Postgres's archiver was not woken: %s", error)
            await self._c.clock.sleep(SIZE_RETRY_S)
            self._news.set()
            return
        if taken is not None:
            self._woken_for = (taken.epoch, taken.chain)

    def _follow_gaps(self) -> None:
        """Told when they are found, not when nothing helped: what could still fill them may be gone soon."""
        c = self._c
        told = c.archiver.state
        if not c.holds_lease or told is None or c.archiver.taken is None:
            self._told_gaps = self._told_gaps and c.holds_lease
            return
        if told.gaps and not self._told_gaps:
            c.journal.note(
                "archive gap",
                f"the archive lacks {told.gaps} files of the log, {told.first_gap} first: no recovery passes them. "
                "The standbys are asked for them; take a base backup",
            )
        elif not told.gaps and self._told_gaps:
            c.journal.note("archive gap filled", "nothing is missing in the archive any more")
        self._told_gaps = told.gaps > 0

    def _follow_trouble(self) -> None:
        c = self._c
        now_s = c.clock.now_s()
        state = self.state()
        trouble = None if state is None or not c.holds_lease else state.trouble
        if trouble is None:
            self._trouble_since_s = None
            if self._told is not None:
                c.journal.note("archive works", f"again, after: {self._told}")
                self._told, self._woken_for = None, None
        else:
            self._trouble_since_s = now_s if self._trouble_since_s is None else self._trouble_since_s
            if self._told is None and now_s - self._trouble_since_s >= TROUBLE_AFTER_S:
                self._told = trouble
                c.journal.note("archive trouble", trouble)
        since_s = c.archiver.silent_since_s
        if since_s is not None and min(now_s - since_s, now_s - self._killed_s) >= HUNG_AFTER_S:
            self._killed_s = now_s
            c.journal.note(
                "archive trouble", f"the archiver did not answer for {now_s - since_s:.0f} s: it is started again"
            )
            c.link.restart_companion()
