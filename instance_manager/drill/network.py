"""Networks of a drill, made of namespaces only: the machine's own interfaces and routes are never touched.

clients ──┐ bridge "clients"         The switch is a namespace with two bridges; the clients stand in it. Each
          ├──────── instance 1       instance is a namespace with one cable to each bridge. Peers talk over the
switch ───┤         instance 2       one, applications over the other, so that a primary can lose its peers and
          └──────── instance 3       keep its clients.
            bridge "peers"
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PEERS = "10.77.1"
CLIENTS = "10.77.2"
CLIENTS_NETWORK = f"{CLIENTS}.0/24"
_RUN = Path("/run/netns")
_DEADLINE_S = 10.0


class NetworkFailed(Exception):
    """A command of `ip` failed; the text is its own."""


def why_unavailable() -> str | None:
    """Why this machine cannot do it, for the user; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (packages iproute2, util-linux)"
    return None


class Network:
    """One switch and a namespace per instance. `close` deletes all of it, whatever state it is in."""

    def __init__(self, names: Sequence[str]) -> None:
        self._prefix = f"imd{os.getpid()}"
        self._names = tuple(names)

    def peers_address(self, name: str) -> str:
        return f"{PEERS}.{self._names.index(name) + 1}"

    def clients_address(self, name: str) -> str:
        return f"{CLIENTS}.{self._names.index(name) + 1}"

    def enter(self, name: str) -> tuple[str, ...]:
        """Before a command: run it in the instance's namespace."""
        return ("nsenter", f"--net={_RUN / self._namespace(name)}")

    def enter_clients(self) -> tuple[str, ...]:
        """Before a command: run it where the clients are."""
        return ("nsenter", f"--net={_RUN / self._switch}")

    def open(self) -> None:
        """Make everything. NetworkFailed: nothing is left."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        switch = self._switch
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "set", "lo", "up")
        for bridge in ("peers", "clients"):
            _ip("-n", switch, "link", "add", bridge, "type", "bridge")
            _ip("-n", switch, "link", "set", bridge, "up")
        _ip("-n", switch, "addr", "add", f"{CLIENTS}.254/24", "dev", "clients")
        for number, name in enumerate(self._names, 1):
            inside = self._namespace(name)
            _ip("netns", "add", inside)
            _ip("-n", inside, "link", "set", "lo", "up")
            for bridge, address in (("peers", f"{PEERS}.{number}/24"), ("clients", f"{CLIENTS}.{number}/24")):
                port = f"{bridge}{number}"
                _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", bridge, "netns", inside)
                _ip("-n", switch, "link", "set", port, "master", bridge)
                _ip("-n", switch, "link", "set", port, "up")
                _ip("-n", inside, "addr", "add", address, "dev", bridge)
                _ip("-n", inside, "link", "set", bridge, "up")

    def cut_from_peers(self, name: str) -> None:
        """Its clients still reach it."""
        _ip("-n", self._namespace(name), "link", "set", "peers", "down")

    def join_peers(self, name: str) -> None:
        _ip("-n", self._namespace(name), "link", "set", "peers", "up")

    def cut_pair(self, one: str, other: str) -> None:
        """These two cannot reach each other; everybody else reaches both."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", self._namespace(here), "route", "replace", "blackhole", f"{self.peers_address(there)}/32")

    def join_pair(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            with contextlib.suppress(NetworkFailed):
                _ip("-n", self._namespace(here), "route", "del", "blackhole", f"{self.peers_address(there)}/32")

    def close(self) -> None:
        """Delete the namespaces, and with them every cable and bridge. Their processes must be gone."""
        for namespace in (*(self._namespace(name) for name in self._names), self._switch):
            if (_RUN / namespace).exists():
                with contextlib.suppress(NetworkFailed):
                    _ip("netns", "del", namespace)

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=_DEADLINE_S)  # noqa: S607
    except subprocess.CalledProcessError as error:
        raise NetworkFailed(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkFailed(f"ip {' '.join(arguments)}: {error}") from error
