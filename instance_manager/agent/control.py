"""The verbs of `instance-manager`: each changes the record, or this instance, and then waits until it shows."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from instance_manager.agent.context import Context, OperationFailed
from instance_manager.agent.lease_keeper import WriteRefused
from instance_manager.agent.reporting import Reporting
from instance_manager.coordination.describe import describe
from instance_manager.core.lease import with_fenced, with_paused, with_switchover
from instance_manager.core.record import ClusterRecord
from instance_manager.core.types import MemberName
from instance_manager.http.ports import ControlProgress, ControlResult, MalformedCall, UnknownCall
from instance_manager.logs import set_level
from instance_manager.ports import CoordinationError
from instance_manager.status import InstanceStatus

log = logging.getLogger("instance_manager.agent.control")

SWITCHOVER_DEADLINE_S = 60.0
STATE_DEADLINE_S = 60.0
POLL_S = 0.05

Outcome = tuple[bool, str]


class Control:
    """`restart_postgres`, `reload` and `reinitialise` are this instance's own; the others work through the record."""

    def __init__(
        self,
        context: Context,
        reporting: Reporting,
        *,
        restart_postgres: Callable[[], Awaitable[str]],
        reload: Callable[[], Awaitable[str]],
        reinitialise: Callable[[], Awaitable[str]],
        lossy_failover: Callable[[bool], Awaitable[Outcome]],
    ) -> None:
        self._c = context
        self._reporting = reporting
        self._restart_postgres = restart_postgres
        self._reload = reload
        self._reinitialise = reinitialise
        self._lossy_failover = lossy_failover

    async def carry_out(
        self, verb: str, arguments: dict[str, object]
    ) -> AsyncIterator[ControlProgress | ControlResult]:
        verbs: dict[str, Callable[[dict[str, object]], Awaitable[Outcome]]] = {
            "switchover": self._switchover,
            "failover": self._failover,
            "fence": self._fence,
            "unfence": self._unfence,
            "restart": self._restart,
            "reload": self._reload_all,
            "reinit": self._reinit,
            "pause": lambda _: self._pause(True),
            "resume": lambda _: self._pause(False),
            "status": self._status,
            "lease": self._lease,
            "log-level": self._log_level,
        }
        if verb not in verbs:
            raise UnknownCall(verb)
        try:
            ok, message = await verbs[verb](arguments)
        except (CoordinationError, WriteRefused, OperationFailed) as error:
            ok, message = False, f"{error}; look at `instance-manager status` and try again"
        yield ControlResult(ok=ok, message=message, status=self._reporting.status())

    async def _status(self, _: dict[str, object]) -> Outcome:
        return True, ""

    async def _lease(self, _: dict[str, object]) -> Outcome:
        stored = await self._c.keeper.read()
        return (True, describe(stored)) if stored is not None else (False, "there is no Lease")

    async def _log_level(self, arguments: dict[str, object]) -> Outcome:
        """Of this agent, until it ends or reads its configuration again."""
        try:
            before = set_level(str(arguments.get("level")))
        except ValueError as error:
            raise MalformedCall(str(error)) from error
        log.warning("the level of the log was changed from %s to %s", before, arguments["level"])
        return True, f"{self._c.configuration.name} logs at {arguments['level']} now, was {before}"

    async def _switchover(self, arguments: dict[str, object]) -> Outcome:
        c = self._c
        target = self._name(arguments.get("to"))
        stored = await c.keeper.read()
        record = stored.record if stored is not None else None
        if record is None or record.holder is None:
            return False, "there is no primary to switch over from"
        if target == record.holder.name:
            return True, f"{target} is the primary already"
        if target is not None and (why_not := self._why_no_target(record, target)) is not None:
            return False, f"refused: {why_not}"
        request_id = f"{c.chance.getrandbits(64):016x}"
        before, old = record.epoch, record.holder.name
        await c.keeper.write(lambda current: with_switchover(current, request_id=request_id, target=target))
        await c.peers.nudge((old,))
        began_s = c.clock.now_s()

        def done(now: ClusterRecord) -> Outcome | None:
            if now.holder is not None and now.epoch > before and now.opened:
                took_s = c.clock.now_s() - began_s
                if now.holder.name == old:
                    return False, f"{old} is the primary again: the switchover did not succeed; its log tells why"
                if target is not None and now.holder.name != target:
                    return False, f"{now.holder.name} is the primary now, not {target}"
                return (
                    True,
                    f"{now.holder.name} is the primary since epoch {now.epoch}, {took_s:.1f} s after the request",
                )
            if now.switchover is None and now.epoch == before and now.holder is not None:
                return False, f"refused: {target or 'no standby'} does not stream from {old}, or is too far behind"
            return None

        return await self._until(done, SWITCHOVER_DEADLINE_S, "the switchover has not ended")

    def _why_no_target(self, record: ClusterRecord, target: MemberName) -> str | None:
        """What the primary would refuse in the end, said at once and by name."""
        instance = self._instance(target)
        if target in record.fenced:
            return f"{target} is fenced"
        if instance is None or not instance.reachable:
            return f"{target} does not answer"
        if instance.postgres != "running":
            return f"the Postgres of {target} is {instance.postgres}"
        return None

    async def _failover(self, arguments: dict[str, object]) -> Outcome:
        if arguments.get("allow_data_loss") is not True and arguments.get("preview") is not True:
            raise MalformedCall("failover loses data: it needs allow_data_loss, or preview")
        return await self._lossy_failover(arguments.get("preview") is True)

    async def _fence(self, arguments: dict[str, object]) -> Outcome:
        name = self._required(arguments)
        await self._c.keeper.write(lambda record: with_fenced(record, name, True))
        await self._c.peers.nudge(self._c.peers.names)

        def done(_: ClusterRecord) -> Outcome | None:
            instance = self._instance(name)
            if instance is not None and instance.postgres == "stopped":
                return True, f"{name} is fenced: its Postgres is stopped until `unfence {name}`"
            return None

        return await self._until(done, STATE_DEADLINE_S, f"{name} is fenced in the Lease, but has not stopped yet")

    async def _unfence(self, arguments: dict[str, object]) -> Outcome:
        name = self._required(arguments)
        await self._c.keeper.write(lambda record: with_fenced(record, name, False))
        await self._c.peers.nudge(self._c.peers.names)

        def done(_: ClusterRecord) -> Outcome | None:
            instance = self._instance(name)
            return (True, f"{name} runs again") if instance is not None and instance.postgres == "running" else None

        return await self._until(done, STATE_DEADLINE_S, f"{name} is not fenced any more, but does not run yet")

    async def _pause(self, paused: bool) -> Outcome:
        await self._c.keeper.write(lambda record: with_paused(record, paused))
        await self._c.peers.nudge(self._c.peers.names)
        return True, "paused: no failover until `resume`" if paused else "resumed: failover is on"

    async def _restart(self, arguments: dict[str, object]) -> Outcome:
        return await self._on(self._name(arguments.get("name")), "restart", self._restart_postgres)

    async def _reinit(self, arguments: dict[str, object]) -> Outcome:
        return await self._on(self._required(arguments), "reinit", self._reinitialise)

    async def _reload_all(self, _: dict[str, object]) -> Outcome:
        return True, await self._reload()

    async def _on(self, name: MemberName | None, verb: str, here: Callable[[], Awaitable[str]]) -> Outcome:
        """Here, or on the named peer over the agents' own authenticated route."""
        if name is None or name == self._c.configuration.name:
            return True, await here()
        answer = await self._c.peers.ask(name, verb, None, str, deadline_s=STATE_DEADLINE_S)
        return True, answer

    async def _until(self, done: Callable[[ClusterRecord], Outcome | None], deadline_s: float, late: str) -> Outcome:
        c = self._c
        ends_s = c.clock.now_s() + deadline_s
        while c.clock.now_s() < ends_s:
            record = c.keeper.record
            outcome = done(record) if record is not None else None
            if outcome is not None:
                return outcome
            c.keeper.hint()
            await c.clock.sleep(POLL_S)
        return False, f"{late} within {deadline_s:g} s; look at `instance-manager status`"

    def _instance(self, name: MemberName) -> InstanceStatus | None:
        return next((i for i in self._reporting.status().instances if i.name == name), None)

    def _name(self, value: object) -> MemberName | None:
        if value is None:
            return None
        names = sorted({*(member.name for member in self._c.configuration.members), *self._c.peers.names})
        if not isinstance(value, str) or value not in names:
            raise MalformedCall(f"no instance {value!r}; there are {', '.join(names)}")
        return MemberName(value)

    def _required(self, arguments: dict[str, object]) -> MemberName:
        name = self._name(arguments.get("name"))
        if name is None:
            raise MalformedCall("the name of an instance is needed")
        return name
