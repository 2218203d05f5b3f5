"""What a cluster's pods ask of the API server, by the server's own audit log and metrics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane import Audited
from kube_api import Object

_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_METRIC = re.compile(r"apiserver_request_total\{([^}]*)\} (\S+)")


@dataclass(frozen=True, slots=True)
class Permission:
    """One thing that a rule of a Role grants."""

    group: str
    resource: str
    verb: str
    name: str
    """Empty: every name, or a request that has none."""

    def allows(self, request: Audited) -> bool:
        same = (request.group, request.resource, request.verb) == (self.group, self.resource, self.verb)
        return same and self.name in ("", request.name)


def permissions(role: Object) -> list[Permission]:
    return [
        Permission(group, resource, verb, name)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames") or ("",)
    ]


def writes_counted(metrics: str, resources: Iterable[str]) -> Counter[str]:
    """Successful and failed writes so far to these resources, by all users, from the text of /metrics."""
    wanted = set(resources)
    found: Counter[str] = Counter()
    for labels, value in _METRIC.findall(metrics):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if of.get("resource") in wanted and of.get("verb") in _WRITES:
            found[of["resource"]] += int(float(value))
    return found
