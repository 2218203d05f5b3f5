"""Certificates from files, in the layout of cert-manager's Secrets: `tls.crt`, `tls.key`, `ca.crt`.

Each set is proven before it is used: a handshake in memory, in which its own `ca.crt` must accept its `tls.crt`. Nothing of
OpenSSL's private parts is needed to learn when a certificate ends, and a set that peers would refuse is never taken over.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"
FILES = (CERTIFICATE, KEY, AUTHORITY)
_HANDSHAKE_STEPS_MAX = 20

MinimumVersion = Literal["TLSv1.2", "TLSv1.3"]
_VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


class CertificateUnusable(Exception):
    """The files of a directory are no certificate that could be used; the text says which and why, without their content."""


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a proven certificate says of itself."""

    common_name: str | None
    names: frozenset[str]
    """Common name, DNS names, addresses, mail addresses and URIs."""
    begins_s: float
    ends_s: float
    """Its life, in seconds since 1970."""


def server_context(
    directory: Path,
    *,
    clients: Literal["required", "optional", "none"],
    minimum_version: MinimumVersion = "TLSv1.2",
) -> ssl.SSLContext:
    """For a listener. `clients`: whether they show a certificate of `ca.crt`. CertificateUnusable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _fill(context, directory, minimum_version, authority=clients != "none")
    modes = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
    context.verify_mode = modes[clients]
    return context


def client_context(directory: Path, *, minimum_version: MinimumVersion = "TLSv1.2") -> ssl.SSLContext:
    """For connections to servers of the same authority, at which this certificate is shown. CertificateUnusable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _fill(context, directory, minimum_version, authority=True)
    return context


def _fill(context: ssl.SSLContext, directory: Path, minimum_version: MinimumVersion, *, authority: bool) -> None:
    context.minimum_version = _VERSIONS[minimum_version]
    # An authority that is itself signed by another is enough, as it is for libpq and for Go.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    for name in FILES if authority else (CERTIFICATE, KEY):
        try:
            (directory / name).open("rb").close()
        except OSError as error:
            raise CertificateUnusable(f"{directory / name} cannot be read: {error.strerror}") from error
    try:
        # Without a callback OpenSSL would ask the terminal for the passphrase of an encrypted key.
        context.load_cert_chain(directory / CERTIFICATE, directory / KEY, password="")
    except (OSError, ValueError) as error:
        raise CertificateUnusable(
            f"{directory}: {CERTIFICATE} and {KEY} are no certificate with its key: {_reason(error)}"
        ) from error
    if authority:
        try:
            context.load_verify_locations(directory / AUTHORITY)
        except (OSError, ValueError) as error:
            raise CertificateUnusable(f"{directory / AUTHORITY} is no certificate: {_reason(error)}") from error


def examine(directory: Path, *, server: Path | None = None) -> CertificateFacts:
    """Prove the certificate as a server's; with `server`, the directory of another, as that of a client there.

    CertificateUnusable: it cannot be loaded, its own `ca.crt` does not accept it, or it has ended or not begun.
    """
    if server is None:
        listening, asking = server_context(directory, clients="none"), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        asking.load_verify_locations(_readable(directory / AUTHORITY))
        asking.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    else:
        listening, asking = server_context(server, clients="required"), client_context(directory)
    asking.check_hostname = False
    try:
        served, asked = _handshake(listening, asking)
    except ssl.SSLCertVerificationError as error:
        raise CertificateUnusable(f"{directory}: {CERTIFICATE} is not accepted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise CertificateUnusable(f"{directory}: {_reason(error)}") from error
    shown = (asked if server is None else served).getpeercert()
    if not shown:
        raise CertificateUnusable(f"{directory}: {CERTIFICATE} was not shown")
    return facts_of(shown)


def _readable(path: Path) -> Path:
    try:
        path.open("rb").close()
    except OSError as error:
        raise CertificateUnusable(f"{path} cannot be read: {error.strerror}") from error
    return path


def facts_of(shown: Mapping[str, object]) -> CertificateFacts:
    """Of what `getpeercert` returns."""
    subject = [pair for part in shown.get("subject", ()) for pair in part]  # type: ignore[attr-defined]
    common_names = [value for key, value in subject if key == "commonName"]
    alternatives = [value for _, value in shown.get("subjectAltName", ())]  # type: ignore[attr-defined]
    return CertificateFacts(
        common_name=common_names[0] if common_names else None,
        names=frozenset((*common_names, *alternatives)),
        begins_s=float(ssl.cert_time_to_seconds(str(shown["notBefore"]))),
        ends_s=float(ssl.cert_time_to_seconds(str(shown["notAfter"]))),
    )


def covers(name: str, host: str) -> bool:
    """Is `host` the certificate's `name`, a leading `*.` standing for one label?"""
    name, host = name.lower(), host.lower()
    if name.startswith("*."):
        return host.partition(".")[2] == name[2:] and host.partition(".")[0] != ""
    return name == host


def _handshake(listening: ssl.SSLContext, asking: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Between two contexts of this process; ssl.SSLError where either side refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    served = listening.wrap_bio(to_server, to_client, server_side=True)
    asked = asking.wrap_bio(to_client, to_server, server_hostname=None)
    done = set()
    for _ in range(_HANDSHAKE_STEPS_MAX):
        for side in (asked, served):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                done.add(side)
        if len(done) == 2:
            return served, asked
    raise ssl.SSLError("the handshake did not end")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "not understood by OpenSSL"
    return str(error)
