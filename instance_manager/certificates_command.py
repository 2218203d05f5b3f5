"""`instance-manager certificates`: an authority and certificates for a cluster, in the layout of cert-manager's Secrets.

Exit codes: 0 done, or nothing to do; 2 wrong use, or something is in the way: then nothing was changed there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from instance_manager.config import ConfigurationError, load_configuration

if TYPE_CHECKING:
    from instance_manager.certificates import Wanted

_WRONG_USE = 2
_NAME = re.compile(r"[A-Za-z0-9*][A-Za-z0-9.:*_-]{0,62}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", type=Path, required=True, metavar="DIR", help="where they are, or are to be")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="an instance's configuration: a certificate for each member"
    )
    parser.add_argument(
        "--member", action="append", default=[], metavar="NAME=HOST[,HOST...]", help="a member; may be given again"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="another name for all members: of a Service, as clients say it",
    )
    parser.add_argument("--user", action="append", default=[], metavar="NAME", help="a certificate for control")
    parser.add_argument(
        "--cluster", default="cluster", metavar="NAME", help="for the authority's name; default: of --config"
    )
    parser.add_argument("--days", type=_days, default=90, metavar="N", help="life of a certificate (90)")
    parser.add_argument("--ca-days", type=_days, default=3650, metavar="N", help="life of the authority (3650)")
    parser.add_argument(
        "--renew",
        action="store_true",
        help="also renew what ends soon or has other names; what is good is never touched",
    )
    parser.add_argument("--renew-before-days", type=_days, default=30, metavar="N", help="what `soon` is (30)")


def run(namespace: argparse.Namespace) -> int:
    """Make what is missing; prints a line for each."""
    try:
        from instance_manager import certificates
    except ImportError as error:
        return _complain(f"{error}: pip install 'instance-manager[certificates]'")
    try:
        wanted = _wanted(namespace)
        cluster = namespace.cluster
        if namespace.config is not None:
            configuration = load_configuration(namespace.config)
            cluster = configuration.cluster.name
            for member in configuration.members:
                names = (member.host, *namespace.name)
                wanted.append(certificates.member(member.name, names))
        if not any(each.server for each in wanted):
            return _complain("for which members? Give --config FILE, or --member NAME=HOST")
        wanted += [certificates.REPLICATION, *(certificates.user(_checked(name)) for name in namespace.user)]
        done = certificates.make(
            namespace.directory,
            wanted,
            cluster=cluster,
            renew=namespace.renew,
            lifetimes=certificates.Lifetimes(
                authority_days=namespace.ca_days, days=namespace.days, renew_before_days=namespace.renew_before_days
            ),
        )
    except (ConfigurationError, certificates.CertificatesRefused, ValueError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}")
    print(
        "\n".join(done) or f"{namespace.directory}: everything is there{'' if namespace.renew else '; --renew renews'}"
    )
    return 0


def _wanted(namespace: argparse.Namespace) -> list[Wanted]:
    from instance_manager import certificates

    found = []
    for text in namespace.member:
        name, separator, hosts = text.partition("=")
        if not separator:
            raise ValueError(f"--member {text!r} is not NAME=HOST[,HOST...]")
        names = [_checked(host) for host in hosts.split(",")]
        found.append(certificates.member(_checked(name), (*names, *map(_checked, namespace.name))))
    return found


def _checked(name: str) -> str:
    """It becomes a path and a name in a certificate."""
    if _NAME.fullmatch(name) is None or ".." in name:
        raise ValueError(f"{name!r} is no name: letters, digits, '.', '-', '_', 63 at most")
    return name


def _days(text: str) -> int:
    days = int(text) if text.isascii() and text.isdigit() else 0
    if not 0 < days <= 36500:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days above 0")
    return days


def _complain(text: str) -> int:
    print(f"instance-manager certificates: {text}", file=sys.stderr)
    return _WRONG_USE
