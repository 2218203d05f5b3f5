"""A small client of the API server for tests: one thread, one request at a time, JSON in and out.

Paths are those of the API, such as `/api/v1/namespaces/NAME/pods`. It is no model of a good client: it retries nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

Object = dict[str, Any]
"""An object of the API as its JSON has it."""

REQUEST_DEADLINE_S = 10.0
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"


class ApiError(Exception):
    """The server's answer is no success."""

    def __init__(self, code: int, body: Object | str) -> None:
        message = body.get("message", "") if isinstance(body, dict) else body
        super().__init__(f"{code}: {message}")
        self.code = code
        self.reason = str(body.get("reason", "")) if isinstance(body, dict) else ""
        self.message = str(message)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server is, and how a connection to it is made: it may stand in another network namespace."""

    host: str
    port: int
    authority_file: Path
    connect: Callable[[str, int, float], socket.socket]
    """(host, port, timeout in seconds); OSError."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks: a client certificate, or a bearer token, or nobody."""

    certificate: tuple[Path, Path] | None = None
    token: str | None = None


class Api:
    """Requests as one identity."""

    def __init__(self, server: Server, identity: Identity) -> None:
        self.server = server
        self._context = ssl.create_default_context(cafile=str(server.authority_file))
        if identity.certificate is not None:
            self._context.load_cert_chain(*identity.certificate)
        self._headers = {"Accept": "application/json", "User-Agent": "kubernetes-tests"}
        if identity.token is not None:
            self._headers["Authorization"] = f"Bearer {identity.token}"

    def get(self, path: str, **query: str) -> Object:
        return self.request("GET", path, query=query)

    def list(self, path: str, **query: str) -> list[Object]:
        items: list[Object] = self.get(path, **query)["items"]
        return items

    def find(self, path: str) -> Object | None:
        """The object, or None if there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def create(self, path: str, body: Object, **query: str) -> Object:
        return self.request("POST", path, body, query=query)

    def replace(self, path: str, body: Object) -> Object:
        return self.request("PUT", path, body)

    def patch(self, path: str, body: Object, *, kind: str = MERGE_PATCH) -> Object:
        return self.request("PATCH", path, body, content_type=kind)

    def delete(self, path: str, *, grace_s: int | None = None, uid: str | None = None) -> Object:
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        return self.request("DELETE", path, options)

    def text(self, path: str) -> str:
        """The answer as it is, for what is not JSON: /metrics, /readyz."""
        with self._answer("GET", path, None, {}, "application/json", REQUEST_DEADLINE_S) as answer:
            return answer.read().decode()

    def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """ApiError; OSError or http.client.HTTPException when no answer came."""
        with self._answer(method, path, body, query or {}, content_type, REQUEST_DEADLINE_S) as answer:
            found: Object = json.loads(answer.read())
            return found

    def watch(self, path: str, resource_version: str, *, timeout_s: int, **query: str) -> Iterator[tuple[str, Object]]:
        """(type, object) of each event until the server ends the stream, at the latest after `timeout_s`."""
        query = {
            **query,
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(timeout_s),
        }
        with self._answer("GET", path, None, query, "application/json", timeout_s + REQUEST_DEADLINE_S) as answer:
            for line in answer:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(int(event["object"].get("code", 0)), event["object"])
                yield event["type"], event["object"]

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: Object | None,
        query: Mapping[str, str],
        content_type: str,
        timeout_s: float,
    ) -> Iterator[http.client.HTTPResponse]:
        server = self.server
        connection = http.client.HTTPConnection(server.host, server.port)
        plain = server.connect(server.host, server.port, timeout_s)
        try:
            connection.sock = self._context.wrap_socket(plain, server_hostname=server.host)
            target = f"{path}?{urlencode(query)}" if query else path
            content = None if body is None else json.dumps(body).encode()
            headers = self._headers if content is None else {**self._headers, "Content-Type": content_type}
            connection.request(method, target, content, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _error_of(answer)
            yield answer
        finally:
            connection.close()
            plain.close()


def _error_of(answer: http.client.HTTPResponse) -> ApiError:
    content = answer.read().decode(errors="replace")
    try:
        return ApiError(answer.status, json.loads(content))
    except ValueError:
        return ApiError(answer.status, content)


def connect_directly(host: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((host, port), timeout_s)
