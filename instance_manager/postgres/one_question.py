"""One question over one new connection to the Unix socket, without a driver: the protocol's simple query, and no more.

A driver's connection costs ten times the CPU of this; asked every second, that is what an idle primary spends most on. It is
also the way to ask a walsender, which speaks only the simple protocol, whose rows asyncpg cannot return.
"""

from __future__ import annotations

import asyncio
import socket
import struct

from instance_manager.postgres.server import DeadlinePassed, LocalServer
from instance_manager.postgres.sql import SqlUnavailable

PROTOCOL_3_0 = 196608
PIECE_BYTES = 8192
ANSWER_BYTES_MAX = 64 * 1024


async def ask(
    server: LocalServer, query: str, *, application_name: str, deadline_s: float, replication: bool = False
) -> list[str | None]:
    """The first row that the server answers to `query`, as text; peer or trust authentication.

    SqlUnavailable, with its `sqlstate` where the server refused; DeadlinePassed.
    """
    settings = {
        "user": server.superuser,
        "database": "postgres",
        "application_name": application_name,
        "search_path": "pg_catalog,pg_temp",
    }
    if replication:
        # `database`, not `true`: then the rules of pg_hba.conf for an ordinary local connection hold.
        settings["replication"] = "database"
    # With its goodbye: the server reads it when it has answered.
    asked = _startup(settings) + _message(b"Q", query.encode() + b"\0") + _message(b"X", b"")
    try:
        async with asyncio.timeout(deadline_s):
            return await _first_row(str(server.socket_directory / f".s.PGSQL.{server.port}"), asked)
    except TimeoutError:
        raise DeadlinePassed(query, deadline_s) from None
    except OSError as error:
        raise SqlUnavailable(f"{query}: {error}") from error


def _startup(settings: dict[str, str]) -> bytes:
    body = b"".join(f"{name}\0{value}\0".encode() for name, value in settings.items()) + b"\0"
    return struct.pack("!II", len(body) + 8, PROTOCOL_3_0) + body


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!I", len(content) + 4) + content


async def _first_row(path: str, asked: bytes) -> list[str | None]:
    """Of what comes: authentication, settings, ready, the row, its end."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, path)
        await loop.sock_sendall(connection, asked)
        received = bytearray()
        while piece := await loop.sock_recv(connection, PIECE_BYTES):
            received += piece
            row = _row_of(bytes(received))
            if row is not None:
                return row
            if len(received) > ANSWER_BYTES_MAX:
                raise SqlUnavailable(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    raise SqlUnavailable("the server closed the connection")


def _row_of(received: bytes) -> list[str | None] | None:
    """None: its end has not come yet. SqlUnavailable: the server said why not."""
    position, row = 0, None
    while position + 5 <= len(received):
        kind, length = received[position : position + 1], int.from_bytes(received[position + 1 : position + 5], "big")
        content = received[position + 5 : position + 1 + length]
        if len(content) < length - 4:
            return None
        position += 1 + length
        match kind:
            case b"D" if row is None:
                row = _fields(content)
            case b"C":
                return row or []
            case b"E":
                fields = {field[:1]: field[1:].decode(errors="replace") for field in content.split(b"\0") if field}
                raise SqlUnavailable(fields.get(b"M", "an error"), fields.get(b"C"))
            case b"R" if content[:4] != b"\0\0\0\0":
                raise SqlUnavailable("the local socket asks for a password")
    return None


def _fields(row: bytes) -> list[str | None]:
    fields: list[str | None] = []
    position = 2
    for _ in range(int.from_bytes(row[:2], "big")):
        length = int.from_bytes(row[position : position + 4], "big", signed=True)
        position += 4
        fields.append(row[position : position + length].decode() if length >= 0 else None)
        position += max(0, length)
    return fields
