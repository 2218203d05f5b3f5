"""The status page of a real cluster in a real browser: `make test-browser`; with SCREENSHOTS=DIRECTORY its pictures are kept there."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import running_chromium
from cluster_harness import eventually, running_cluster
from cluster_tools import done, psql, superuser_sql, wait_other_primary

from instance_manager.demo.cluster import LocalCluster
from instance_manager.demo.plan import ArchivePlan
from instance_manager.http.lag_history import INTERVAL_S

pytestmark = pytest.mark.timeout(400)

PICTURE_BYTES_MAX = 150 * 1024


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """After a switchover, and with a standby whose replay has lagged for a while."""
    with running_cluster(archive=ArchivePlan()) as made:
        first = made.wait_primary()
        done(made, first, "switchover")
        wait_other_primary(made, first)
        made.wait_redundant(60)
        eventually(made, lambda: _recoverable(made), within_s=120, what="the first backup is told of")
        yield made


def _recoverable(cluster: LocalCluster) -> bool:
    status = cluster.primary_status()
    backups = status.archive.backups if status is not None and status.archive is not None else None
    return backups is not None and backups.recoverable_from != ""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("SCREENSHOTS") or tmp_path)


def url(cluster: LocalCluster, name: str) -> str:
    member = cluster.plan.member(name)
    return f"http://{member.host}:{member.http_port}/"


async def _lag_a_while(cluster: LocalCluster, standby: str) -> None:
    """So that the drawing of its lag shows something."""
    await asyncio.sleep(INTERVAL_S)
    await asyncio.to_thread(superuser_sql, cluster, standby, "SELECT pg_wal_replay_pause()")
    try:
        for _ in range(3):
            filling = "CREATE TABLE IF NOT EXISTS filled (t text); INSERT INTO filled SELECT repeat('x', 900) FROM generate_series(1, 9000)"
            told = await asyncio.to_thread(psql, cluster.connection_string(), filling, timeout_s=60)
            assert told.code == 0, str(told)
            await asyncio.sleep(INTERVAL_S)
    finally:
        await asyncio.to_thread(superuser_sql, cluster, standby, "SELECT pg_wal_replay_resume()")
    await asyncio.sleep(2 * INTERVAL_S)


async def test_the_page_is_whole_wide_and_narrow_light_and_dark(
    cluster: LocalCluster, tmp_path: Path, pictures: Path
) -> None:
    primary = cluster.wait_primary()
    await _lag_a_while(cluster, cluster.standbys()[0])
    backgrounds = set()
    async with running_chromium(tmp_path) as tab:
        for width, height, dark, picture in (
            (1180, 900, False, "status-page.png"),
            (1180, 900, True, "status-page-dark.png"),
            (390, 1000, True, "status-page-phone.png"),
        ):
            await tab.open(url(cluster, primary), width=width, dark=dark)
            assert primary in await tab.value("document.querySelector('h1').innerText")
            assert await tab.value("document.querySelectorAll('.card').length") == 3
            assert await tab.value("document.querySelectorAll('.card polyline').length") >= 2
            assert await tab.value("document.querySelectorAll('.log tr').length") > 3
            text = await tab.value("document.body.innerText")
            assert re.search(r"recoverable since\s+20\d\d-\d\d-\d\d", text), text
            assert "Nothing is at risk" in text
            wider = await tab.value("document.documentElement.scrollWidth - innerWidth")
            assert wider <= 0, f"{wider} pixels wider than a screen of {width}"
            backgrounds.add(await tab.value("getComputedStyle(document.body).backgroundColor"))
            await tab.screenshot(pictures / picture, height=height)
            assert 10_000 < (pictures / picture).stat().st_size < PICTURE_BYTES_MAX
        assert len(backgrounds) == 2
        assert {requested.split("?")[0] for requested in tab.requested} <= {url(cluster, primary), "data:,"}
        assert tab.complaints == []


async def test_a_standby_that_stopped_is_seen_on_the_pages_of_the_others(
    cluster: LocalCluster, tmp_path: Path, pictures: Path
) -> None:
    primary, standby = cluster.wait_primary(), cluster.standbys()[0]
    await asyncio.to_thread(done, cluster, primary, "fence", standby)
    try:
        async with running_chromium(tmp_path) as tab:
            await tab.open(url(cluster, primary), width=1180, dark=False)
            card = f"[...document.querySelectorAll('.card')].find(each => each.innerText.includes('{standby}'))"
            assert await tab.value(f"{card}.classList.contains('off')") is True
            assert "stopped" in await tab.value(f"{card}.innerText")
            assert standby in await tab.value("document.querySelector('header').parentElement.innerText")
            await tab.screenshot(pictures / "status-page-fenced.png", height=620)
    finally:
        await asyncio.to_thread(done, cluster, primary, "unfence", standby)


async def test_a_script_that_got_into_the_page_would_not_run(cluster: LocalCluster, tmp_path: Path) -> None:
    async with running_chromium(tmp_path) as tab:
        await tab.open(url(cluster, cluster.wait_primary()), width=1180, dark=False)
        await tab.value(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        assert await tab.value("window.ran === undefined") is True
        assert any("Content Security Policy" in complaint for complaint in tab.complaints)
