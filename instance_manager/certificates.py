"""An authority of one's own and certificates by it, for where there is no cert-manager; in the layout of its Secrets.

    ca/tls.crt, ca/tls.key             the authority: nobody but the one who signs needs the key
    members/NAME/tls.crt, tls.key, ca.crt
    replication/...                    a client certificate with the common name streaming_replica
    control/NAME/...                   of a user who may control

What is there is never overwritten, but by `renew`: then by a new key and certificate when the old one ends soon or its names
have changed. The authority is renewed with its own key, so that what it has signed stays good.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from instance_manager.tls import AUTHORITY, CERTIFICATE, KEY, CertificateUnusable, examine
from instance_manager.wall_clock import now_utc

BEGINS_BEFORE = datetime.timedelta(days=1)
"""Clocks differ; a certificate that begins at its making would be refused by whoever is behind."""
_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


class CertificatesRefused(Exception):
    """What is in the directory is not to be touched, or is not usable; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One certificate."""

    path: str
    """Below the directory, as `members/pg-0`."""
    common_name: str
    names: tuple[str, ...] = ()
    """DNS names and addresses."""
    server: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    authority_days: int = 3650
    days: int = 90
    renew_before_days: int = 30


def member(name: str, names: Iterable[str]) -> Wanted:
    """Of an instance: as a server of Postgres and of peers, and as a client of its peers."""
    return Wanted(path=f"members/{name}", common_name=name, names=tuple(dict.fromkeys((name, *names))))


REPLICATION = Wanted(path="replication", common_name="streaming_replica", server=False)


def user(name: str) -> Wanted:
    """Of somebody who may control."""
    return Wanted(path=f"control/{name}", common_name=name, server=False)


def make(
    directory: Path, wanted: Iterable[Wanted], *, cluster: str, renew: bool, lifetimes: Lifetimes | None = None
) -> tuple[str, ...]:
    """Make what is missing and, with `renew`, what ends soon; what was done, a sentence each. CertificatesRefused, OSError."""
    limits = lifetimes or Lifetimes()
    now = now_utc()
    done: list[str] = []
    authority, key, changed = _authority(directory / "ca", cluster, now, limits, renew=renew, done=done)
    for each in wanted:
        place = directory / each.path
        reason = _reason_to_make(place, each, authority, now, limits)
        if reason is not None and (not (place / CERTIFICATE).exists() or renew):
            _issue(place, each, authority, key, now, limits)
            done.append(f"{place}: {reason}")
        elif changed or not (place / AUTHORITY).exists():
            _write(place / AUTHORITY, _pem(authority), 0o644)
    return tuple(done)


def _authority(
    place: Path, cluster: str, now: datetime.datetime, limits: Lifetimes, *, renew: bool, done: list[str]
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, bool]:
    if not (place / CERTIFICATE).exists() and not (place / KEY).exists():
        key = ec.generate_private_key(ec.SECP256R1())
        authority = _sign_authority(
            key, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} authority")]), now, limits
        )
        _make_directory(place)
        _write(place / KEY, _key_pem(key), 0o600)
        _write(place / CERTIFICATE, _pem(authority), 0o644)
        done.append(f"{place}: a new authority")
        return authority, key, False
    try:
        authority = x509.load_pem_x509_certificate((place / CERTIFICATE).read_bytes())
        loaded = serialization.load_pem_private_key((place / KEY).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificatesRefused(
            f"{place}: there is an authority that cannot be used ({error}); nothing was changed. Bring {KEY} and "
            f"{CERTIFICATE} back, or give another --directory"
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != authority.public_key():
        raise CertificatesRefused(f"{place}: {KEY} is not the key of {CERTIFICATE}; nothing was changed")
    ends_soon = authority.not_valid_after_utc - now < datetime.timedelta(days=limits.days + limits.renew_before_days)
    if renew and ends_soon:
        authority = _sign_authority(loaded, authority.subject, now, limits)
        _write(place / CERTIFICATE, _pem(authority), 0o644)
        done.append(f"{place}: renewed with its own key")
    return authority, loaded, renew and ends_soon


def _sign_authority(
    key: ec.EllipticCurvePrivateKey, name: x509.Name, now: datetime.datetime, limits: Lifetimes
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEGINS_BEFORE)
        .not_valid_after(now + datetime.timedelta(days=limits.authority_days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _reason_to_make(
    place: Path, wanted: Wanted, authority: x509.Certificate, now: datetime.datetime, limits: Lifetimes
) -> str | None:
    if not (place / CERTIFICATE).exists():
        if (place / KEY).exists():
            raise CertificatesRefused(
                f"{place}: there is {KEY} without {CERTIFICATE}; nothing was changed. Remove it first"
            )
        return "made"
    try:
        present = x509.load_pem_x509_certificate((place / CERTIFICATE).read_bytes())
    except ValueError as error:
        raise CertificatesRefused(f"{place / CERTIFICATE} is no certificate ({error}); remove it first") from error
    if present.not_valid_after_utc - now < datetime.timedelta(days=limits.renew_before_days):
        return f"renewed, the old one ends on {present.not_valid_after_utc:%Y-%m-%d}"
    if present.issuer != authority.subject:
        return "renewed, the old one is of another authority"
    if _names_of(present) != set(wanted.names):
        return "renewed, its names have changed"
    return None


def _issue(
    place: Path,
    wanted: Wanted,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    limits: Lifetimes,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    ends = min(now + datetime.timedelta(days=limits.days), authority.not_valid_after_utc)
    purposes = [_SERVER, _CLIENT] if wanted.server else [_CLIENT]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wanted.common_name)]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEGINS_BEFORE)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if wanted.names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in wanted.names]), critical=False
        )
    certificate = builder.sign(authority_key, hashes.SHA256())
    _make_directory(place)
    # In this order: whoever reads a new key with the old certificate keeps what it had, and looks again.
    _write(place / AUTHORITY, _pem(authority), 0o644)
    _write(place / KEY, _key_pem(key), 0o600)
    _write(place / CERTIFICATE, _pem(certificate), 0o644)
    if wanted.server:
        try:
            examine(place)
        except CertificateUnusable as error:
            raise CertificatesRefused(str(error)) from error


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_of(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in names}


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others while it is written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
