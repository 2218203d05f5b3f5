"""The startup process of a server in recovery (xlogrecovery.c): replay, whom to follow, pause, promotion.

It looks at SIGHUP between two records only: not while a query conflicts, and not between the last record that it finds in
pg_wal and its asking for a walreceiver (P2). Replay is reckoned when somebody looks, so that it costs no events.

Left out: recovery targets, restartpoints other than at replayed checkpoints; an archive is looked into at SIGHUP only.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from simulated_sessions import Child
from simulated_wal import (
    complete,
    entries_before,
    left_at,
    line_of,
    newest_timeline,
    segment_start,
    timeline_at,
)

from instance_manager.core.types import Lsn, Timeline

if TYPE_CHECKING:
    from simulated_server import PostgresServer
    from simulated_walreceiver import WalReceiver

RETRIEVE_RETRY_S = 0.2
PAUSED_LOOKS_FOR_PROMOTION_S = 1.0
CONFIRM_PAUSE_S = (0.0, 0.003)
LOOKS_AFTER_ASKING_S = (0.001, 0.1)
OUR_RESTORE_COMMAND = "restore_command.sh"


class Startup:
    """The startup process."""

    __slots__ = (
        "_asking",
        "_due",
        "_hup_pending",
        "_needed",
        "_promoting",
        "busy",
        "child",
        "consistent",
        "following",
        "pause_state",
        "promote_asked",
        "replayed",
        "server",
        "target",
        "triggered",
    )

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.child = Child(server.process, server.cluster.new_pid())
        self.replayed = 0
        """As of the last look; see `advance`."""
        self.target = Timeline(1)
        self.consistent = False
        self.busy = False
        """Held up amid a record: by a query that conflicts, a long redo."""
        self.pause_state = "not paused"
        self.following = (server.loaded.get("primary_conninfo", ""), server.loaded.get("primary_slot_name", ""))
        """`primary_conninfo` and slot as this process has loaded them."""
        self.promote_asked = False
        self.triggered = False
        self._promoting = False
        self._hup_pending = False
        self._asking = False
        self._needed = 0
        self._due: deque[tuple[float, int]] = deque()

    def begin(self, replayed: int, needed: int, target: Timeline) -> None:
        """Recovery has got to `replayed`; consistent from `needed` on."""
        self.replayed, self._needed, self.target = replayed, needed, target
        self._become_consistent()
        self._arrived(self.server.data.log.flushed)
        self._ask_soon(0.0)

    # Replay.

    @property
    def held(self) -> bool:
        return self.busy or self.child.paused or self.pause_state == "paused" or self.triggered

    def _arrived(self, lsn: int) -> None:
        cluster = self.server.cluster
        end = complete(lsn)
        if end > (self._due[-1][1] if self._due else self.replayed):
            delay_s = cluster.draw(cluster.behaviour.replay_s)
            self._due.append((cluster.world.now_s + delay_s, end))
            if not self.consistent:
                self.child.later(delay_s + 1e-6, self.advance)

    def arrived(self, lsn: int) -> None:
        """The walreceiver has flushed up to there."""
        cluster = self.server.cluster
        self.advance()
        self._arrived(lsn)
        if not self.busy and cluster.chance(cluster.behaviour.startup_busy, "replay met a conflict"):
            self.become_busy(cluster.draw(cluster.behaviour.startup_busy_s))

    def advance(self) -> int:
        """Replay what is due by now; how far replay has come."""
        if not self._due or self.held:
            return self.replayed
        now_s = self.server.cluster.world.now_s
        upto = self.replayed
        while self._due and self._due[0][0] <= now_s:
            upto = self._due.popleft()[1]
        self._replay(upto)
        return self.replayed

    def _replay(self, upto: int) -> None:
        server = self.server
        data = server.data
        if upto <= self.replayed:
            return
        for index in range(entries_before(self.replayed), entries_before(upto)):
            entry = data.log.entries[index]
            if entry.kind == "commit":
                server.rows.append(entry.payload)
            elif entry.kind in ("checkpoint", "shutdown"):
                data.note_checkpoint(index)
        self.replayed = upto
        # Pages reach the disk at any time, and raise the minimum; here always at once.
        data.minimum_recovery = (self.timeline, upto)
        self._become_consistent()

    def _become_consistent(self) -> None:
        if not self.consistent and self.replayed >= self._needed:
            self.consistent = True
            self.server.consistent()

    @property
    def timeline(self) -> Timeline:
        """Of the last record replayed: what IDENTIFY_SYSTEM tells of a standby."""
        index = entries_before(self.replayed)
        return self.server.data.log.entries[index - 1].timeline if index > 0 else Timeline(1)

    def become_busy(self, duration_s: float) -> None:
        self.advance()
        self.busy = True
        self.child.later(duration_s, self.end_busy)

    def end_busy(self) -> None:
        """The query is gone. Whether it looks at SIGHUP or asks for a walreceiver first depends on where it stood."""
        if not self.busy:
            return
        self.busy = False
        cluster = self.server.cluster
        if (
            self._hup_pending
            and not self.promote_asked
            and self.pause_state == "not paused"
            and self.server.walreceiver is None
            and self.following[0]
            and cluster.chance(cluster.behaviour.startup_asks_first, "walreceiver asked for with an older conninfo")
        ):
            self._replay_all()
            self._ask()
            self.child.later(cluster.draw(LOOKS_AFTER_ASKING_S), self._look)
        else:
            self._look()
        if self.promote_asked:
            self._check_promotion()
        elif self.pause_state == "pause requested":
            self._enter_pause()
        else:
            self._ask_soon(0.0)

    def _replay_all(self) -> None:
        self._due.clear()
        self._replay(complete(self.server.data.log.flushed))

    # SIGHUP: StartupRereadConfig.

    def sighup(self) -> None:
        self._hup_pending = True
        if self.busy:
            self.server.cluster.count("startup process was busy at SIGHUP")
        else:
            self.child.later(self.server.cluster.draw(self.server.cluster.behaviour.look_s), self._look)

    def _look(self) -> None:
        if self.busy or not self._hup_pending:
            return
        self._hup_pending = False
        settings = self.server.settings
        before = self.following
        self.following = (settings.get("primary_conninfo", ""), settings.get("primary_slot_name", ""))
        self._restore()
        if self.following != before:
            if self.server.walreceiver is not None:
                self.server.walreceiver.terminate()
            else:
                self._ask_soon(0.0)

    def _restore(self) -> None:
        """WAL from an archive comes whether or not anybody is followed (P9); our script answers "absent" for every segment."""
        server = self.server
        archive = server.cluster.archive
        command = server.settings.get("restore_command", "")
        log = server.data.log
        if archive is None or not command or command == OUR_RESTORE_COMMAND or archive.flushed <= log.end:
            return
        first = entries_before(log.end)
        end = complete(archive.flushed)
        log.receive(first, tuple(archive.entries[first : entries_before(end)]), end)
        log.flushed = log.written
        server.cluster.count("WAL restored from the archive")
        self._arrived(log.flushed)

    # Pause: recoveryPausesHere.

    def pause(self) -> None:
        if self.pause_state == "not paused":
            self.pause_state = "pause requested"
            self.child.later(self.server.cluster.draw(self.server.cluster.behaviour.look_s), self._enter_pause)

    def _enter_pause(self) -> None:
        """The loop looks at SIGHUP, confirms, sleeps. The signal may come between the look and the confirmation."""
        if self.busy or self.pause_state != "pause requested":
            return
        self._look()
        self.child.later(self.server.cluster.draw(CONFIRM_PAUSE_S), self._confirm_pause)

    def _confirm_pause(self) -> None:
        if not self.busy and self.pause_state == "pause requested":
            self.advance()
            self.pause_state = "paused"

    def resume(self) -> None:
        if self.pause_state != "not paused":
            self.pause_state = "not paused"
            self._ask_soon(0.0)

    # Whom to follow: WaitForWALToBecomeAvailable.

    def _ask_soon(self, delay_s: float) -> None:
        if not self._asking and self.following[0]:
            self._asking = True
            self.child.later(delay_s, self._ask_again)

    def _ask_again(self) -> None:
        self._asking = False
        self._ask()

    def _ask(self) -> None:
        """Ask the postmaster for a walreceiver, unless there is WAL to replay or it must not."""
        server = self.server
        if self.busy or self.pause_state != "not paused" or self.promote_asked or not self.following[0]:
            return
        if server.walreceiver is not None or server.stopping:
            return
        self.advance()
        if self._due:
            self._ask_soon(max(0.0, self._due[-1][0] - server.cluster.world.now_s) + 1e-6)
            return
        timeline, start = self._next()
        server.fork_walreceiver(*self.following, timeline, start)

    def _next(self) -> tuple[Timeline, int]:
        self._rescan()
        position = complete(self.server.data.log.end)
        line = line_of(self.server.data.histories, self.target)
        return timeline_at(line, position), segment_start(position)

    def _rescan(self) -> None:
        """rescanLatestTimeLine: go over to a newer timeline, if it left ours no earlier than where replay is."""
        histories = self.server.data.histories
        newest = newest_timeline(histories, self.target)
        if newest == self.target:
            return
        try:
            switch = left_at(line_of(histories, newest), self.target)
        except KeyError:
            self.server.cluster.count("newer timeline is no child of this one")
            return
        if switch is not None and switch < self.replayed:
            self.server.cluster.count("newer timeline forked off before this recovery point")
            return
        self.target = newest

    def receiver_ended(self) -> None:
        if self.promote_asked:
            self._check_promotion()
        else:
            self._ask_soon(RETRIEVE_RETRY_S)

    def timeline_ended(self) -> None:
        """The primary's history left the timeline that is received."""
        self.child.later(self.server.cluster.draw(self.server.cluster.behaviour.look_s), self._go_on)

    def _go_on(self) -> None:
        receiver = self.server.walreceiver
        if receiver is None or receiver.status != "waiting":
            return
        if self.busy or self._due or self.pause_state != "not paused" or self.promote_asked:
            self.advance()
            self.child.later(0.02, self._go_on)
            return
        before = self.target
        timeline, start = self._next()
        if self.target == before:
            # Nothing that it could go over to; it asks again and again.
            self.child.later(RETRIEVE_RETRY_S, self._go_on_anyway, timeline, start)
        else:
            self._restart(receiver, timeline, start)

    def _restart(self, receiver: WalReceiver, timeline: Timeline, start: int) -> None:
        self.server.requested(timeline, start)
        receiver.restart(self.server.start_request(receiver, timeline, start))

    def _go_on_anyway(self, timeline: Timeline, start: int) -> None:
        receiver = self.server.walreceiver
        if receiver is not None and receiver.status == "waiting" and not self.promote_asked:
            self._restart(receiver, timeline, start)

    # Promotion.

    def promote(self) -> None:
        """SIGUSR2 from the postmaster, which has seen the signal file."""
        self.promote_asked = True
        delay_s = self.server.cluster.draw(self.server.cluster.behaviour.look_s)
        if self.pause_state == "paused":
            delay_s = self.server.cluster.world.random.uniform(0.0, PAUSED_LOOKS_FOR_PROMOTION_S)
        self.child.later(delay_s, self._check_promotion)

    def _check_promotion(self) -> None:
        """CheckForStandbyTrigger, then the end of recovery once the walreceiver is gone."""
        server = self.server
        if self.busy or self._promoting or not self.consistent:
            return
        if not self.triggered:
            if not server.data.promote_file:
                self.promote_asked = False
                self._ask_soon(0.0)
                return
            server.data.promote_file = False
            self._replay_all()
            self.triggered = True
            self.pause_state = "not paused"
        if server.walreceiver is not None:
            server.walreceiver.terminate()
            return
        self._promoting = True
        self._due.clear()
        self._replay(complete(server.data.log.flushed))
        self.child.later(server.cluster.draw(server.cluster.behaviour.promotion_s), self._end_recovery)

    def _end_recovery(self) -> None:
        """StartupXLOG's end: half a record is dropped, the new timeline forks behind the last whole one."""
        server = self.server
        data = server.data
        data.log.drop_torn_tail()
        number = self._new_timeline()
        parents = data.histories.get(self.target, ())
        data.histories[number] = (*parents, (self.target, Lsn(data.log.end)))
        server.cluster.world.trace.add(server.host.name, "promoted to timeline %s at %s", number, data.log.end)
        server.become_primary(number)

    def _new_timeline(self) -> Timeline:
        """The first number for which there is no history: by pg_wal, and by what restore_command answers (P4)."""
        server = self.server
        claim = server.volume.claim if server.has_restore_command else None
        number = Timeline(self.target + 1)
        while number in server.data.histories or (claim is not None and number < claim):
            number = Timeline(number + 1)
        return number
