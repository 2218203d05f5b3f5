"""Where the API server is, and how to be let in: the pod's service account, or a kubeconfig for development.

The service account is four small files that the kubelet keeps fresh; they are read here. A kubeconfig has contexts, plugins
and certificates of many kinds: that is kubernetes-asyncio's to know, and it is imported only then, because its import
costs 36 MiB on top of what the agent uses already.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from instance_manager.kubernetes_names import SERVICE_ACCOUNT
from instance_manager.threads import Threads, TooManyCalls, monotonic_s

TOKEN_AGE_MAX_S = 60.0
"""A bound token lives for an hour or less and the kubelet replaces it at 80 %: reading it each minute is often enough."""
READ_DEADLINE_S = 1.0


class AccessUnusable(Exception):
    """The API server cannot be asked; the text says what is missing and what to do."""


class Access(Protocol):
    """One way in. `open` may be called again, when certificates have changed."""

    @property
    def server(self) -> str:
        """`https://host:port`."""
        ...

    async def open(self) -> ssl.SSLContext | None:
        """Read what is needed; None: without TLS. AccessUnusable."""
        ...

    def authorization(self) -> str | None:
        """Value of the header, at once; None: by certificate, or nobody."""
        ...

    async def was_refused(self) -> None:
        """The credentials were not accepted: look for newer ones."""
        ...


class ServiceAccountAccess:
    """Inside a pod."""

    def __init__(self, environment: Mapping[str, str], directory: Path = SERVICE_ACCOUNT) -> None:
        self._directory = directory
        host, port = (environment.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
        self._address = (f"[{host}]" if ":" in host else host, port)
        self._token = ""
        self._read_s = float("-inf")
        self._threads = Threads("service account")
        self._reading: asyncio.Task[None] | None = None

    @property
    def server(self) -> str:
        return f"https://{self._address[0]}:{self._address[1]}"

    async def open(self) -> ssl.SSLContext:
        """AccessUnusable outside of a pod."""
        if not all(self._address):
            raise AccessUnusable(
                "$KUBERNETES_SERVICE_HOST and $KUBERNETES_SERVICE_PORT are not set: this is no pod; "
                "set coordination.kubernetes.kubeconfig"
            )
        try:
            context = await self._threads.call(self._read_authority, deadline_s=READ_DEADLINE_S)
            await self._read_token()
        except (OSError, ValueError, TimeoutError, TooManyCalls) as error:
            raise AccessUnusable(
                f"{self._directory}: the service account cannot be read: {error}; is automountServiceAccountToken off?"
            ) from error
        return context

    def authorization(self) -> str:
        """The token as it was last read; when that is a minute ago, it is read again meanwhile."""
        if monotonic_s() - self._read_s > TOKEN_AGE_MAX_S and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read_token_if_possible())
        return f"Bearer {self._token}"

    async def was_refused(self) -> None:
        await self._read_token_if_possible()

    async def _read_token_if_possible(self) -> None:
        """Keeps the old one otherwise: it may be good for a long time yet."""
        with contextlib.suppress(OSError, ValueError, TimeoutError, TooManyCalls):
            await self._read_token()

    async def _read_token(self) -> None:
        path = self._directory / "token"
        token = (await self._threads.call(lambda: path.read_text(encoding="ascii"), deadline_s=READ_DEADLINE_S)).strip()
        if not token:
            raise ValueError(f"{path} is empty")
        self._token, self._read_s = token, monotonic_s()

    def _read_authority(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._directory / "ca.crt"))


class KubeconfigAccess:
    """Outside of a pod, as `kubectl` with its current context."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server = ""
        self._authorization: str | None = None

    @property
    def server(self) -> str:
        return self._server

    async def open(self) -> ssl.SSLContext | None:
        """AccessUnusable: the file cannot be used, or what reads it is not installed."""
        try:
            from kubernetes_asyncio.client import Configuration
            from kubernetes_asyncio.config import ConfigException, load_kube_config
        except ImportError as error:
            raise AccessUnusable(
                "coordination.kubernetes.kubeconfig needs kubernetes-asyncio: pip install 'instance-manager[kubeconfig]'"
            ) from error
        found = Configuration()
        try:
            await load_kube_config(config_file=str(self._path), client_configuration=found)
        except (ConfigException, OSError, ValueError, KeyError, TypeError) as error:
            raise AccessUnusable(f"coordination.kubernetes.kubeconfig: {self._path}: {error}") from error
        self._server = str(found.host or "").rstrip("/")
        self._authorization = found.api_key.get("BearerToken")
        if self._authorization is None and found.username:
            self._authorization = found.get_basic_auth_token()
        if self._server.startswith("http://"):
            return None
        try:
            context = ssl.create_default_context(cafile=found.ssl_ca_cert)
            if not found.verify_ssl:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if found.cert_file:
                context.load_cert_chain(found.cert_file, keyfile=found.key_file)
        except (OSError, ValueError) as error:
            raise AccessUnusable(f"coordination.kubernetes.kubeconfig: {self._path}: {error}") from error
        return context

    def authorization(self) -> str | None:
        return self._authorization

    async def was_refused(self) -> None:
        """A plugin's token has expired: ask the plugin again."""
        with contextlib.suppress(AccessUnusable):
            await self.open()
