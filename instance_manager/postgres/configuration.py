"""postgresql.conf as a pure function of typed options: what is ours, what is refused, what a user may change.

Two files, both in the data directory and both written whole:

- `postgresql.conf`: static; its last line includes
- `instance-manager.replication.conf`: what changes with the role (synchronous list, primary, slot, restore command). The
  inclusion is not optional: a directory without the file does not start, and so never starts without its list (P1, P8).

`postgresql.auto.conf` (ALTER SYSTEM) is read after both. So before every start and every reload `strip_auto_conf` takes
out what a user may not set; from 17 on ALTER SYSTEM is off as well.
"""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from instance_manager.core.types import MEMBER_ID_PATTERN, MemberId
from instance_manager.postgres.control_data import HotStandbySettings
from instance_manager.postgres.parameters import (
    DEFAULTS,
    FIXED,
    INCLUSION_WORDS,
    MINIMUMS,
    REFUSED,
    RESTART_PARAMETERS,
    minimums_for,
)

POSTGRESQL_CONF = "postgresql.conf"
REPLICATION_CONF = "instance-manager.replication.conf"
AUTO_CONF = "postgresql.auto.conf"
HEADER = "# Written by the instance manager; changes made here are lost.\n"

NOBODY_CAN_SATISFY = 'ANY 1 ("instance-manager: nobody")'
"""A synchronous list that no standby's name can match (no member id has a space): every commit waits. Every standby and
every starting primary runs with it, so that a promotion begins with all commits waiting (P1, P8)."""

NOTHING_SYNCHRONOUS = ""
"""The empty list: no commit waits. Only while the record says q = 0."""

ParameterValue = str | int | float | bool
SslMode = Literal["disable", "prefer", "require", "verify-ca", "verify-full"]

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}(\.[a-z_][a-z0-9_]{0,62})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LINE = re.compile(
    r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_.$]*)(?:\s*=\s*|\s+|(?='))"
    r"(?:'(?P<quoted>(?:[^'\\\n]|\\.|'')*)'|(?P<bare>[^\s'#]+))\s*(?:#.*)?"
)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_STRONG_SYNCHRONOUS_COMMIT = frozenset({"on", "remote_apply", "true", "yes", "1"})


class ParametersRefused(ValueError):
    """Parameters that a user may not set; `problems` has a sentence for each, with the reason."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files of the server's certificate; readable by Postgres's user."""

    certificate: Path
    key: Path
    authority: Path | None = None
    minimum_version: str = "TLSv1.2"


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a member connects to another member's Postgres. Without a root certificate nobody is verified."""

    sslmode: SslMode = "prefer"
    root_certificate: Path | None = None
    certificate: Path | None = None
    """To be shown, with `key`; readable by Postgres's user."""
    key: Path | None = None

    def options(self) -> dict[str, str]:
        """Of a connection string."""
        found = {"sslmode": str(self.sslmode)}
        if self.root_certificate is not None:
            found["sslrootcert"] = str(self.root_certificate)
        if self.certificate is not None and self.key is not None:
            found |= {"sslcert": str(self.certificate), "sslkey": str(self.key)}
        return found

    def for_asyncpg(self) -> ssl.SSLContext | SslMode:
        """What asyncpg takes for `ssl`: it would look for the files in the home directory."""
        if self.root_certificate is None:
            return self.sslmode
        context = ssl.create_default_context(cafile=str(self.root_certificate))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.check_hostname = self.sslmode == "verify-full"
        if self.certificate is not None and self.key is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(frozen=True, slots=True)
class CollectedLog:
    """Files of Postgres's log collector, in a directory of Postgres's user."""

    directory: Path
    filename: str
    """For strftime; ends in `.log`."""
    file_bytes: int
    """A file is left for the next when it is so large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticSettings:
    """Everything that postgresql.conf is made of."""

    major: int
    cluster_name: str
    """Shown in the process list; the member's id."""
    listen_address: str
    """Empty: the Unix socket only (bootstrap)."""
    port: int
    socket_directory: Path
    instances: int
    """Members of the cluster: each needs a slot and a walsender on every other."""
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    """What the user asks for."""
    tls: TlsFiles | None = None
    archive_command: str | None = None
    """None: no archiving. Switching it on needs a restart. (With `archive_mode` on and no command WAL is kept for ever.)"""
    summarize_wal: bool = False
    """For incremental backups, on Postgres 17 and later."""
    log: CollectedLog | None = None
    """None: plain lines on standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationSettings:
    """Everything that instance-manager.replication.conf is made of; may change by a reload."""

    synchronous_standby_names: str = NOBODY_CAN_SATISFY
    primary_conninfo: str = ""
    """Empty: follow nobody."""
    primary_slot_name: str = ""
    restore_command: str = ""
    hot_standby: HotStandbySettings | None = None
    """On a standby: the values it must start with, by `settings_for_standby`; takes effect at a start only."""


def check_parameter(name: str, value: ParameterValue) -> str | None:
    """Why a user may not set this parameter to this value, as a sentence; None: allowed."""
    if _NAME.fullmatch(name) is None:
        return f"{name!r} is no name of a parameter (lower-case letters, digits and _, with at most one dot)"
    if name in INCLUSION_WORDS:
        return f"{name}: the instance manager writes the whole configuration; there is nothing to include"
    reason = FIXED.get(name) or REFUSED.get(name)
    if name == "wal_level":
        reason = None if value in ("replica", "logical") else "replication needs replica or logical"
    elif name == "synchronous_commit":
        reason = (
            None
            if _is_strong(value)
            else (
                "below on as the default of everybody it acknowledges commits that no standby has flushed; "
                "set it in the session or for the role that can afford the loss"
            )
        )
    elif name in MINIMUMS and reason is None:
        minimum = MINIMUMS[name]
        if not isinstance(value, int) or isinstance(value, bool):
            reason = "must be a whole number"
        elif value < minimum:
            reason = f"the instance manager itself needs {minimum}"
    if reason is not None:
        return f"{name}: {reason}"
    try:
        render_value(value)
    except ValueError as error:
        return f"{name}: {error}"
    return None


def check_parameters(parameters: Mapping[str, ParameterValue]) -> tuple[str, ...]:
    """All that is wrong with a user's parameters, a sentence each; empty: nothing."""
    return tuple(
        problem for name, value in sorted(parameters.items()) if (problem := check_parameter(name, value)) is not None
    )


def render_value(value: ParameterValue) -> str:
    """The value as it stands in a configuration file, quoted so that it stays one value on one line.

    ValueError: a control character, or a number that is none.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("not a finite number")
        return f"'{value!r}'"
    if _CONTROL.search(value) is not None:
        raise ValueError("a value must be one line without control characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a value must be valid Unicode") from None
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def render_settings(settings: Mapping[str, ParameterValue]) -> str:
    """One line for each, in the given order. ValueError: a name or a value that cannot be written safely."""
    lines = []
    for name, value in settings.items():
        if _NAME.fullmatch(name) is None or name in INCLUSION_WORDS:
            raise ValueError(f"not a name of a parameter: {name!r}")
        lines.append(f"{name} = {render_value(value)}\n")
    return "".join(lines)


def parse_settings(text: str) -> dict[str, str]:
    """Names (lower case) and values of a configuration file, the last of each; inclusions are names like any other.

    ValueError: a line that Postgres would refuse. Reads what `render_settings` and ALTER SYSTEM write.
    """
    found: dict[str, str] = {}
    for line in text.split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, value = _parse_line(line)
        found[name] = value
    return found


def render_postgresql_conf(settings: StaticSettings) -> str:
    """The text of postgresql.conf. ParametersRefused: all that the user may not set, at once."""
    problems = check_parameters(settings.parameters)
    if problems:
        raise ParametersRefused(problems)
    summaries: dict[str, ParameterValue] = {"summarize_wal": True} if _can_summarize(settings) else {}
    rendered: dict[str, ParameterValue] = {**DEFAULTS, **summaries, **settings.parameters}
    for name, minimum in minimums_for(settings.instances).items():
        rendered[name] = max(minimum, int(rendered.get(name, minimum)))
    rendered |= _fixed_values(settings)
    return (
        HEADER
        + render_settings(dict(sorted(rendered.items())))
        + "# What changes with the role, and so must come last.\n"
        + f"include '{REPLICATION_CONF}'\n"
    )


def render_replication_conf(settings: ReplicationSettings) -> str:
    """The text of instance-manager.replication.conf. ValueError: a value that cannot be written safely."""
    rendered: dict[str, ParameterValue] = {
        "synchronous_standby_names": settings.synchronous_standby_names,
        "primary_conninfo": settings.primary_conninfo,
        "primary_slot_name": settings.primary_slot_name,
        "restore_command": settings.restore_command,
    }
    if settings.hot_standby is not None:
        rendered |= asdict(settings.hot_standby)
    return HEADER + render_settings(rendered)


def render_synchronous_standby_names(count: int, members: Iterable[MemberId]) -> str:
    """`ANY count (members)`, sorted and quoted; empty for 0. ValueError: more than there are, or no member's id."""
    names = sorted(set(members))
    if count == 0:
        return NOTHING_SYNCHRONOUS
    if not 0 < count <= len(names):
        raise ValueError(f"{count} synchronous standbys of {len(names)}")
    for name in names:
        if MEMBER_ID_PATTERN.fullmatch(name) is None:
            raise ValueError(f"not the id of a member: {name!r}")
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"ANY {count} ({quoted})"


@dataclass(frozen=True, slots=True)
class StrippedAutoConf:
    """`text` is what may stay of postgresql.auto.conf; `warnings` says what was taken out and why."""

    text: str
    warnings: tuple[str, ...]


def strip_auto_conf(text: str) -> StrippedAutoConf:
    """Take out of postgresql.auto.conf what a user may not set, and lines that are none.

    What ALTER SYSTEM sets beats postgresql.conf: a synchronous list or `fsync = off` left there would undo the promise.
    """
    kept = []
    warnings = []
    for line in text.split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            kept.append(line)
            continue
        try:
            name, value = _parse_line(line)
        except ValueError:
            warnings.append("postgresql.auto.conf: a line that is no setting was removed")
            continue
        number = int(value) if re.fullmatch(r"-?\d{1,18}", value) else value
        problem = check_parameter(name, number)
        if problem is None:
            kept.append(line)
        else:
            warnings.append(f"postgresql.auto.conf (ALTER SYSTEM): removed {problem}")
    return StrippedAutoConf("\n".join(kept), tuple(warnings))


def without_settings(text: str, names: frozenset[str]) -> str:
    """`text`, a configuration file, with the lines of these settings as comments; so too what pulls in other files, or cannot be read."""

    def is_wanted(line: str) -> bool:
        if not line.strip() or line.lstrip().startswith("#"):
            return True
        try:
            name, _ = _parse_line(line)
        except ValueError:
            return False
        return name not in names | INCLUSION_WORDS

    return "\n".join(line if is_wanted(line) else f"# {line}" for line in text.split("\n"))


def render_conninfo(options: Mapping[str, str | int]) -> str:
    """A libpq connection string; values quoted. ValueError: a control character, or a strange keyword."""
    parts = []
    for keyword, value in options.items():
        text = str(value)
        if re.fullmatch(r"[a-z_]+", keyword) is None or _CONTROL.search(text) is not None:
            raise ValueError(f"cannot be in a connection string: {keyword!r}")
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        parts.append(f"{keyword}='{quoted}'")
    return " ".join(parts)


def replication_conninfo(
    *, host: str, port: int, user: str, passfile: Path, application_name: str, tls: ClientTls | None = None
) -> str:
    """primary_conninfo of a standby. The password is in `passfile` only. A dead peer is noticed within about 3 s."""
    return render_conninfo(
        {
            "host": host,
            "port": port,
            "user": user,
            "passfile": str(passfile),
            "application_name": application_name,
            **(tls or ClientTls()).options(),
            "gssencmode": "disable",
            "connect_timeout": 3,
            "keepalives_idle": 2,
            "keepalives_interval": 1,
            "keepalives_count": 2,
            "tcp_user_timeout": 3000,
        }
    )


def changes_that_need_restart(before: str, after: str) -> tuple[str, ...]:
    """Names whose value differs between two rendered files and is read at a start only.

    Only parameters of Postgres itself are known; for those of libraries see `pending_restart` in pg_settings.
    """
    old = parse_settings(before)
    new = parse_settings(after)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    return tuple(sorted(changed & RESTART_PARAMETERS))


def _can_summarize(settings: StaticSettings) -> bool:
    return settings.summarize_wal and settings.major >= 17


def _fixed_values(settings: StaticSettings) -> dict[str, ParameterValue]:
    values: dict[str, ParameterValue] = {
        "listen_addresses": settings.listen_address,
        "port": settings.port,
        "unix_socket_directories": str(settings.socket_directory),
        "unix_socket_permissions": "0777",
        "cluster_name": settings.cluster_name,
        "hot_standby": True,
        "fsync": True,
        "full_page_writes": True,
        "wal_log_hints": True,
        "restart_after_crash": False,
        "data_sync_retry": False,
        "recovery_target_timeline": "latest",
        "archive_mode": settings.archive_command is not None,
        "archive_command": settings.archive_command or "",
        "password_encryption": "scram-sha-256",
        "log_timezone": "UTC",
        **_log_values(settings),
        "wal_receiver_timeout": "3s",
        "wal_receiver_status_interval": "1s",
        "wal_retrieve_retry_interval": "200ms",
        "wal_receiver_create_temp_slot": False,
        "ssl": settings.tls is not None,
    }
    if settings.tls is not None:
        values["ssl_cert_file"] = str(settings.tls.certificate)
        values["ssl_key_file"] = str(settings.tls.key)
        values["ssl_min_protocol_version"] = settings.tls.minimum_version
        if settings.tls.authority is not None:
            values["ssl_ca_file"] = str(settings.tls.authority)
    if settings.major >= 17:
        values["allow_alter_system"] = False
    if settings.major >= 18:
        values["idle_replication_slot_timeout"] = 0
    return values


def _log_values(settings: StaticSettings) -> dict[str, ParameterValue]:
    """The collector's files are bounded by whoever reads them: it deletes what it has told."""
    if settings.log is None:
        return {"logging_collector": False, "log_destination": "stderr"}
    return {
        "logging_collector": True,
        "log_destination": "jsonlog" if settings.major >= 15 else "csvlog",
        "log_directory": str(settings.log.directory),
        "log_filename": settings.log.filename,
        "log_file_mode": "0600",
        "log_rotation_age": 0,
        "log_rotation_size": f"{settings.log.file_bytes // 1024}kB",
        "log_truncate_on_rotation": False,
    }


def _is_strong(value: ParameterValue) -> bool:
    return value is True or (not isinstance(value, bool) and str(value) in _STRONG_SYNCHRONOUS_COMMIT)


def _parse_line(line: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"not a line of a configuration file: {line[:200]!r}")
    if match["bare"] is not None:
        return match["name"].lower(), match["bare"]
    value = re.sub(
        r"''|\\([0-7]{1,3})|\\(.)",
        lambda found: (
            "'" if found[0] == "''" else chr(int(found[1], 8) & 0xFF) if found[1] else _ESCAPES.get(found[2], found[2])
        ),
        match["quoted"],
    )
    return match["name"].lower(), value
