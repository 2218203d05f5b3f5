"""The peers' authenticated route: when a voter promises, and what a primary does about a promise that led to nothing."""

from __future__ import annotations

import pytest
from cluster_tools import (
    done,
    everything_of,
    http_get,
    messages,
    peer_call,
    psql,
    record,
    stopped,
    volume,
)

from instance_manager.codec import from_json
from instance_manager.core.election import VoteAnswer
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import Epoch, MemberId, WalEnd, member_name_of
from instance_manager.core.voting import VoteRequest
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)


def _request(now: ClusterRecord, candidate: MemberId) -> VoteRequest:
    assert now.position is not None
    return VoteRequest(
        cluster_uid=now.cluster_uid,
        candidate=candidate,
        epoch=Epoch(now.epoch + 1),
        record_epoch=now.epoch,
        end=WalEnd(now.position.timeline, now.position.lsn),
    )


def test_a_voter_with_a_healthy_primary_refuses_a_promise_and_persists_nothing(lasting_cluster: LocalCluster) -> None:
    now = record(lasting_cluster)
    voter, candidate = sorted(now.voters)
    name = member_name_of(voter)
    before = volume(lasting_cluster, name)
    for call in ("pre_vote", "promise"):
        answer = peer_call(lasting_cluster, name, call, _request(now, candidate))
        assert answer.status == 200
        told = from_json(answer.body.encode(), VoteAnswer)
        assert not told.granted
        assert told.reason == "I do not suspect the primary"
    assert volume(lasting_cluster, name) == before
    assert lasting_cluster.why_not_redundant() is None


def test_a_promise_asked_with_a_wrong_token_is_401(lasting_cluster: LocalCluster) -> None:
    now = record(lasting_cluster)
    voter, candidate = sorted(now.voters)
    for call in ("promise", "restart", "lossy_failover", "watch"):
        answer = peer_call(
            lasting_cluster, member_name_of(voter), call, _request(now, candidate), token="0123456789abcdef-not-it"
        )
        assert answer.status == 401


def test_a_malformed_promise_is_400_and_an_unknown_call_404(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.names[0]
    assert peer_call(lasting_cluster, name, "promise", {"epoch": "many"}).status == 400
    assert peer_call(lasting_cluster, name, "no_such_call", {}).status == 404


def test_r12_a_primary_reaffirms_itself_after_a_promise_that_nobody_took(lasting_cluster: LocalCluster) -> None:
    """The primary freezes, a voter promises the next epoch to a candidate that then dies, the primary wakes in time."""
    primary = lasting_cluster.wait_primary()
    done(lasting_cluster, primary, "pause")  # so that nobody stands by itself
    renewals = record(lasting_cluster).renewals
    lasting_cluster.wait(lambda: record(lasting_cluster).renewals != renewals, 10, "a renewal", poll_s=0.01)
    before = record(lasting_cluster)
    voter, candidate = sorted(before.voters)
    name = member_name_of(voter)
    with stopped(*everything_of(lasting_cluster, primary)):
        answer = lasting_cluster.wait(
            lambda: _granted(lasting_cluster, name, _request(before, candidate)), 10, f"{name} promises"
        )
        assert answer is not None
        assert answer.end is not None
        assert volume(lasting_cluster, name).promised_epoch == before.epoch + 1
        assert volume(lasting_cluster, name).promised_to == candidate
    lasting_cluster.wait(
        lambda: volume(lasting_cluster, name).promised_epoch > before.epoch + 1, 40, f"{name} follows again"
    )
    now = record(lasting_cluster)
    assert now.epoch > before.epoch + 1
    assert now.holder is not None
    assert now.holder.name == primary, "it is not a failover"
    assert now.chain == before.chain
    assert any(line.startswith("reaffirm: ") for line in messages(lasting_cluster, primary))
    done(lasting_cluster, primary, "resume")
    assert lasting_cluster.wait_redundant(60) == primary
    assert psql(lasting_cluster.connection_string(), "SELECT 1").out == "1"
    lasting_cluster.wait(
        lambda: http_get(lasting_cluster, name, "/replica").status == 200, 20, f"{name} receives again"
    )


def _granted(cluster: LocalCluster, name: str, request: VoteRequest) -> VoteAnswer | None:
    told = from_json(peer_call(cluster, name, "promise", request).body.encode(), VoteAnswer)
    return told if told.granted else None
