"""The write permit: until when Postgres may run read-write. Pure: no clock, no I/O; every time is an argument.

All times are absolute seconds of CLOCK_BOOTTIME, which no clock step moves and which counts a suspended machine's sleep.
A permit has an epoch (the Lease's `leaseTransitions`) and two deadlines. At `soft` the agent stops Postgres itself; at
`hard` the supervisor kills it. The rules (DESIGN.md section 2, PROTOCOL.md R10):

- a deadline is never later than now + `hard_limit_s`, whatever the agent says;
- for the same epoch deadlines only grow, so that a late message takes nothing away;
- a later epoch replaces an earlier one; an earlier one never comes back;
- once an epoch is revoked, nothing at or below it is accepted any more;
- what is refused changes nothing: the old deadline stays.
"""

import math
from typing import NamedTuple


class Permit(NamedTuple):
    """Leave to run read-write in one epoch. `soft_s` <= `hard_s`, both absolute CLOCK_BOOTTIME seconds."""

    epoch: int
    soft_s: float
    hard_s: float


class PermitRefusedError(Exception):
    """What was asked for is not permitted; the text says why. The permit is as it was."""


class WritePermit:
    """The permit in force, the epochs that are over, and what follows from both."""

    def __init__(self, hard_limit_s: float) -> None:
        """`hard_limit_s`: the longest time from now, in seconds, that any permit may last."""
        if not (math.isfinite(hard_limit_s) and hard_limit_s > 0):
            raise ValueError("hard_limit_s must be a positive number of seconds")
        self._hard_limit_s = hard_limit_s
        self._current: Permit | None = None
        self._revoked_epoch = -1

    @property
    def current(self) -> Permit | None:
        """The last permit given, perhaps run out; None if there was none or it was revoked."""
        return self._current

    @property
    def revoked_epoch(self) -> int:
        """No permit at or below this epoch is accepted; -1 while nothing was revoked."""
        return self._revoked_epoch

    def extend(self, now_s: float, epoch: int, soft_s: float, hard_s: float) -> Permit:
        """Give or prolong the permit of `epoch`, and return what is in force now.

        Raises PermitRefusedError for an epoch that is over, and for deadlines that are no numbers, in the wrong order, or past.
        """
        if not (math.isfinite(soft_s) and math.isfinite(hard_s)):
            raise PermitRefusedError("a deadline is not a finite number")
        if soft_s > hard_s:
            raise PermitRefusedError("soft is later than hard")
        if hard_s <= now_s:
            raise PermitRefusedError("hard is already past")
        if epoch <= self._revoked_epoch:
            raise PermitRefusedError(f"epoch {epoch} is revoked (all up to {self._revoked_epoch} are)")
        hard_s = min(hard_s, now_s + self._hard_limit_s)
        soft_s = min(soft_s, hard_s)
        old = self._current
        if old is not None:
            if epoch < old.epoch:
                raise PermitRefusedError(f"epoch {epoch} is over, the permit is of epoch {old.epoch}")
            if epoch == old.epoch:
                soft_s, hard_s = max(soft_s, old.soft_s), max(hard_s, old.hard_s)
        self._current = Permit(epoch, soft_s, hard_s)
        return self._current

    def revoke(self, epoch: int) -> None:
        """End every permit at or below `epoch`, now and for ever."""
        self._revoked_epoch = max(self._revoked_epoch, epoch)
        if self._current is not None and self._current.epoch <= self._revoked_epoch:
            self._current = None

    def require(self, now_s: float, epoch: int) -> None:
        """Return if Postgres may become read-write in `epoch` now; else raise PermitRefusedError.

        It must be the permit's very epoch and before `soft`: past it, the agent would have to stop Postgres again at once.
        """
        if self._current is None:
            raise PermitRefusedError("there is no permit")
        if self._current.epoch != epoch:
            raise PermitRefusedError(f"the permit is of epoch {self._current.epoch}, not {epoch}")
        if now_s >= self._current.soft_s:
            raise PermitRefusedError(f"the permit of epoch {epoch} is past its soft deadline")

    def must_fence(self, now_s: float) -> bool:
        """Whether a read-write Postgres must be killed now: no permit, or `hard` is reached."""
        return self._current is None or now_s >= self._current.hard_s
