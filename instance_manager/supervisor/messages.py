"""What the agent may ask of the supervisor: one JSON object per datagram, validated completely before anything is done.

Every message has a `type`, and may have an integer `id`, which the answer then carries:
`{"type": "reply", "id": 7, "ok": false, "error": "why"}`.
"""

import json
import math
import os
import signal
from typing import Literal, NamedTuple

MESSAGE_MAX_BYTES = 65536

Mode = Literal["standby", "read_write"]

_SIGNALS = {"HUP": signal.SIGHUP, "INT": signal.SIGINT, "TERM": signal.SIGTERM, "QUIT": signal.SIGQUIT}
_EPOCH_MAX = 2**63 - 1


class MessageError(Exception):
    """A datagram that is no valid message. `message_id` is its id if that much could be read."""

    def __init__(self, reason: str, message_id: int | None = None) -> None:
        super().__init__(reason)
        self.message_id = message_id


class RefusedError(Exception):
    """A valid message asked for what cannot be done now; the text says why."""


class Tick(NamedTuple):
    """I am alive."""

    id: int | None


class Extend(NamedTuple):
    """`permit` on the wire: extend the write permit. Deadlines are absolute CLOCK_BOOTTIME seconds."""

    id: int | None
    epoch: int
    soft_s: float
    hard_s: float


class Revoke(NamedTuple):
    """End every permit at or below `epoch`, for ever."""

    id: int | None
    epoch: int


class Start(NamedTuple):
    """Start Postgres. `argv[0]` is an absolute path and `env` the whole environment; `epoch` is None only for a standby."""

    id: int | None
    mode: Mode
    epoch: int | None
    argv: tuple[str, ...]
    env: dict[str, str]


class Promote(NamedTuple):
    """Postgres becomes read-write: send it SIGUSR1, for which the agent has written the promotion file."""

    id: int | None
    epoch: int


class Signal(NamedTuple):
    """Send a signal to the postmaster."""

    id: int | None
    signal: signal.Signals


class Kill(NamedTuple):
    """Kill all of Postgres now; the answer comes when nothing of it is left."""

    id: int | None


class Goodbye(NamedTuple):
    """The agent has shut down in order: stop what is left and exit."""

    id: int | None


class RestartCompanion(NamedTuple):
    """The companion hangs: kill it, so that it is started again."""

    id: int | None


Message = Tick | Extend | Revoke | Start | Promote | Signal | Kill | Goodbye | RestartCompanion


def parse(datagram: bytes) -> Message:
    """Read one message. Raises MessageError for anything that is not exactly one."""
    if len(datagram) > MESSAGE_MAX_BYTES:
        raise MessageError(f"longer than {MESSAGE_MAX_BYTES} bytes")
    try:
        fields = json.loads(datagram.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise MessageError("not a JSON object")
    message_id = fields.get("id")
    if message_id is not None and not _is_int(message_id):
        raise MessageError("id is not an integer")
    try:
        return _build(message_id, fields)
    except MessageError as error:
        error.message_id = message_id
        raise


def _build(message_id: int | None, fields: dict[str, object]) -> Message:
    match fields.get("type"):
        case "tick":
            return Tick(message_id)
        case "permit":
            return Extend(message_id, _epoch(fields), _seconds(fields, "soft"), _seconds(fields, "hard"))
        case "revoke":
            return Revoke(message_id, _epoch(fields))
        case "start":
            return _start(message_id, fields)
        case "promote":
            return Promote(message_id, _epoch(fields))
        case "signal":
            name = fields.get("signal")
            if not isinstance(name, str) or name not in _SIGNALS:
                raise MessageError(f"signal is none of {', '.join(_SIGNALS)}")
            return Signal(message_id, _SIGNALS[name])
        case "kill":
            return Kill(message_id)
        case "goodbye":
            return Goodbye(message_id)
        case "restart_companion":
            return RestartCompanion(message_id)
        case _:
            raise MessageError("unknown type")


def _start(message_id: int | None, fields: dict[str, object]) -> Start:
    argv, env = fields.get("argv"), fields.get("env")
    if not isinstance(argv, list) or not argv or not all(_is_text(argument) for argument in argv):
        raise MessageError("argv is not a list of strings")
    if not argv[0].startswith("/"):
        raise MessageError("argv[0] is not an absolute path")
    if not isinstance(env, dict) or not all(_is_text(key) and _is_text(value) for key, value in env.items()):
        raise MessageError("env is not an object of strings")
    if any(key == "" or "=" in key for key in env):
        raise MessageError("a name in env is empty or contains '='")
    mode, epoch = fields.get("mode"), None if fields.get("epoch") is None else _epoch(fields)
    if mode == "standby":
        return Start(message_id, "standby", epoch, tuple(argv), env)
    if mode != "read_write":
        raise MessageError("mode is neither standby nor read_write")
    if epoch is None:
        raise MessageError("read_write needs an epoch")
    return Start(message_id, "read_write", epoch, tuple(argv), env)


def _epoch(fields: dict[str, object]) -> int:
    value = fields.get("epoch")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _EPOCH_MAX:
        raise MessageError("epoch is not an integer from 0 to 2^63-1")
    return value


def _seconds(fields: dict[str, object], key: str) -> float:
    value = fields.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MessageError(f"{key} is not a number")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise MessageError(f"{key} is not a finite number")
    return seconds


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    """Whether execve can take it: a string without NUL that has bytes."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True
