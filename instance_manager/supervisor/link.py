"""The supervisor's end of the socket pair to one agent. Nothing here ever waits."""

import json
import socket
from collections import deque

from instance_manager.supervisor.messages import MESSAGE_MAX_BYTES

_QUEUE_MAX = 256


class LinkBrokenError(Exception):
    """The agent does not read, or its end is gone: this link is of no more use for sending."""


class Link:
    """Sends JSON objects and receives raw datagrams. A new agent gets a new one; the old is closed before (R10)."""

    def __init__(self) -> None:
        self._ours, self.agents = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._queue: deque[bytes] = deque()

    def fileno(self) -> int:
        """Our end's descriptor, for a selector."""
        return self._ours.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` is to be called once the socket can be written to."""
        return bool(self._queue)

    def close_agents_end(self) -> None:
        """After the agent inherited its end: so that its going is seen."""
        self.agents.close()

    def close(self) -> None:
        """Nothing that is still on the way, in either direction, arrives after this."""
        self._ours.close()
        self.agents.close()

    def receive(self) -> bytes | None:
        """The next datagram, cut off just above the longest allowed; None if there is none now; b"" at the end."""
        try:
            return self._ours.recv(MESSAGE_MAX_BYTES + 1)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def send(self, message: dict[str, object]) -> None:
        """Send now or queue. Raises LinkBrokenError if 256 messages wait already."""
        if len(self._queue) >= _QUEUE_MAX:
            raise LinkBrokenError(f"the agent left {_QUEUE_MAX} messages unread")
        self._queue.append(json.dumps(message).encode())
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it. Raises LinkBrokenError if the agent's end is closed."""
        while self._queue:
            try:
                self._ours.send(self._queue[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkBrokenError(f"cannot send: {error}") from error
            self._queue.popleft()
