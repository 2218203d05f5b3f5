"""The loop: signals in, messages in, deadlines; children started, reaped and ended. One thread, one selector.

Order of each round: the permit first (nothing that still waits to be read may save a Postgres past `hard`), then signals,
the dead, messages, the permit again, and last the agent's own deadlines.
"""

import os
import selectors
import signal
from collections.abc import Callable

from instance_manager.supervisor import fence, lock
from instance_manager.supervisor.backoff import Backoff
from instance_manager.supervisor.children import Agent, Postgres
from instance_manager.supervisor.companion import Companion
from instance_manager.supervisor.exit_codes import EndError, ExitCode
from instance_manager.supervisor.fence import FenceIncompleteError, boottime_s
from instance_manager.supervisor.hello import hello
from instance_manager.supervisor.link import Link, LinkBrokenError
from instance_manager.supervisor.log import Log
from instance_manager.supervisor.messages import (
    Extend,
    Goodbye,
    Kill,
    Message,
    MessageError,
    Promote,
    RefusedError,
    RestartCompanion,
    Revoke,
    Signal,
    Start,
    Tick,
    parse,
)
from instance_manager.supervisor.options import Options
from instance_manager.supervisor.permit import PermitRefusedError, WritePermit
from instance_manager.supervisor.signals import Signals

# epoll counts CLOCK_MONOTONIC, which stands still while the machine is suspended: never sleep long. It is the `margin_s`
# of the timings that a kill may be late by, then.
POLL_S = 0.5
LOCK_PAUSE_S = 0.1
LOCK_ATTEMPTS = 100
EXEC_FAILURES_MAX = 10
GOODBYE_GRACE_S = 1.0
AGENT_KILL_BUDGET_S = 0.1
LOG_PATIENCE_S = 0.2
# Longer than this late out of a wait, the supervisor itself was held up, and the agent's silence proves nothing.
HELD_UP_S = 0.5
MESSAGES_PER_ROUND = 64
REAPED_PER_ROUND = 1024


class Supervisor:
    """One supervisor's life; `run` is all of it."""

    def __init__(self, options: Options, incarnation: str, log: Log) -> None:
        self._options = options
        self._incarnation = incarnation
        self._log = log
        self._permit = WritePermit(options.hard_s)
        self._started_s = boottime_s()
        self._signals = Signals()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals.fd, selectors.EVENT_READ)
        self._lock_fd = -1
        self._agent: Agent | None = None
        self._agent_start_s = self._started_s
        self._agent_starts = 0
        self._exec_failures = 0
        self._backoff = Backoff()
        self._companion = Companion(options.companion_argv, log, self._started_s)
        self._postgres: Postgres | None = None
        self._dying: tuple[fence.Process, ...] = ()
        self._kill_replies: list[tuple[Link, int]] = []
        self._reaped = self._reaped_told = 0
        self._shutdown_deadline_s: float | None = None
        self._goodbye_deadline_s: float | None = None

    def run(self) -> ExitCode:
        """Run until there is a reason to end; nothing of ours is left then, unless FENCE_INCOMPLETE is returned."""
        try:
            try:
                self._take_lock()
                while True:
                    self._round()
            except EndError as end:
                code = end.code
            except FenceIncompleteError:
                raise
            except Exception as error:
                self._log.failure("internal_error", error=repr(error))
                code = ExitCode.INTERNAL_ERROR
            self._end_everything()
        except Exception as error:
            # Whatever it is, Postgres was not seen dead: end at once, and let the kernel kill what it can.
            self._log.failure("fence_incomplete", error=repr(error))
            code = ExitCode.FENCE_INCOMPLETE
        self._log.info("exit", code=int(code), reason=code.name)
        return code

    # --- the loop ---

    def _take_lock(self) -> None:
        def pause() -> None:
            self._wait(LOCK_PAUSE_S)
            if self._signals.asks_for_end():
                raise EndError(ExitCode.ORDERLY)

        path = self._options.lock_file
        try:
            self._lock_fd = lock.acquire(path, f"{self._incarnation} {os.getpid()}", LOCK_ATTEMPTS, pause)
        except lock.LockBusyError as error:
            self._log.failure("lock_busy", error=str(error))
            raise EndError(ExitCode.LOCK_BUSY) from error
        except OSError as error:
            self._log.failure("lock_unusable", error=str(error))
            raise EndError(ExitCode.BAD_USAGE) from error
        self._log.info("started", pid=os.getpid(), lock_file=path, agent=self._options.agent_argv)

    def _round(self) -> None:
        now_s = boottime_s()
        timeout_s = max(0.0, min(POLL_S, *(deadline_s - now_s for deadline_s in self._deadlines())))
        self._wait(timeout_s)
        held_up_s = boottime_s() - now_s - timeout_s
        if held_up_s > HELD_UP_S and self._agent is not None:
            self._agent.silent_after_s += held_up_s
            self._log.warning("held_up", seconds=round(held_up_s, 3))
        self._enforce_permit()
        self._handle_signals()
        self._reap()
        self._talk()
        self._enforce_permit()
        self._look_after_dying()
        self._look_after_agent()
        self._companion.look_after(boottime_s())
        self._look_after_end()

    def _deadlines(self) -> list[float]:
        deadlines = [self._agent_start_s if self._agent is None else self._agent.silent_after_s]
        if self._must_be_permitted() is not None and self._permit.current is not None:
            deadlines.append(self._permit.current.hard_s)
        log_s = None if self._postgres is None else self._postgres.log_until_s
        others = (self._shutdown_deadline_s, self._goodbye_deadline_s, self._companion.start_s, log_s)
        deadlines.extend(s for s in others if s is not None)
        return deadlines

    def _wait(self, timeout_s: float) -> None:
        agent = self._agent
        if agent is not None and agent.linked:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if agent.link.has_unsent else 0)
            if self._selector.get_key(agent.link).events != events:
                self._selector.modify(agent.link, events)
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._signals.fd:
                self._signals.drain()

    def _handle_signals(self) -> None:
        signals = self._signals.take()
        if signal.SIGQUIT in signals:
            self._log.warning("quit")
            raise EndError(ExitCode.QUIT)
        if signal.SIGHUP in signals:
            self._send({"type": "reload"})
        if signals & {signal.SIGTERM, signal.SIGINT} and self._shutdown_deadline_s is None:
            self._shutdown_deadline_s = boottime_s() + self._options.shutdown_timeout_s
            self._agent_start_s = boottime_s()
            self._log.info("terminating", timeout_s=self._options.shutdown_timeout_s)
            self._send({"type": "terminate", "signal": "TERM"})

    def _look_after_end(self) -> None:
        now_s = boottime_s()
        if self._exec_failures >= EXEC_FAILURES_MAX:
            raise EndError(ExitCode.AGENT_CANNOT_START)
        if self._goodbye_deadline_s is not None and (self._agent is None or now_s >= self._goodbye_deadline_s):
            raise EndError(ExitCode.ORDERLY)
        if self._shutdown_deadline_s is not None and now_s >= self._shutdown_deadline_s:
            self._log.failure("shutdown_deadline_passed")
            raise EndError(ExitCode.SHUTDOWN_DEADLINE)

    def _end_everything(self) -> None:
        """Kill Postgres, then all else that descends from us. Raises FenceIncompleteError."""
        self._fence("killed")
        if self._agent is not None:
            self._agent.child.send_signal(signal.SIGKILL)
        result = fence.kill_all(self._all_descendants, self._options.kill_budget_s)
        if result.running:
            raise FenceIncompleteError(str(result.running))

    def _all_descendants(self, table: fence.Table) -> list[fence.Process]:
        own_pid = os.getpid()
        return [p for p in fence.descendants(table, [own_pid]) if p.pid != own_pid and not p.is_dead]

    # --- the dead ---

    def _reap(self) -> None:
        for _ in range(REAPED_PER_ROUND):
            try:
                # Looked at before it is reaped: what it leaves behind is known by its pid, which then still is its own.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            if self._postgres is not None and info.si_pid == self._postgres.child.pid:
                if info.si_code == os.CLD_EXITED and self._only_its_log_is_left(self._postgres):
                    return
                self._postmaster_died(self._postgres)
            elif self._agent is not None and info.si_pid == self._agent.child.pid:
                self._agent_died(self._agent)
            elif info.si_pid == self._companion.pid:
                self._companion.reap(boottime_s())
            else:
                os.waitpid(info.si_pid, 0)
            self._reaped += 1

    def _only_its_log_is_left(self, postgres: Postgres) -> bool:
        """A postmaster that ended by itself leaves its log collector, which ends when it has written what it was given: why the
        server ended, often. It is given a moment, in which nobody is told of the end and the permit counts on."""
        if postgres.fenced:
            return False
        now_s = boottime_s()
        if postgres.log_until_s is None:
            postgres.log_until_s = now_s + LOG_PATIENCE_S
        return now_s < postgres.log_until_s and len(self._postgres_processes(postgres, fence.read_processes())) == 1

    def _postmaster_died(self, postgres: Postgres) -> None:
        self._kill_postgres(postgres)
        _, status = os.waitpid(postgres.child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        exec_error = postgres.child.exec_error()
        postgres.child.close()
        self._postgres = None
        event = postgres.exited(code)
        self._log.info("postgres_exited", **event, exec_error=exec_error)
        self._send({"type": "postgres_exited", **event})

    def _agent_died(self, agent: Agent) -> None:
        self._kill_agent_processes(agent)
        _, status = os.waitpid(agent.child.pid, 0)
        exec_error = agent.child.exec_error()
        self._exec_failures = 0 if exec_error is None else self._exec_failures + 1
        self._drop_link(agent)
        agent.child.close()
        self._agent = None
        now_s = boottime_s()
        wait_s = self._backoff.after_run_of(now_s - agent.started_s)
        self._agent_start_s = now_s + wait_s
        self._log.warning(
            "agent_died",
            pid=agent.child.pid,
            status=os.waitstatus_to_exitcode(status),
            condemned=agent.condemned,
            exec_error=exec_error,
            restart_in_s=wait_s,
        )

    # --- the agent ---

    def _look_after_agent(self) -> None:
        now_s = boottime_s()
        agent = self._agent
        if agent is None:
            if now_s >= self._agent_start_s and self._goodbye_deadline_s is None:
                self._start_agent(now_s)
        elif agent.condemned is not None or now_s >= agent.silent_after_s:
            if agent.condemned is None:
                agent.condemned = "silent"
                self._log.failure("agent_silent", pid=agent.child.pid)
            self._drop_link(agent)
            agent.child.send_signal(signal.SIGKILL)
            agent.silent_after_s = now_s + POLL_S  # it is reaped before that, or killed again

    def _start_agent(self, now_s: float) -> None:
        greeting = hello(
            incarnation=self._incarnation,
            started_s=self._started_s,
            now_s=now_s,
            postgres=self._postgres,
            permit=self._permit,
            agent_restarts=self._agent_starts,
            reaped=self._reaped,
            terminating=self._shutdown_deadline_s is not None,
        )
        try:
            self._agent = agent = Agent.start(self._options.agent_argv, greeting, now_s)
        except OSError as error:
            self._agent_start_s = now_s + self._backoff.after_run_of(0.0)
            self._log.failure("agent_not_started", error=str(error))
            return
        self._agent_starts += 1
        self._selector.register(agent.link, selectors.EVENT_READ)
        self._log.info("agent_started", pid=agent.child.pid, restarts=self._agent_starts - 1)

    def _drop_link(self, agent: Agent) -> None:
        if agent.linked:
            self._selector.unregister(agent.link)
            agent.linked = False
        self._kill_replies = [(link, number) for link, number in self._kill_replies if link is not agent.link]
        agent.link.close()

    def _kill_agent_processes(self, agent: Agent) -> None:
        postmaster_pid = None if self._postgres is None else self._postgres.child.pid
        result = fence.kill_all(
            lambda table: fence.agent_processes(
                table,
                supervisor_pid=os.getpid(),
                postmaster_pid=postmaster_pid,
                agent_pid=agent.child.pid,
                companion_pid=self._companion.pid,
            ),
            AGENT_KILL_BUDGET_S,
        )
        if result.running or result.dying:
            self._log.warning("agent_processes_left", running=result.running, dying=result.dying)

    def _send(self, message: dict[str, object]) -> None:
        """Send to the agent, if there is one that listens."""
        if self._agent is not None and self._agent.linked:
            try:
                self._agent.link.send(message)
            except LinkBrokenError as error:
                self._condemn(self._agent, str(error))

    def _condemn(self, agent: Agent, reason: str) -> None:
        if agent.condemned is None:
            agent.condemned = reason
            agent.silent_after_s = boottime_s()
            self._log.failure("agent_link_broken", pid=agent.child.pid, reason=reason)

    # --- messages ---

    def _talk(self) -> None:
        agent = self._agent
        for _ in range(MESSAGES_PER_ROUND):
            if agent is None or agent is not self._agent or not agent.linked or agent.condemned is not None:
                return
            datagram = agent.link.receive()
            if datagram is None:
                break
            if not datagram:
                # The end of the link keeps every deadline; the agent is now silent, and killed when that was too long.
                self._log.warning("agent_closed_link", pid=agent.child.pid)
                self._selector.unregister(agent.link)
                agent.linked = False
                return
            self._receive(agent, datagram)
        if agent is not None and agent.linked:
            try:
                agent.link.flush()
            except LinkBrokenError as error:
                self._condemn(agent, str(error))

    def _receive(self, agent: Agent, datagram: bytes) -> None:
        try:
            message = parse(datagram)
        except MessageError as error:
            self._log.warning("bad_message", error=str(error), start=datagram[:80].decode("utf-8", "replace"))
            self._reply(error.message_id, str(error))
            return
        agent.silent_after_s = boottime_s() + self._options.heartbeat_timeout_s
        try:
            then = self._obey(agent, message)
        except (PermitRefusedError, RefusedError) as error:
            self._log.warning("refused", request=type(message).__name__.lower(), error=str(error))
            self._reply(message.id, str(error))
            return
        if not isinstance(message, Kill):
            self._reply(message.id, None)
        if then is not None:
            then()

    def _reply(self, message_id: int | None, error: str | None) -> None:
        if message_id is not None:
            self._send({"type": "reply", "id": message_id, "ok": error is None, "error": error})

    def _obey(self, agent: Agent, message: Message) -> Callable[[], None] | None:
        """Do what is asked; returns what is to be done after the reply. Raises PermitRefusedError and RefusedError."""
        match message:
            case Tick():
                if self._reaped != self._reaped_told:
                    self._reaped_told = self._reaped
                    self._send({"type": "reaped", "count": self._reaped})
            case Extend(_, epoch, soft_s, hard_s):
                self._permit.extend(boottime_s(), epoch, soft_s, hard_s)
            case Revoke(_, epoch):
                self._permit.revoke(epoch)
                self._log.info("revoked", epoch=epoch)
                self._enforce_permit()
            case Start():
                return self._start_postgres(message)
            case Promote(_, epoch):
                self._promote(epoch)
            case Signal(_, number):
                if not self._running_postgres().child.send_signal(number):
                    raise RefusedError("the postmaster is dead")
                self._log.info("postgres_signalled", signal=number.name)
            case Kill(number_or_none):
                if number_or_none is not None:
                    self._kill_replies.append((agent.link, number_or_none))
                self._fence("killed")
                self._look_after_dying()
            case Goodbye():
                self._log.info("goodbye")
                self._goodbye_deadline_s = boottime_s() + GOODBYE_GRACE_S
                self._fence("killed")
                self._companion.end()
            case RestartCompanion():
                self._log.warning("companion_restart", pid=self._companion.pid)
                self._companion.kill()
        return None

    # --- Postgres ---

    def _running_postgres(self) -> Postgres:
        if self._postgres is None:
            raise RefusedError("Postgres is not running")
        if self._postgres.fenced:
            raise RefusedError("Postgres is being killed")
        return self._postgres

    def _start_postgres(self, message: Start) -> Callable[[], None]:
        self._look_after_dying()
        if self._postgres is not None or self._dying:
            raise RefusedError("a Postgres process is left")
        if self._goodbye_deadline_s is not None:
            raise RefusedError("the agent said goodbye")
        now_s = boottime_s()
        if message.mode == "read_write":
            if message.epoch is None:
                raise RefusedError("read_write needs an epoch")
            self._permit.require(now_s, message.epoch)
        try:
            postgres = Postgres.start(message, self._lock_fd, self._options.postgres_credentials, now_s)
        except OSError as error:
            raise RefusedError(f"cannot start a process: {error}") from error
        self._postgres, pid = postgres, postgres.child.pid
        self._log.info("postgres_started", pid=pid, mode=message.mode, epoch=message.epoch)
        return lambda: self._send({"type": "postgres_started", "pid": pid, "mode": message.mode})

    def _promote(self, epoch: int) -> None:
        postgres = self._running_postgres()
        self._permit.require(boottime_s(), epoch)
        postgres.mode = "read_write"  # before the signal: from then on the permit counts
        if not postgres.child.send_signal(signal.SIGUSR1):
            raise RefusedError("the postmaster is dead")
        self._log.info("postgres_promoted", epoch=epoch)

    def _must_be_permitted(self) -> Postgres | None:
        """The Postgres that needs a permit: read-write, and not being killed already."""
        postgres = self._postgres
        return None if postgres is None or postgres.mode != "read_write" or postgres.fenced else postgres

    def _enforce_permit(self) -> None:
        now_s = boottime_s()
        if self._must_be_permitted() is not None and self._permit.must_fence(now_s):
            self._log.failure("permit_over", permit=self._permit.current, now_s=now_s)
            self._fence("fenced")

    def _fence(self, reason: str) -> None:
        """Kill all of Postgres. Raises FenceIncompleteError if some of it may still run."""
        postgres = self._postgres
        if postgres is not None:
            if not postgres.fenced:
                postgres.reason = reason
            self._kill_postgres(postgres)
            self._reap()

    def _postgres_processes(self, postgres: Postgres, table: fence.Table) -> list[fence.Process]:
        return fence.postgres_processes(
            table,
            supervisor_pid=os.getpid(),
            postmaster_pid=postgres.child.pid,
            agent_pid=None if self._agent is None else self._agent.child.pid,
            companion_pid=self._companion.pid,
        )

    def _kill_postgres(self, postgres: Postgres) -> None:
        result = fence.kill_all(
            lambda table: self._postgres_processes(postgres, table), self._options.kill_budget_s, postgres.child
        )
        if not result.killed <= postgres.killed or not postgres.fenced:
            self._log.info(
                "postgres_killed", killed=len(result.killed), dying=result.dying, took_s=round(result.took_s, 4)
            )
        postgres.fenced = True
        postgres.killed |= result.killed
        self._dying += tuple(p for p in result.dying if p not in self._dying and p.pid != postgres.child.pid)
        if result.running:
            raise FenceIncompleteError(str(result.running))

    def _look_after_dying(self) -> None:
        self._dying = tuple(process for process in self._dying if fence.is_left(process))
        if self._kill_replies and self._postgres is None and not self._dying:
            replies, self._kill_replies = self._kill_replies, []
            for link, number in replies:
                if self._agent is not None and link is self._agent.link:
                    self._reply(number, None)
