"""One life of a supervisor: its permit, its link to the agent, and what it does to Postgres.

The permit (`supervisor.permit`) and the reading of messages (`supervisor.messages`) are the real code; the loop around them
is the real one's, with callbacks on virtual time in place of a selector, and processes that are simulated. What this leaves
out: the look into /proc (Postgres' processes are one unit that is killed at once), and credentials.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from simulated_time import Host, Process, Timer, World

from instance_manager.supervisor.backoff import Backoff
from instance_manager.supervisor.children import START_GRACE_S
from instance_manager.supervisor.messages import (
    Extend,
    Goodbye,
    Kill,
    Message,
    MessageError,
    Promote,
    RefusedError,
    Revoke,
    Signal,
    Start,
    Tick,
    parse,
)
from instance_manager.supervisor.permit import PermitRefusedError, WritePermit

HEARTBEAT_TIMEOUT_S = 3.0
LINK_LATENCY_S = 0.0002
QUEUE_MAX = 256
SHUTDOWN_TIMEOUT_S = 60.0
GOODBYE_GRACE_S = 1.0


class ServerProcess(Protocol):
    """A postmaster and everything below it."""

    @property
    def pid(self) -> int: ...

    def signal(self, name: str) -> None: ...

    def kill_all(self) -> None: ...

    def on_exit(self, callback: Callable[[str], object]) -> None: ...


class SimulatedDatagrams:
    """The agent's end of the socket pair."""

    __slots__ = ("_arrived", "_queue", "_supervisor", "closed")

    def __init__(self, supervisor: SimulatedSupervisor) -> None:
        self._supervisor = supervisor
        self._queue: deque[bytes] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self.closed = False

    def send(self, datagram: bytes) -> None:
        if self.closed:
            raise BrokenPipeError("the supervisor is gone")
        self._supervisor.process.call_later(LINK_LATENCY_S, self._supervisor.receive, self, datagram)

    async def receive(self) -> bytes:
        while not self._queue:
            if self.closed:
                return b""
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        return self._queue.popleft()

    def put(self, datagram: bytes) -> None:
        """Called in the agent's process."""
        self._queue.append(datagram)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def has_room(self) -> bool:
        return len(self._queue) < QUEUE_MAX


class SimulatedSupervisor:
    """`run_agent` is the agent's main coroutine over its end of the link; `start_server` is fork and exec of Postgres."""

    def __init__(
        self,
        host: Host,
        incarnation: str,
        *,
        hard_s: float,
        run_agent: Callable[[Process, SimulatedDatagrams], Coroutine[Any, Any, None]],
        start_server: Callable[[], ServerProcess],
        on_end: Callable[[SimulatedSupervisor, str], None],
    ) -> None:
        self.host = host
        self.world: World = host.world
        self.incarnation = incarnation
        self.process = Process(host, f"{host.name}/supervisor")
        self.agent: Process | None = None
        self.server: ServerProcess | None = None
        self.mode = ""
        self.fenced = False
        """The running server is being killed."""
        self.permit = WritePermit(hard_s)
        self._run_agent = run_agent
        self._start_server = start_server
        self._on_end = on_end
        self._link: SimulatedDatagrams | None = None
        self._agent_starts = 0
        self._agent_started_s = 0.0
        self._silent_after_s = 0.0
        self._heard_s = host.boottime_s()
        self._backoff = Backoff()
        self._exit_reason = "exit"
        self._kill_replies: list[int] = []
        self._terminating = False
        self._goodbye = False
        self._enforcing: Timer | None = None
        self._started_s = host.boottime_s()
        self.process.call_soon(self._start_agent)

    @property
    def alive(self) -> bool:
        return self.process.alive

    # The agent.

    def _start_agent(self) -> None:
        if self._goodbye:
            return
        agent = self.agent = Process(self.host, f"{self.host.name}/agent")
        link = self._link = SimulatedDatagrams(self)
        now_s = self.host.boottime_s()
        self._agent_starts += 1
        self._agent_started_s = now_s
        self._silent_after_s = now_s + START_GRACE_S
        agent.on_failure = lambda error: self._agent_failed(agent, error)
        agent.on_exit.append(lambda: self.process.call_soon(self._agent_died, agent))
        self._send(self._hello(now_s))
        task = agent.spawn(self._run_agent(agent, link))
        task.add_done_callback(lambda _: agent.kill())
        self._watch_agent(agent)

    def _agent_failed(self, agent: Process, error: BaseException) -> None:
        """Some errors end the agent by design; the supervisor starts another. Anything else is a defect."""
        self.world.trace.add(self.host.name, "the agent ended by %s", repr(error))
        self.on_agent_error(error)
        agent.kill()

    def on_agent_error(self, error: BaseException) -> None:
        """Replaced by the world: which errors are defects."""

    def _agent_died(self, agent: Process) -> None:
        if self.agent is not agent:
            return
        self.agent = None
        if self._link is not None:
            self._link.closed = True
            self._link = None
        self._kill_replies.clear()
        if self._goodbye:
            self._end("orderly")
            return
        wait_s = self._backoff.after_run_of(self.host.boottime_s() - self._agent_started_s)
        self.process.call_later(wait_s, self._start_agent)

    def _watch_agent(self, agent: Process) -> None:
        """Killed when it is silent; time in which this process itself was held up proves nothing."""
        if self.agent is not agent:
            return
        now_s = self.host.boottime_s()
        if now_s - self._heard_s > 1.0 and self._silent_after_s > self._heard_s:
            self._silent_after_s += now_s - self._heard_s - 0.5
        self._heard_s = now_s
        if now_s >= self._silent_after_s:
            self.world.counters["supervisor: silent agent killed"] += 1
            agent.kill()
            return
        self.process.call_later(0.5, self._watch_agent, agent)

    # Messages.

    def _send(self, message: dict[str, object]) -> None:
        link, agent = self._link, self.agent
        if link is not None and agent is not None:
            if not link.has_room():
                agent.kill()
                return
            agent.call_later(LINK_LATENCY_S, link.put, json.dumps(message).encode())

    def _hello(self, now_s: float) -> dict[str, object]:
        permit = self.permit.current
        return {
            "type": "hello",
            "incarnation": self.incarnation,
            "started_s": self._started_s,
            "now_s": now_s,
            "postgres": None if self.server is None else {"pid": self.server.pid, "mode": self.mode},
            "permit": None if permit is None else {"epoch": permit.epoch, "soft": permit.soft_s, "hard": permit.hard_s},
            "revoked_epoch": self.permit.revoked_epoch,
            "agent_restarts": self._agent_starts - 1,
            "terminating": self._terminating,
        }

    def receive(self, link: SimulatedDatagrams, datagram: bytes) -> None:
        if link is not self._link:
            # Each agent has a link of its own: what a killed one had sent is not read any more (R10).
            return
        self._enforce()
        try:
            message = parse(datagram)
        except MessageError as error:
            self._reply(error.message_id, str(error))
            return
        self._silent_after_s = self.host.boottime_s() + HEARTBEAT_TIMEOUT_S
        try:
            then = self._obey(message)
        except (PermitRefusedError, RefusedError) as error:
            self.world.counters[f"supervisor: refused {type(message).__name__.lower()}"] += 1
            self._reply(message.id, str(error))
            return
        if not isinstance(message, Kill):
            self._reply(message.id, None)
        if then is not None:
            then()
        self._enforce()

    def _reply(self, message_id: int | None, error: str | None) -> None:
        if message_id is not None:
            self._send({"type": "reply", "id": message_id, "ok": error is None, "error": error})

    def _obey(self, message: Message) -> Callable[[], None] | None:
        match message:
            case Tick():
                pass
            case Extend(_, epoch, soft_s, hard_s):
                self.permit.extend(self.host.boottime_s(), epoch, soft_s, hard_s)
                self._enforce_at_hard()
            case Revoke(_, epoch):
                self.permit.revoke(epoch)
            case Start(_, mode, epoch):
                return self._start_postgres(mode, epoch)
            case Promote(_, epoch):
                server = self._running()
                self.permit.require(self.host.boottime_s(), epoch)
                self.mode = "read_write"
                self._enforce_at_hard()
                server.signal("USR1")
            case Signal(_, number):
                self._running().signal(number.name.removeprefix("SIG"))
            case Kill(message_id):
                if message_id is not None:
                    self._kill_replies.append(message_id)
                self._fence("killed")
                self._answer_kills()
            case Goodbye():
                self._goodbye = True
                self._fence("killed")
                self.process.call_later(GOODBYE_GRACE_S, self._end, "orderly")
        return None

    # Postgres.

    def _running(self) -> ServerProcess:
        if self.server is None:
            raise RefusedError("Postgres is not running")
        if self.fenced:
            raise RefusedError("Postgres is being killed")
        return self.server

    def _start_postgres(self, mode: str, epoch: int | None) -> Callable[[], None]:
        if self.server is not None:
            raise RefusedError("a Postgres process is left")
        if self._goodbye:
            raise RefusedError("the agent said goodbye")
        if mode == "read_write":
            if epoch is None:
                raise RefusedError("read_write needs an epoch")
            self.permit.require(self.host.boottime_s(), epoch)
        self.mode, self.fenced, self._exit_reason = mode, False, "exit"
        server = self.server = self._start_server()
        server.on_exit(lambda how: self.process.call_soon(self._postgres_exited, server, how))
        self._enforce_at_hard()
        return lambda: self._send({"type": "postgres_started", "pid": server.pid, "mode": mode})

    def _postgres_exited(self, server: ServerProcess, how: str) -> None:
        if self.server is not server:
            return
        self.server = None
        self._send(
            {
                "type": "postgres_exited",
                "pid": server.pid,
                "mode": self.mode,
                "exit_code": 0 if how == "stopped" else 1,
                "signal": None,
                "reason": self._exit_reason,
            }
        )
        self._answer_kills()

    def _answer_kills(self) -> None:
        if self._kill_replies and self.server is None:
            replies, self._kill_replies = self._kill_replies, []
            for message_id in replies:
                self._reply(message_id, None)

    def _enforce_at_hard(self) -> None:
        """Look again at the deadline; it is looked at before and after every message too."""
        if self._enforcing is not None:
            self._enforcing.cancel()
            self._enforcing = None
        permit = self.permit.current
        if self.server is not None and self.mode == "read_write" and not self.fenced and permit is not None:
            # Timers stand still while the machine is suspended, the deadline does not: so also in short steps.
            left_s = min(0.2, max(0.0, permit.hard_s - self.host.boottime_s()))
            if permit.hard_s - self.host.boottime_s() > 1.0:
                left_s = permit.hard_s - self.host.boottime_s() - 0.9
            self._enforcing = self.process.call_later(left_s, self._enforce_again)

    def _enforce_again(self) -> None:
        self._enforcing = None
        self._enforce()
        self._enforce_at_hard()

    def _enforce(self) -> None:
        if self.server is None or self.mode != "read_write" or self.fenced:
            return
        if self.permit.must_fence(self.host.boottime_s()):
            self.world.counters["supervisor: fenced at hard"] += 1
            self.world.trace.add(self.host.name, "the supervisor fences: permit over")
            self._fence("fenced")

    def _fence(self, reason: str) -> None:
        if self.server is not None and not self.fenced:
            self.fenced = True
            self._exit_reason = reason
            self.server.kill_all()

    def reload(self) -> None:
        """SIGHUP to PID 1."""
        if self.alive:
            self.process.call_soon(self._send, {"type": "reload"})

    # The end.

    def terminate(self) -> None:
        """SIGTERM to PID 1."""
        if not self._terminating and self.alive:
            self._terminating = True
            self.process.call_soon(self._send, {"type": "terminate", "signal": "TERM"})
            self.process.call_later(SHUTDOWN_TIMEOUT_S, self._end, "shutdown deadline")

    def _end(self, how: str) -> None:
        if self.alive:
            self.kill(how)

    def kill(self, how: str = "killed") -> None:
        """PID 1 ends: the kernel kills everything in its namespace."""
        if not self.alive:
            return
        agent, server = self.agent, self.server
        self.process.kill()
        if agent is not None:
            agent.kill()
        if server is not None:
            server.kill_all()
        self._on_end(self, how)
