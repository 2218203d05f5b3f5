"""Certificates of two authorities, made for one test run."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from http_harness import free_port, make_configuration
from msgspec.structs import replace

from instance_manager import certificates
from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration
from instance_manager.config_security import ControlSection, TlsSection

CONTROL_TOKEN = "fedcba9876543210-control"


@dataclass(frozen=True)
class Authorities:
    """`ours` signs members, the allowed user alice and the stranger bob; `theirs` is somebody else's."""

    ours: Path
    theirs: Path

    def member(self, name: str) -> Path:
        return self.ours / "members" / name

    def client(self, directory: Path | None, *, by: Path | None = None) -> ssl.SSLContext:
        """Trusting ours (or `by`), showing the certificate of `directory`."""
        context = ssl.create_default_context(cafile=str((by or self.member("demo-1")) / "ca.crt"))
        if directory is not None:
            context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
        return context


def make_authorities(root: Path) -> Authorities:
    for name in ("ours", "theirs"):
        certificates.make(
            root / name,
            [
                certificates.member("demo-1", ["127.0.0.1"]),
                certificates.member("demo-2", ["127.0.0.1"]),
                certificates.member("elsewhere", ["192.0.2.1"]),
                certificates.user("alice"),
                certificates.user("bob"),
            ],
            cluster=name,
            renew=False,
        )
    return Authorities(root / "ours", root / "theirs")


def with_tls(directory: Path, authorities: Authorities, **tls: str) -> Configuration:
    """A configuration that demands TLS of peers and offers control over the network."""
    plain = make_configuration(directory)
    token_file = directory / "control-token"
    token_file.write_text(CONTROL_TOKEN)
    return replace(
        plain,
        members=tuple(replace(member, peer_port=free_port()) for member in plain.members),
        tls=TlsSection(directory=authorities.member("demo-1"), **tls),  # type: ignore[arg-type]
        control=ControlSection(
            listen=f"127.0.0.1:{free_port()}", allowed_names=("alice", "carol"), token_file=token_file
        ),
    )


def loaded(configuration: Configuration) -> Certificates:
    assert configuration.tls is not None
    configuration.state_directory.mkdir(exist_ok=True)
    made = Certificates(configuration.tls, configuration.control, configuration.certificates_directory)
    made.load()
    return made
