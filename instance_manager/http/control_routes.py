"""Patroni's names for what changes a cluster, and its manner of answering: a code and a line of text.

They are the verbs of `/control/`, on the same listener and for the same callers. A script that waits for the code of
`POST /switchover` needs no change but the address.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from aiohttp import web

from instance_manager.http.answers import ErrorBody, Handler
from instance_manager.http.ports import ControlResult, InstanceService, MalformedCall
from instance_manager.http.routes import JSON, Reply, Route

_log = logging.getLogger(__name__)

Arguments = dict[str, object]
TEXT = "text/plain"


class NotPossible(Exception):
    """It cannot be done as things are: 412, as Patroni answers."""


@dataclass(frozen=True, slots=True)
class _Verb:
    name: str
    takes: frozenset[str]
    arguments: Callable[[InstanceService, Arguments], Arguments]

    def given(self, body: bytes) -> Arguments:
        arguments = msgspec.json.decode(body or b"{}", type=dict[str, object])
        if unknown := sorted(set(arguments) - self.takes):
            raise MalformedCall(f"{self.name} does not take {', '.join(unknown)[:200]}")
        return arguments


def _switchover(service: InstanceService, body: Arguments) -> Arguments:
    leader, candidate = body.get("leader"), body.get("candidate")
    primary = service.status().primary
    if leader is None:
        raise MalformedCall("Switchover could be performed only from a specific leader")
    if leader != primary:
        raise NotPossible(f"leader name does not match: {primary or 'nobody'} is the primary")
    if leader == candidate:
        raise MalformedCall("Switchover target and source are the same")
    return {"to": candidate} if candidate is not None else {}


def _failover(_: InstanceService, body: Arguments) -> Arguments:
    if body.get("candidate") is not None:
        raise NotPossible(
            "here a failover takes whoever lost least: leave `candidate` out, or POST /switchover, which loses nothing"
        )
    if body.get("allow_data_loss") is not True:
        raise NotPossible(
            'failover may lose data: say {"allow_data_loss": true}, or POST /switchover, which loses nothing'
        )
    return {"allow_data_loss": True}


def _here(service: InstanceService, _: Arguments) -> Arguments:
    return {"name": service.details().name}


def _named(_: InstanceService, body: Arguments) -> Arguments:
    return {"name": body.get("name")}


def _nothing(_: InstanceService, __: Arguments) -> Arguments:
    return {}


VERBS: Mapping[str, _Verb] = {
    "/switchover": _Verb("switchover", frozenset(("leader", "candidate")), _switchover),
    "/failover": _Verb("failover", frozenset(("candidate", "allow_data_loss")), _failover),
    "/restart": _Verb("restart", frozenset(), _here),
    "/reload": _Verb("reload", frozenset(), _nothing),
    "/reinitialize": _Verb("reinit", frozenset(), _here),
    "/fence": _Verb("fence", frozenset(("name",)), _named),
    "/unfence": _Verb("unfence", frozenset(("name",)), _named),
    "/pause": _Verb("pause", frozenset(), _nothing),
    "/resume": _Verb("resume", frozenset(), _nothing),
}


def routes(handler: Handler) -> tuple[Route, ...]:
    """All of control: the verbs as the commands use them, and by Patroni's names."""
    needs = (
        "the control socket, as root or as the user of the instance manager; over the network (`control.listen`) an allowed "
        "certificate or the control token"
    )
    refused = {
        400: Reply("malformed", str, (TEXT,)),
        401: Reply("over the network: no proof of who asks, or another token", ErrorBody),
        403: Reply("this caller may not control the instance", ErrorBody),
        408: Reply("the body did not come in time", ErrorBody),
        413: Reply("the body is too long", ErrorBody),
        415: Reply("over the network with a certificate: not `Content-Type: application/json`", ErrorBody),
    }
    stream = Route(
        path="/control/{verb}",
        handler=handler,
        summary="A verb of `instance-manager`: lines of JSON, progress and at last the result.",
        methods=("POST",),
        needs=needs,
        replies={
            **refused,
            200: Reply("lines of JSON", str, ("application/jsonl",)),
            400: Reply("malformed", ErrorBody),
            404: Reply("no such verb", ErrorBody),
            500: Reply("it failed unexpectedly before its first line", ErrorBody),
            503: Reply("too many commands at work", ErrorBody),
        },
    )
    return (
        stream,
        *(
            Route(
                path=path,
                handler=handler,
                summary=f"Patroni's name for the verb {verb.name}.",
                methods=("POST",),
                needs=needs,
                replies={
                    **refused,
                    200: Reply("done", str, (TEXT,)),
                    412: Reply("not possible as things are", str, (TEXT,)),
                    503: Reply("it failed, or too many commands are at work", str, (TEXT, JSON)),
                },
            )
            for path, verb in VERBS.items()
        ),
    )


async def answer(service: InstanceService, request: web.Request, body: bytes) -> web.Response:
    """Carry it out to its end. 200: done; 400: malformed; 412: not possible now; 503: it failed."""
    verb = VERBS[request.path]
    try:
        result = await _run(service, verb.name, verb.arguments(service, verb.given(body)))
    except (MalformedCall, msgspec.DecodeError) as error:
        return _text(400, str(error))
    except NotPossible as error:
        return _text(412, str(error))
    except Exception as error:
        _log.exception("a command failed", extra={"verb": verb.name})
        return _text(503, f"{type(error).__name__}: {error}")
    return _text(200 if result.ok else 503, result.message)


async def _run(service: InstanceService, verb: str, arguments: Arguments) -> ControlResult:
    async for item in service.control(verb, arguments):
        if isinstance(item, ControlResult):
            return item
    return ControlResult(ok=False, message=f"{verb} ended without a result")


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, headers={"Cache-Control": "no-store"})
