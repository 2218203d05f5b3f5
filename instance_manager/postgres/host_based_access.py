"""pg_hba.conf and pg_ident.conf: who may log in, and from where.

Two states. *Closed*: the agent over the Unix socket, and the members' replication. *Open*: applications too. A server
starts closed, and is opened when its role and its quorum allow (P8: after a crash it shows rows that no standby has).

The first line that matches decides, so our lines come first: a user's line can add access, and never lends the
superuser or the replication user to anybody.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from instance_manager.postgres.configuration import HEADER

AGENT_MAP = "instance_manager"
REPLICATION_ROLE = "streaming_replica"
MONITORING_ROLE = "instance_manager_monitor"

_LAST_OF_CLOSED = f'host replication "{REPLICATION_ROLE}" all reject'
_ALWAYS_OF_OPEN = "local all all scram-sha-256"
_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_TYPES = frozenset({"local", "host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc"})
_METHODS = frozenset({"scram-sha-256", "cert", "reject", "gss", "ldap", "radius", "pam", "oauth", "peer"})
_TOKEN = re.compile(r'(?:"[^"]*"|[^\s"])+')
_ITEM = r'(?:"[^"]+"|[^\s",]+)'
_ITEMS = re.compile(rf"{_ITEM}(?:,{_ITEM})*")
_OPTION = re.compile(r'[a-z_]+=(?:"[^"]*"|[^\s",]+)|"[a-z_]+=[^"]*"')
_MAPPED = frozenset({"map"})
_OPTIONS: dict[str, frozenset[str]] = {
    "scram-sha-256": frozenset(),
    "reject": frozenset(),
    "cert": _MAPPED,
    "peer": _MAPPED,
    "gss": _MAPPED | {"include_realm", "krb_realm"},
    "pam": frozenset({"pamservice", "pam_use_hostname"}),
    "radius": frozenset({"radiusservers", "radiussecrets", "radiusports", "radiusidentifiers"}),
    "ldap": frozenset(
        f"ldap{name}"
        for name in (
            *("server", "port", "scheme", "tls", "prefix", "suffix", "basedn", "binddn", "bindpasswd"),
            *("searchattribute", "searchfilter", "url"),
        )
    ),
    "oauth": _MAPPED | {"issuer", "scope", "validator", "delegate_ident_mapping"},
}
_OF_CERTIFICATES = frozenset({"clientcert", "clientname"})
_NEEDED: dict[str, tuple[frozenset[str], ...]] = {
    "ldap": (
        frozenset({"ldapserver", "ldapurl"}),
        frozenset({"ldapbasedn", "ldapprefix", "ldapsuffix", "ldapurl"}),
    ),
    "radius": (frozenset({"radiusservers"}), frozenset({"radiussecrets"})),
    "oauth": (frozenset({"issuer"}), frozenset({"scope"})),
}
"""A server does not start with a line that lacks one of each: the whole instance would be down for it."""


class Access(enum.Enum):
    """Who is let in."""

    CLOSED = "closed"
    """The agent, as superuser or for monitoring, and replication by members."""
    OPEN = "open"
    """Applications too, and monitoring from outside."""


class AccessLineRefused(ValueError):
    """A user's line of pg_hba.conf that is malformed or would give away what is ours; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSettings:
    """Everything that pg_hba.conf is made of."""

    superuser: str = "postgres"
    replication_networks: Sequence[str] = ()
    """Networks (CIDR) or host names of the members; empty: from anywhere, by password."""
    application_networks: Sequence[str] = ()
    """Networks from which any role with a password may log in."""
    lines: Sequence[str] = field(default=())
    """The user's own lines, before the ones for `application_networks`."""
    require_tls: bool = False
    """Of members and of everybody by `application_networks`; a user's own line says for itself."""
    replication_by_certificate: bool = False
    """Members prove themselves by a certificate with the role's name; their password does not count then."""
    superuser_networks: Sequence[str] = ()
    """From where the superuser may log in with a password, over TLS; by default from nowhere."""


def render_hba(settings: AccessSettings, access: Access) -> str:
    """The text of pg_hba.conf. AccessLineRefused: a user's line; ValueError: a network."""
    superuser = _quoted(settings.superuser)
    replication = _quoted(REPLICATION_ROLE)
    host = "hostssl" if settings.require_tls else "host"
    lines = [
        f"local all {superuser} peer map={AGENT_MAP}",
        f"local replication {superuser} peer map={AGENT_MAP}",
        f"local all {_quoted(MONITORING_ROLE)} peer map={AGENT_MAP}",
    ]
    if access is Access.OPEN:
        lines += [f"hostssl all {superuser} {n} scram-sha-256" for n in _networks(settings.superuser_networks)]
    lines += [
        f"host all {superuser} all reject",
        f"host replication {superuser} all reject",
    ]
    for network in _networks(settings.replication_networks) or ("all",):
        # pg_rewind is an ordinary connection, to the database postgres.
        if settings.replication_by_certificate:
            lines.append(f"hostssl replication,postgres {replication} {network} cert")
        else:
            lines.append(f"{host} replication,postgres {replication} {network} scram-sha-256")
    lines += [
        f"local all,replication {replication} reject",
        f"host all {replication} all reject",
        _LAST_OF_CLOSED,
    ]
    users = [check_line(line) for line in settings.lines]
    networks = _networks(settings.application_networks)
    if access is Access.OPEN:
        lines += users
        lines.append(_ALWAYS_OF_OPEN)
        lines += [f"{host} all all {network} scram-sha-256" for network in networks]
    return HEADER + "".join(f"{line}\n" for line in lines)


def rendered_access(text: str) -> Access | None:
    """The state for which `render_hba` made this text, whatever the settings were; None: it did not, or somebody edited it."""
    if not text.startswith(HEADER):
        return None
    lines = text.splitlines()
    if _ALWAYS_OF_OPEN in lines:
        return Access.OPEN
    return Access.CLOSED if lines[-1] == _LAST_OF_CLOSED else None


def render_ident(*, agent_os_user: str, superuser: str = "postgres") -> str:
    """The text of pg_ident.conf: the agent's operating system user may be the superuser and the monitoring role.

    ValueError: a strange name of a user. Postgres's own operating system user is not let in, unless it is the agent's.
    """
    if _USER_NAME.fullmatch(agent_os_user) is None:
        raise ValueError(f"strange name of an operating system user: {agent_os_user!r}")
    return HEADER + "".join(f'{AGENT_MAP} "{agent_os_user}" {_quoted(role)}\n' for role in (superuser, MONITORING_ROLE))


def check_line(line: str) -> str:
    """A user's line of pg_hba.conf, with single blanks; AccessLineRefused for what must not be in the file.

    Allowed: the usual types and methods with a password, a certificate or a directory service. Refused: `trust`,
    `password`, `md5` and `ident` (they let in without proof, or with a password that travels or is stored weakly),
    replication (walsenders count as copies: P7), inclusions, and more than one line.
    """
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", line) is not None:
        raise AccessLineRefused(f"not one line of pg_hba.conf: {shown_line(line)[:200]!r}")
    bare = line.strip()
    if bare.count('"') % 2 or bare.endswith("\\") or "@" in bare or "#" in re.sub(r'"[^"]*"', "", bare):
        raise AccessLineRefused(f"comments, odd quotes, continuation and @ files are not allowed: {shown_line(bare)!r}")
    tokens = _TOKEN.findall(bare)
    if not tokens or tokens[0] not in _TYPES:
        raise AccessLineRefused(f"must begin with one of {', '.join(sorted(_TYPES))}: {shown_line(bare)!r}")
    address_count = 0 if tokens[0] == "local" else 1
    rest = tokens[3:]
    if address_count and len(rest) > 2 and _is_address(rest[1]):
        # Address and mask in two columns.
        address_count = 2
    if len(rest) <= address_count:
        raise AccessLineRefused(f"type, database, user, address and method are needed: {shown_line(bare)!r}")
    method, *options = rest[address_count:]
    for field_ in (*tokens[1:3], *rest[:address_count]):
        if _ITEMS.fullmatch(field_) is None:
            raise AccessLineRefused(
                f"{field_!r} must be names with commas and no blanks between them: {shown_line(bare)!r}"
            )
    if method not in _METHODS:
        raise AccessLineRefused(
            f"method {method!r} is not allowed, only {', '.join(sorted(_METHODS))}: {shown_line(bare)!r}"
        )
    if any(_OPTION.fullmatch(option) is None for option in options):
        raise AccessLineRefused(f"options are written name=value: {shown_line(bare)!r}")
    if any(option.replace('"', "") == f"map={AGENT_MAP}" for option in options):
        raise AccessLineRefused(f"the map {AGENT_MAP} is the instance manager's: {shown_line(bare)!r}")
    _check_options(tokens[0], method, options, bare)
    databases = tokens[1].split(",")
    if any(database.strip('"').lower() == "replication" for database in databases):
        raise AccessLineRefused(f"replication is for members only (a walsender counts as a copy): {shown_line(bare)!r}")
    return " ".join(tokens)


def _check_options(kind: str, method: str, options: Sequence[str], bare: str) -> None:
    names = {option.replace('"', "").partition("=")[0] for option in options}
    allowed = _OPTIONS[method] | (_OF_CERTIFICATES if kind == "hostssl" else frozenset())
    if unknown := names - allowed:
        raise AccessLineRefused(f"{method} has no option {min(unknown)}: {shown_line(bare)!r}")
    for one_of in _NEEDED.get(method, ()):
        if not names & one_of:
            raise AccessLineRefused(f"{method} needs {' or '.join(sorted(one_of))}: {shown_line(bare)!r}")
    if (method == "peer" and kind != "local") or (method in ("cert",) and kind != "hostssl"):
        raise AccessLineRefused(f"{method} is not for {kind}: {shown_line(bare)!r}")


def shown_line(line: str) -> str:
    """A user's line as it may be told and logged: without passwords and secrets."""
    whole = re.sub(r'("[a-z_]*(?:passwd|secrets?)=)[^"]*', r"\1...", line)
    return re.sub(r'((?:passwd|secrets?)=)("[^"]*"?|[^\s"]+)', r"\1...", whole)


def _networks(networks: Iterable[str]) -> tuple[str, ...]:
    """Checked and in one form: a CIDR network, or a host name."""
    found = []
    for each in networks:
        try:
            found.append(str(ipaddress.ip_network(each, strict=False)))
        except ValueError:
            if re.fullmatch(r"\.?[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?", each) is None or each.lower() in (
                "all",
                "samehost",
                "samenet",
            ):
                raise ValueError(f"neither a network nor a host name: {each!r}") from None
            found.append(each)
    return tuple(dict.fromkeys(found))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _quoted(name: str) -> str:
    if _USER_NAME.fullmatch(name) is None:
        raise ValueError(f"strange name of a role: {name!r}")
    return f'"{name}"'
