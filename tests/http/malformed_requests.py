"""Requests as no client should send them: a seeded source of bytes, each in the pieces in which it is sent."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PATHS = [
    "/",
    "/livez",
    "/readyz",
    "/startupz",
    "/lag",
    "/status",
    "/primary",
    "/replica",
    "/read-only",
    "/sync",
    "/async",
    "/quorum",
    "/leader",
    "/health",
    "/liveness",
    "/readiness",
    "/patroni",
    "/cluster",
    "/history",
    "/config",
    "/openapi.json",
    "/peer/echo",
    "/peer/state",
    "/control/pause",
    "/nowhere",
]


@dataclass(frozen=True, slots=True)
class Sent:
    kind: str
    pieces: tuple[bytes, ...]
    is_whole: bool
    """Something is to be answered; else the connection is closed at once."""


def make(chance: random.Random) -> Sent:
    kind = chance.choice(sorted(_KINDS))
    data = _KINDS[kind](chance)
    is_whole = kind not in _NEVER_WHOLE
    if chance.random() < 0.2:
        data, is_whole = data[: chance.randrange(len(data))] or b"G", False
    return Sent(kind, tuple(_split(chance, data)), is_whole)


def _split(chance: random.Random, data: bytes) -> Sequence[bytes]:
    if chance.random() < 0.7:
        return (data,)
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randint(1, 6)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if begin < end]


def _head(path: str | bytes, *lines: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    target = path.encode() if isinstance(path, str) else path
    return b"\r\n".join((b" ".join((method, target, version)), b"Host: x", b"Connection: close", *lines, b"", b""))


def _noise(chance: random.Random, most: int) -> bytes:
    return chance.randbytes(chance.randint(1, most))


def _path(chance: random.Random) -> str:
    return chance.choice(PATHS)


def _method(chance: random.Random) -> bytes:
    methods = (
        b"get",
        b"BREW",
        b"G\0T",
        b"CONNECT",
        b"TRACE",
        b"A" * 5000,
        b"PROPFIND",
        b"PATCH",
        b"DELETE",
        b"{}",
        b"\xff",
    )
    return _head(_path(chance), method=chance.choice(methods))


def _version(chance: random.Random) -> bytes:
    versions = (
        b"HTTP/9.9",
        b"HTTP/1",
        b"HTTP/1.x",
        b"",
        b"HTTP/0.9",
        b"ICY",
        b"HTTP/2.0",
        b"HTTP/1.1 extra",
        b"HTTP/1.0",
    )
    return _head(_path(chance), version=chance.choice(versions))


def _target(chance: random.Random) -> bytes:
    path = _path(chance).encode()
    return _head(
        chance.choice(
            (
                b"*",
                b"//",
                b"/..%2f..%2fetc/passwd",
                b"http://[::1",
                b"http://other.example" + path,
                path + b"%00",
                path + b"?%zz=%ff",
                path + b"#" + _noise(chance, 20).hex().encode(),
                b"/" + b"a" * chance.randint(1000, 20000),
                path + b"?" + b"lag=1&" * chance.randint(1, 500),
                path + b"?lag=" + _noise(chance, 30).hex().encode(),
                path + b"?lag=" + b"9" * chance.randint(1, 3000),
                path + b"?lag=%F0%9F%98%80&tag_%00=%00&mode=" + _noise(chance, 4).hex().encode(),
                "/ſtatus".encode(),
                b"/peer/" + b"%2e" * 50,
                b"/\xc3\x28",
                path + b"/",
            )
        )
    )


def _lines(chance: random.Random) -> bytes:
    line = chance.choice(
        (
            b"X: " + b"y" * chance.randint(1000, 70000),
            b"\r\n".join(b"X-%d: y" % number for number in range(chance.randint(10, 400))),
            b": nothing",
            b"No colon at all",
            b"X\0Y: z",
            b" folded: line",
            b"X: a\rb",
            b"Host: another",
            b"Accept: text/html",
            b"Cookie: " + b"a=b; " * 300,
            b"Authorization: Bearer " + _noise(chance, 40).hex().encode(),
            b"Authorization: Bearer \xff\xfe",
            b"Deadline-Seconds: " + chance.choice((b"nan", b"-1", b"1e400", b"inf", b"\xc3\xa9")),
            b"Upgrade: websocket\r\nSec-WebSocket-Key: x",
            b"Upgrade: h2c\r\nHTTP2-Settings: x",
            b"Range: bytes=0-,1-,2-",
            b"Expect: 100-continue",
            b"Expect: " + _noise(chance, 9).hex().encode(),
            b"If-None-Match: *",
            b"X-Forwarded-For: " + b"1.2.3.4, " * 200,
        )
    )
    return _head(_path(chance), line, method=chance.choice((b"GET", b"HEAD", b"OPTIONS", b"POST")))


def _body(chance: random.Random) -> bytes:
    body = _noise(chance, 300)
    line = chance.choice(
        (
            b"Content-Length: -1",
            b"Content-Length: +5",
            b"Content-Length: 5\r\nContent-Length: 6",
            b"Content-Length: " + b"9" * 30,
            b"Content-Length: abc",
            b"Content-Length: 3\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked",
            b"Transfer-Encoding: identity",
            b"Content-Encoding: gzip\r\nContent-Length: %d" % len(body),
            b"Content-Encoding: br\r\nContent-Length: %d" % len(body),
            b"Content-Type: text/plain; charset=\xff\r\nContent-Length: %d" % len(body),
            b"Content-Length: %d" % len(body),
        )
    )
    path = chance.choice(("/peer/echo", "/primary", "/status", "/control/pause", _path(chance)))
    return _head(path, line, method=chance.choice((b"POST", b"PUT", b"GET"))) + body


def _chunks(chance: random.Random) -> bytes:
    chunk = chance.choice(
        (
            b"zz\r\nab\r\n0\r\n\r\n",
            b"-1\r\n\r\n",
            b"f" * 40 + b"\r\n",
            b"2\r\nabcd\r\n0\r\n\r\n",
            b"2;ext=" + b"x" * 5000 + b"\r\nab\r\n",
        )
    )
    return _head("/peer/echo", b"Transfer-Encoding: chunked", method=b"POST") + chunk


def _pipelined(chance: random.Random) -> bytes:
    heads = [_head(_path(chance)).replace(b"Connection: close\r\n", b"") for _ in range(chance.randint(2, 40))]
    return b"".join((*heads, chance.choice((_head("/livez"), b"garbage\r\n\r\n", _noise(chance, 50)))))


def _other_protocol(chance: random.Random) -> bytes:
    return chance.choice(
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _noise(chance, 200),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _noise(chance, 40),
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
            _noise(chance, 4000),
            b"\r\n" * chance.randint(1, 200),
            b"\n\n\n" + _head("/livez"),
        )
    )


_KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "method": _method,
    "version": _version,
    "target": _target,
    "lines": _lines,
    "body": _body,
    "chunks": _chunks,
    "pipelined": _pipelined,
    "other protocol": _other_protocol,
}
_NEVER_WHOLE = frozenset(("other protocol",))
