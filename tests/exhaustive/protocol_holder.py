"""What a holder does in the protocol's model: open, step by step to a wanted quorum, release, resume, repair.

Every change of the register is `_write`, with all its outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from breadth_first import Violation
from protocol_rules import Core
from protocol_words import (
    DELETED,
    DOWN,
    LETTERS,
    NEVER_READ,
    NOBODY_THERE,
    PRIMARY,
    PROMOTION,
    RECORDS,
    SETS,
    SHUTDOWN,
    STANDBY,
    VOLUMES,
    Bounds,
    Node,
    State,
    appended,
    end_of,
    id_of,
)

from instance_manager.core.quorum import RecordBehindBarrier, RecordVoters, SetSynchronous
from instance_manager.core.types import MemberId

Event = tuple[str, State | Violation]


class Holding:
    def __init__(self, core: Core, limits: Bounds) -> None:
        self.core = core
        self.limits = limits

    @staticmethod
    def _with(state: State, index: int, node: Node) -> State:
        nodes = state.nodes
        return state._replace(nodes=(*nodes[:index], node, *nodes[index + 1 :]))

    def _write(
        self,
        state: State,
        index: int,
        what: str,
        record: int,
        *,
        succeeded: Node,
        unknown: Node,
        replaces: bool = False,
    ) -> Iterator[Event]:
        """One conditional write: done; done, and the answer is lost; or on its way, to land later or never.

        `unknown`: the agent as it was when it sent the write, which it does not know the outcome of.
        """
        if state.record == DELETED and not replaces:
            return
        pending = () if self.core.rules.conditional_writes else state.pending
        landed = state._replace(record=record, pending=pending)
        if replaces:
            landed = landed._replace(tampered=False)
        yield what, self._with(landed, index, succeeded)
        spent = state.spent
        if spent.unknown_writes >= self.limits.unknown_writes:
            return
        more = spent._replace(unknown_writes=spent.unknown_writes + 1)
        waiting = unknown._replace(unknown=True)
        yield f"{what}; the answer is lost", self._with(landed, index, waiting)._replace(spent=more)
        if not replaces:
            # A repair that lands late is left out: `tampered` would have to travel with it.
            later = state._replace(pending=tuple(sorted({*state.pending, record})), spent=more)
            yield f"{what}: on its way, no answer", self._with(later, index, waiting)

    def _same_grounds(self, state: State, node: Node) -> bool:
        return state.record > 0 and self.core.grounds(state.record) == self.core.grounds(node.snapshot)

    def _holding(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """The snapshot names this very life as the holder, whether or not it is still true."""
        chain = RECORDS[node.snapshot].chain
        taken_up = chain is not None and end_of(node.log).timeline == chain.current
        if node.server == STANDBY and not taken_up:
            yield from self._promote(state, index, node)
        elif node.server == STANDBY:
            # A damaged Lease that it repaired as a standby: nothing was claimed that a promotion could take up.
            yield from self._resume(state, index, node)
        elif node.server == DOWN:
            if node.leaving:
                yield from self._release(state, index, node)
            yield from self._resume(state, index, node)
        else:
            yield from self._renew(state, index, node)
            yield from self._serve(state, index, node)
        if self.limits.give_back and node.server != PRIMARY and node.found > 0:
            yield from self._give_back(state, index, node)

    def _promote(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me, record = LETTERS[index], RECORDS[node.snapshot]
        prepared = self.core.writing(node.volume, node.snapshot, primary=True)
        if prepared != node.volume:
            ready = node._replace(volume=prepared, upstream=NOBODY_THERE, campaign=None, vote=None)
            yield f"{me} is about to promote", self._with(state, index, ready)
            return
        assert record.chain is not None
        timeline = record.chain.current
        event = f"{me} is promoted to timeline {timeline}"
        if any(taken == timeline for taken, _ in state.promoted):
            yield event, Violation(f"timeline {timeline} is taken up twice")
            return
        log = appended(node.log, timeline, PROMOTION)
        primary = node._replace(
            server=PRIMARY, log=log, view=0, term=record.epoch, gate=False, found=NEVER_READ, upstream=NOBODY_THERE
        )
        after = self._with(state, index, primary)
        yield event, after._replace(promoted=tuple(sorted((*state.promoted, (timeline, node.log)))))

    def _renew(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """A heartbeat: a successful conditional write that changes nothing else closes every unknown one (R1)."""
        if state.record <= 0 or RECORDS[state.record].holder != RECORDS[node.snapshot].holder:
            return
        renewed = node._replace(snapshot=state.record, unknown=False)
        if renewed == node and not state.pending:
            return
        pending = () if self.core.rules.conditional_writes else state.pending
        after = self._with(state._replace(pending=pending), index, renewed)
        yield f"{LETTERS[index]} renews the Lease", after

    def _others(self, state: State, index: int) -> frozenset[MemberId]:
        return frozenset(id_of(other.volume) for each, other in enumerate(state.nodes) if each != index)

    def _serve(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me, record = LETTERS[index], RECORDS[node.snapshot]
        if node.unknown and self.core.rules.unknown_blocks:
            return
        if not node.view:
            view = self.core.opening(node.snapshot, self._others(state, index))
            yield f"{me} opens with {SETS[view]}", self._with(state, index, node._replace(view=view))
            return
        if not node.gate:
            yield from self._open_gate(state, index, node)
        if self.limits.quorum_steps != "none" and self._same_grounds(state, node):
            yield from self._quorum_step(state, index, node)
        spent = state.spent
        if spent.reaffirms < self.limits.reaffirms:
            later = [each for each in state.nodes if VOLUMES[each.volume].promised_epoch > record.epoch]
            if later and self._same_grounds(state, node):
                yield from self._reaffirm(state, index, node)
        if spent.releases < self.limits.releases:
            yield from self._stop_clean(state, index, node)

    def _open_gate(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me, record = LETTERS[index], RECORDS[node.snapshot]
        if record.quorum > 0 and not self._barrier_passed(state, index, node):
            return
        if record.opened:
            yield f"{me} lets clients in", self._with(state, index, node._replace(gate=True))
        elif self._same_grounds(state, node):
            opened = self.core.opened(state.record)
            done = node._replace(gate=True, snapshot=opened, unknown=False)
            yield from self._write(
                state, index, f"{me} records that clients enter", opened, succeeded=done, unknown=node
            )

    def _barrier_passed(self, state: State, index: int, node: Node) -> bool:
        """Do k members of S hold all that this log holds?"""
        if not self.core.rules.barrier:
            return True
        view = SETS[node.view]
        holding = sum(
            each != index and id_of(other.volume) in view.members and other.log == node.log
            for each, other in enumerate(state.nodes)
        )
        return holding >= view.k

    def _quorum_step(self, state: State, index: int, node: Node) -> Iterator[Event]:
        me = LETTERS[index]
        few = self.limits.quorum_steps == "alone or all"
        for step in self.core.steps(node.snapshot, node.view, self._others(state, index), few):
            if isinstance(step, SetSynchronous):
                view = SETS.number(step.synchronous)
                if view != node.view:
                    yield f"{me} sets {step.synchronous}", self._with(state, index, node._replace(view=view))
                continue
            if not isinstance(step, RecordVoters | RecordBehindBarrier):
                continue
            if isinstance(step, RecordBehindBarrier) and not self._barrier_passed(state, index, node):
                continue
            record = self.core.with_voters(state.record, step.voters, step.quorum)
            intending = node._replace(volume=self.core.writing(node.volume, node.snapshot, record))
            done = intending._replace(
                volume=self.core.writing(intending.volume, record), snapshot=record, unknown=False
            )
            what = f"{me} records N = {{{', '.join(sorted(step.voters))}}}, q = {step.quorum}"
            yield from self._write(state, index, what, record, succeeded=done, unknown=intending)

    def _reaffirm(self, state: State, index: int, node: Node) -> Iterator[Event]:
        for answering in self._some_others(state, index):
            highest = max((VOLUMES[state.nodes[each].volume].highest_epoch for each in answering), default=0)
            would = frozenset(id_of(state.nodes[each].volume) for each in answering)
            record = self.core.reaffirmed(state.record, node.volume, node.life, highest, would)
            if not record or RECORDS[record].epoch > self.limits.epochs:
                continue
            epoch = RECORDS[record].epoch
            done = node._replace(
                volume=self.core.writing(node.volume, record), snapshot=record, term=epoch, unknown=False
            )
            what = f"{LETTERS[index]} reaffirms itself at epoch {epoch}"
            for event, after in self._write(state, index, what, record, succeeded=done, unknown=node):
                if isinstance(after, State):
                    after = after._replace(spent=after.spent._replace(reaffirms=state.spent.reaffirms + 1))
                yield event, after

    def _some_others(self, state: State, index: int) -> Iterator[tuple[int, ...]]:
        """Whoever answers just now: any of them may not."""
        others = [each for each in range(len(state.nodes)) if each != index]
        for size in range(len(others) + 1):
            yield from combinations(others, size)

    # Giving up.

    def _stop_clean(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """The shutdown checkpoint reaches any of those that had received all before it (P12)."""
        log = appended(node.log, end_of(node.log).timeline, SHUTDOWN)
        current = [
            each
            for each in range(len(state.nodes))
            if state.nodes[each].upstream == index and state.nodes[each].log == node.log
        ]
        for size in range(len(current) + 1):
            for reached in combinations(current, size):
                nodes = list(state.nodes)
                nodes[index] = node._replace(server=DOWN, view=0, gate=False, leaving=True, log=log)
                for each in reached:
                    nodes[each] = nodes[each]._replace(log=log)
                spent = state.spent._replace(releases=state.spent.releases + 1)
                who = ", ".join(LETTERS[each] for each in reached) or "nobody"
                yield (
                    f"{LETTERS[index]} stops clean; its shutdown checkpoint reaches {who}",
                    state._replace(nodes=tuple(nodes), spent=spent),
                )

    def _release(self, state: State, index: int, node: Node) -> Iterator[Event]:
        if state.record <= 0 or not self._same_grounds(state, node):
            return
        me = id_of(node.volume)
        able = [
            each
            for each in range(len(state.nodes))
            if each != index and (state.nodes[each].log == node.log or not self.core.rules.holding_is_seen)
        ]
        for size in range(len(able) + 1):
            for seen in combinations(able, size):
                holding = frozenset(id_of(state.nodes[each].volume) for each in seen)
                for named in (*sorted(holding), me):
                    record = self.core.released(state.record, node.log, holding, named, me)
                    intending = node._replace(volume=self.core.writing(node.volume, record))
                    done = intending._replace(snapshot=record, unknown=False, leaving=False)
                    what = f"{LETTERS[index]} releases the Lease to {named}, held by {sorted(holding)}"
                    yield from self._write(
                        state, index, what, record, succeeded=done, unknown=intending._replace(leaving=False)
                    )

    def _give_back(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """A winner that cannot open (R13)."""
        record = RECORDS[node.snapshot]
        if record.opened or not self._same_grounds(state, node):
            return
        assert record.chain is not None
        promoted = end_of(node.log).timeline == record.chain.current
        back = self.core.given_back(state.record, node.found, promoted)
        done = node._replace(snapshot=back, unknown=False, found=NEVER_READ)
        yield from self._write(
            state, index, f"{LETTERS[index]} gives the Lease back", back, succeeded=done, unknown=node
        )

    # Coming back as the holder.

    def _resume(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """Its directory still holds the Lease: enough voters are asked, a later epoch is written, then it starts."""
        if node.snapshot != state.record:
            return
        if node.server != DOWN:
            # It runs under an earlier life of the supervisor, or as a standby: it is killed first.
            stopped = node._replace(server=DOWN, view=0, upstream=NOBODY_THERE, campaign=None, vote=None)
            yield f"{LETTERS[index]} stops its Postgres to resume", self._with(state, index, stopped)
            return
        record = RECORDS[node.snapshot]
        epochs = set()
        # The kernel went on where only processes crashed; whose disk lost something has lost power before.
        same_boot = not state.spent.lost_tails
        for answering in self._some_others(state, index):
            told = tuple((id_of(state.nodes[each].volume), state.nodes[each].log) for each in answering)
            if self.core.restart_refusal(node.snapshot, node.log, told, same_boot) is not None:
                continue
            epochs.add(
                max(
                    record.epoch,
                    VOLUMES[node.volume].highest_epoch,
                    *(VOLUMES[state.nodes[each].volume].highest_epoch for each in answering),
                )
            )
        for highest in sorted(epochs):
            yield from self._resume_behind(state, index, node, highest)

    def _resume_behind(self, state: State, index: int, node: Node, highest: int) -> Iterator[Event]:
        everybody = frozenset(RECORDS[node.snapshot].voters)
        written = self.core.reaffirmed(state.record, node.volume, node.life, highest, everybody)
        if not self.core.rules.restart_writes_epoch:
            written = state.record
        if not written or RECORDS[written].epoch > self.limits.epochs:
            return
        record = RECORDS[written]
        assert record.chain is not None
        volume = self.core.writing(node.volume, written, primary=True)
        started = node._replace(volume=volume, snapshot=written, unknown=False, leaving=False, upstream=NOBODY_THERE)
        if end_of(node.log).timeline != record.chain.current:
            # It took the Lease and ended before it took up its claim.
            started = started._replace(server=STANDBY)
        else:
            view = self.core.opening(written, self._others(state, index))
            started = started._replace(server=PRIMARY, view=view, gate=False, term=record.epoch)
        what = f"{LETTERS[index]} resumes at epoch {record.epoch}"
        if written == state.record:
            yield what, self._with(state, index, started)
        else:
            yield from self._write(state, index, what, written, succeeded=started, unknown=node)

    def _repair(self, state: State, index: int, node: Node) -> Iterator[Event]:
        """A damaged Lease is written anew by its last holder, on exactly the version that it judged (R3)."""
        volume = VOLUMES[node.volume]
        if volume.last_record is None or not volume.was_primary or node.snapshot != state.record:
            return
        found = set()
        for answering in self._some_others(state, index):
            told = tuple(
                (id_of(state.nodes[each].volume), VOLUMES[state.nodes[each].volume].promised_epoch)
                for each in answering
            )
            found.add(self.core.repaired(node.volume, node.life, told))
        for record in sorted(found - {0}):
            epoch = RECORDS[record].epoch
            if epoch > self.limits.epochs:
                continue
            done = node._replace(volume=self.core.writing(node.volume, record), snapshot=record, unknown=False)
            yield from self._write(
                state,
                index,
                f"{LETTERS[index]} repairs the Lease at epoch {epoch}",
                record,
                succeeded=done,
                unknown=node,
                replaces=True,
            )
