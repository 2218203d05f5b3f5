"""What the holder of the Lease writes into the record: only into its own epoch, and so that a repair can rest on it (R3)."""

from __future__ import annotations

from dataclasses import replace

from instance_manager.agent.context import Context
from instance_manager.agent.lease_keeper import Change, WriteRefused
from instance_manager.core.record import ClusterRecord, StoredRecord


class RecordWrites:
    def __init__(self, context: Context) -> None:
        self._c = context

    async def write_voters(self, record: ClusterRecord, wanted: ClusterRecord) -> None:
        """Write (N, q) and mode, with the intention on the volume before and the success after: a Lease that is restored
        or edited is known by it, and repaired by what was really acted on (R3)."""
        c = self._c
        await c.volume.save(lambda state: state.writing(record, wanted))
        stored = await c.keeper.write(
            lambda current: replace(current, voters=wanted.voters, quorum=wanted.quorum, mode=wanted.mode),
            grounds=record.grounds(),
        )
        await c.volume.save(lambda state: state.writing(stored.record, None))

    async def settled(self, record: ClusterRecord) -> ClusterRecord:
        """The record once it is known what became of the last intention: by a write of our own (R1). A second intention
        before that would make the volume forget the first, and take what this holder wrote for edited (R3)."""
        c = self._c
        if c.volume.state.intended_record is None:
            return record
        stored = await c.keeper.write(lambda current: self._still_held(current, record))
        await c.volume.save(lambda state: state.writing(stored.record, None))
        return stored.record

    async def unrelaxed(self, record: ClusterRecord) -> ClusterRecord:
        """The record by which a restart is judged: with a q that was being lowered when this holder ended as it was before,
        so that its voters are asked, and can be elected if this disk lost what they hold (R16)."""
        c = self._c
        strict = c.volume.state.unrelaxed(record)
        if strict is None:
            return record
        voters, quorum = strict.voters, strict.quorum
        stored = await c.keeper.write(
            lambda current: replace(current, voters=voters, quorum=quorum), grounds=record.grounds()
        )
        await c.volume.save(lambda state: state.writing(stored.record, None))
        c.journal.note("quorum", f"q is {quorum} again: Postgres was never told to stop waiting")
        return stored.record

    def _still_held(self, current: ClusterRecord, record: ClusterRecord) -> ClusterRecord:
        """`current`, if this life holds it in the epoch of `record`. WriteRefused."""
        if current.holder is None or current.holder != self._c.holder or current.epoch != record.epoch:
            raise WriteRefused(f"the Lease is at epoch {current.epoch}, not this instance's of {record.epoch}")
        return current

    async def write(self, record: ClusterRecord, change: Change) -> StoredRecord:
        """A change by the holder of this epoch, and never on a successor's record, whatever happened meanwhile."""

        def guarded(current: ClusterRecord) -> ClusterRecord:
            self._still_held(current, record)
            if (current.voters, current.quorum, current.mode) != (record.voters, record.quorum, record.mode):
                raise WriteRefused("the voters have changed meanwhile")
            return change(current)

        return await self._c.keeper.write(guarded)
