"""How long a child that ended stays away."""

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 8.0
GOOD_RUN_S = 30.0


class Backoff:
    """How long to wait before a child is started again: 0, then 0.5 s doubling to 8 s; anew after 30 s of good running."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after_run_of(self, ran_s: float) -> float:
        """The wait in seconds, after a run of `ran_s` seconds ended."""
        if ran_s >= GOOD_RUN_S:
            self._next_s = 0.0
        wait_s = self._next_s
        self._next_s = min(max(2 * wait_s, FIRST_BACKOFF_S), LONGEST_BACKOFF_S)
        return wait_s
