"""The certificates of one instance, as they were last proven, and what is served by them.

Each set is copied below the instance's state, proven there, and only then used: a half-written or wrong one in the user's
directory costs nothing, and an agent that restarts over a broken one goes on with the last good copy. Everything here blocks
on the disk: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instance_manager.config_security import ControlSection, TlsSection
from instance_manager.status import CertificateStatus
from instance_manager.tls import (
    FILES,
    CertificateFacts,
    CertificateUnusable,
    client_context,
    covers,
    examine,
    server_context,
)

REPLICATION_NAME = "streaming_replica"
"""Postgres takes the common name of the certificate as the name of the role."""
ALARM_DAYS = 14
ALARM_SHARE = 0.2
"""A certificate that lives for a day only is no alarm in its last fortnight: less than a fifth of its life left is."""
_DAY_S = 86400.0
_FILE_BYTES_MAX = 1024 * 1024

Signature = tuple[tuple[int, int, int, int] | None, ...]


@dataclass(slots=True)
class _Set:
    use: str
    source: Path
    copy: Path
    server: Path | None = None
    """For a client's certificate: of the server that it is proven against."""
    common_name: str | None = None
    """That it must have."""
    host: str | None = None
    """That one of its names must cover."""
    mutual: bool = False
    """Also a client's, at servers of the same set."""
    seen: Signature | None = None
    facts: CertificateFacts | None = None
    problem: str | None = None
    """Why what is in `source` is not used."""


class Certificates:
    """Of every use that the configuration names. `look` reads what has changed and replaces the contexts."""

    def __init__(
        self,
        tls: TlsSection,
        control: ControlSection | None,
        copies: Path,
        own: Callable[[Path], None] = lambda _: None,
        *,
        host: str | None = None,
    ) -> None:
        """`copies`: a directory of this instance, made when needed. `own`: gives a file to Postgres's user. `host`: by which
        its peers know this instance."""
        self._tls = tls
        self._copies = copies
        self._own = own
        self._looking = threading.Lock()
        self._sets: dict[str, _Set] = {}
        for use, source in (("postgres", tls.for_postgres), ("peers", tls.for_peers)):
            if source is not None:
                self._sets[use] = _Set(use, source, copies / use)
        if "peers" in self._sets:
            self._sets["peers"].host, self._sets["peers"].mutual = host, True
        if tls.replication is not None:
            self._sets["replication"] = _Set(
                "replication", tls.replication, copies / "replication", copies / "postgres", REPLICATION_NAME
            )
        if control is not None and tls.for_control is not None:
            self._sets["control"] = _Set("control", tls.for_control, copies / "control")
        self.replaced_at_start: tuple[str, ...] = ()
        """Uses of which `load` found something else than the copy: a Postgres that outlived an agent still serves that."""
        self.peers_server: ssl.SSLContext | None = None
        self.peers_client: ssl.SSLContext | None = None
        self.control_server: ssl.SSLContext | None = None

    def directory(self, use: str) -> Path | None:
        """Where the proven copy of a use is; None: it is not configured."""
        return self._sets[use].copy if use in self._sets else None

    def load(self) -> None:
        """At the start. CertificateUnusable: a use has neither a good set nor a copy of an earlier one."""
        before = {use: _content(each.copy) for use, each in self._sets.items()}
        self.look()
        self.replaced_at_start = tuple(use for use, each in self._sets.items() if _content(each.copy) != before[use])
        for each in self._sets.values():
            if each.facts is None:
                self._take_copy(each)

    def look(self) -> tuple[str, ...]:
        """Take over what is new and good; the uses that were replaced. Problems are kept for `remarks`.

        Nothing while another thread is at it: one that hung on the disk and was given up may go on at any time.
        """
        if not self._looking.acquire(blocking=False):
            return ()
        try:
            return self._look()
        finally:
            self._looking.release()

    def _look(self) -> tuple[str, ...]:
        replaced = []
        for each in self._sets.values():
            now = _signature(each.source)
            if now == each.seen:
                continue
            try:
                facts = self._take_over(each)
            except (CertificateUnusable, OSError) as error:
                # Looked at again the next time: it may have been read while it was replaced.
                each.problem = f"the new certificate is not used: {error}" if each.facts is not None else str(error)
                continue
            each.seen, each.facts, each.problem = now, facts, None
            self._build(each)
            replaced.append(each.use)
        return tuple(replaced)

    def problems(self) -> tuple[str, ...]:
        """What is wrong with the files as they are now, a sentence each; nothing is copied, and nothing taken over."""
        found = []
        for each in self._sets.values():
            try:
                _prove(each, each.source, self._sets["postgres"].source if each.server is not None else None)
            except CertificateUnusable as error:
                found.append(f"tls.{each.use}: {error}")
        return tuple(found)

    def remarks(self, now_s: float) -> tuple[str, ...]:
        """What somebody should look at, a sentence each. `now_s`: seconds since 1970."""
        found = []
        for each in self._sets.values():
            if each.problem is not None:
                found.append(f"tls.{each.use}: {each.problem}")
            if each.facts is not None and (text := _alarm(each.facts, now_s)) is not None:
                found.append(f"tls.{each.use}: the certificate {text}")
        return tuple(found)

    def statuses(self, now_s: float) -> tuple[CertificateStatus, ...]:
        return tuple(
            CertificateStatus(
                use=each.use,
                names=tuple(sorted(each.facts.names)) if each.facts is not None else (),
                days_left=round((each.facts.ends_s - now_s) / _DAY_S, 1) if each.facts is not None else None,
                problem=each.problem,
            )
            for each in self._sets.values()
        )

    def _take_over(self, each: _Set) -> CertificateFacts:
        new = each.copy.with_name(f"{each.copy.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        _make_directory(self._copies, self._own)
        _make_directory(new, self._own)
        try:
            for name in FILES:
                _copy(each.source / name, new / name, self._own)
            facts = _prove(each, new, each.server)
            _make_directory(each.copy, self._own)
            for name in FILES:
                (new / name).replace(each.copy / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return facts

    def _take_copy(self, each: _Set) -> None:
        problem = each.problem
        try:
            each.facts = examine(each.copy, server=each.copy if each.mutual else each.server)
        except CertificateUnusable as error:
            # One that has ended still lets those in who do not look; what cannot be loaded at all is the end.
            try:
                server_context(each.copy, clients="none")
            except CertificateUnusable:
                raise CertificateUnusable(f"tls.{each.use}: {problem}") from error
        each.problem = f"{problem}; the copy of an earlier one is used"
        self._build(each)

    def _build(self, each: _Set) -> None:
        version = self._tls.minimum_version
        if each.use == "peers":
            self.peers_server = server_context(each.copy, clients="required", minimum_version=version)
            self.peers_client = client_context(each.copy, minimum_version=version)
        elif each.use == "control":
            self.control_server = server_context(each.copy, clients="optional", minimum_version=version)


def _prove(each: _Set, directory: Path, server: Path | None) -> CertificateFacts:
    facts = examine(directory, server=directory if each.mutual else server)
    if each.common_name is not None and facts.common_name != each.common_name:
        raise CertificateUnusable(
            f"{each.source}: the common name is {facts.common_name!r}, and must be {each.common_name!r}"
        )
    if each.host is not None and not any(covers(name, each.host) for name in facts.names):
        raise CertificateUnusable(
            f"{each.source}: its names do not cover {each.host}, by which the other members know this one"
        )
    return facts


def _alarm(facts: CertificateFacts, now_s: float) -> str | None:
    left_s = facts.ends_s - now_s
    if left_s <= 0:
        return "has ended: whoever checks it refuses"
    if left_s < min(ALARM_DAYS * _DAY_S, ALARM_SHARE * (facts.ends_s - facts.begins_s)):
        return f"ends in {left_s / _DAY_S:.1f} days, and was not renewed"
    return None


def _signature(directory: Path) -> Signature:
    """Of what the paths lead to: the kubelet replaces the folder `..data` behind the files' symbolic links."""
    found: list[tuple[int, int, int, int] | None] = []
    for name in FILES:
        try:
            state = (directory / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


def _content(directory: Path) -> tuple[bytes | None, ...]:
    return tuple(_read(directory / name) for name in FILES)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _make_directory(path: Path, own: Callable[[Path], None]) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    own(path)


def _copy(source: Path, target: Path, own: Callable[[Path], None]) -> None:
    try:
        with source.open("rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise CertificateUnusable(f"{source} cannot be read: {error.strerror}") from error
    if len(content) > _FILE_BYTES_MAX:
        raise CertificateUnusable(f"{source} is longer than {_FILE_BYTES_MAX} bytes")
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
    own(target)
