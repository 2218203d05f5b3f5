"""The status page: everything is escaped, nothing comes from outside, and it stays small whatever the cluster is like."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import aiohttp
from http_harness import DETAILS, STATUS, FakeService

from instance_manager.core.archive_state import ArchiveState, BackupsState
from instance_manager.core.types import Lsn
from instance_manager.http.lag_history import SAMPLES_MAX, LagHistory
from instance_manager.http.page import render
from instance_manager.http.page_chart import lag_chart
from instance_manager.status import ClusterStatus, DecisionLine, InstanceStatus

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&"
PAGE_BYTES_MAX = 40 * 1024


def instance(name: str, text: str = "", **changes: Any) -> InstanceStatus:
    usual: dict[str, Any] = {
        "name": name,
        "member_id": f"{name}{text}",
        "role": f"standby{text}",
        "reachable": True,
        "postgres": f"running{text}",
        "timeline": 2,
        "lsn": f"1/00000100{text}",
        "lag_bytes": 16,
        "replay_lag_bytes": 256,
        "receiving": True,
        "voter": True,
        "problem": text or None,
        "operation": text or None,
    }
    return InstanceStatus(**{**usual, **changes})


def status_full_of(text: str) -> ClusterStatus:
    return replace(
        STATUS,
        cluster=f"c{text}",
        told_by=f"t{text}",
        primary=f"p{text}",
        durability=text,
        voters=(text,),
        synchronous_standby_names=text,
        fenced=(text,),
        at_risk=(text,) * 50,
        switchover=text,
        archive=ArchiveState(
            level=text,
            position=Lsn(1),
            lag_bytes=5,
            lag_s=1.0,
            waiting=3,
            gaps=2,
            conflicts=1,
            trouble=text,
            backups=BackupsState(
                good=1, newest=text, newest_age_s=5.0, recoverable_from=text, first_gap=text, problem=text
            ),
        ),
        paused=True,
        instances=(instance(f"p{text}", text), *(instance(f"i-{number}{text}", text) for number in range(30))),
        decisions=tuple(DecisionLine(age_s=1.0, decision=text, reason=text, count=2) for _ in range(20)),
    )


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(page)
    return parser.found


def filled(status: ClusterStatus) -> LagHistory:
    lags = LagHistory()
    for _ in range(SAMPLES_MAX):
        lags.add(status)
    return lags


def test_what_anybody_named_is_text_and_never_markup() -> None:
    status = status_full_of(EVIL)
    page = render(status, DETAILS, filled(status))
    found = elements(page)
    assert not [tag for tag, _ in found if tag in ("script", "img", "iframe", "object", "form")]
    assert not [name for _, attributes in found for name in attributes if name.startswith("on") or name == "style"]
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 100


def test_it_stays_small_whatever_the_cluster_is_like() -> None:
    status = status_full_of("a reason that goes on and on " * 30)
    history = DETAILS.history * 500
    assert len(render(status, replace(DETAILS, history=history), filled(status)).encode()) < PAGE_BYTES_MAX


async def test_a_browser_gets_the_page_and_everybody_else_the_check_of_the_primary(
    service: FakeService, client: aiohttp.ClientSession
) -> None:
    async with client.get("/", headers=BROWSER) as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        page = await response.text()
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "demo-1" in page
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    service.snapshot = replace(service.snapshot, accepts_writes=False)
    for headers in ({}, {"Accept": "application/json"}, {"Accept": "*/*"}):
        async with client.get("/", headers=headers) as response:
            assert (response.status, response.content_type) == (503, "application/json")
    async with client.get("/", headers=BROWSER) as response:
        assert response.status == 200


async def test_nothing_comes_from_outside(client: aiohttp.ClientSession) -> None:
    async with client.get("/", headers=BROWSER) as response:
        page = await response.text()
    links = [
        value or "" for _, attributes in elements(page) for name, value in attributes.items() if name in ("href", "src")
    ]
    assert links
    assert all(link == "data:," or re.fullmatch(r"/[a-z.]+", link) for link in links)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_answers_what_is_asked_first() -> None:
    lags = LagHistory()
    assert "Nothing is at risk" in render(STATUS, DETAILS, lags)
    assert "is primary, clients are let in" in render(STATUS, DETAILS, lags)
    closed = render(replace(STATUS, accepts_clients=False, at_risk=("commits are on 1 disks",)), DETAILS, lags)
    assert "clients are not let in" in closed
    assert "commits are on 1 disks" in closed
    assert "Nothing is at risk" not in closed
    assert "There is no primary" in render(replace(STATUS, primary=None), DETAILS, lags)
    assert "cannot be read now" in render(replace(STATUS, lease_readable=False), DETAILS, lags)
    assert "Paused" in render(replace(STATUS, paused=True), DETAILS, lags)


def test_an_instance_that_does_not_answer_is_shown_as_such() -> None:
    status = replace(STATUS, instances=(instance("demo-1", role="primary"), instance("demo-2", reachable=False)))
    page = render(status, DETAILS, LagHistory())
    assert "does not answer; what is below is old" in page
    assert "streams to 0 of 1" in page
    assert page.index("demo-1<span") < page.index("demo-2<span")


def test_lags_are_kept_for_minutes_and_for_members_that_there_are() -> None:
    lags = LagHistory()
    for number in range(SAMPLES_MAX + 50):
        lags.add(replace(STATUS, instances=(instance("demo-2", lag_bytes=number, replay_lag_bytes=1),)))
    assert lags.of("demo-2") == tuple(range(51, SAMPLES_MAX + 51))
    lags.add(replace(STATUS, instances=(instance("demo-3", reachable=False), instance("demo-1"))))
    assert lags.of("demo-2") == ()
    assert lags.of("demo-3") == (None,)
    assert lags.of("demo-1") == (0,)


def test_a_drawing_has_a_gap_where_nothing_is_known() -> None:
    drawing = lag_chart((0, 1000, None, None, 10**9))
    assert drawing.count("<polyline") == 2
    assert drawing.count('class="gap"') == 1
    tops = [
        float(pair.split(",")[1]) for line in re.findall(r'polyline points="([^"]*)"', drawing) for pair in line.split()
    ]
    assert tops[0] == 42
    assert tops[-1] == 4
    assert 4 < tops[1] < 42


def test_without_samples_there_is_an_empty_drawing() -> None:
    assert "<polyline" not in lag_chart(())


def test_the_archive_is_told_where_there_is_one() -> None:
    assert "<h2>Archive" not in render(STATUS, DETAILS, LagHistory())
    calm = render(replace(STATUS, archive=ArchiveState(level="calm", position=Lsn(0x5000000))), DETAILS, LagHistory())
    assert "complete to" in calm
    assert "0/5000000" in calm
    broken = ArchiveState(level="critical", gaps=2, trouble="the bucket is gone")
    page = render(replace(STATUS, archive=broken), DETAILS, LagHistory())
    assert '<b class="bad">critical</b>' in page
    assert "2 missing segments" in page
    assert "the bucket is gone" in page


def test_the_archive_says_what_can_be_recovered() -> None:
    backups = BackupsState(
        good=3,
        newest="20261103T000000",
        newest_age_s=7300.0,
        recoverable_from="2026-11-02 12:00:00",
        recoverable_s=200000.0,
    )

    def page(**changes: Any) -> str:
        archive = ArchiveState(level="calm", position=Lsn(0x5000000), backups=replace(backups, **changes))
        return re.sub(r"<[^>]*>", " ", render(replace(STATUS, archive=archive), DETAILS, LagHistory()))

    assert "20261103T000000 , 2 h ago" in page()
    assert "2026-11-02 12:00:00  UTC, 2 d back" in page()
    assert "complete to  0/5000000" in page()
    assert "gap at" not in page()
    assert "000000010000000000000002" in page(first_gap="000000010000000000000002")
    assert "none that can be restored" in page(good=0)
    assert "could not be looked at anew: the store is away" in page(problem="the store is away")
