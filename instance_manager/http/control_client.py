"""Commands to an instance through its control socket. Standard library only besides msgspec: commands start fast."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from instance_manager.http.ports import ControlProgress, ControlResult

LINE_BYTES_MAX = 1024 * 1024
CONNECT_TIMEOUT_S = 2.0


class ControlError(Exception):
    """Base of what can go wrong on the way to an instance and back."""


class InstanceNotReachable(ControlError):
    """Nobody answers on the socket, or who answers is not who it should be: nothing was done."""


class CommandRefused(ControlError):
    """The instance did not take the command: nothing was done. 400 and 404 are the user's mistakes."""

    def __init__(self, http_status: int, text: str) -> None:
        super().__init__(text)
        self.http_status = http_status


class AnswerLost(ControlError):
    """The command was taken and its end was not told: it may have been done."""


_HOST = re.compile(r"(?:\[(?P<six>[^]]+)\]|(?P<host>[^:]+)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """An instance's `control.listen`, from elsewhere."""

    host: str
    port: int
    authority: Path
    """The `ca.crt` by which the instance is known."""
    certificate: Path | None = None
    """Directory with `tls.crt` and `tls.key` to be shown."""
    token: str | None = None
    server_name: str | None = None
    """That its certificate must have; by default the host."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}

    def context(self) -> ssl.SSLContext:
        """OSError (ssl.SSLError is one): a file cannot be used."""
        context = ssl.create_default_context(cafile=str(self.authority))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if self.certificate is not None:
            context.load_cert_chain(self.certificate / "tls.crt", self.certificate / "tls.key", password="")
        return context


def parse_host(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPv6]:PORT`. ValueError."""
    match = _HOST.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT or [IPv6]:PORT")
    return match["six"] or match["host"], int(match["port"])


class _Line(msgspec.Struct, frozen=True):
    progress: str | None = None
    result: ControlResult | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("control", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Over the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        self.sock.connect(os.fspath(self._path))
        self.sock.settimeout(self.timeout)


class _TlsConnection(http.client.HTTPConnection):
    def __init__(self, network: Network, timeout_s: float) -> None:
        super().__init__(network.host, network.port, timeout=timeout_s)
        self._network = network

    def connect(self) -> None:
        """With the certificate, and to nobody but the instance."""
        network = self._network
        plain = socket.create_connection((network.host, network.port), CONNECT_TIMEOUT_S)
        try:
            self.sock = network.context().wrap_socket(plain, server_hostname=network.server_name or network.host)
        except BaseException:
            plain.close()
            raise
        self.sock.settimeout(self.timeout)


def send_command(
    path: Path | Network, verb: str, arguments: dict[str, object], *, silence_s: float
) -> Iterator[ControlProgress | ControlResult]:
    """Progress as it comes, then the result, which is the last item. Gives up after `silence_s` without a word.

    Raises InstanceNotReachable, CommandRefused or AnswerLost.
    """
    connection: http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if isinstance(path, Network):
        connection, headers = _TlsConnection(path, silence_s), headers | path.headers
    else:
        connection = _UnixConnection(path, silence_s)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise InstanceNotReachable(f"{path}: {_reason(error)}") from error
        try:
            connection.request("POST", f"/control/{verb}", json.dumps(arguments), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise CommandRefused(response.status, _error_text(response.read(LINE_BYTES_MAX)))
            while line := response.readline(LINE_BYTES_MAX):
                item = msgspec.json.decode(line, type=_Line)
                if item.result is not None:
                    yield item.result
                    return
                yield ControlProgress(progress=item.progress or "")
        except (OSError, http.client.HTTPException) as error:
            raise AnswerLost(f"{path}: {_reason(error)}") from error
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise AnswerLost(f"{path}: an answer that this version does not understand: {error}") from error
        raise AnswerLost(f"{path}: the answer ended without a result")
    finally:
        connection.close()


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such socket"
        case ConnectionRefusedError():
            return "nobody listens there"
        case TimeoutError():
            return "no answer in time"
        case ssl.SSLCertVerificationError(verify_message=text):
            return f"its certificate is refused: {text}"
        case OSError(strerror=text) if text:
            return text
        case _:
            return f"{type(error).__name__} {error}".strip()


def _error_text(body: bytes) -> str:
    try:
        content = json.loads(body)
        return str(content["error"])
    except (ValueError, KeyError, TypeError):
        return body[:1000].decode("utf-8", "replace")
