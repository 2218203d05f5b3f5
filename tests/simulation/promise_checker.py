"""The promise, checked where it could be broken: at every acknowledgement, election, start and write of the record.

Of a synchronous cluster:
- what was acknowledged is in the log of whoever is elected, when it is elected, and of every server that becomes writable;
- what a server acknowledges after another was elected is in that one's log already;
- whenever a commit is acknowledged or the voters change, at least q of N have flushed every acknowledged commit.
Of an asynchronous one:
- when somebody takes over by time, nobody else is writable; what is lost was behind the last known position by no more than
  the configured lag. A machine whose supervisor was not scheduled in its time is excused, as the documents say.
Of both: no timeline number has two origins; nobody becomes writable who never held the Lease; a half-rewound directory
never starts; a voter's directory is neither wiped nor rewound.

A verb that allows loss is a new beginning: what it gave up is no longer asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulated_wal import Entry, entries_before

from instance_manager.core.record import ClusterRecord, Holder
from instance_manager.core.types import Epoch, MemberId, MemberName, Timeline, format_lsn, member_name_of

if TYPE_CHECKING:
    from simulated_cluster import SimulatedCluster
    from simulated_server import PostgresServer
    from simulated_volume import DataDirectory, DataVolume


class PromiseBroken(Exception):
    """What must never happen has happened; the text says what."""


@dataclass(frozen=True, slots=True)
class Elected:
    """A member that took the Lease: from now on its log is the cluster's."""

    epoch: Epoch
    name: MemberName
    data: DataDirectory
    timeline: Timeline
    at_s: float
    prefix: frozenset[Entry]
    """What it held then."""
    asynchronous: bool


class PromiseChecker:
    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._without_voters: set[str] = set()
        """Lives whose voters have elected another: writable for a while, but nobody confirms what they write. A clock has no part
        in that, also when the next primary turns asynchronous at once (seed 1017286); what they acknowledge all the same is seen as ever."""
        self.acknowledged: dict[Entry, str] = {}
        """Each with who acknowledged it, while it is asked for."""
        self.acknowledgements = 0
        self.given_up = 0
        """Acknowledged, and lost by a verb that allows it, or in an asynchronous cluster."""
        self._elected: Elected | None = None
        self._origins: dict[Timeline, tuple[DataDirectory, int]] = {}
        """Of each timeline: in which directory it began, and at which entry."""
        self._holders: set[Holder] = set()
        self._last: tuple[Entry, int] | None = None
        """The last acknowledged entry on the current history, and its index."""
        self._tampered = False
        self.loss_allowed_until_s = 0.0
        """A user has asked for a failover that may lose; everything is mended then, and everybody can be reached."""
        self.was_tampered_with = False
        """The record was changed by hand, ever."""
        self.was_asynchronous = False
        """At any time."""
        self.excused_until_s: dict[str, float] = {}

    def broken(self, text: str, *args: object) -> None:
        self._cluster.world.stop(PromiseBroken(text % args))

    # Acknowledgements.

    def on_acknowledged(self, server: PostgresServer, entry: Entry) -> None:
        """The wait of a synchronous commit has ended by itself: from now on it must never be lost."""
        self.acknowledgements += 1
        elected, name = self._elected, server.host.name
        if elected is not None and server.volume.data is not elected.data and entry not in elected.prefix:
            if elected.asynchronous and self._is_excused(name):
                return
            self.broken(
                "%s acknowledged %s although %s was elected for epoch %s and does not hold it",
                name, entry, elected.name, elected.epoch,
            )  # fmt: skip
        self.acknowledged[entry] = name
        record = self._cluster.record
        if (
            record is None
            or record.mode != "synchronous"
            or (elected is not None and server.volume.data is not elected.data)
        ):
            return
        assert server.volume.data is not None
        index = _index_of(server.volume.data.log.entries, entry)
        if self._last is None or index > self._last[1]:
            self._last = (entry, index)
        self._require_on_quorum(record, "when it was acknowledged")

    def _require_on_quorum(self, record: ClusterRecord, when: str) -> None:
        """At least q of N hold the last acknowledged commit; logs are prefixes of one another, so this is true of all."""
        if self._last is None or record.quorum == 0 or self._tampered:
            return
        entry, index = self._last
        holding = [voter for voter in sorted(record.voters) if self._holds(voter, entry, index)]
        if len(holding) < record.quorum:
            self.broken(
                "%s, acknowledged by %s, is on %s of N = %s with q = %s %s",
                entry, self.acknowledged.get(entry), holding, sorted(record.voters), record.quorum, when,
            )  # fmt: skip

    def _holds(self, voter: MemberId, entry: Entry, index: int) -> bool:
        data = self._cluster.directory_of(voter)
        if data is None:
            return False
        log = data.log
        return index < entries_before(log.flushed) and index < len(log.entries) and log.entries[index] is entry

    # The record.

    def on_interference(self) -> None:
        """Somebody changed the record by hand: until it is written whole again it says nothing of who must hold what."""
        self._tampered = self.was_tampered_with = True

    def on_applied(self, before: ClusterRecord | None, after: ClusterRecord) -> None:
        if before is None or after.epoch > before.epoch:
            self._tampered = False
        self.was_asynchronous |= after.mode == "asynchronous"
        if after.holder is not None:
            self._holders.add(after.holder)
        taken = (
            after.holder is not None
            and after.chain is not None
            and bool(after.chain.switches)
            and after.chain.switches[-1].epoch == after.epoch
            and (before is None or before.epoch < after.epoch)
        )
        if taken:
            may_lose = self._cluster.world.now_s < self.loss_allowed_until_s
            lossy = may_lose and not after.voters and after.quorum == 0
            self._taken_over(before, after, lossy=lossy)
        if after.mode == "synchronous":
            self._require_on_quorum(after, "after the record was written")

    def _taken_over(self, before: ClusterRecord | None, record: ClusterRecord, *, lossy: bool) -> None:
        assert record.holder is not None
        assert record.chain is not None
        cluster = self._cluster
        name = record.holder.name
        data = cluster.directory_of(record.holder.member_id)
        assert data is not None, f"{name} took the Lease without a directory"
        log, switch = data.log, record.chain.switches[-1]
        prefix = frozenset(log.entries[: entries_before(switch.switch_lsn)])
        missing = [entry for entry in self.acknowledged if entry not in prefix]
        asynchronous = record.mode == "asynchronous"
        if missing and not lossy and not asynchronous:
            self.broken(
                "%s was elected for epoch %s at %s without %s acknowledged writes, the first %s by %s",
                name, record.epoch, format_lsn(switch.switch_lsn), len(missing), missing[0], self.acknowledged[missing[0]],
            )  # fmt: skip
        self._without_voters.discard(record.holder.incarnation)
        if before is not None and before.holder is not None and not asynchronous and not lossy:
            self._without_voters.add(before.holder.incarnation)
        if lossy:
            cluster.world.counters["checked: failover with loss"] += 1
            self._check_loses_no_more_than_it_must(name, prefix)
        elif asynchronous:
            self._check_asynchronous_takeover(before, record, name, missing)
        for entry in missing:
            del self.acknowledged[entry]
        self.given_up += len(missing)
        self._elected = Elected(
            record.epoch, name, data, record.chain.current, cluster.world.now_s, prefix, asynchronous or lossy
        )
        index = entries_before(switch.switch_lsn) - 1
        self._last = next(
            ((entry, i) for i in range(index, -1, -1) if (entry := log.entries[i]) in self.acknowledged), None
        )
        cluster.world.counters["checked: elections"] += 1

    def _check_asynchronous_takeover(
        self, before: ClusterRecord | None, record: ClusterRecord, name: str, missing: list[Entry]
    ) -> None:
        cluster = self._cluster
        known = before.position if before is not None else None
        if known is not None and record.chain is not None:
            lag_bytes = known.lsn - record.chain.switches[-1].switch_lsn
            if lag_bytes > cluster.maximum_lag_bytes:
                self.broken("%s took over %s bytes behind the last known position", name, lag_bytes)
        for other in cluster.instances.values():
            server, supervisor = other.server, other.supervisor
            if other.name == name or server is None or not server.read_write or self._is_excused(other.name):
                continue
            if supervisor is not None and supervisor.incarnation in self._without_voters:
                continue
            self.broken("%s took over by time for epoch %s while %s can still commit", name, record.epoch, other.name)
        cluster.world.counters["checked: takeovers by time"] += 1
        if missing:
            cluster.world.counters["checked: asynchronous takeovers that lost writes"] += 1

    def _check_loses_no_more_than_it_must(self, winner: str, prefix: frozenset[Entry]) -> None:
        """R15: only the best is taken. Everybody can be reached when a user asks for it here."""
        for instance in self._cluster.instances.values():
            data = instance.volume.data
            if data is None or instance.volume.rewind_attempts or instance.supervisor is None:
                continue
            # What was received in part is no record, whatever its first bytes say.
            whole = data.log.entries[: entries_before(data.log.end)]
            more = [entry for entry in whole if entry in self.acknowledged and entry not in prefix]
            if more and self._cluster.is_member(instance):
                self.broken("%s was elected with loss, although %s holds %s", winner, instance.name, more[0])

    # Servers.

    def on_started(self, server: PostgresServer) -> None:
        if server.volume.rewind_attempts > 0:
            self.broken("%s started a half-rewound directory", server.host.name)

    def on_read_write(self, server: PostgresServer, timeline: Timeline) -> None:
        """Its recovery has ended, and it writes `timeline`."""
        cluster, name = self._cluster, server.host.name
        data = server.volume.data
        assert data is not None
        log = data.log
        begins = next((i for i, entry in enumerate(log.entries) if entry.timeline == timeline), len(log.entries))
        origin = self._origins.setdefault(timeline, (data, begins))
        if origin[0] is not data:
            self.broken("timeline %s began in two directories: %s is the second", timeline, name)
        member = cluster.member_at(cluster.instances[name])
        if not any(holder.member_id == member for holder in self._holders):
            self.broken("%s (%s) became writable and never held the Lease", name, member)
        elected = self._elected
        if elected is not None and server.volume.data is not elected.data and elected.asynchronous:
            return
        if elected is not None and server.volume.data is not elected.data:
            # A former holder that was frozen in its promotion: it may acknowledge nothing new, which is checked there.
            return
        have = set(log.entries)
        missing = [entry for entry in self.acknowledged if entry not in have]
        if missing:
            self.broken(
                "%s became writable without %s acknowledged writes, the first %s", name, len(missing), missing[0]
            )

    def on_destroying(self, volume: DataVolume, what: str) -> None:
        """A rewind or a set-aside begins: R6, of a voter never."""
        member = self._cluster.member_at(self._cluster.instances[volume.name])
        record = self._cluster.record
        if record is not None and record.needs_vote_of(member):
            self.broken("%s of %s, which is a voter of the record (R6)", what, member)

    def _is_excused(self, name: str) -> bool:
        return self._cluster.world.now_s < self.excused_until_s.get(name, 0.0)


def _index_of(entries: list[Entry], entry: Entry) -> int:
    for index in range(len(entries) - 1, -1, -1):
        if entries[index] is entry:
            return index
    raise AssertionError("an acknowledged entry is not in its own log")


__all__ = ["Elected", "PromiseBroken", "PromiseChecker", "member_name_of"]
