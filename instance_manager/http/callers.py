"""Who asks? The kernel's word on a Unix socket; a certificate or a token on the network."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from dataclasses import dataclass

from aiohttp import web

from instance_manager.config import Configuration
from instance_manager.config_security import ControlSection
from instance_manager.http.token import PeerToken
from instance_manager.tls import CertificateFacts, covers, facts_of


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may; `name` is for the log."""

    name: str
    by_certificate: bool = False
    """Known by what a browser shows for any page that asks it to: the request must be one that no foreign page can make."""


@dataclass(frozen=True, slots=True)
class Refused:
    status: int
    reason: str


class LocalCallers:
    """Of the control socket: root, and the user that the instance manager runs as."""

    async def judge(self, request: web.Request) -> Caller | Refused:
        connection = request.transport.get_extra_info("socket") if request.transport is not None else None
        if connection is None or connection.family != socket.AF_UNIX:
            return Refused(403, "control is possible through the control socket only")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _pid, uid, _gid = struct.unpack("3i", credentials)
        if uid not in (0, os.geteuid()):
            return Refused(403, f"the user with id {uid} may not control this instance")
        return Caller(f"local user {uid}")


class NetworkCallers:
    """Of `control.listen`: a certificate of the authority with an allowed name, or the token. TLS in any case."""

    def __init__(self, section: ControlSection) -> None:
        """TokenUnusable: the file cannot be used."""
        self._allowed = frozenset(section.allowed_names)
        self._token = PeerToken(section.token_file, key="control.token_file") if section.token_file else None

    async def judge(self, request: web.Request) -> Caller | Refused:
        if not _is_tls(request):
            return Refused(403, "control over the network needs TLS")
        shown = certificate_of(request)
        if shown is not None and (names := shown.names & self._allowed):
            return Caller(f"certificate {min(names)}", by_certificate=True)
        if self._token is not None and (authorization := request.headers.get("Authorization")) is not None:
            if not self._token.matches(authorization):
                await self._token.read_again()
            if self._token.matches(authorization):
                return Caller("bearer token")
            return Refused(401, "the token is another than that of control.token_file")
        if shown is not None:
            return Refused(403, f"the certificate of {shown.common_name!r} is not among control.allowed_names")
        return Refused(
            401, "control over the network needs a certificate of control.allowed_names, or the bearer token"
        )


def certificate_of(request: web.Request) -> CertificateFacts | None:
    """Of the client, as its connection's handshake has proven it; None: it has shown none."""
    connection = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
    shown = connection.getpeercert() if isinstance(connection, ssl.SSLObject) else None
    return facts_of(shown) if shown else None


def is_member(configuration: Configuration, shown: CertificateFacts) -> bool:
    """Is it the certificate of a member of this cluster: does one of its names cover a member's host?"""
    for name in shown.names:
        label = name.partition(".")[0]
        # On Kubernetes also of a member that the configuration does not list, or not yet.
        member = configuration.member(configuration.instance.name if label == "*" else label)
        if member is not None and covers(name, member.host):
            return True
        if any(covers(name, each.host) for each in configuration.members):
            return True
    return False


def _is_tls(request: web.Request) -> bool:
    return request.transport is not None and request.transport.get_extra_info("ssl_object") is not None
