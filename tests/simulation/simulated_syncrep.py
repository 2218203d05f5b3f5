"""Synchronous replication as syncrep.c does it: who waits, who releases, and by whose copy of the list.

A backend waits only if the shared flag is set, and the checkpointer alone sets it (P1). Each walsender releases by its own
copy of the list (P5); names are counted, not machines (P7); a cancelled wait reports success (P13).

Left out: FIRST (priorities are 0 and 1), `remote_write` and `remote_apply`, prepared transactions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simulated_wal import Entry

if TYPE_CHECKING:
    from simulated_sessions import Session
    from simulated_volume import PostgresCluster
    from simulated_walsender import WalSender

_ANY = re.compile(r"ANY (\d+) \((.*)\)")

Outcome = Literal["acknowledged", "cancelled_wait", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """One process' copy of `synchronous_standby_names`: `ANY k (names)`; k = 0: the empty list."""

    k: int
    names: frozenset[str]

    def priority_of(self, name: str) -> int:
        """SyncRepGetStandbyPriority."""
        return 1 if name.lower() in self.names else 0


@functools.lru_cache(maxsize=1024)
def parse_names(value: str) -> SyncConfig:
    match = _ANY.fullmatch(value)
    if match is None:
        assert value == "", value
        return SyncConfig(0, frozenset())
    names = frozenset(name.strip().strip('"').lower() for name in match[2].split(","))
    return SyncConfig(int(match[1]), names)


class Commit:
    """One transaction of a backend, from its record to its result."""

    __slots__ = ("done", "entry", "lsn", "on_result", "session", "synchronous", "waiting")

    def __init__(
        self, entry: Entry, session: Session | None, *, synchronous: bool, on_result: Callable[[Outcome, Entry], object]
    ) -> None:
        self.entry = entry
        self.lsn = 0
        self.session = session
        """Whose backend it is; None: one that lives for this commit only."""
        self.synchronous = synchronous
        self.on_result = on_result
        self.waiting = False
        """In SyncRepWaitForLSN."""
        self.done = False


class SyncRep:
    """The shared memory of synchronous replication (WalSndCtl), and the queue of those who wait for flush."""

    __slots__ = ("_cluster", "_finish", "_queue", "_released", "_senders", "defined")

    def __init__(
        self,
        cluster: PostgresCluster,
        senders: list[WalSender],
        finish: Callable[[Commit, Outcome], None],
    ) -> None:
        self.defined = False
        """`sync_standbys_defined`: set and cleared by the checkpointer alone."""
        self._cluster = cluster
        self._senders = senders
        self._finish = finish
        self._queue: list[Commit] = []
        self._released = 0

    def waits(self, commit: Commit) -> bool:
        """SyncRepWaitForLSN: queue the commit, unless it need not wait."""
        if not self.defined or commit.lsn <= self._released:
            return False
        commit.waiting = True
        self._queue.append(commit)
        return True

    def cancel(self, commit: Commit) -> None:
        """SyncRepCancelWait."""
        if commit.waiting:
            commit.waiting = False
            self._queue.remove(commit)

    def set_defined(self, defined: bool) -> None:
        """SyncRepUpdateSyncStandbysDefined: going to the empty list releases everybody at once."""
        if self.defined == defined:
            return
        self.defined = defined
        if not defined:
            queue, self._queue = self._queue, []
            for commit in queue:
                commit.waiting = False
                self._finish(commit, "acknowledged")

    def release_by(self, sender: WalSender, current: SyncConfig) -> None:
        """SyncRepReleaseWaiters in the walsender `sender`. `current` is what the file says, for the counters only."""
        config = sender.config
        if sender.priority == 0 or sender.state not in ("streaming", "stopping") or sender.flush is None:
            return
        if config.k == 0:
            return
        flushed = [
            (each.flush, each.name)
            for each in self._senders
            if each.priority > 0 and each.flush is not None and each.state in ("streaming", "stopping")
        ]
        if len(flushed) < config.k:
            return
        if len(flushed) > 1:
            flushed.sort(reverse=True)
        position = flushed[config.k - 1][0]
        if position <= self._released:
            return
        self._released = position
        queue = self._queue
        count = 0
        while count < len(queue) and queue[count].lsn <= position:
            count += 1
        if not count:
            return
        released, self._queue = queue[:count], queue[count:]
        if config != current:
            self._cluster.count("commit released by a walsender with an older list")
        if config.k > 1 and len({name for _, name in flushed[: config.k]}) < config.k:
            self._cluster.count("commit released by two walsenders of one name")
        for commit in released:
            commit.waiting = False
            self._finish(commit, "acknowledged")
