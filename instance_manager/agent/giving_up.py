"""How a primary gives the Lease up in order: a switchover, a fence, the end of its instance (P12, R4, R14)."""

from __future__ import annotations

from dataclasses import replace

from instance_manager.agent.context import Context
from instance_manager.agent.peering import EndAnswer, EndRequest
from instance_manager.agent.primary import PrimaryDuties
from instance_manager.core.lease import released, without_switchover
from instance_manager.core.record import ClusterRecord
from instance_manager.core.roles import Role
from instance_manager.core.types import MemberId, MemberName, WalEnd

CHECKPOINT_DEADLINE_S = 30.0
ROLE_DEADLINE_S = 0.3
"""How long a handover waits at most until no new client is led here any more: usually 10 ms, beside the checkpoint."""


class GivingUp:
    def __init__(self, context: Context, primary: PrimaryDuties) -> None:
        self._c = context
        self._primary = primary

    async def switch_over(self) -> None:
        c = self._c
        record = c.record
        request = record.switchover
        if request is None:
            return
        self._primary.look()
        if await self._wait_for_extension():
            return
        target = self._primary.best_target(record, request.target)
        if target is None:
            who = request.target or "any standby"
            c.journal.note("switchover refused", f"{who} does not stream or is too far behind")
            await self._primary.writes.write(record, without_switchover)
            return
        await self._give_up(record, target, f"switchover to {target[0]}")

    async def hand_over(self, reason: str) -> None:
        """Shutdown or fence: a switchover where somebody fit is there, else a clean stop with a stamp for ourselves (R14)."""
        c = self._c
        record = c.record
        self._primary.look()
        if c.database.running and await self._wait_for_extension():
            return
        await self._give_up(record, self._primary.best_target(record, None) if not record.paused else None, reason)

    async def _wait_for_extension(self) -> bool:
        """Those that promised not to take over while the store was away would not take a release either (R11)."""
        c = self._c
        left_s = c.extended_until_s - c.clock.now_s()
        if left_s <= 0:
            return False
        c.journal.note("hand over", f"later: the voters are bound for {left_s:.1f} s yet by their promise (R11)")
        await c.clock.sleep(min(left_s, 1.0))
        return True

    async def _give_up(self, record: ClusterRecord, target: tuple[MemberName, MemberId] | None, reason: str) -> None:
        c = self._c
        timings = c.configuration.timings
        c.journal.note("hand over", f"{reason}; target {target[0] if target else 'nobody'}")
        if not c.database.running:
            c.start_yielding(reason)
            return
        c.giving_up = True
        c.publish_role()
        try:
            if target is not None:
                # Before anything stops, so that the shutdown's own checkpoint is short.
                await c.database.checkpoint(deadline_s=CHECKPOINT_DEADLINE_S)
            await c.publication.role_is_published(deadline_s=ROLE_DEADLINE_S)
            c.take_role(Role.STOPPING, reason)
        finally:
            c.giving_up = False
        # Whoever takes over archives what is left. Where nobody does it is now or after the next start, if there is one.
        c.archives_to_the_end = target is None
        try:
            clean = await c.database.stop(
                deadline_s=timings.stop_timeout_s if target else 4 * timings.stop_timeout_s,
                archive_for_s=0.0 if target else 2 * timings.stop_timeout_s,
            )
        finally:
            c.archives_to_the_end = False
        c.gate_open = False
        if not clean:
            await c.database.kill()
            c.start_yielding(f"{reason}: Postgres did not stop in time and was killed")
            c.take_role(Role.STOPPED, "killed")
            return
        end = await c.database.directory.shutdown_end(record.chain)
        c.take_role(Role.STOPPED, "Postgres has stopped clean")
        if end is None:
            # P12: not a clean end on the claimed timeline: no handover on it, the voters elect or it starts again.
            c.start_yielding(f"{reason}: the shutdown was not clean")
            return
        holding = await self._who_holds(record, end, target)
        if target is not None and target[1] not in holding:
            c.journal.note("hand over", f"{target[0]} does not hold the end of the log")
            target = None
        named = target[1] if target is not None else c.member_id
        await c.link.revoke(record.epoch)
        record = await self._primary.writes.settled(record)
        # Persisted before: after this nobody may take the release for lost and repair the Lease (R3).
        await c.volume.save(lambda state: state.writing(record, _released(record, end, holding, named, c.member_id)))
        await self._primary.writes.write(record, lambda current: _released(current, end, holding, named, c.member_id))
        c.journal.note("release", f"the log ends at {end}; released to {named}")
        if target is not None:
            await c.peers.nudge((target[0],))

    async def _who_holds(
        self, record: ClusterRecord, end: WalEnd, target: tuple[MemberName, MemberId] | None
    ) -> frozenset[MemberId]:
        """The standbys that hold the shutdown checkpoint; the target is asked until its deadline, the others once."""
        c = self._c
        deadline_s = c.clock.now_s() + (1.5 if target is not None else 0.0)
        while True:
            answers = await c.peers.ask_all(
                c.peers.names, "end", EndRequest(cluster_uid=record.cluster_uid), EndAnswer, deadline_s=1.5
            )
            holding = frozenset(
                answer.member_id for answer in answers.values() if answer.member_id is not None and answer.end == end
            )
            if target is None or target[1] in holding or c.clock.now_s() >= deadline_s:
                return holding
            await c.clock.sleep(0.02)


def _released(
    record: ClusterRecord, end: WalEnd, holding: frozenset[MemberId], named: MemberId, me: MemberId
) -> ClusterRecord:
    changed = released(record, end=end, holding=holding, target=named if named in holding else None)
    if named == me and changed.release is not None:
        return replace(changed, release=replace(changed.release, target=me))
    return changed
