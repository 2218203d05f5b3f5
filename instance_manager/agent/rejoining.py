"""How the data directory comes back: initialise, start as a standby, follow, rewind, clone, set aside. Rules: core/rejoin."""

from __future__ import annotations

import logging
from dataclasses import replace

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.postgres_port import Upstream
from instance_manager.agent.recovering import NotMade
from instance_manager.config_sections import MemberSection
from instance_manager.core.archive_state import GAP
from instance_manager.core.lease import initial_first_write
from instance_manager.core.record import ClusterRecord, initial_record, initialised
from instance_manager.core.rejoin import DirectoryFacts, Rejoin, plan_rejoin
from instance_manager.core.roles import Role
from instance_manager.core.types import MemberName, TimelineChain, WalEnd, make_member_id
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.postgres.wal_dump import PositionUnknown

log = logging.getLogger("instance_manager.agent.rejoining")


class Rejoining:
    def __init__(self, context: Context) -> None:
        self._c = context
        self.failed_rewinds = 0
        self._has_told_gap = False
        self._archive_failed = False
        """Since a directory was made here last: the next try does not spend that time again."""

    # A new cluster.

    async def create_record(self, random_hex: str) -> None:
        """The first Lease. The member's id is made before, so that the holder is this very directory-to-be."""
        c = self._c
        state = c.volume.state
        member_id = state.member_id or make_member_id(c.configuration.name, random_hex)
        current = c.keeper.record
        given = c.configuration.cluster.uid
        uid = given or (current.cluster_uid if current is not None else f"{c.chance.getrandbits(64):016x}")
        # Another may be faster: a uid that was made here is remembered once it is the cluster's.
        await c.volume.save(
            lambda before: replace(before, member_id=member_id, cluster_uid=given or before.cluster_uid)
        )
        holder = c.holder
        if holder is None:
            raise OperationFailed("the supervisor has not told its incarnation")
        asynchronous = c.configuration.cluster.durability == "asynchronous"
        first = initial_record(
            cluster_name=c.configuration.cluster.name,
            cluster_uid=uid,
            mode="asynchronous" if asynchronous else "synchronous",
            lease_duration_s=c.configuration.timings.lease_duration_s,
            holder=holder,
        )
        if current is None:
            await c.keeper.create(first)
        else:
            await c.keeper.write(lambda found: initial_first_write(found, first), grounds=current.grounds())
        c.journal.note("create the Lease", "a new cluster begins here")

    async def initialise(self) -> None:
        """initdb, and the record that makes it the one cluster for ever (never initialised again by itself)."""
        c = self._c
        c.take_role(Role.INITIALISING, "this instance created the Lease")
        c.operation = "initdb" if c.configuration.bootstrap.recovery is None else "recovering from an archive"
        record = c.record
        await c.volume.save(
            lambda state: replace(state.saw_record(record), initialising=True, cluster_uid=record.cluster_uid)
        )
        grounds = c.record.grounds()
        control = await c.database.directory.initialise(self._recovering)
        stored = await c.keeper.write(
            lambda record: initialised(
                record,
                system_identifier=str(control.system_identifier),
                timeline=control.timeline,
                position=control.checkpoint_lsn,
            ),
            grounds=grounds,
        )
        await c.volume.save(lambda state: replace(state.saw_record(stored.record), initialising=False))
        c.journal.note("initialised", f"system identifier {control.system_identifier}")

    # An existing one.

    async def start_standby(self, reason: str) -> None:
        """Follow nobody: `primary_conninfo` stays empty until a promise is persisted (R5)."""
        c = self._c
        state = c.volume.state
        # A Lease that was put back knows an older history than this log may have.
        known = [each for each in (c.keeper.record, state.remembered()) if each is not None]
        record = max(known, key=lambda each: each.epoch, default=None)
        if record is not None and record.chain is not None:
            facts = await c.database.directory.stopped_facts(record.chain)
            if facts.needs is not None:
                raise OperationFailed(f"it must receive up to {facts.needs} before it is consistent, from nobody yet")
            if facts.end is None:
                # It might be never consistent, take no connection, and could not be told whom to follow.
                raise OperationFailed("the end of its log cannot be told: it is not started to follow nobody")
        if state.member_id is None:
            await c.volume.new_member(c.configuration.name)
        await c.volume.save(lambda before: replace(before, starts=before.starts + 1))
        await c.database.start_standby()
        c.take_role(Role.STANDBY, reason)

    async def follow(self) -> None:
        """Following a primary of epoch e is a promise of e, persisted before the walreceiver starts."""
        c = self._c
        record = c.record
        holder = record.holder
        if holder is None or not c.volume.state.may_follow(record):
            raise OperationFailed("there is nobody to follow")
        if record.chain is None:
            raise OperationFailed("the cluster has no history yet")
        async with c.voting:
            end = await self._end_before_following(record, record.chain)
            if end is not None and not record.chain.contains(end):
                # Nothing is received any more, so that this very end is what the next decision sees.
                await c.database.stop_following(record.chain, deadline_s=c.configuration.timings.promise_timeout_s)
        if end is None or not record.chain.contains(end):
            raise OperationFailed(f"this log ends at {end}: it cannot follow")
        if not c.database.view().receiving and (dead := await c.database.dead_ends(record.chain)):
            await self._stop(f"it recovers along timeline {dead[-1]}, which is not in the cluster's history")
            await self._start_following(record, f"its log ends at {end}")
            return
        async with c.voting:
            # A promise of a later epoch may have been made since the decision; then `promising` refuses.
            await c.volume.save(
                lambda state: replace(state.following(record), cluster_uid=record.cluster_uid, was_primary=False)
            )
            await c.database.follow(self._upstream(record))
        c.journal.note("follow", f"{holder.name}, epoch {record.epoch}, from {end}")
        self.failed_rewinds = 0

    async def _end_before_following(self, record: ClusterRecord, chain: TimelineChain) -> WalEnd | None:
        """Proven: what is estimated while something is received may hide what this log has past the history.

        Only from the very same primary, under a later epoch of it, nothing need be interrupted.
        """
        c = self._c
        view = c.database.view()
        followed = view.following[0] if view.following is not None else None
        if view.receiving and record.holder is not None and followed == record.holder.member_id:
            return view.end
        end = await c.database.proven_end(chain)
        if end is None and view.in_recovery:
            end = await c.database.stop_following(chain, deadline_s=c.configuration.timings.promise_timeout_s)
        return end

    async def adopt(self, record: ClusterRecord) -> None:
        """A standby that an agent before this one started may wait for a primary that is none any more, and a server that
        is not consistent yet cannot be asked."""
        c = self._c
        # No promise meanwhile: what it stopped from following would be taken for what follows still.
        async with c.voting:
            state = c.volume.state
            upstream = self._upstream(record)
            promised = (state.promised_epoch, state.promised_to) == (record.epoch, upstream.holder)
            await c.database.adopt(upstream, promised=promised)

    async def rejoin(self, reason: str) -> None:
        """Postgres does not run, or runs on a log that left the cluster's history."""
        c = self._c
        # What follows may wipe: it rests on the store itself, not on a snapshot.
        await c.keeper.read()
        record = c.record
        if record.chain is None:
            raise OperationFailed("the cluster has no history yet")
        if c.database.running:
            # What it has received may end amid a record: only complete ones say whether it went past the history.
            try:
                end = await c.database.proven_end(record.chain)
            except PositionUnknown as error:
                # On a timeline that is not the history's (P4), for one.
                end, reason = None, f"{reason}; {error}"
            ours = (
                c.database.view().system_identifier in (None, record.system_identifier)
                and c.volume.state.member_id not in record.excluded
            )
            if ours and end is not None and record.chain.contains(end) and record.holder is not None:
                await self.follow()
                return
            if record.needs_vote_of(c.volume.state.member_id):
                raise OperationFailed(f"{reason}; but it is still a voter: the primary drops it first (R6)")
            await self._stop(reason)
        stopped = await c.database.directory.stopped_facts(record.chain)
        facts = DirectoryFacts(
            exists=stopped.exists,
            half_rewound=stopped.half_rewound,
            foreign=stopped.foreign,
            system_identifier=stopped.system_identifier,
            end=stopped.end,
            needs=stopped.needs,
            member_id=c.volume.state.member_id,
            failed_rewinds=self.failed_rewinds,
            excluded=c.volume.state.member_id in record.excluded,
            own_initdb=c.volume.state.initialising,
        )
        plan = plan_rejoin(record, facts, chain=record.chain)
        c.journal.note("rejoin", f"{plan.rejoin.value}: {plan.reason}")
        if plan.rejoin is Rejoin.FOLLOW_AT_ONCE:
            if record.holder is None:
                raise OperationFailed(f"{plan.reason}; there is nobody to follow")
            if c.volume.state.promised_epoch < record.epoch:
                await c.volume.new_member(c.configuration.name)
            await self._start_following(record, plan.reason)
        elif plan.rejoin is Rejoin.FOLLOW and record.holder is not None and c.volume.state.may_follow(record):
            await self._start_following(record, plan.reason)
        elif plan.rejoin is Rejoin.FOLLOW:
            await self.start_standby(plan.reason)
        elif plan.rejoin is Rejoin.WAIT:
            raise OperationFailed(plan.reason)
        else:
            with c.measures.rejoining(plan.rejoin.value):
                await self._copy_from_primary(plan.rejoin, record, record.chain)

    async def _stop(self, reason: str) -> None:
        c = self._c
        c.take_role(Role.STOPPING, reason)
        if not await c.database.stop(deadline_s=c.configuration.timings.stop_timeout_s):
            await c.database.kill()
        c.take_role(Role.STOPPED, reason)

    async def _start_following(self, record: ClusterRecord, reason: str) -> None:
        """The promise of the epoch is persisted, then Postgres starts with its upstream set (R5).

        A server that is not consistent yet takes no connection, so nothing could be set later.
        """
        c = self._c
        upstream_name = record.holder.name if record.holder is not None else ""
        if c.volume.state.member_id is None:
            await c.volume.new_member(c.configuration.name)
        async with c.voting:
            await c.volume.save(
                lambda state: replace(
                    state.following(record),
                    cluster_uid=record.cluster_uid,
                    was_primary=False,
                    starts=state.starts + 1,
                )
            )
            await c.database.start_standby(self._upstream(record), chain=record.chain)
        c.take_role(Role.STANDBY, reason)
        c.journal.note("follow", f"{upstream_name}, epoch {record.epoch}, from the start: {reason}")

    def _upstream(self, record: ClusterRecord) -> Upstream:
        if record.holder is None:
            raise OperationFailed("there is nobody to follow")
        member = self._member(record.holder.name)
        return Upstream(
            holder=record.holder.member_id,
            host=member.host,
            port=member.postgres_port,
            member_id=self._c.member_id,
            epoch=record.epoch,
        )

    async def _copy_from_primary(self, rejoin: Rejoin, record: ClusterRecord, chain: TimelineChain) -> None:
        c = self._c
        source = self._serving_primary(record)
        member = self._member(source)
        if rejoin is not Rejoin.CLONE:
            # What a peer last said of itself may be old: this may be the only copy that is left of the data. A primary
            # that is not there counts for no failed rewind either.
            await c.database.directory.require_source(
                member.host, member.postgres_port, record.system_identifier or "", chain.current
            )
        # What was read for the plan may be old by now: looking at a directory on a slow disk takes its time.
        await c.keeper.read()
        # Where there is no directory there is no log to be kept for an election.
        if rejoin is not Rejoin.CLONE and c.record.needs_vote_of(c.volume.state.member_id):
            raise OperationFailed("it has become a voter meanwhile: the primary drops it first (R6)")
        # From here on this directory is nobody's (R6, P7): whatever interrupts this, its id speaks for no log any more.
        await c.volume.save(lambda state: replace(state, member_id=None))
        made_from: str = source
        try:
            if rejoin is Rejoin.REWIND:
                c.take_role(Role.REWINDING, f"from {source}")
                c.operation = f"rewinding from {source}"
                try:
                    await c.database.rewind(member.host, member.postgres_port, chain.current)
                except LocalPostgresError:
                    self.failed_rewinds += 1
                    raise
            else:
                if rejoin is Rejoin.SET_ASIDE_AND_CLONE:
                    await c.database.directory.set_aside()
                c.take_role(Role.CLONING, f"from {source}, or an archive")
                made_from = await self._from_archive(record, source, member) or await self._clone(record)
                self.failed_rewinds, self._archive_failed = 0, False
            # R6, P7: what was copied or rewound is another log than before: another member, without a vote.
            member_id = await c.volume.new_member(c.configuration.name)
            c.journal.note(rejoin.value, f"from {made_from}: now member {member_id}")
        finally:
            c.operation = None
            c.take_role(Role.STOPPED, f"{rejoin.value} ended")

    async def _from_archive(self, record: ClusterRecord, source: str, member: MemberSection) -> str | None:
        """What the directory was made from; None: from nothing yet, and why is told."""
        c = self._c
        bootstrap = c.configuration.bootstrap
        is_any = c.configuration.archive is not None or bootstrap.recovery is not None
        if bootstrap.replicas_from == "primary" or not is_any or self._archive_failed:
            return None
        c.operation = "looking for a backup to begin with"
        began_s = c.clock.now_s()
        try:
            return await c.database.directory.make_from_archive(member.host, member.postgres_port, record, self._making)
        except NotMade as error:
            if error.is_choice:
                c.journal.note("from the primary", str(error))
                return None
            reason = str(error)
        except (LocalPostgresError, OSError) as error:
            reason = str(error)
        self._archive_failed = True
        c.journal.note(
            "archive copy failed", f"{reason}; after {c.clock.now_s() - began_s:.0f} s {source} is copied instead"
        )
        return None

    async def _clone(self, record: ClusterRecord) -> str:
        """Whose copy it is. The primary of this moment: an archive may have taken hours before."""
        c = self._c
        source = self._serving_primary(c.record)
        member = self._member(source)
        c.operation = f"cloning from {source}"
        await c.database.directory.clone(
            member.host, member.postgres_port, record.system_identifier or "", self._progress
        )
        return source

    def _making(self, text: str) -> None:
        self._c.operation = f"a standby's directory from an archive: {text}"

    def _progress(self, text: str) -> None:
        self._c.operation = text

    def _recovering(self, text: str) -> None:
        c = self._c
        c.operation = f"recovering from an archive: {text}"
        if GAP in text and not self._has_told_gap:
            # Recovery goes on trying for long; whoever could still put the segment back is to know now.
            self._has_told_gap = True
            c.journal.note("archive gap", text)

    def _serving_primary(self, record: ClusterRecord) -> MemberName:
        if record.holder is None:
            raise OperationFailed("there is no primary to copy from")
        peer = self._c.peers.views().get(record.holder.name)
        if peer is None or not peer.answers or peer.state is None or not peer.state.writable:
            raise OperationFailed(f"{record.holder.name} does not serve yet")
        return record.holder.name

    def _member(self, name: MemberName) -> MemberSection:
        member = self._c.configuration.member(name)
        if member is None:
            raise OperationFailed(f"{name} is not among the members of the configuration")
        return member
