"""What this instance tells: its state to peers, snapshots to probes, the whole picture to people."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from instance_manager.agent.context import Context
from instance_manager.core.archive_state import ArchiveState
from instance_manager.core.observation import PeerState, PeerView
from instance_manager.core.record import ClusterRecord
from instance_manager.core.roles import Role
from instance_manager.core.types import Epoch, format_lsn
from instance_manager.status import ClusterStatus, InstanceStatus, Probes

NOT_RECEIVING_ALARM_S = 10.0
LOOP_STALL_S = 2.5
"""A loop that has not ticked for this time counts as dead; the supervisor kills after 3 s."""


class Reporting:
    def __init__(self, context: Context, archive: Callable[[], ArchiveState | None] = lambda: None) -> None:
        self._c = context
        self._archive = archive
        self.loop_ticked_s = context.clock.now_s()

    def own_state(self) -> PeerState:
        c = self._c
        volume = c.volume.state
        postgres = c.database.view()
        view = c.keeper.view()
        record = view.record
        permit_left_s = self._permit_left_s()
        return PeerState(
            name=c.configuration.name,
            member_id=volume.member_id,
            incarnation=c.link.incarnation,
            role=c.role.value,
            has_data=c.database.directory.has_data,
            record_epoch=record.epoch if record is not None else Epoch(0),
            promised_epoch=volume.promised_epoch,
            highest_epoch=volume.highest_epoch,
            end=postgres.end,
            priority=c.configuration.instance.priority,
            writable=postgres.running
            and postgres.mode == "read_write"
            and postgres.answers
            and not postgres.in_recovery,
            yielding=c.yielding,
            suspects=c.suspects,
            receiving=postgres.receiving,
            terminating=c.link.terminating,
            fenced=record is not None and c.configuration.name in record.fenced,
            permit_left_s=round(permit_left_s, 1),
            postgres=self.postgres_word(),
            disk_full=c.health.is_full,
            lag_bytes=c.database.seen.lag_bytes(record.position if record is not None else None),
            replay_lag_bytes=c.database.seen.replay_lag_bytes(),
            operation=c.operation,
            problem=self._problem(view.damage),
            opened=c.gate_open,
            synchronous=str(c.synchronous) if c.role is Role.PRIMARY else None,
            archive=self._archive(),
        )

    def _problem(self, damage: str | None) -> str | None:
        c = self._c
        if not c.configuration.is_member:
            return f"it is beyond cluster.instances {c.configuration.instances}: raise that, or let the StatefulSet remove it"
        silent_s = c.database.not_receiving_for_s()
        if silent_s > NOT_RECEIVING_ALARM_S:
            # Replicas without a walreceiver have passed for healthy for 40 hours (cloudnative-pg#10419).
            return f"told to follow, and has received nothing for {silent_s:.0f} s"
        full = "its volume is full" if c.health.is_full else None
        remarks = "; ".join(sentence for sentences in c.remarks.values() for sentence in sentences)
        return c.health.unhealthy() or damage or full or remarks or None

    def urgent(self) -> tuple[object, ...]:
        """What a peer should hear of at once; positions and ages are not among it."""
        c = self._c
        volume, record, postgres = c.volume.state, c.keeper.record, c.database
        return (
            volume.member_id,
            c.link.incarnation,
            c.role,
            record.epoch if record is not None else 0,
            volume.promised_epoch,
            postgres.running_read_write and postgres.answers,
            c.yielding,
            c.link.terminating,
            record is not None and c.configuration.name in record.fenced,
            self.postgres_word(),
            c.gate_open,
        )

    def digest(self) -> str:
        return f"{hash(self.urgent()) & 0xFFFFFFFFFFFFFFFF:016x}"

    def probes(self) -> Probes:
        c = self._c
        now_s = c.clock.now_s()
        postgres = c.database.view()
        record = c.keeper.record
        stalled_s = now_s - self.loop_ticked_s
        alive = stalled_s < LOOP_STALL_S
        primary = c.role is Role.PRIMARY and c.gate_open and self._permit_left_s() > 0
        standby = postgres.running and postgres.mode == "standby" and postgres.answers and bool(postgres.in_recovery)
        reasons = []
        if not alive:
            reasons.append(f"the agent's loop has not ticked for {stalled_s:.1f} s")
        if not primary and not (standby and (postgres.receiving or c.suspects is not None)):
            reasons.append(f"role {c.role.value}, Postgres {self.postgres_word()}")
        return Probes(
            taken_s=now_s,
            role=c.role.value,
            alive=alive,
            started=postgres.answers or (postgres.running and c.database.start_advances()),
            ready=primary or (standby and (postgres.receiving or c.suspects is not None)),
            accepts_writes=primary,
            accepts_reads=primary or standby,
            lag_bytes=0 if primary else c.database.seen.lag_bytes(record.position if record is not None else None),
            replay_lag_bytes=0 if primary else c.database.seen.replay_lag_bytes(),
            timeline=postgres.end.timeline if postgres.end is not None else None,
            reasons=tuple(reasons),
        )

    def status(self) -> ClusterStatus:
        c = self._c
        view = c.keeper.view()
        record = view.record
        own = self._instance(self.own_state(), reachable=True, record=record)
        peers = [self._peer(name, peer, record) for name, peer in c.peers.views().items()]
        instances = tuple(sorted([own, *peers], key=lambda instance: instance.name))
        holder_state = self._holder_state(record)
        return ClusterStatus(
            cluster=c.configuration.cluster.name,
            told_by=c.configuration.name,
            primary=record.holder.name if record is not None and record.holder is not None else None,
            epoch=record.epoch if record is not None else None,
            timeline=record.chain.current if record is not None and record.chain is not None else None,
            system_identifier=record.system_identifier if record is not None else None,
            lease_age_s=round(view.read_age_s + view.unchanged_for_s, 1) if view.read else None,
            lease_readable=c.keeper.last_error is None and view.damage is None and view.read,
            seconds_to_fence=round(self._permit_left_s(), 1) if c.holds_lease else None,
            durability=c.configuration.cluster.durability,
            voters=tuple(sorted(record.voters)) if record is not None else (),
            quorum=record.quorum if record is not None else None,
            synchronous_wanted=c.wanted_k(),
            synchronous_standby_names=holder_state.synchronous if holder_state is not None else None,
            paused=record is not None and record.paused,
            fenced=tuple(sorted(record.fenced)) if record is not None else (),
            accepts_clients=holder_state is not None and holder_state.opened and holder_state.writable,
            at_risk=tuple(self._at_risk(record, view.damage, holder_state, instances)),
            instances=instances,
            decisions=c.journal.lines(),
            archive=holder_state.archive if holder_state is not None else None,
            switchover=(record.switchover.target or "any standby")
            if record is not None and record.switchover is not None
            else None,
            certificates=c.certificates(),
            managed=c.managed() if c.holds_lease else (),
        )

    def _at_risk(
        self,
        record: ClusterRecord | None,
        damage: str | None,
        holder: PeerState | None,
        instances: tuple[InstanceStatus, ...],
    ) -> Iterable[str]:
        c = self._c
        if damage is not None:
            yield f"{damage}: no failover until it is repaired"
        if c.keeper.last_error is not None:
            yield f"the Lease cannot be read or written here ({c.keeper.last_error})"
        if record is None:
            yield "there is no cluster record yet"
            return
        if record.holder is None:
            yield "there is no primary"
        elif holder is None or not holder.writable:
            yield f"{record.holder.name} holds the Lease but does not serve writes"
        if record.mode == "asynchronous" and c.configuration.instances > 1:
            yield "asynchronous: a failover loses what the new primary had not received"
        elif record.quorum == 0 and c.wanted_k() > 0:
            yield "no standby is a voter: commits are on one disk only, and nobody can be elected"
        elif record.quorum < c.wanted_k():
            yield f"commits are on {record.quorum + 1} disks, {c.wanted_k() + 1} are wanted"
        needed = record.promises_needed
        if needed is not None and record.voters:
            able = [i for i in instances if i.voter and i.reachable and i.postgres == "running"]
            if len(able) < needed:
                yield f"a failover needs promises of {needed} voters, {len(able)} could answer"
        if holder is not None and holder.archive is not None:
            yield from archive_risks(holder.archive)
        if record.paused:
            yield "paused: no failover"
        for instance in instances:
            if not instance.reachable:
                yield f"{instance.name} does not answer {c.configuration.name}"
            elif instance.problem is not None:
                yield f"{instance.name}: {instance.problem}"

    def _instance(self, state: PeerState, *, reachable: bool, record: ClusterRecord | None) -> InstanceStatus:
        end = state.end
        return InstanceStatus(
            name=state.name,
            member_id=state.member_id,
            role=state.role,
            reachable=reachable,
            postgres=state.postgres,
            timeline=end.timeline if end is not None else None,
            lsn=format_lsn(end.lsn) if end is not None else None,
            lag_bytes=state.lag_bytes,
            replay_lag_bytes=state.replay_lag_bytes,
            followed_epoch=state.record_epoch,
            promised_epoch=state.promised_epoch,
            receiving=state.receiving,
            voter=record is not None and state.member_id in record.voters,
            problem=state.problem or state.yielding,
            operation=state.operation,
        )

    def _peer(self, name: str, peer: PeerView, record: ClusterRecord | None) -> InstanceStatus:
        if peer.state is None:
            return InstanceStatus(
                name=name, member_id=None, role="unknown", reachable=False, postgres="unknown", problem="never answered"
            )
        return self._instance(peer.state, reachable=peer.answers, record=record)

    def _holder_state(self, record: ClusterRecord | None) -> PeerState | None:
        c = self._c
        if record is None or record.holder is None:
            return None
        if c.holds_lease:
            return self.own_state()
        peer = c.peers.views().get(record.holder.name)
        return peer.state if peer is not None and peer.answers else None

    def _permit_left_s(self) -> float:
        permit = self._c.link.permit
        return permit.soft_s - self._c.clock.now_s() if permit is not None and self._c.holds_lease else 0.0

    def postgres_word(self) -> str:
        postgres = self._c.database
        if not postgres.running:
            return "stopped"
        if postgres.answers:
            return "running"
        return "starting" if postgres.start_advances() else "unresponsive"


def archive_risks(archive: ArchiveState) -> Iterable[str]:
    """What of the archive could cost something, each a sentence."""
    if archive.trouble is not None:
        yield f"nothing is archived: {archive.trouble}"
    if archive.level in ("behind", "pressed", "critical"):
        behind = f"archiving is {archive.level}: {archive.waiting} files wait, {archive.oldest} for {archive.oldest_age_s:.0f} s"
        yield behind if archive.level == "behind" else f"{behind}; the volume fills up"
    if archive.gaps:
        yield (
            f"the archive lacks {archive.gaps} segments, {archive.first_gap} first: no recovery passes them; take a base backup"
        )
    backups = archive.backups
    if backups is not None and not backups.good:
        yield "the archive has no backup that can be restored: take one with `instance-manager backup`"
    if backups is not None and backups.first_gap and not archive.gaps:
        yield (
            f"the archive lacks {backups.first_gap} behind its newest backup: no recovery passes it; take a base backup"
        )
    if archive.conflicts:
        yield "other content is in the archive under a name of this log: see the log of the archiver"
