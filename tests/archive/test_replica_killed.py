"""The making of a standby's directory from an archive in S3, killed at any moment: it begins anew, and nothing of it is believed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from archiving_server import all_archived, archiving, insert, prepared
from backup_harness import LAYOUT, store_of, take
from fault_proxy import Fault, FaultProxy
from harness import Cluster, PostgresProcess, freeze, owned_directory, processes_of, thaw, wait_until
from replica_harness import CONFIGURATION, DEADLINE_S, Making, numbers
from s3_server import CREDENTIALS

from instance_manager.agent.recovering import NotMade, make_replica
from instance_manager.archive.backup.info import BackupInfo
from instance_manager.codec import to_json
from instance_manager.core.types import Timeline, TimelineChain
from instance_manager.postgres import directory
from instance_manager.postgres.directory import (
    DirectoryRefused,
    DirectoryState,
    inspect_directory,
    remove_leftovers,
)

pytestmark = pytest.mark.timeout(300)
CHAIN = TimelineChain(Timeline(1))
PROGRAM = Path(__file__).parent / "making_replica.py"


class Agent:
    """One, with the process that it has begun, and that one's Postgres."""

    def __init__(self, making: Making, request: bytes) -> None:
        self._staged = making.server.data_directory
        self.said: list[str] = []
        self._known: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(making.process.root / CONFIGURATION), str(self._staged)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **CREDENTIALS},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(request.decode())
        self._process.stdin.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.said += (line.strip() for line in self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def command(self) -> int:
        """Of the process that makes the directory."""
        (found,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        self._known.add(int(found))
        return int(found)

    def postgres(self) -> list[int]:
        found = [pid for staging in self.stagings() for pid in processes_of(staging)]
        self._known.update(found)
        return found

    def stagings(self) -> list[Path]:
        return sorted(self._staged.parent.glob(f"{self._staged.name}.clone-*"))

    async def end(self) -> str:
        """What it said last. AssertionError: it has not ended in order, or not in time."""
        await wait_until(self._ended, deadline_s=DEADLINE_S, what="a directory")
        assert self._process.wait() == 0, self.said
        self._reader.join(10)
        return self.said[-1]

    async def _ended(self) -> bool:
        return self.has_ended

    def kill(self) -> None:
        """Itself alone."""
        self._process.kill()
        self._process.wait()

    def clear(self) -> None:
        """What a test that failed has left of it, also what it has frozen."""
        if not self.has_ended:
            self.kill_all()
        for pid in self._known:
            with contextlib.suppress(OSError):
                if str(self._staged).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """As the end of a container: none of them does anything after the first one's end."""
        pids = [self.pid, self.command(), *self.postgres()]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        self._process.wait()


@pytest.fixture
def begin() -> Iterator[Callable[[Making, bytes], Agent]]:
    begun: list[Agent] = []

    def begin(making: Making, request: bytes) -> Agent:
        begun.append(Agent(making, request))
        return begun[-1]

    yield begin
    for agent in begun:
        agent.clear()


class Moment:
    """One at which the making stands until the store goes on: in the files, or in the replay of the log behind them."""

    def __init__(self, name: str, info: BackupInfo, proxy: FaultProxy, space: Path) -> None:
        self.name, self._proxy, self._space = name, proxy, space
        third = info.segment_size.name(info.end_segment)
        for _ in range(3):
            third = info.segment_size.next_name(third)
        self._path = f"/{info.backup_id}/data" if name == "files" else f"/{LAYOUT.wal(third).rpartition('.')[0]}"
        self._hold: Fault | None = None

    def __enter__(self) -> Moment:
        self._hold = self._proxy.fail("silent", method="GET", path=self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.heal()

    async def come(self, said: list[str], has_ended: Callable[[], bool]) -> None:
        assert self._hold is not None
        before = self._hold.met

        async def is_there() -> bool:
            assert not has_ended(), said
            is_held = self._hold is not None and self._hold.met > before
            return is_held and any(self._space.glob("PG_*/*/*")) and (self.name == "files" or is_replaying(said))

        await wait_until(is_there, deadline_s=DEADLINE_S, what=f"it stands in the {self.name}: {said}")


def is_replaying(said: list[str]) -> bool:
    return any(text.startswith("replayed") for text in said)


@pytest.mark.parametrize("moment_name", ["files", "replay"])
async def test_one_that_was_killed_begins_anew_when_all_of_it_has_ended_and_nothing_of_it_is_believed(
    cluster: Cluster,
    s3_section: dict[str, Any],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[Making, bytes], Agent],
    moment_name: str,
) -> None:
    source, moved = cluster.add("p"), cluster.root / "moved"
    # Of those that are killed nobody removes what they have there.
    monkeypatch.setenv("TMPDIR", str(cluster.root))
    with archiving(source, s3_section) as made:
        await prepared(cluster, made)
        await source.execute(f"CREATE TABLESPACE space LOCATION '{owned_directory(cluster.root / 'space')}'")
        await source.execute("CREATE TABLE elsewhere TABLESPACE space AS SELECT n FROM generate_series(1, 500) n")
        info = (await take(made, store_of(s3_section))).info
        await insert(source, 0, 20_000)
        await all_archived(source)
        making = Making(cluster, "s", source, {"archive": s3_section, "bootstrap": {"replicas_from": "archive"}})
        (space,) = info.tablespaces
        request = await making.request(chain=CHAIN, history="", origin=None, tablespaces=((space.oid, str(moved)),))
        content, server = to_json(request), making.server
        moment = Moment(moment_name, info, proxy, moved)

        def nothing_is_believed() -> None:
            report = inspect_directory(server)
            assert (report.state, len(report.leftovers)) == (DirectoryState.MISSING, 1)

        with moment:
            # The process alone: its agent clears up.
            said: list[str] = []
            task = asyncio.create_task(
                make_replica(server, making.process.root / CONFIGURATION, request, on_progress=said.append)
            )
            await moment.come(said, task.done)
            os.kill(command_of(os.getpid(), server.data_directory), signal.SIGKILL)
            with pytest.raises(NotMade, match="ended with -9"):
                await task
            assert inspect_directory(server).leftovers == ()
            assert list(moved.iterdir()) == []

            # The agent alone: its successor waits until the last of the others has ended.
            first = begin(making, content)
            await moment.come(first.said, lambda: first.has_ended)
            command, postgres = first.command(), first.postgres()
            left = command if moment.name == "files" else min(postgres)
            freeze(left)
            first.kill()
            if left != command:
                os.kill(command, signal.SIGKILL)
            nothing_is_believed()
            with monkeypatch.context() as during:
                during.setattr(directory, "LEFT_DEADLINE_S", 0.5)
                with pytest.raises(DirectoryRefused, match="somebody still works in"):
                    remove_leftovers(server)
            assert any(moved.glob("PG_*"))
            thaw(left)

            # All at once.
            second = begin(making, content)
            await moment.come(second.said, lambda: second.has_ended)
            assert len(second.stagings()) == 1
            second.kill_all()
            nothing_is_believed()

        third = begin(making, content)
        assert "of this cluster's archive" in await third.end()
        report = inspect_directory(server)
        assert (report.state, report.has_standby_signal, report.leftovers) == (DirectoryState.INITIALISED, True, ())
        assert CHAIN.contains(await making.end(CHAIN))
        assert [path.name for path in moved.iterdir()] == [path.name for path in (cluster.root / "space").iterdir()]
        standby = await making.follow(cluster)
        await insert(source, 20_000, 10)
        await source.execute("INSERT INTO elsewhere VALUES (501)")
        await wait_until(lambda: has_all(standby), deadline_s=20, what="every row on the standby")


def command_of(agent: int, staged: Path) -> int:
    """Of the children of the process, the one that makes the directory."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    named = f"{staged}.clone-".encode()
    (found,) = (int(pid) for pid in children if named in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


async def has_all(standby: PostgresProcess) -> bool:
    elsewhere = await standby.fetchval("SELECT count(*) FROM elsewhere")
    return elsewhere == 501 and await numbers(standby) == set(range(20_010))
