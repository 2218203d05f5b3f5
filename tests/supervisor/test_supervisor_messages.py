"""What is a message, and what is garbage."""

import json
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instance_manager.supervisor.messages import (
    MESSAGE_MAX_BYTES,
    Extend,
    Goodbye,
    Kill,
    MessageError,
    Promote,
    RestartCompanion,
    Revoke,
    Signal,
    Start,
    Tick,
    parse,
)


@pytest.mark.parametrize(
    ("datagram", "message"),
    [
        (b'{"type":"tick"}', Tick(None)),
        (b'{"type":"permit","id":1,"epoch":3,"soft":6,"hard":8.5}', Extend(1, 3, 6.0, 8.5)),
        (b'{"type":"revoke","id":2,"epoch":0}', Revoke(2, 0)),
        (b'{"type":"promote","epoch":4}', Promote(None, 4)),
        (b'{"type":"signal","signal":"HUP"}', Signal(None, signal.SIGHUP)),
        (b'{"type":"kill","id":9}', Kill(9)),
        (b'{"type":"goodbye"}', Goodbye(None)),
        (b'{"type":"restart_companion","id":3}', RestartCompanion(3)),
        (
            b'{"type":"start","mode":"standby","epoch":null,"argv":["/bin/true"],"env":{"A":"b"}}',
            Start(None, "standby", None, ("/bin/true",), {"A": "b"}),
        ),
    ],
)
def test_every_message_of_the_protocol_is_understood(datagram: bytes, message: object) -> None:
    assert parse(datagram) == message


@pytest.mark.parametrize(
    "datagram",
    [
        b"\x00\xff",
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 60000,
        b'{"type":"tick"} x',
        b'{"type":"dance"}',
        b'{"type":["tick"]}',
        b'{"type":"tick","id":"1"}',
        b'{"type":"tick","id":true}',
        b'{"type":"permit","epoch":1,"soft":6,"hard":NaN}',
        b'{"type":"permit","epoch":1,"soft":6,"hard":1e999}',
        b'{"type":"permit","epoch":1,"soft":6,"hard":1' + b"0" * 400 + b"}",
        b'{"type":"permit","epoch":1,"soft":6,"hard":"8"}',
        b'{"type":"permit","epoch":1.5,"soft":6,"hard":8}',
        b'{"type":"permit","epoch":true,"soft":6,"hard":8}',
        b'{"type":"permit","epoch":-1,"soft":6,"hard":8}',
        b'{"type":"permit","epoch":9223372036854775808,"soft":6,"hard":8}',
        b'{"type":"signal","signal":"KILL"}',
        b'{"type":"signal","signal":9}',
        b'{"type":"start","mode":"read_write","epoch":null,"argv":["/x"],"env":{}}',
        b'{"type":"start","mode":"primary","epoch":1,"argv":["/x"],"env":{}}',
        b'{"type":"start","mode":"standby","argv":["postgres"],"env":{}}',
        b'{"type":"start","mode":"standby","argv":[],"env":{}}',
        b'{"type":"start","mode":"standby","argv":["/x",1],"env":{}}',
        b'{"type":"start","mode":"standby","argv":["/x","a\\u0000b"],"env":{}}',
        b'{"type":"start","mode":"standby","argv":["/x","\\ud800"],"env":{}}',
        b'{"type":"start","mode":"standby","argv":["/x"],"env":{"A=B":"c"}}',
        b'{"type":"start","mode":"standby","argv":["/x"],"env":{"A":1}}',
        b'{"type":"tick","x":"' + b"x" * MESSAGE_MAX_BYTES + b'"}',
    ],
    ids=lambda datagram: datagram[:60].decode("latin-1"),
)
def test_anything_else_is_garbage(datagram: bytes) -> None:
    with pytest.raises(MessageError):
        parse(datagram)


def test_garbage_with_a_readable_id_can_be_answered() -> None:
    with pytest.raises(MessageError) as caught:
        parse(b'{"type":"dance","id":7}')
    assert caught.value.message_id == 7


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_fields = st.dictionaries(
    st.sampled_from(["type", "id", "epoch", "soft", "hard", "mode", "argv", "env", "signal"]),
    _json
    | st.sampled_from(["tick", "permit", "revoke", "start", "promote", "signal", "kill", "standby", "read_write"]),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # two cores, often busy
@given(st.binary(max_size=200) | _fields.map(lambda fields: json.dumps(fields).encode()))
def test_nothing_that_arrives_raises_anything_but_its_own_error(datagram: bytes) -> None:
    try:
        message = parse(datagram)
    except MessageError:
        return
    assert message.id is None or isinstance(message.id, int)
