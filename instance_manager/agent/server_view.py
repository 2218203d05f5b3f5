"""What the server that runs told when it was last looked at, and what can be concluded from it."""

from __future__ import annotations

from instance_manager.core.types import Timeline, WalEnd
from instance_manager.ports import Clock
from instance_manager.postgres.observation import PostgresObservation


class ServerView:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.last: PostgresObservation | None = None
        """None: this server has not answered yet, or there is none."""
        self.of_pid: int | None = None
        self.answers = False
        """It answered the last look."""
        self._message: str | None = None
        self.message_changed_s = float("-inf")
        self.timeline = Timeline(0)
        """The latest that it was seen to receive, or is known to be on."""
        self.received_s = clock.now_s()
        """When it last received something, or was not to."""
        self.proven: WalEnd | None = None
        """The end of the last complete record, since nothing more can be received (`stop_following`)."""

    def take(self, seen: PostgresObservation, *, follows: bool) -> None:
        """`follows`: the server was told to."""
        self.last, self.answers = seen, True
        receiver = seen.walreceiver
        message = f"{receiver.pid} {receiver.last_message}" if receiver is not None else None
        if message != self._message:
            self._message, self.message_changed_s = message, self._clock.now_s()
        if seen.is_receiving or not seen.in_recovery or not follows:
            self.received_s = self._clock.now_s()
        if receiver is not None and receiver.received_timeline is not None:
            self.timeline = max(self.timeline, receiver.received_timeline)

    def forget(self) -> None:
        """Another server runs, or none."""
        self.last, self.of_pid, self.answers = None, None, False
        self._message, self.timeline, self.proven = None, Timeline(0), None

    def lag_bytes(self, position: WalEnd | None) -> int | None:
        """Behind the last position that the primary told: never more exact than its last renewal."""
        end = self.end()
        if end is None or position is None:
            return None
        return max(0, position.lsn - end.lsn)

    def replay_lag_bytes(self) -> int | None:
        """Received and not yet replayed."""
        seen, end = self.last, self.end()
        if seen is None or end is None or not seen.in_recovery or seen.replay_lsn is None:
            return None
        return max(0, end.lsn - seen.replay_lsn)

    def system_identifier(self) -> str | None:
        return str(self.last.system_identifier) if self.last is not None else None

    def end(self) -> WalEnd | None:
        seen = self.last
        if seen is None:
            return None
        if not seen.in_recovery:
            return WalEnd(seen.timeline, seen.flush_lsn) if seen.flush_lsn is not None else None
        if self.proven is not None:
            return self.proven
        # What it has flushed may end amid a record (P11): good for a lag, not for a vote or a comparison.
        known = [lsn for lsn in (seen.receive_lsn, seen.replay_lsn) if lsn is not None]
        return WalEnd(max(self.timeline, seen.timeline), max(known)) if known else None
