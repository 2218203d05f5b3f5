"""A small pod for the tests of the runner: an HTTP server that answers from files, so that a test decides what it says."""

from __future__ import annotations

from pathlib import Path

from kube_api import Object
from pod_image import USER, Image, interpreter

SIMPLE_IMAGE = "simple"
PORT = 8080
_SCRIPT = """\
import http.server, os, pathlib, signal, sys

answers = pathlib.Path("/tmp")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        fails = (answers / f"fail-{name}").exists()
        self.send_response(500 if fails else 200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())

    def log_message(self, form, *arguments):
        print(form % arguments, flush=True)

def end(number, frame):
    pathlib.Path("/dev/termination-log").write_text("told to end")
    sys.exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("STUBBORN") else end)
pathlib.Path("/dev/termination-log").write_text("started as " + os.environ["POD_NAME"])
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""


def simple_image() -> Image:
    python, mounts = interpreter()
    return Image(
        entrypoint=("python3", "-I", "-S", "-c", _SCRIPT),
        environment={"PATH": f"{Path(python).parent}:/usr/bin:/bin"},
        mounts=mounts,
    )


def simple_pod(name: str, **overrides: object) -> Object:
    """That the restricted policy admits. `overrides` are of the container."""
    probe = {"periodSeconds": 1, "httpGet": {"path": "/ready", "port": "http"}}
    container = {
        "name": "main",
        "image": f"{SIMPLE_IMAGE}:test",
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": [
            {"name": name.upper().replace(".", "_"), "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in (("pod_name", "metadata.name"), ("pod_ip", "status.podIP"), ("pod_uid", "metadata.uid"))
        ],
        "startupProbe": {"periodSeconds": 1, "failureThreshold": 20, "httpGet": {"path": "/started", "port": "http"}},
        "readinessProbe": probe,
        "livenessProbe": {**probe, "httpGet": {"path": "/live", "port": PORT}, "failureThreshold": 2},
        "volumeMounts": [
            {"name": "settings", "mountPath": "/etc/settings", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        **overrides,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 5,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": [
                {"name": "settings", "configMap": {"name": "settings"}},
                {"name": "tmp", "emptyDir": {}},
            ],
            "containers": [container],
        },
    }
