"""The network of the test pods, made of namespaces only: the machine's own interfaces and routes are never touched.

control plane, probes, clients ── bridge ── pod 1, pod 2, ...

The switch is a namespace with one bridge; the API server, the name server and the tests' clients stand in it at one
address. Each pod is a namespace with one cable to the bridge, at an address that no earlier pod of the run had.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

SWITCH_ADDRESS = "10.78.0.1"
NETWORK = "10.78.0.0/16"
_RUN = Path("/run/netns")
_DEADLINE_S = 10.0
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NetworkFailed(Exception):
    """A command of `ip` failed; the text is its own."""


def why_unavailable() -> str | None:
    """Why this machine cannot run pods, for the user; None if it can."""
    if os.geteuid() != 0:
        return "pods run in namespaces, which need root"
    missing = [program for program in ("ip", "nsenter", "mount") if shutil.which(program) is None]
    return f"pods need {' and '.join(missing)} (packages iproute2, util-linux)" if missing else None


class PodNetwork:
    """`close` deletes all of it, whatever state it is in; the processes in it must be gone."""

    def __init__(self) -> None:
        self._prefix = f"imk{os.getpid()}"
        self._made: list[str] = []
        self._addresses = 1
        self._lock = threading.Lock()

    def open(self) -> None:
        """NetworkFailed: nothing is left."""
        try:
            self._add_namespace(self._switch)
            self._ip(self._switch, "link", "add", "pods", "type", "bridge")
            self._ip(self._switch, "addr", "add", f"{SWITCH_ADDRESS}/16", "dev", "pods")
            self._ip(self._switch, "link", "set", "pods", "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for namespace in reversed(self._made):
            with contextlib.suppress(NetworkFailed):
                _ip("netns", "del", namespace)
        self._made.clear()

    def enter(self) -> tuple[str, ...]:
        """Before a command: run it where the API server and the clients are."""
        return ("nsenter", f"--net={_RUN / self._switch}")

    def connect(self, host: str, port: int, timeout_s: float) -> socket.socket:
        """A connection from the switch; OSError."""
        return _connect(_RUN / self._switch, host, port, timeout_s)

    def datagrams(self, port: int) -> socket.socket:
        """A UDP socket at the switch's address."""
        with _standing_in(_RUN / self._switch):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((SWITCH_ADDRESS, port))
        return made

    def add_pod(self) -> PodLink:
        """A namespace with a new address and a cable to the bridge."""
        with self._lock:
            self._addresses += 1
            number = self._addresses
        link = PodLink(
            f"{self._prefix}-{number}", f"10.78.{number // 256}.{number % 256}", f"pod{number}", self._switch
        )
        self._add_namespace(link.namespace)
        self._ip(
            self._switch, "link", "add", link.port, "type", "veth", "peer", "name", "eth0", "netns", link.namespace
        )
        self._ip(self._switch, "link", "set", link.port, "master", "pods")
        self._ip(self._switch, "link", "set", link.port, "up")
        self._ip(link.namespace, "addr", "add", f"{link.address}/16", "dev", "eth0")
        self._ip(link.namespace, "link", "set", "eth0", "up")
        return link

    def remove_pod(self, link: PodLink) -> None:
        with contextlib.suppress(NetworkFailed):
            _ip("netns", "del", link.namespace)
        self._made.remove(link.namespace)

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def _add_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        self._ip(name, "link", "set", "lo", "up")

    @staticmethod
    def _ip(namespace: str, *arguments: str) -> None:
        _ip("-n", namespace, *arguments)


class PodLink:
    """A pod's namespace and its cable."""

    def __init__(self, namespace: str, address: str, port: str, switch: str) -> None:
        self.namespace = namespace
        self.address = address
        self.port = port
        self._switch = switch

    @property
    def namespace_file(self) -> Path:
        return _RUN / self.namespace

    def enter(self) -> tuple[str, ...]:
        """Before a command: run it in the pod's network, beside its container."""
        return ("nsenter", f"--net={self.namespace_file}")

    def connect(self, port: int, timeout_s: float) -> socket.socket:
        """A connection to the pod's address from its own node, which a cut does not hinder; OSError."""
        return _connect(self.namespace_file, self.address, port, timeout_s)

    def cut(self) -> None:
        """Nothing goes in or out any more; nobody is told. Its own loopback stays."""
        # The pod's end stays up, so that what it sends is lost instead of refused.
        _ip("-n", self._switch, "link", "set", self.port, "nomaster")

    def join(self) -> None:
        _ip("-n", self._switch, "link", "set", self.port, "master", "pods")


def _connect(namespace: Path, host: str, port: int, timeout_s: float) -> socket.socket:
    with _standing_in(namespace):
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        made.connect((host, port))
    except BaseException:
        made.close()
        raise
    return made


@contextlib.contextmanager
def _standing_in(namespace: Path) -> Iterator[None]:
    """This thread makes its sockets there; a socket stays where it was made."""
    with _open_file(Path("/proc/thread-self/ns/net")) as home, _open_file(namespace) as away:
        _set_network_namespace(away)
        try:
            yield
        finally:
            _set_network_namespace(home)


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _set_network_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=_DEADLINE_S)
    except subprocess.CalledProcessError as error:
        raise NetworkFailed(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkFailed(f"ip {' '.join(arguments)}: {error}") from error
