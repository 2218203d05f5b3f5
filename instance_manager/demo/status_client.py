"""Asks an instance for its status with a deadline: over its control socket, else over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path

import msgspec

from instance_manager.codec import from_json
from instance_manager.status import ClusterStatus

_ANSWER_BYTES_MAX = 4 * 1024 * 1024


class ControlFailed(Exception):
    """The instance refused, failed, or did not answer; the text is for the user."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


def control(control_socket: Path, verb: str, arguments: dict[str, object], *, timeout_s: float) -> dict[str, object]:
    """Run a verb to its end and return its result (`ok`, `message`, `status`). ControlFailed otherwise.

    `timeout_s` bounds each wait for the instance, which tells its progress meanwhile.
    """
    connection = _UnixConnection(control_socket, timeout_s)
    try:
        connection.request("POST", f"/control/{verb}", json.dumps(arguments), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read(_ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise ControlFailed(f"{control_socket}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    lines = [line for line in body.splitlines() if line.strip()]
    try:
        last = json.loads(lines[-1]) if lines else {}
    except ValueError as error:
        raise ControlFailed(f"{control_socket}: not JSON: {lines[-1][:200]!r}") from error
    if answer.status != 200 or not isinstance(last.get("result"), dict):
        raise ControlFailed(f"{verb}: {answer.status} {last.get('error', 'without a result')}")
    result: dict[str, object] = last["result"]
    return result


def status_over_tcp(host: str, http_port: int, *, timeout_s: float) -> ClusterStatus | None:
    """`GET /status`; None when there is no good answer in time."""
    connection = http.client.HTTPConnection(host, http_port, timeout=timeout_s)
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        body = answer.read(_ANSWER_BYTES_MAX)
        if answer.status != 200:
            return None
        return from_json(body, ClusterStatus)
    except (OSError, http.client.HTTPException, msgspec.ValidationError, msgspec.DecodeError):
        return None
    finally:
        connection.close()


def status_over_socket(control_socket: Path, *, timeout_s: float) -> ClusterStatus | None:
    """The verb `status`; None when there is no good answer in time."""
    try:
        result = control(control_socket, "status", {}, timeout_s=timeout_s)
        return msgspec.convert(result.get("status"), ClusterStatus)
    except (ControlFailed, msgspec.ValidationError):
        return None
