"""The sections `tls` and `control`: who proves what to whom, and by which files. Nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from instance_manager.config_sections import MemberSection, Section

_LISTEN = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>[1-9][0-9]{0,4})")


class TlsSection(Section, frozen=True):
    """Each path is a directory in the layout of cert-manager's Secrets: `tls.crt`, `tls.key` and `ca.crt`."""

    directory: Path | None = None
    """For whatever of the following has none of its own."""
    postgres: Path | None = None
    """The server's certificate; `ca.crt` is what clients' certificates are checked by."""
    peers: Path | None = None
    """Of the instance, as server and as client; its names must cover the member's `host`."""
    control: Path | None = None
    """Of the listener for control over TCP; `ca.crt` is what users' certificates are checked by."""
    replication: Path | None = None
    """A client certificate with the common name `streaming_replica`: replication is by it then, and not by a password."""
    mode: Literal["required", "permissive"] = "required"
    """`permissive`, to turn TLS on in a running cluster: plain connections of clients and members still work."""
    minimum_version: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"

    @property
    def for_postgres(self) -> Path | None:
        return self.postgres or self.directory

    @property
    def for_peers(self) -> Path | None:
        return self.peers or self.directory

    @property
    def for_control(self) -> Path | None:
        return self.control or self.directory

    @property
    def required(self) -> bool:
        return self.mode == "required"


class ControlSection(Section, frozen=True):
    """Control over the network, besides the Unix socket: with TLS, and proof of who asks."""

    listen: str
    """`HOST:PORT`, `[IPv6]:PORT`."""
    allowed_names: tuple[str, ...] = ()
    """Common names, or names of the subject's alternatives, of certificates by which a user may control."""
    token_file: Path | None = None
    """A secret by which a user may control, shown as bearer token."""

    @property
    def address(self) -> tuple[str, int]:
        """ValueError: not of that form."""
        match = _LISTEN.fullmatch(self.listen)
        if match is None or int(match["port"]) > 65535:
            raise ValueError(f"{self.listen!r} is not HOST:PORT or [IPv6]:PORT")
        return match["six"] or match["host"], int(match["port"])


def check_security(
    tls: TlsSection | None, control: ControlSection | None, members: Iterable[MemberSection]
) -> list[str]:
    """What does not fit together, a sentence each."""
    found = []
    if tls is not None:
        if not (tls.directory or tls.postgres or tls.peers or tls.control):
            found.append("tls: names no certificate; set directory, or postgres, peers or control")
        if tls.replication is not None and (tls.for_postgres is None or not tls.required):
            found.append("tls.replication: needs a certificate of Postgres (tls.postgres) and mode: required")
        if tls.for_peers is not None:
            found += [
                f"members: {member.name} has no peer_port; with tls.peers each needs one"
                for member in members
                if member.peer_port is None
            ]
    if control is not None:
        try:
            _ = control.address
        except ValueError as error:
            found.append(f"control.listen: {error}")
        if tls is None or tls.for_control is None:
            found.append("control.listen: control over the network needs TLS; set tls.control")
        if not control.allowed_names and control.token_file is None:
            found.append("control: nobody may; set allowed_names (of client certificates) or token_file")
    return found
