"""Signals to the supervisor itself: each wakes the loop, which then asks which they were."""

import os
import signal

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)


class Signals:
    """Those that came since the last `take`. `fd` becomes readable with each."""

    def __init__(self) -> None:
        self._came: set[int] = set()
        self.fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _HANDLED:
            signal.signal(number, lambda number, _frame: self._came.add(number))
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)

    def drain(self) -> None:
        """After `fd` was readable."""
        os.read(self.fd, 65536)

    def asks_for_end(self) -> bool:
        """Without taking any."""
        return bool(self._came & {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})

    def take(self) -> set[int]:
        """And forget them."""
        came, self._came = self._came, set()
        return came
