"""Standing for election, answering candidates, and taking a released Lease. The rules are in `core/`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import replace

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.agent.volume import VolumeUnusable
from instance_manager.core.election import (
    Candidate,
    Stand,
    StandBack,
    VoteAnswer,
    Won,
    judge_pre_votes,
    judge_promises,
    taken_from_release,
    taken_over,
)
from instance_manager.core.lease import entitled_by_time
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, MemberId, MemberName, WalEnd, member_name_of
from instance_manager.core.voting import (
    ExtensionRequest,
    Verdict,
    VolumeState,
    VoteRequest,
    VoterView,
    judge_extension,
    judge_vote,
)
from instance_manager.ports import CoordinationError
from instance_manager.postgres.server import LocalPostgresError
from instance_manager.wall_clock import timestamp

log = logging.getLogger("instance_manager.agent.elections")

PROMISED_PAUSE_S = 1.0


class Elections:
    """Both sides of an election on this instance."""

    def __init__(self, context: Context) -> None:
        self._c = context
        self._lost = 0

    # The voter's side.

    async def answer_pre_vote(self, request: VoteRequest) -> VoteAnswer:
        await self._c.keeper.read()
        verdict = judge_vote(request, self._voter(), final=False)
        return self._answer(verdict, await self._own_end())

    async def answer_promise(self, request: VoteRequest) -> VoteAnswer:
        """Persist the promise, stop the walreceiver, prove that it is stopped, and only then tell the position (P2)."""
        verdict = judge_vote(request, self._voter(), final=True)
        self._c.measures.promises.add("granted" if verdict.granted else "refused")
        if not verdict.granted:
            return self._answer(verdict, None)
        self._c.journal.note("promise", f"epoch {request.epoch} to {request.candidate}: {verdict.reason}")
        try:
            end = await self._promise(request.epoch, request.candidate)
        except (OperationFailed, LocalPostgresError) as error:
            return self._answer(Verdict(granted=False, reason=f"not yet: {error}"), None)
        # Whoever has just promised gives that election the time to end before it stands itself (R12).
        self._c.stand_again_s = max(self._c.stand_again_s, self._c.clock.now_s() + PROMISED_PAUSE_S)
        return self._answer(verdict, end)

    async def answer_extension(self, request: ExtensionRequest) -> Verdict:
        """R11: bind this voter, on disk and on its own clock, not to promise for the time asked."""
        async with self._c.voting:
            verdict = judge_extension(request, self._voter())
            if verdict.granted:
                until_s = self._c.clock.now_s() + request.duration_s
                await self._c.volume.save(
                    lambda state: replace(
                        state,
                        extension_epoch=request.epoch,
                        extension_until_s=max(until_s, state.extension_until_s),
                        boot_id=self._c.boot_id,
                    )
                )
        return verdict

    async def _promise(self, epoch: Epoch, candidate: MemberId, stands_on: ClusterRecord | None = None) -> WalEnd:
        """`stands_on`: a promise to itself, by which it is about to take the Lease; persisted in one."""
        chain = self._c.record.chain
        if chain is None:
            raise OperationFailed("the cluster has no history yet")

        def promised(state: VolumeState) -> VolumeState:
            after = state.promising(epoch, candidate)
            return after if stands_on is None else after.taking(stands_on, epoch)

        async with self._c.voting:
            if self._c.clock.now_s() < self._c.volume.state.extension_until_s:
                raise OperationFailed("this member has just promised the primary not to promise (R11)")
            await self._c.volume.save(promised)
            end = await self._c.database.stop_following(
                chain, deadline_s=self._c.configuration.timings.promise_timeout_s
            )
        if not chain.contains(end):
            raise OperationFailed(f"this log ends at {end}, which is not in the cluster's history: it has no rank (P4)")
        return end

    async def _own_end(self) -> WalEnd | None:
        """Of complete records, so that ends compare; an estimate while something is received still."""
        chain = self._c.record.chain
        if chain is None:
            return None
        try:
            return await self._c.database.proven_end(chain) or self._c.database.view().end
        except LocalPostgresError:
            return self._c.database.view().end

    def _voter(self) -> VoterView:
        c = self._c
        view = c.keeper.view()
        postgres = c.database.view()
        return VoterView(
            now_s=c.clock.now_s(),
            volume=c.volume.state,
            boot_id=c.boot_id,
            record=view.record,
            record_read_age_s=view.read_age_s,
            renew_interval_s=c.configuration.timings.renew_interval_s,
            suspects=c.suspects,
            fenced=view.record is not None and c.configuration.name in view.record.fenced,
            damaged=view.damage is not None,
            takeover_open=c.takeover_open,
            serving=c.holds_lease or (postgres.running and postgres.mode == "read_write"),
        )

    def _answer(self, verdict: Verdict, end: WalEnd | None) -> VoteAnswer:
        state = self._c.volume.state
        return VoteAnswer(
            voter=state.member_id,
            granted=verdict.granted,
            reason=verdict.reason,
            highest_epoch=state.highest_epoch,
            end=end,
            priority=self._c.configuration.instance.priority,
        )

    # The candidate's side.

    async def stand(self, reason: str) -> None:
        """Pre-vote, promises, and the conditional write on exactly what the promises stood on."""
        c = self._c
        try:
            won = await self._campaign(reason)
        except (OperationFailed, LocalPostgresError, CoordinationError) as error:
            self._stand_back(str(error))
            raise OperationFailed(str(error)) from error
        finally:
            c.takeover_open = False
        if won is not None:
            self._lost = 0

    async def _campaign(self, reason: str) -> ClusterRecord | None:
        c = self._c
        await c.keeper.read()
        record = c.record
        grounds = record.grounds()
        end = await self._own_end()
        if end is None:
            raise OperationFailed("the end of this log is not known")
        me = Candidate(member_id=c.member_id, end=end, priority=c.configuration.instance.priority)
        request = VoteRequest(
            cluster_uid=record.cluster_uid,
            candidate=me.member_id,
            epoch=Epoch(max(record.epoch, c.volume.state.highest_epoch) + 1),
            record_epoch=record.epoch,
            end=end,
        )
        names = self._other_voters(record)
        timeout_s = c.configuration.timings.promise_timeout_s
        answers = await c.peers.ask_all(names, "pre_vote", request, VoteAnswer, deadline_s=timeout_s)
        votes = {answer.voter: answer for answer in answers.values() if answer.voter is not None}
        votes[me.member_id] = self._answer(judge_vote(request, self._voter(), final=False), end)
        judged = judge_pre_votes(record, c.volume.state, me, votes)
        if isinstance(judged, StandBack):
            await self._pass_to(judged)
            return None
        return await self._ask_promises(replace(request, epoch=judged.epoch), record, grounds, judged, reason)

    async def _ask_promises(
        self, request: VoteRequest, record: ClusterRecord, grounds: tuple[object, ...], stand: Stand, reason: str
    ) -> ClusterRecord | None:
        c = self._c
        if c.clock.now_s() < c.stand_again_s:
            raise OperationFailed("another was promised meanwhile")
        c.journal.note("stand", f"epoch {stand.epoch}: {reason}")
        verdict = judge_vote(request, self._voter(), final=True)
        if not verdict.granted:
            raise OperationFailed(f"this instance cannot promise itself: {verdict.reason}")
        c.takeover_open = True
        # Both at once: what counts is judged only when this log is final and the others have told theirs.
        async with asyncio.TaskGroup() as tasks:
            own = tasks.create_task(_caught(self._promise(stand.epoch, request.candidate, record)))
            others = tasks.create_task(
                c.peers.ask_all(
                    self._other_voters(record),
                    "promise",
                    request,
                    VoteAnswer,
                    deadline_s=c.configuration.timings.promise_timeout_s + 1,
                )
            )
        end, answers = own.result(), others.result()
        if isinstance(end, Exception):
            raise end
        me = Candidate(member_id=request.candidate, end=end, priority=c.configuration.instance.priority)
        promises = {answer.voter: answer for answer in answers.values() if answer.voter is not None}
        promises[me.member_id] = self._answer(verdict, end)
        holder = c.holder
        if holder is None:
            raise OperationFailed("this instance is no member")
        judged = judge_promises(record, me, holder, stand.epoch, promises, wanted_k=c.wanted_k())
        if isinstance(judged, StandBack):
            await self._pass_to(judged)
            return None
        told = ", ".join(f"{voter} at {answer.end}" for voter, answer in sorted(promises.items()) if answer.granted)
        return await self._take(judged, record, grounds, f"promises of {told}")

    async def _take(
        self, won: Won, record: ClusterRecord, grounds: tuple[object, ...], why: str, *, exactly: bool = False
    ) -> ClusterRecord:
        """`exactly`: on this very version of the record, never on one that was renewed since."""
        c = self._c
        taken = won.record

        def change(current: ClusterRecord) -> ClusterRecord:
            if exactly and current.write_id != record.write_id:
                raise WriteRefused("the Lease was renewed meanwhile")
            # R12: on a newer version only while the grounds are the same; what users changed beside them stays.
            return replace(
                taken,
                renewals=0,
                paused=current.paused,
                fenced=current.fenced,
                configuration_counter=current.configuration_counter,
                excluded=current.excluded - {c.member_id},
                retired=current.retired,
                acquired_at=timestamp(),
            )

        c.took_at_s = c.clock.now_s()
        await c.volume.save(lambda state: state.taking(record, taken.epoch))
        stored = await c.keeper.write(change, grounds=grounds)
        c.journal.note(
            "take the Lease",
            f"epoch {taken.epoch}, timeline {taken.highest_timeline}, "
            f"voters {', '.join(sorted(taken.voters)) or 'none'}, q {taken.quorum}: {why}",
        )
        return stored.record

    async def take_release(self, reason: str) -> None:
        """R4: the log ends with the stamped shutdown checkpoint, so nobody needs to promise."""
        c = self._c
        record = c.record
        grounds = record.grounds()
        if record.chain is None:
            raise OperationFailed("the cluster has no history yet")
        c.takeover_open = True
        try:
            async with c.voting:
                end = await c.database.stop_following(
                    record.chain, deadline_s=c.configuration.timings.promise_timeout_s
                )
            holder = c.holder
            if holder is None:
                raise OperationFailed("this instance is no member")
            judged = taken_from_release(
                record,
                member=c.member_id,
                holder=holder,
                end=end,
                volume=c.volume.state,
                released_for_s=c.keeper.view().unchanged_for_s,
                takeover_timeout_s=c.configuration.timings.takeover_timeout_s,
                wanted_k=c.wanted_k(),
                now_s=c.clock.now_s(),
            )
            if isinstance(judged, StandBack):
                self._stand_back(judged.reason)
                raise OperationFailed(judged.reason)
            await self._take(judged, record, grounds, reason)
        except CoordinationError as error:
            self._stand_back(str(error))
            raise OperationFailed(str(error)) from error
        finally:
            c.takeover_open = False

    async def take_by_time(self, reason: str) -> None:
        """Asynchronous clusters: `decide` has found that time, a release or proven death entitles this member."""
        c = self._c
        await c.keeper.read()
        record = c.record
        if record.mode != "asynchronous" or record.chain is None:
            raise OperationFailed("the cluster is synchronous: only promises elect")
        c.takeover_open = True
        try:
            async with c.voting:
                end = await c.database.stop_following(
                    record.chain, deadline_s=c.configuration.timings.promise_timeout_s
                )
            if not record.chain.contains(end):
                raise OperationFailed(f"this log ends at {end}, which is not in the cluster's history (P4)")
            if c.member_id not in record.voters:
                raise OperationFailed(
                    "this member is not among those of the record: an extension need not ask it (R11)"
                )
            if (why_not := self._why_not_by_time(record, end)) is not None:
                raise OperationFailed(why_not)
            holder = c.holder
            if holder is None:
                raise OperationFailed("this instance is no member")
            epoch = Epoch(max(record.epoch, c.volume.state.highest_epoch) + 1)
            others = record.voters - {c.member_id}
            taken = taken_over(record, holder=holder, epoch=epoch, end=end, voters=others, quorum=0)
            await self._take(Won(taken), record, record.grounds(), reason, exactly=True)
        except CoordinationError as error:
            self._stand_back(str(error))
            raise OperationFailed(str(error)) from error
        finally:
            c.takeover_open = False

    def _why_not_by_time(self, record: ClusterRecord, end: WalEnd) -> str | None:
        """Judged once more, on what was read for it: the decision stood on an older look."""
        c = self._c
        now_s = c.clock.now_s()
        if now_s < c.volume.state.extension_until_s:
            return "this member promised the primary not to take over while the store is away (R11)"
        return entitled_by_time(
            record,
            unchanged_for_s=c.keeper.view().unchanged_for_s,
            agent_age_s=now_s - c.started_s,
            proven_dead=c.is_proven_dead(record),
            own_end=end,
            maximum_lag_bytes=c.configuration.cluster.maximum_lag_on_failover_bytes,
            clock_rate_error=c.configuration.timings.clock_rate_error,
        )

    def _other_voters(self, record: ClusterRecord) -> tuple[MemberName, ...]:
        own = self._c.member_id
        return tuple(sorted(member_name_of(voter) for voter in record.voters if voter != own))

    async def _pass_to(self, judged: StandBack) -> None:
        """R12: a better voter is told to stand, this one waits."""
        self._stand_back(judged.reason)
        if judged.better is not None:
            await self._c.peers.nudge((member_name_of(judged.better),))
        self._c.journal.note("stand back", judged.reason)

    def _stand_back(self, reason: str) -> None:
        # Randomised, so that two candidates do not meet again and again.
        self._lost = min(self._lost + 1, 4)
        wait_s = self._c.chance.uniform(0.1, 0.25) * 2**self._lost
        self._c.stand_again_s = self._c.clock.now_s() + wait_s
        log.info("not elected, standing again in %.1f s at the earliest: %s", wait_s, reason)


async def _caught(promise: Awaitable[WalEnd]) -> WalEnd | Exception:
    """A failed promise of this instance does not cut the question to the others short: they count epochs by it."""
    try:
        return await promise
    except (OperationFailed, LocalPostgresError, VolumeUnusable, ValueError) as error:
        return error
