"""How each standby has been doing, from what the primary's walsenders show, on the primary's own clock.

A standby is heard of when its reply time or its flushed position changes. The reply time is the standby's wall clock and
is compared for equality only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from instance_manager.core.quorum import StandbyHealth
from instance_manager.core.types import Lsn, MemberId

MAXIMUM_STABLE_NEEDED_S = 60.0
FLAP_WINDOW_S = 120.0
REPLIES_WITHIN_S = 0.9
"""Silence over a whole second between two looks: the next looks come sooner."""


@dataclass(frozen=True, slots=True)
class Walsender:
    """One line of pg_stat_replication."""

    application_name: str
    state: str
    flush_lsn: Lsn | None
    reply_time: str | None


@dataclass(slots=True)
class _Watched:
    heard: tuple[object, ...] = ()
    unheard_s: float = 0.0
    streaming_since_s: float | None = None
    lost_since_s: float | None = None
    lost_times: int = 0
    last_lost_s: float = float("-inf")


class StandbyWatch:
    def __init__(self, *, stable_s: float, silent_after_s: float) -> None:
        self._stable_s = stable_s
        self._silent_after_s = silent_after_s
        self._watched: dict[MemberId, _Watched] = {}
        self._looked_s = float("-inf")

    def look(self, walsenders: Iterable[Walsender], now_s: float) -> None:
        """Take in what was just observed. Silence is counted over the times between two looks that were near each other:
        what passed in a pause of our own is neither a standby's silence nor a sign of its life."""
        gap_s = now_s - self._looked_s
        watched_s = gap_s if gap_s <= self._silent_after_s else 0.0
        self._looked_s = now_s
        seen = {MemberId(sender.application_name): sender for sender in walsenders}
        for member_id in seen:
            self._watched.setdefault(member_id, _Watched())
        for member_id, watched in self._watched.items():
            sender = seen.get(member_id)
            heard = (sender.reply_time, sender.flush_lsn) if sender is not None else ()
            if heard != watched.heard:
                watched.heard, watched.unheard_s = heard, 0.0
            else:
                watched.unheard_s += watched_s
            if sender is not None and sender.state == "streaming" and watched.unheard_s < self._silent_after_s:
                if watched.streaming_since_s is None:
                    watched.streaming_since_s = now_s
                watched.lost_since_s = None
                if now_s - watched.last_lost_s > FLAP_WINDOW_S:
                    watched.lost_times = 0
            elif watched.lost_since_s is None:
                # Silence began when it was last heard, not when it was found out.
                watched.lost_since_s = now_s if sender is None else now_s - watched.unheard_s
                if watched.streaming_since_s is not None:
                    watched.lost_times += 1
                    watched.last_lost_s = now_s
                watched.streaming_since_s = None

    def health(self, member_id: MemberId, now_s: float, *, eligible: bool, first: bool) -> StandbyHealth:
        """`first`: nobody is a voter yet, so one that streams is taken at once."""
        watched = self._watched.get(member_id)
        if watched is None:
            return StandbyHealth(
                streaming=False, lost_for_s=float("inf"), streaming_for_s=0, stable_needed_s=0, eligible=eligible
            )
        streaming_for_s = now_s - watched.streaming_since_s if watched.streaming_since_s is not None else 0.0
        lost_for_s = now_s - watched.lost_since_s if watched.lost_since_s is not None else 0.0
        needed_s = 0.0 if first else min(MAXIMUM_STABLE_NEEDED_S, self._stable_s * 2 ** max(0, watched.lost_times - 1))
        return StandbyHealth(
            streaming=watched.streaming_since_s is not None,
            lost_for_s=lost_for_s,
            streaming_for_s=streaming_for_s,
            stable_needed_s=needed_s,
            eligible=eligible,
        )

    @property
    def all_are_heard(self) -> bool:
        """Each that streams was heard of at the last look; they reply once a second."""
        return all(
            watched.unheard_s < REPLIES_WITHIN_S
            for watched in self._watched.values()
            if watched.streaming_since_s is not None
        )

    def known(self) -> frozenset[MemberId]:
        return frozenset(self._watched)
