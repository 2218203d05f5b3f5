"""The cluster's name server for test pods: it answers from the EndpointSlices of the API, as the cluster's DNS does.

A pod of a headless Service has its own name, and a Service stands for the addresses of its ready endpoints. That holds
for Services with a cluster address too: there is no kube-proxy here that would make such an address lead anywhere.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable

from kube_api import Object

DOMAIN = "cluster.local"
PORT = 53
_A, _INTERNET = 1, 1
_ANSWER, _NAME_ERROR = 0x8580, 0x8583
_TTL_S = 1


def names_of(slices: Iterable[Object]) -> dict[str, list[str]]:
    """The addresses of each full name."""
    found: dict[str, list[str]] = {}
    for piece in slices:
        service = piece["metadata"].get("labels", {}).get("kubernetes.io/service-name")
        if service is None:
            continue
        base = f"{service}.{piece['metadata']['namespace']}.svc.{DOMAIN}"
        found.setdefault(base, [])
        for endpoint in piece.get("endpoints") or ():
            if endpoint.get("conditions", {}).get("ready", True):
                found[base] += endpoint["addresses"]
                if "hostname" in endpoint:
                    found.setdefault(f"{endpoint['hostname']}.{base}", []).extend(endpoint["addresses"])
    return found


def resolver_file(namespace: str, server: str) -> str:
    """A pod's /etc/resolv.conf."""
    return f"nameserver {server}\nsearch {namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\noptions ndots:5\n"


class NameServer:
    """Answers questions for IPv4 addresses on one socket, in a thread of its own."""

    def __init__(self, listening: socket.socket, addresses_of: Callable[[str], list[str] | None]) -> None:
        self._socket = listening
        self._addresses_of = addresses_of
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="name-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._thread.is_alive():
            self._thread.join(5)

    def _serve(self) -> None:
        self._socket.settimeout(0.5)
        while not self._closing:
            with contextlib.suppress(OSError):
                question, client = self._socket.recvfrom(512)
                with contextlib.suppress(ValueError, struct.error, IndexError, UnicodeDecodeError):
                    self._socket.sendto(answer(question, self._addresses_of), client)


def answer(query: bytes, addresses_of: Callable[[str], list[str] | None]) -> bytes:
    """The reply to one query of one question. ValueError: it is none."""
    number, _, questions = struct.unpack_from("!HHH", query)
    if questions != 1:
        raise ValueError("one question at a time")
    labels, offset = [], 12
    while (length := query[offset]) > 0:
        labels.append(query[offset + 1 : offset + 1 + length].decode("ascii"))
        offset += 1 + length
    kind, _ = struct.unpack_from("!HH", query, offset + 1)
    question = query[12 : offset + 5]
    addresses = addresses_of(".".join(labels).lower())
    shown = addresses if addresses is not None and kind == _A else []
    header = struct.pack("!HHHHHH", number, _NAME_ERROR if addresses is None else _ANSWER, 1, len(shown), 0, 0)
    # 0xc00c points back to the name in the question.
    records = [struct.pack("!HHHIH", 0xC00C, _A, _INTERNET, _TTL_S, 4) + socket.inet_aton(address) for address in shown]
    return b"".join((header, question, *records))
