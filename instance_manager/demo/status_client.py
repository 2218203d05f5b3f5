"""Asks an instance for its status with a deadline: over HTTP, or its control socket where a network is in between."""

from __future__ import annotations

import http.client
from pathlib import Path

import msgspec

from instance_manager.codec import from_json
from instance_manager.http.control_client import ControlError, send_command
from instance_manager.http.ports import ControlResult
from instance_manager.status import ClusterStatus

_ANSWER_BYTES_MAX = 4 * 1024 * 1024


def control(control_socket: Path, verb: str, arguments: dict[str, object], *, timeout_s: float) -> ControlResult:
    """Run a verb to its end. ControlError; `timeout_s` bounds each silence of the instance."""
    for item in send_command(control_socket, verb, arguments, silence_s=timeout_s):
        if isinstance(item, ControlResult):
            return item
    raise ControlError(f"{verb} ended without a result")


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
        return control(control_socket, "status", {}, timeout_s=timeout_s).status
    except ControlError:
        return None
