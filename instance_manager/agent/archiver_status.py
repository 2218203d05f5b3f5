"""The archiver's whole status, asked over its socket for a scrape."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

ANSWER_MAX_BYTES = 256 * 1024
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class ArchiverAnswer:
    status: bytes
    """JSON."""
    pid: int
    """Of the process that listens, as the kernel knows it."""


async def ask_archiver(path: Path) -> ArchiverAnswer:
    """OSError or EOFError when it does not answer; the deadline is the caller's."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=ANSWER_MAX_BYTES)
    try:
        connection = writer.get_extra_info("socket")
        pid, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        writer.write(b"status\n")
        return ArchiverAnswer(await reader.readuntil(b"\n"), int(pid))
    except asyncio.LimitOverrunError as error:
        raise OSError("the archiver's answer is too long") from error
    finally:
        writer.close()
