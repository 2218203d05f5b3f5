"""What an instance knows of its peers: answers, refusals, silence, and a peer that has heard of a later epoch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from agent_builders import peer_state
from agent_fakes import VirtualClock, settle
from agent_instance import FakeCaller

from instance_manager.agent.peering import HEARTBEAT_S, EndAnswer, EndRequest, Peers, WatchAnswer, WatchRequest
from instance_manager.codec import from_json, to_json
from instance_manager.core.observation import PeerView
from instance_manager.core.types import Epoch, MemberName
from instance_manager.ports import PeerRefused, PeerRejected, PeerSilent

A_NAME, B_NAME = MemberName("a"), MemberName("b")


class Watching:
    """`p` watches `a` and `b`; `a` changes when a test says so, `b` is silent."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.caller = FakeCaller()
        self.state = peer_state("a")
        self.later = 0
        self.changes = 0
        self.caller.answers["a", "watch"] = self.answer
        self.peers = Peers(
            self.caller,
            (A_NAME, B_NAME),
            self.clock,
            interval_s=0.5,
            record_epoch=lambda: Epoch(5),
            on_change=self.on_change,
            on_later_epoch=self.on_later,
        )

    def on_change(self) -> None:
        self.changes += 1

    def on_later(self) -> None:
        self.later += 1

    async def answer(self, body: bytes) -> WatchAnswer:
        return WatchAnswer(digest=self.digest, state=self.state)

    @property
    def digest(self) -> str:
        return str(hash(self.state))

    def view(self) -> PeerView:
        return self.peers.views()[A_NAME]


@pytest.fixture
async def at() -> AsyncIterator[Watching]:
    watching = Watching()
    task = asyncio.create_task(watching.peers.run())
    await settle()
    yield watching
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_peer_that_answers_is_known_at_once_and_heard_again_and_again_on_one_connection(at: Watching) -> None:
    assert at.view().answers
    assert at.view().state == at.state
    await at.clock.sleep(10)
    assert at.view().answers
    assert at.view().silent_for_s <= HEARTBEAT_S
    assert sum(name == "a" for name, _, _ in at.caller.calls) == 1


async def test_a_change_of_a_peer_is_noticed_when_it_happens(at: Watching) -> None:
    changes = at.changes
    at.state = peer_state("a", suspects="p refuses connections")
    at.caller.changed.set()
    await settle()
    state = at.view().state
    assert state is not None
    assert state.suspects == "p refuses connections"
    assert at.changes > changes


async def test_section_4_a_refusal_is_told_from_silence(at: Watching) -> None:
    at.caller.on("a", "watch", PeerRefused("nobody listens"))
    await at.clock.sleep(HEARTBEAT_S + 0.5)
    assert (at.view().answers, at.view().refused) == (False, True)
    at.caller.on("a", "watch", PeerSilent("no answer in time"))
    await at.clock.sleep(0.6)
    assert (at.view().answers, at.view().refused) == (False, False)
    assert at.view().silent_for_s >= 1.0
    assert at.view().state == at.state, "its last answer stays, however old"


async def test_a_peer_that_rejects_us_does_not_answer(at: Watching) -> None:
    at.caller.on("a", "watch", PeerRejected(401, "wrong token"))
    await at.clock.sleep(HEARTBEAT_S + 0.5)
    assert (at.view().answers, at.view().refused) == (False, False)


async def test_a_peer_that_comes_back_is_asked_for_everything(at: Watching) -> None:
    before = at.caller.answers["a", "watch"]
    at.caller.on("a", "watch", PeerRefused("nobody listens"))
    await at.clock.sleep(HEARTBEAT_S + 0.5)
    at.caller.answers["a", "watch"] = before
    at.caller.calls.clear()
    await at.clock.sleep(0.5)
    assert at.view().answers


async def test_a_connection_that_ends_in_order_is_asked_for_again_and_is_no_silence(at: Watching) -> None:
    changes, told = at.changes, at.caller.answers["a", "watch"]
    at.caller.on("a", "watch", None)
    at.caller.changed.set()
    await settle()
    at.caller.answers["a", "watch"] = told
    await at.clock.sleep(0.5)
    assert sum(name == "a" for name, _, _ in at.caller.calls) == 2
    assert at.view().answers
    assert at.changes == changes


async def test_a_peer_that_ends_before_it_told_anything_is_silent_and_not_asked_in_a_spin(at: Watching) -> None:
    at.caller.on("a", "watch", None)
    await at.clock.sleep(1)
    at.caller.calls.clear()
    await at.clock.sleep(10)
    assert 35 <= sum(name == "a" for name, _, _ in at.caller.calls) <= 45
    assert not at.view().answers
    assert at.view().silent_for_s > 10


async def test_a_silent_peer_is_asked_a_few_times_a_second_and_no_more(at: Watching) -> None:
    at.caller.calls.clear()
    await at.clock.sleep(10)
    asked = sum(name == "b" for name, _, _ in at.caller.calls)
    assert 35 <= asked <= 45
    assert at.peers.views()[B_NAME].silent_for_s == float("inf")


async def test_an_answer_that_cannot_be_understood_is_silence(at: Watching) -> None:
    at.caller.on("a", "watch", {"digest": 7})
    await at.clock.sleep(HEARTBEAT_S + 0.5)
    assert not at.view().answers
    assert not at.view().refused


async def test_a_peer_with_a_later_epoch_makes_us_read_the_lease(at: Watching) -> None:
    assert at.later == 0
    at.state = peer_state("a", record_epoch=Epoch(6))
    at.caller.changed.set()
    await settle()
    assert at.later == 1


async def test_the_question_tells_the_epoch_that_we_know(at: Watching) -> None:
    assert from_json(at.caller.calls[0][2], WatchRequest).record_epoch == 5


async def test_section_4_a_pause_of_this_process_is_not_the_silence_of_a_peer_that_answered(at: Watching) -> None:
    at.clock.pause(60)
    assert at.view().silent_for_s >= 60
    at.peers.was_paused()
    assert at.view().silent_for_s == 0
    assert at.peers.views()[B_NAME].silent_for_s == float("inf")


async def test_who_does_not_answer_in_time_is_missing_and_holds_up_nobody(at: Watching) -> None:
    at.caller.ends_at("a", peer_state("a").end)  # type: ignore[arg-type]
    answers = await at.peers.ask_all((A_NAME, B_NAME), "end", EndRequest(cluster_uid="uid-1"), EndAnswer, deadline_s=1)
    assert set(answers) == {"a"}
    assert to_json(answers[A_NAME].end) == to_json(peer_state("a").end)
