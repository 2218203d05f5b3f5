"""The agent's end of the socket pair to its supervisor (DESIGN.md section 2)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from instance_manager.core.lease import Permit
from instance_manager.core.types import Epoch

log = logging.getLogger(__name__)

FD_VARIABLE = "INSTANCE_MANAGER_SUPERVISOR_FD"
_MESSAGE_MAX_BYTES = 65536
REQUEST_DEADLINE_S = 5.0


class SupervisorError(Exception):
    """The supervisor refused a request, or is gone; the text says which."""


class SupervisorSilent(SupervisorError):
    """No answer in time. What was asked for waits in the supervisor's queue, and may be done at any later time."""


@dataclass(frozen=True, slots=True)
class PostgresProcess:
    pid: int
    mode: Literal["standby", "read_write"]


@dataclass(frozen=True, slots=True)
class PostgresExit:
    pid: int
    reason: str
    """exit, fenced or killed."""
    description: str
    at_s: float
    """When the agent heard of it, CLOCK_BOOTTIME."""


class Datagrams(Protocol):
    """Whole messages in order, both ways, between one agent and its supervisor."""

    def send(self, datagram: bytes) -> None:
        """Queued at once; OSError when the other end is gone or takes no more."""
        ...

    async def receive(self) -> bytes:
        """The next one; empty when the other end is closed."""
        ...


class SeqpacketSocket:
    """The real ones: the inherited end of a SOCK_SEQPACKET pair."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection

    @classmethod
    def from_environment(cls) -> SeqpacketSocket:
        """KeyError or OSError when this process was not started by a supervisor."""
        return cls(socket.socket(fileno=int(os.environ.pop(FD_VARIABLE))))

    def send(self, datagram: bytes) -> None:
        self._socket.send(datagram)

    async def receive(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, _MESSAGE_MAX_BYTES)


class SupervisorLink:
    """Requests with answers, events as state. `on_event` is called after every change of what is public here."""

    def __init__(self, datagrams: Datagrams, *, now_s: Callable[[], float], on_event: Callable[[str], None]) -> None:
        self._datagrams = datagrams
        self._now_s = now_s
        self._on_event = on_event
        self._next_id = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._unanswered_starts: set[int] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._greeted = asyncio.Event()
        self.incarnation = ""
        self.agent_restarts = 0
        self.reaped = 0
        """Processes that the supervisor has reaped."""
        self.postgres: PostgresProcess | None = None
        self.last_exit: PostgresExit | None = None
        self.permit: Permit | None = None
        """What was last granted; the supervisor may have capped it."""
        self.terminating = False
        self.reload_asked = False
        self.expected_exit = False
        """The agent itself asked for the next end of Postgres."""

    async def run(self) -> None:
        """Read until the supervisor is gone, then raise SupervisorError: an agent does not outlive its supervisor."""
        while True:
            datagram = await self._datagrams.receive()
            if not datagram:
                raise SupervisorError("the supervisor closed the link")
            self._take(json.loads(datagram))

    async def greeted(self, deadline_s: float = 10.0) -> None:
        """Wait for the supervisor's first message."""
        async with asyncio.timeout(deadline_s):
            await self._greeted.wait()

    def tick(self) -> None:
        self._send({"type": "tick"})

    def extend(self, permit: Permit) -> None:
        """Extend the write permit. No answer is waited for: the deadlines are absolute."""
        known = self.permit
        if (
            known is None
            or permit.epoch > known.epoch
            or (permit.epoch == known.epoch and permit.hard_s > known.hard_s)
        ):
            self.permit = permit
        self._send({"type": "permit", "epoch": permit.epoch, "soft": permit.soft_s, "hard": permit.hard_s})

    async def revoke(self, epoch: Epoch) -> None:
        """No permit at or below `epoch` is valid any more, for ever."""
        self.permit = None
        await self._request({"type": "revoke", "epoch": epoch})

    @property
    def may_start_yet(self) -> bool:
        """A start was given up before the supervisor answered it, and may happen at any time: no directory is touched."""
        return bool(self._unanswered_starts)

    async def start(self, mode: str, epoch: Epoch | None, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.expected_exit = False
        self.last_exit = None
        self._unanswered_starts.add(number := self._next_id + 1)
        try:
            await self._request({"type": "start", "mode": mode, "epoch": epoch, "argv": list(argv), "env": dict(env)})
        except SupervisorSilent:
            raise
        except SupervisorError:
            # Refused, or never sent.
            self._unanswered_starts.discard(number)
            raise
        # The event comes after the answer.
        async with asyncio.timeout(REQUEST_DEADLINE_S):
            while self.postgres is None and self.last_exit is None:
                await self._changed()

    async def promote(self, epoch: Epoch) -> None:
        await self._request({"type": "promote", "epoch": epoch})
        if self.postgres is not None:
            self.postgres = PostgresProcess(self.postgres.pid, "read_write")

    async def signal(self, name: Literal["HUP", "INT", "TERM", "QUIT"]) -> None:
        if name != "HUP":
            self.expected_exit = True
        await self._request({"type": "signal", "signal": name})

    async def kill(self, deadline_s: float = 10.0) -> None:
        """Every Postgres process is killed; returns when none is left."""
        self.expected_exit = True
        await self._request({"type": "kill"}, deadline_s)

    def restart_companion(self) -> None:
        """The third child hangs: it is killed, and started again."""
        self._send({"type": "restart_companion"})

    async def goodbye(self) -> None:
        with contextlib.suppress(SupervisorError):
            await self._request({"type": "goodbye"})

    async def wait_stopped(self, deadline_s: float) -> bool:
        """True once Postgres has ended; False when it still runs after the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while self.postgres is not None:
                    await self._changed()
        except TimeoutError:
            return False
        return True

    async def _changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def _request(self, message: dict[str, Any], deadline_s: float = REQUEST_DEADLINE_S) -> None:
        self._next_id += 1
        request_id = self._next_id
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answer
        try:
            self._send({**message, "id": request_id})
            async with asyncio.timeout(deadline_s):
                await answer
        except TimeoutError:
            raise SupervisorSilent(f"no answer to {message['type']} within {deadline_s:g} s") from None
        finally:
            self._waiting.pop(request_id, None)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._datagrams.send(json.dumps(message).encode())
        except OSError as error:
            raise SupervisorError(f"cannot reach the supervisor: {error.strerror}") from error

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "hello":
                self.incarnation = message["incarnation"]
                self.agent_restarts = message.get("agent_restarts", 0)
                self.reaped = message.get("reaped", 0)
                if message["postgres"] is not None:
                    self.postgres = PostgresProcess(message["postgres"]["pid"], message["postgres"]["mode"])
                if message["permit"] is not None:
                    permit = message["permit"]
                    self.permit = Permit(Epoch(permit["epoch"]), permit["soft"], permit["hard"])
                self.terminating = bool(message.get("terminating"))
                self._greeted.set()
            case "reply":
                if not message["ok"]:
                    self._unanswered_starts.discard(message.get("id", 0))
                answer = self._waiting.get(message.get("id", 0))
                if answer is not None and not answer.done():
                    if message["ok"]:
                        answer.set_result(None)
                    else:
                        answer.set_exception(SupervisorError(str(message["error"])))
            case "postgres_started":
                # Comes right after the answer: until then nothing shows that it runs.
                self._unanswered_starts.clear()
                self.postgres = PostgresProcess(message["pid"], message["mode"])
            case "postgres_exited":
                self.postgres = None
                how = (
                    f"signal {message['signal']}" if message.get("signal") else f"exit code {message.get('exit_code')}"
                )
                self.last_exit = PostgresExit(message["pid"], message["reason"], how, self._now_s())
            case "reaped":
                self.reaped = message["count"]
                return
            case "terminate":
                self.terminating = True
            case "reload":
                self.reload_asked = True
            case other:
                log.warning("unknown message of the supervisor", extra={"fields": {"type": other}})
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._on_event(f"supervisor: {message.get('type')}")
