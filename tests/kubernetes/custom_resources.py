"""Custom resources that shipped manifests use and that others define: stand-ins written by hand, so that the server takes the manifests.

Of cert-manager the fields that are used, with their types and words as its reference has them
(https://cert-manager.io/docs/reference/api-docs/): a misspelt one is refused. Of the Prometheus operator the kinds only; its files
are judged by promtool in tests/metrics. Nothing acts on any of them.
"""

from __future__ import annotations

import yaml
from control_plane import ControlPlane
from kube_api import Object

ESTABLISHED_WITHIN = "30s"

_TEXT: Object = {"type": "string"}
_DURATION: Object = {"type": "string", "pattern": "^([0-9]+(h|m|s))+$"}
_TEXTS: Object = {"type": "array", "items": _TEXT}
_ANYTHING: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _fields(required: tuple[str, ...] = (), **properties: Object) -> Object:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


_CERTIFICATE = _fields(
    ("secretName", "issuerRef"),
    secretName=_TEXT,
    commonName={"type": "string", "maxLength": 64},
    dnsNames=_TEXTS,
    isCA={"type": "boolean"},
    duration=_DURATION,
    renewBefore=_DURATION,
    usages={
        "type": "array",
        "items": {"type": "string", "enum": ["digital signature", "key encipherment", "server auth", "client auth"]},
    },
    privateKey=_fields(
        algorithm={"type": "string", "enum": ["RSA", "ECDSA", "Ed25519"]},
        size={"type": "integer"},
        rotationPolicy={"type": "string", "enum": ["Never", "Always"]},
    ),
    issuerRef=_fields(("name",), name=_TEXT, kind=_TEXT, group=_TEXT),
)
_ISSUER = _fields(selfSigned=_fields(crlDistributionPoints=_TEXTS), ca=_fields(("secretName",), secretName=_TEXT))
_DEFINED = (
    ("cert-manager.io", "v1", "Certificate", _CERTIFICATE),
    ("cert-manager.io", "v1", "Issuer", _ISSUER),
    ("monitoring.coreos.com", "v1", "PodMonitor", _ANYTHING),
    ("monitoring.coreos.com", "v1", "PrometheusRule", _ANYTHING),
)


def define(control_plane: ControlPlane) -> None:
    """To the server; from then on it takes objects of these kinds."""
    made = [_definition(*each) for each in _DEFINED]
    control_plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(made))
    names = [f"customresourcedefinition/{each['metadata']['name']}" for each in made]
    control_plane.kubectl("wait", "--for=condition=Established", f"--timeout={ESTABLISHED_WITHIN}", *names)


def _definition(group: str, version: str, kind: str, spec: Object) -> Object:
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _fields(("spec",), spec=spec)},
                }
            ],
        },
    }
