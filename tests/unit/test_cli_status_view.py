"""The status screen: one look, 80 x 24, and nothing that steers a terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from instance_manager.core.archive_state import ArchiveState, BackupsState
from instance_manager.core.types import Lsn
from instance_manager.status import ClusterStatus, DecisionLine, InstanceStatus
from instance_manager.status_view import format_bytes, format_seconds, instance_table, render_status

HEALTHY = ClusterStatus(
    cluster="demo",
    told_by="demo-2",
    primary="demo-1",
    epoch=3,
    timeline=2,
    system_identifier="7300000000000000001",
    lease_age_s=0.5,
    lease_readable=True,
    seconds_to_fence=5.5,
    durability="preferred",
    voters=("demo_2_01234567", "demo_3_89abcdef"),
    quorum=1,
    synchronous_wanted=1,
    synchronous_standby_names='ANY 1 ("demo_2_01234567", "demo_3_89abcdef")',
    paused=False,
    fenced=(),
    accepts_clients=True,
    at_risk=(),
    instances=tuple(
        InstanceStatus(
            name=f"demo-{number}",
            member_id=f"demo_{number}_01234567",
            role="primary" if number == 1 else "standby",
            reachable=True,
            postgres="running",
            timeline=2,
            lsn="12/3456789A",
            lag_bytes=None if number == 1 else 1000 * number,
            replay_lag_bytes=None if number == 1 else 16 << 20,
            followed_epoch=3,
            voter=number != 1,
        )
        for number in (1, 2, 3)
    ),
    decisions=tuple(
        DecisionLine(age_s=float(number), decision="follow", reason=f"demo-1 holds epoch 3, look {number}", count=7)
        for number in range(30)
    ),
)


def test_who_is_primary_why_and_what_is_at_risk_is_on_one_screen() -> None:
    screen = render_status(HEALTHY)
    lines = screen.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0] == "demo: primary demo-1, clients are let in, epoch 3, timeline 2"
    assert "at risk: nothing" in lines
    assert "why, as decided by demo-2, latest first:" in lines
    assert "   0.0 s  follow (7 times): demo-1 holds epoch 3, look 0" in lines
    assert "\x1b" not in screen


def test_each_instance_has_its_line() -> None:
    table = instance_table(HEALTHY).splitlines()
    assert table[0].split() == ["INSTANCE", "ROLE", "POSTGRES", "TL", "POSITION", "LAG", "REPLAY", "EPOCH", "VOTER"]
    assert table[1].split() == ["demo-1*", "primary", "running", "2", "12/3456789A", "-", "-", "3", "-"]
    assert table[2].split() == ["demo-2", "standby", "running", "2", "12/3456789A", "2", "kB", "16", "MB", "3", "yes"]


def test_what_is_at_risk_is_never_cut_away() -> None:
    risks = tuple(
        f"sentence {number} of an operator's worst morning, and it goes on for quite a while, to its end {number}"
        for number in range(20)
    )
    screen = render_status(replace(HEALTHY, at_risk=risks))
    words = " ".join(screen.replace("!", "").split())
    assert all(f"to its end {number}" in words for number in range(20))
    assert max(map(len, screen.splitlines())) <= 80


def test_trouble_is_shown() -> None:
    troubled = replace(
        HEALTHY,
        primary=None,
        lease_readable=False,
        paused=True,
        fenced=("demo-3",),
        switchover="demo-2",
        seconds_to_fence=-1.0,
        synchronous_standby_names=None,
        instances=(
            replace(HEALTHY.instances[0], reachable=False, problem="does not answer"),
            replace(HEALTHY.instances[1], promised_epoch=4, operation="cloning from demo-1: 45 %"),
        ),
    )
    screen = render_status(troubled)
    for text in (
        "demo: no primary",
        "not readable now",
        "stops in 0.0 s",
        "PAUSED: no failover; fenced: demo-3; switchover: demo-2",
        "nobody waited for",
        "no answer",
        "3>4",
        "demo-1: does not answer",
        "demo-2: cloning from demo-1: 45 %",
    ):
        assert text in screen


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    long = replace(
        HEALTHY,
        at_risk=("a sentence with aVeryLongWord" + "x" * 90,),
        instances=tuple(replace(instance, name="n" * 50, problem="p" * 300) for instance in HEALTHY.instances),
        voters=tuple("v" * 60 for _ in range(5)),
    )
    assert max(map(len, render_status(long, width).splitlines())) <= width


def test_before_anything_is_known_it_still_renders() -> None:
    unknown = replace(
        HEALTHY,
        primary=None,
        epoch=None,
        timeline=None,
        lease_age_s=None,
        lease_readable=False,
        seconds_to_fence=None,
        voters=(),
        quorum=None,
        synchronous_standby_names=None,
        instances=(),
        decisions=(),
    )
    assert "lease: never read" in render_status(unknown)


def test_what_a_peer_tells_does_not_steer_the_terminal() -> None:
    nasty = replace(
        HEALTHY,
        cluster="de\x1b]0;mo",
        at_risk=("a\x1b[2J\nb",),
        instances=(replace(HEALTHY.instances[0], role="pri\rmary", problem="x\x07\x9by"),),
        decisions=(DecisionLine(age_s=0, decision="a\x1bb", reason="c\nd"),),
    )
    screen = render_status(nasty)
    assert all(letter == "\n" or letter.isprintable() for letter in screen)


def test_colour_only_paints() -> None:
    import re

    painted = render_status(HEALTHY, colour=True)
    assert "\x1b[" in painted
    assert re.sub(r"\x1b\[[0-9]*m", "", painted) == render_status(HEALTHY)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 kB"),
        (1536, "1.5 kB"),
        (16 << 20, "16 MB"),
        (5 << 40, "5 TB"),
        (-2048, "-2 kB"),
    ],
)
def test_bytes_are_told_in_the_units_of_postgres(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (60, "60 s"), (600, "10 min"), (7300, "2 h"), (400000, "5 d")],
)
def test_times_are_told_in_the_fitting_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_how_far_the_archive_is_stands_among_the_first_lines() -> None:
    known = ArchiveState(level="calm", position=Lsn(0x5000000), lag_bytes=8192, lag_s=0.8)
    assert "archive: calm, complete to 0/5000000, behind 8 kB, 0.8 s" in render_status(replace(HEALTHY, archive=known))
    waits = replace(known, level="behind", waiting=40, oldest_age_s=90.0)
    assert "archive: behind, complete to 0/5000000, behind 8 kB, 0.8 s, 40 wait, the oldest for 90 s" in render_status(
        replace(HEALTHY, archive=waits), 100
    )
    assert "archive: not known" in render_status(replace(HEALTHY, archive=ArchiveState(level="unknown")))
    assert "archive:" not in render_status(HEALTHY)


def test_what_can_be_recovered_stands_below_it() -> None:
    def told(backups: BackupsState | None) -> str:
        return render_status(replace(HEALTHY, archive=ArchiveState(level="calm", backups=backups)), 120)

    good = BackupsState(good=2, newest="20261103T000000", newest_age_s=7300.0, recoverable_from="2026-11-02 12:00:00")
    assert "backups: 2 good, the newest 2 h ago, recoverable since 2026-11-02 12:00:00 UTC\n" in told(good)
    gap = told(replace(good, recoverable_from="", first_gap="000000010000000000000002"))
    assert "the newest 2 h ago, gap at 000000010000000000000002\n" in gap
    assert "not looked at anew" in told(replace(good, problem="away"))
    assert "backups: none that can be restored" in told(BackupsState(good=0))
    assert "backups" not in told(None)
