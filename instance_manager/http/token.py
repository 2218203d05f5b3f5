"""A token from a file: the one that instances share, by which a peer is known, or a user's for control."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from pathlib import Path

from instance_manager.threads import Threads, TooManyCalls

_TOKEN_PATTERN = re.compile(rb"[\x21-\x7e]{16,1024}")
_READ_AGAIN_AFTER_S = 1.0
_READ_TIMEOUT_S = 1.0


class TokenUnusable(Exception):
    """The token's file cannot be used; the text says why, without its content."""


class PeerToken:
    """The content of the token's file; read again, at most once a second, when it was refused or did not match."""

    def __init__(self, path: Path, *, key: str = "secrets.peer_token") -> None:
        """`key`: of the configuration, for errors."""
        self._path = path
        self._key = key
        self._token = _read(path, key)
        self._threads = Threads("peer token")
        self._may_read_again_s = 0.0

    @property
    def bearer(self) -> str:
        """Value of the Authorization header."""
        return f"Bearer {self._token.decode('ascii')}"

    def matches(self, authorization: str | None) -> bool:
        """Compared in constant time."""
        return hmac.compare_digest((authorization or "").encode("utf-8", "replace"), self.bearer.encode("ascii"))

    async def read_again(self) -> None:
        """After a rotation of the secret. Keeps the old token if the file cannot be read in time."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._may_read_again_s:
            return
        self._may_read_again_s = loop.time() + _READ_AGAIN_AFTER_S
        with contextlib.suppress(TokenUnusable, TimeoutError, TooManyCalls):
            self._token = await self._threads.call(lambda: _read(self._path, self._key), deadline_s=_READ_TIMEOUT_S)


def _read(path: Path, key: str) -> bytes:
    try:
        with path.open("rb") as file:
            token = file.read(4096).strip()
    except OSError as error:
        raise TokenUnusable(f"{key}: {path} cannot be read: {error.strerror}") from error
    if _TOKEN_PATTERN.fullmatch(token) is None:
        raise TokenUnusable(f"{key}: {path} must hold 16 to 1024 printable ASCII characters without spaces")
    return token
