"""The network of the test pods, made of namespaces only: the machine's own interfaces and routes are never touched.

control plane ──── bridge "pods" ──── pod 1, pod 2, ...
                        │
                     clients ──── bridge "island"

The switch is a namespace with two bridges; the API server and the name server stand in it at one address. Each pod is a
namespace with one cable to the bridge, at an address that no earlier pod of the run had. A pod that is cut off loses its
cable, or finds itself on the island, where only the clients are: their open sessions with it go on.
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
CLIENTS_ADDRESS = "10.78.255.254"
_RUN = Path("/run/netns")
_DEADLINE_S = 10.0
_PREFIX = "imk"
_SWITCH_HARDWARE_ADDRESS = "02:00:0a:4e:00:01"
_CLIENTS_HARDWARE_ADDRESS = "02:00:0a:4e:ff:fe"
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
        self._prefix = f"{_PREFIX}{os.getpid()}"
        self._made: list[str] = []
        self._addresses = 1
        self._lock = threading.Lock()

    def open(self) -> None:
        """NetworkFailed: nothing is left."""
        _remove_leftovers()
        try:
            self._add_namespace(self._switch)
            self._add_namespace(self._clients)
            for bridge in ("pods", "island"):
                # An address of its own: else it takes the lowest of its ports', another with every pod that comes or goes.
                _ip("-n", self._switch, "link", "add", bridge, "address", _SWITCH_HARDWARE_ADDRESS, "type", "bridge")
                _ip("-n", self._switch, "link", "set", bridge, "up")
                self._add_cable(f"to-{bridge}", bridge, self._clients, bridge)
                # One hardware address for both, so that a pod that is moved finds the clients where they were.
                _ip("-n", self._clients, "link", "set", bridge, "address", _CLIENTS_HARDWARE_ADDRESS)
                _ip("-n", self._clients, "link", "set", bridge, "up")
            _ip("-n", self._switch, "addr", "add", f"{SWITCH_ADDRESS}/16", "dev", "pods")
            _ip("-n", self._clients, "addr", "add", f"{CLIENTS_ADDRESS}/16", "dev", "pods")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for namespace in reversed(self._made):
            with contextlib.suppress(NetworkFailed):
                _ip("netns", "del", namespace)
        self._made.clear()

    def enter(self) -> tuple[str, ...]:
        """Before a command: run it where the API server is."""
        return ("nsenter", f"--net={_RUN / self._switch}")

    def enter_clients(self) -> tuple[str, ...]:
        """Before a command: run it where the clients are."""
        return ("nsenter", f"--net={_RUN / self._clients}")

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
        link = PodLink(f"{self._prefix}-{number}", f"10.78.{number // 256}.{number % 256}", f"pod{number}")
        self._add_namespace(link.namespace)
        self._add_cable(link.port, "pods", link.namespace, "eth0")
        _ip("-n", link.namespace, "addr", "add", f"{link.address}/16", "dev", "eth0")
        _ip("-n", link.namespace, "link", "set", "eth0", "up")
        return link

    def cut(self, link: PodLink, *, clients_stay: bool = False) -> None:
        """Nobody reaches the pod any more, or only the clients do; nobody is told. Its own loopback stays."""
        # The pod's end stays up, so that what it sends is lost instead of refused.
        if not clients_stay:
            _ip("-n", self._switch, "link", "set", link.port, "nomaster")
            return
        _ip("-n", self._switch, "link", "set", link.port, "master", "island")
        _ip("-n", self._clients, "route", "replace", f"{link.address}/32", "dev", "island", "src", CLIENTS_ADDRESS)

    def join(self, link: PodLink) -> None:
        with contextlib.suppress(NetworkFailed):
            _ip("-n", self._clients, "route", "del", f"{link.address}/32", "dev", "island")
        _ip("-n", self._switch, "link", "set", link.port, "master", "pods")

    def remove_pod(self, link: PodLink) -> None:
        with contextlib.suppress(NetworkFailed):
            _ip("netns", "del", link.namespace)
        self._made.remove(link.namespace)

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    @property
    def _clients(self) -> str:
        return f"{self._prefix}-clients"

    def _add_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _add_cable(self, port: str, bridge: str, namespace: str, name: str) -> None:
        """From a bridge of the switch to the other namespace, where its end has this name."""
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", name, "netns", namespace)
        _ip("-n", self._switch, "link", "set", port, "master", bridge)
        _ip("-n", self._switch, "link", "set", port, "up")


class PodLink:
    """A pod's namespace and its cable."""

    def __init__(self, namespace: str, address: str, port: str) -> None:
        self.namespace = namespace
        self.address = address
        self.port = port

    @property
    def namespace_file(self) -> Path:
        return _RUN / self.namespace

    def connect(self, port: int, timeout_s: float) -> socket.socket:
        """A connection to the pod's address from its own node, which a cut does not hinder; OSError."""
        return _connect(self.namespace_file, self.address, port, timeout_s)


def _remove_leftovers() -> None:
    """Namespaces of tests that were killed: their processes ended with them."""
    for path in _RUN.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(NetworkFailed):
                _ip("netns", "del", path.name)


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
