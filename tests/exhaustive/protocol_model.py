"""The synchronous protocol, message by message: promises, takeovers, releases, restarts and the register itself.

What is in this world. A register with conditional writes: a write succeeds, or takes effect while its answer is lost, or
is still on its way and lands later, or never does (a lost one is one that never lands). Instances, each with a volume that
forgets nothing, a log of numbered writes over timelines, a Postgres that is down, a standby or a primary, and an
agent with a snapshot of the record of any age. Everything that an agent does is a step of its own, and between any two steps
anybody may be paused (is not scheduled), the agent may be restarted (its memory is gone) or the whole instance (its
Postgres is gone too); suspicion may always be wrong; a message may be lost, be late, and a request may come twice. A primary
that was replaced goes on writing and acknowledging by its own list until it hears of it, or for ever.

The agent's decisions are the core's own functions (protocol_rules), asked in the order in which the agent asks them.

What is checked in every state:
- whoever the record names as holder has every acknowledged write in its log, so a former primary acknowledges nothing that
  the winner does not have, and every later primary has it too;
- the list of the holder's Postgres keeps the invariant with the record;
- no two logs that differ end at the same position, and no timeline is promoted twice;
- while the register is deleted or restored to something old: the latest primary that runs has every acknowledged write.

What is left out: Postgres's own delays (a list takes effect at once; they are in views_model), time (permits and extensions
are in permits_model), users' changes, and cascaded standbys. A pre-vote is one step: it persists nothing and only
chooses the epoch. The answer to a promise arrives at once or never: a candidate that hears it late is one that is slow to
act on it, which it may always be.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations

from breadth_first import Violation
from protocol_holder import Holding
from protocol_rules import Core, ProtocolRules
from protocol_words import (
    DELETED,
    DOWN,
    LETTERS,
    NEVER_READ,
    NOBODY_THERE,
    PRIMARY,
    RECORDS,
    SETS,
    STANDBY,
    VOLUMES,
    Bounds,
    Campaign,
    Node,
    State,
    appended,
    contradict,
    end_of,
    first_state,
    id_of,
    index_of,
    nameless,
    next_streamed,
    renamed_state,
    without_last,
    writes_of,
)

from instance_manager.core.quorum import invariant_holds
from instance_manager.core.rejoin import Rejoin

Event = tuple[str, State | Violation]


class ProtocolModel(Holding):
    """The world and the candidates; what a holder does is in `protocol_holder`."""

    def __init__(self, rules: ProtocolRules, bounds: Bounds, *, name: str = "protocol") -> None:
        super().__init__(Core(rules, k=bounds.k), bounds)
        self.name = name
        self.rules = rules
        self.orders = list(permutations(range(bounds.instances)))

    @property
    def bounds(self) -> str:
        return str(self.limits)

    def first(self) -> Iterator[tuple[str, State]]:
        yield "a is the primary at epoch 1, the others follow it and are its voters", first_state(self.limits)

    def after(self, state: State) -> Iterator[Event]:
        for event, after in self._everything(state):
            if isinstance(after, State):
                wrong = self._wrong(after)
                if wrong is not None:
                    yield event, Violation(wrong)
                    continue
            yield event, after

    def canonical(self, state: State) -> Hashable:
        holder = self._holder_of(state.record)
        signatures = [(index == holder, nameless(node)) for index, node in enumerate(state.nodes)]
        ranked = sorted(signatures)
        return min(
            hash(renamed_state(state, order))
            for order in self.orders
            if all(ranked[order[index]] == signature for index, signature in enumerate(signatures))
        )

    # What must hold.

    def _wrong(self, state: State) -> str | None:
        nodes = state.nodes
        for one, other in combinations(nodes, 2):
            if one.log != other.log and contradict(one.log, other.log):
                return f"two different logs end at {end_of(one.log)}"
        if state.tampered:
            last = max(range(len(nodes)), key=lambda index: nodes[index].term)
            if nodes[last].server == PRIMARY and state.acknowledged & ~writes_of(nodes[last].log):
                return f"{LETTERS[last]} is primary without an acknowledged write"
            return None
        holder = self._holder_of(state.record)
        if holder is None:
            return None
        node, record = nodes[holder], RECORDS[state.record]
        if state.acknowledged & ~writes_of(node.log) and (node.server == PRIMARY or not state.spent.lost_tails):
            return f"{LETTERS[holder]} holds the Lease without an acknowledged write"
        if node.server == PRIMARY and node.view and node.term <= record.epoch:
            view = SETS[node.view]
            if not invariant_holds(record.voters, record.quorum, view):
                return f"the record elects with q {record.quorum} of {len(record.voters)} where {view} acknowledges"
        return None

    @staticmethod
    def _holder_of(record: int) -> int | None:
        if record <= 0:
            return None
        holder = RECORDS[record].holder
        return None if holder is None else index_of(holder.member_id)

    # What may happen.

    def _everything(self, state: State) -> Iterator[Event]:
        yield from self._register(state)
        for index, node in enumerate(state.nodes):
            yield from self._postgres(state, index, node)
            yield from self._troubles(state, index, node)
            yield from self._agent(state, index, node)

    def _register(self, state: State) -> Iterator[Event]:
        """The store itself: late writes, and what an administrator does to it."""
        for late in state.pending:
            rest = tuple(each for each in state.pending if each != late) if not self.rules.conditional_writes else ()
            if late != state.record:
                yield "a late write lands", state._replace(record=late, pending=rest)
        spent = state.spent
        if spent.damages < self.limits.damages:
            more = spent._replace(damages=spent.damages + 1)
            if state.record > 0:
                yield (
                    "the Lease is deleted",
                    state._replace(record=DELETED, pending=(), tampered=True, spent=more),
                )
                holderless = _without_holder(state.record)
                if holderless != state.record:
                    yield (
                        "somebody clears the holder by hand",
                        state._replace(record=holderless, pending=(), spent=more),
                    )
            if state.backup > 0 and self._all_have_seen_later(state):
                yield (
                    "the Lease is restored from the backup",
                    state._replace(record=state.backup, pending=(), tampered=True, spent=more),
                )
        if self.limits.damages and state.backup == NEVER_READ and state.record > 0 and not state.tampered:
            yield "the Lease is backed up", state._replace(backup=state.record)

    @staticmethod
    def _all_have_seen_later(state: State) -> bool:
        """Who has seen nothing later than the backup cannot know it from the truth: that is not covered (R3)."""
        epoch = RECORDS[state.backup].epoch
        return all(VOLUMES[node.volume].recorded_epoch > epoch for node in state.nodes)

    def _postgres(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me = LETTERS[index]
        if node.server == PRIMARY:
            if node.gate and state.written < self.limits.writes:
                write = state.written + 1
                log = appended(node.log, end_of(node.log).timeline, write)
                after = self._with(state, index, node._replace(log=log))
                yield f"write {write} on {me}", after._replace(written=write)
            for write in range(1, state.written + 1):
                if not state.acknowledged >> write & 1 and self._acknowledges(state, index, node, write):
                    after = state._replace(acknowledged=state.acknowledged | 1 << write)
                    yield f"{me} acknowledges write {write}", after
        elif node.server == STANDBY and node.upstream >= 0:
            source = state.nodes[node.upstream]
            longer = next_streamed(node.log, source.log) if source.server == PRIMARY else None
            if longer is not None:
                yield (
                    f"{me} receives from {LETTERS[node.upstream]}",
                    self._with(state, index, node._replace(log=longer)),
                )

    @staticmethod
    def _acknowledges(state: State, index: int, node: Node, write: int) -> bool:
        if not writes_of(node.log) >> write & 1 or not node.view:
            return False
        view = SETS[node.view]
        having = sum(
            other != index and id_of(each.volume) in view.members and writes_of(each.log) >> write & 1
            for other, each in enumerate(state.nodes)
        )
        return having >= view.k

    def _troubles(self, state: State, index: int, node: Node) -> Iterator[Event]:
        spent, limits, me = state.spent, self.limits, LETTERS[index]
        forgotten = node._replace(
            snapshot=NEVER_READ, unknown=True, leaving=False, found=NEVER_READ, campaign=None, vote=None
        )
        if spent.agent_restarts < limits.agent_restarts and node != forgotten:
            after = self._with(state, index, forgotten)
            yield (
                f"the agent of {me} restarts",
                after._replace(spent=spent._replace(agent_restarts=spent.agent_restarts + 1)),
            )
        dead = forgotten._replace(server=DOWN, view=0, upstream=NOBODY_THERE, gate=False, life=node.life + 1)
        if spent.crashes < limits.crashes:
            after = self._with(state, index, dead)
            yield f"{me} crashes", after._replace(spent=spent._replace(crashes=spent.crashes + 1))
        if spent.rollbacks < limits.rollbacks and node.server != PRIMARY and self._holder_of(state.record) != index:
            # Told by its start counter, or by a position below the last known: another member (R6).
            volume = self.core.renamed_directory(node.volume, index, 8 + spent.rollbacks)
            after = self._with(state, index, dead._replace(log=without_last(node.log), volume=volume))
            yield (
                f"the directory of {me} is rolled back to an older copy",
                after._replace(spent=spent._replace(rollbacks=spent.rollbacks + 1)),
            )
        if spent.lost_tails < limits.lost_tails and self._may_lose_its_tail(state, index, node):
            after = self._with(state, index, dead._replace(log=without_last(node.log)))
            yield (
                f"{me} crashes, and its disk has lost the last record",
                after._replace(spent=spent._replace(lost_tails=spent.lost_tails + 1)),
            )

    def _may_lose_its_tail(self, state: State, index: int, node: Node) -> bool:
        """A disk that lies is covered while others have what it lost: q is above 0 and nothing is on its way (R16)."""
        if state.record <= 0 or state.tampered or state.pending or self._holder_of(state.record) != index:
            return False
        return (
            RECORDS[state.record].quorum > 0
            and node.server == PRIMARY
            and writes_of(node.log) > writes_of(without_last(node.log))
        )

    # What an agent does.

    def _agent(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me = LETTERS[index]
        if node.snapshot != state.record or (node.unknown and self.rules.read_closes_unknown):
            closed = node._replace(snapshot=state.record)
            if self.rules.read_closes_unknown:
                closed = closed._replace(unknown=False)
            yield f"{me} reads the Lease", self._with(state, index, closed)
        if node.snapshot == NEVER_READ:
            return
        if self.core.damage(node.snapshot, node.volume):
            yield from self._repair(state, index, node)
            return
        if node.snapshot == DELETED:
            return
        yield from self._voting(state, index, node)
        record = RECORDS[node.snapshot]
        holder = record.holder
        mine = holder is not None and holder.member_id == id_of(node.volume)
        if holder is not None and mine and holder.incarnation == str(node.life):
            yield from self._holding(state, index, node)
            return
        if node.server == PRIMARY:
            stopped = node._replace(server=DOWN, view=0, gate=False, leaving=False)
            yield f"{me} sees that it does not hold the Lease, and stops", self._with(state, index, stopped)
        elif mine:
            yield from self._resume(state, index, node)
        else:
            yield from self._as_standby(state, index, node)

    def _as_standby(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me, record = LETTERS[index], RECORDS[node.snapshot]
        if node.server == DOWN:
            yield from self._rejoin(state, index, node)
            return
        if not self.core.contains(node.snapshot, node.log):
            yield from self._rejoin(state, index, node)
        elif node.campaign is None and node.vote is None:
            yield from self._follow(state, index, node)
            yield from self._stand(state, index, node)
            if record.holder is None:
                yield from self._take_release(state, index, node)
        if node.campaign is not None:
            yield from self._take(state, index, node, node.campaign)
            yield f"{me} gives up to stand", self._with(state, index, node._replace(campaign=None, vote=None))

    def _follow(self, state: State, index: int, node: Node) -> Iterator[Event]:
        record = RECORDS[node.snapshot]
        if record.holder is None:
            return
        upstream = index_of(record.holder.member_id)
        volume = VOLUMES[node.volume]
        if node.upstream == upstream and volume.promised_epoch == record.epoch:
            return
        after = self.core.following(node.volume, node.snapshot)
        if after is not None and upstream != index:
            yield (
                f"{LETTERS[index]} follows {LETTERS[upstream]} at epoch {record.epoch}",
                self._with(state, index, node._replace(volume=after, upstream=upstream)),
            )

    def _rejoin(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """It rests on the store itself: a directory may be wiped."""
        if node.snapshot != state.record:
            return
        me, holder = LETTERS[index], self._holder_of(node.snapshot)
        plan = self.core.plan(node.snapshot, node.log, node.volume)
        if plan is Rejoin.FOLLOW:
            if node.server == DOWN:
                started = node._replace(server=STANDBY, upstream=NOBODY_THERE, leaving=False)
                yield f"{me} starts as a standby", self._with(state, index, started)
            return
        spent = state.spent
        if plan is Rejoin.WAIT or holder is None or spent.clones >= self.limits.clones:
            return
        source = state.nodes[holder]
        if source.server == PRIMARY and holder != index:
            copied = node._replace(
                server=DOWN,
                upstream=NOBODY_THERE,
                leaving=False,
                campaign=None,
                vote=None,
                log=source.log,
                volume=self.core.renamed_directory(node.volume, index, spent.clones + 1),
            )
            after = self._with(state, index, copied)
            yield (
                f"the directory of {me} is copied anew from {LETTERS[holder]}",
                after._replace(spent=spent._replace(clones=spent.clones + 1)),
            )

    # Elections.

    def _stand(self, state: State, index: int, node: Node) -> Iterator[Event]:
        record = RECORDS[node.snapshot]
        me = id_of(node.volume)
        if me not in record.voters or record.quorum == 0:
            return
        epoch = max(record.epoch, VOLUMES[node.volume].highest_epoch) + 1
        others = [
            (other.volume, other.log)
            for each, other in enumerate(state.nodes)
            if each != index
            and id_of(other.volume) in record.voters
            and other.snapshot > 0
            and self.core.verdict(
                other.volume,
                other.snapshot,
                me,
                epoch,
                record.epoch,
                self._serves(other),
                other.campaign is not None,
                False,
            )
        ]
        own = (node.volume, node.log)
        epochs = set()
        for size in range(len(others) + 1):
            for some in combinations(others, size):
                asked = self.core.epoch_to_stand(node.snapshot, node.volume, node.log, (own, *some))
                if asked is not None and asked <= self.limits.epochs:
                    epochs.add(asked)
        for chosen in sorted(epochs):
            if not self.core.verdict(
                node.volume, node.snapshot, me, chosen, record.epoch, self._serves(node), False, True
            ):
                continue
            volume = self.core.promising(node.volume, chosen, me)
            if volume is None:
                continue
            standing = node._replace(
                volume=volume if self.rules.promise_persisted else node.volume,
                campaign=Campaign(chosen, node.snapshot, (0,) * len(state.nodes)),
                vote=(chosen, index),
                request=(chosen, record.epoch),
            )
            yield (
                f"{LETTERS[index]} stands for epoch {chosen} and promises it to itself",
                self._with(state, index, standing),
            )

    def _voting(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """The voter's side: the promise is persisted; the walreceiver is stopped; only then the position is told."""
        if node.server != STANDBY:
            return
        if node.vote is not None:
            yield from self._tell(state, index, node, *node.vote)
        for candidate, other in enumerate(state.nodes):
            if candidate == index or other.request is None:
                continue
            epoch, record_epoch = other.request
            if node.vote == (epoch, candidate) or not self.core.verdict(
                node.volume,
                node.snapshot,
                id_of(other.volume),
                epoch,
                record_epoch,
                self._serves(node),
                node.campaign is not None,
                True,
            ):
                continue
            volume = self.core.promising(node.volume, epoch, id_of(other.volume))
            if volume is None or (
                volume == node.volume
                and node.upstream == NOBODY_THERE
                and self._answered(state, index, node, epoch, candidate)
            ):
                continue
            promised = node._replace(
                volume=volume if self.rules.promise_persisted else node.volume, vote=(epoch, candidate)
            )
            after = self._with(state, index, promised)
            if self.rules.position == "before":
                after = self._delivered(after, index, promised, epoch, candidate)
            yield f"{LETTERS[index]} promises epoch {epoch} to {LETTERS[candidate]}", after

    @staticmethod
    def _answered(state: State, index: int, node: Node, epoch: int, candidate: int) -> bool:
        """A repeated request would change nothing: the same answer was given, or nobody waits for it."""
        campaign = state.nodes[candidate].campaign
        return campaign is None or campaign.epoch != epoch or campaign.promises[index] == node.log

    def _tell(self, state: State, index: int, node: Node, epoch: int, candidate: int) -> Iterator[Event]:
        me = LETTERS[index]
        stopped = node._replace(upstream=NOBODY_THERE, vote=None)
        after = self._with(state, index, stopped)
        if not self.core.contains(node.snapshot, node.log):
            yield f"{me} stops receiving; its log has no rank", after
            return
        event = f"{me} stops receiving and tells {LETTERS[candidate]} its end"
        if self.rules.position != "before" or candidate == index:
            delivered = self._delivered(after, index, stopped, epoch, candidate)
            if delivered != after:
                yield event, delivered
                if candidate == index:
                    return
        yield f"{event}, which is lost", after

    def _delivered(self, state: State, index: int, node: Node, epoch: int, candidate: int) -> State:
        """The candidate hears the position, if it still asks."""
        asker = state.nodes[candidate]
        if asker.campaign is None or asker.campaign.epoch != epoch:
            return state
        promises = list(asker.campaign.promises)
        # A restarted server may tell where replay has come to, not where its log ends (P3, R5).
        short = self.rules.position == "replayed" and node.life > 0
        promises[index] = without_last(node.log) if short else node.log
        campaign = asker.campaign._replace(promises=tuple(promises))
        return self._with(state, candidate, asker._replace(campaign=campaign))

    def _take(self, state: State, index: int, node: Node, campaign: Campaign) -> Iterator[Event]:
        if not campaign.promises[index]:
            return
        promises = tuple((id_of(state.nodes[voter].volume), log) for voter, log in enumerate(campaign.promises) if log)
        taken = self.core.won(campaign.grounds, node.volume, node.life, campaign.epoch, promises)
        if taken:
            yield from self._take_over(state, index, node, taken, campaign.grounds, "takes the Lease")

    def _take_release(self, state: State, index: int, node: Node) -> Iterator[Event]:
        taken = self.core.won_release(node.snapshot, node.volume, node.life, node.log)
        if taken and RECORDS[taken].epoch <= self.limits.epochs:
            yield from self._take_over(state, index, node, taken, node.snapshot, "takes the released Lease")

    def _take_over(self, state: State, index: int, node: Node, taken: int, grounds: int, what: str) -> Iterator[Event]:
        epoch = RECORDS[taken].epoch
        if state.record <= 0:
            return
        if self.rules.takeover_on_its_grounds and self.core.grounds(state.record) != self.core.grounds(grounds):
            return
        seen = node._replace(
            volume=self.core.seen(node.volume, epoch),
            found=grounds,
            upstream=NOBODY_THERE,
            campaign=None,
            vote=None,
        )
        yield from self._write(
            state,
            index,
            f"{LETTERS[index]} {what} at epoch {epoch}",
            taken,
            succeeded=seen._replace(snapshot=taken, unknown=False),
            unknown=seen,
        )

    @staticmethod
    def _serves(node: Node) -> bool:
        if node.server == PRIMARY:
            return True
        record = RECORDS[node.snapshot] if node.snapshot > 0 else None
        return (
            record is not None
            and record.holder is not None
            and record.holder.member_id == id_of(node.volume)
            and record.holder.incarnation == str(node.life)
        )


@cache
def _without_holder(record: int) -> int:
    """What `kubectl edit` leaves: no holder, and no stamp (R4)."""
    return RECORDS.number(replace(RECORDS[record], holder=None))
