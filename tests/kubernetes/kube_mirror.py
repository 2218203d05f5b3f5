"""All objects of one kind, kept up to date by a watch: what a kubelet or a controller knows of the API."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable

from kube_api import Api, ApiError, Object

_WATCH_S = 60
_RETRY_S = 0.1

Changed = Callable[[Object | None, Object | None], None]
"""(before, after); None: it was not there, or is gone. Called from the mirror's thread, one change after the other."""


def key_of(item: Object) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


class Mirror:
    """Lists, then watches; begins anew when the stream breaks. An object that is replaced is told as gone and new."""

    def __init__(self, api: Api, path: str, changed: Changed | None = None) -> None:
        self._api = api
        self._path = path
        self._changed = changed
        self._items: dict[tuple[str, str], Object] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mirror {path}", daemon=True)

    def start(self, deadline_s: float = 10.0) -> None:
        """Until the first list is here."""
        self._thread.start()
        assert self._listed.wait(deadline_s), f"no list of {self._path}"

    def close(self) -> None:
        """No change is told any more; the thread ends with its stream."""
        self._closing.set()

    def find(self, namespace: str, name: str) -> Object | None:
        with self._lock:
            return self._items.get((namespace, name))

    def all(self) -> list[Object]:
        with self._lock:
            return [*self._items.values()]

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                found = self._api.get(self._path)
                self._take_list(found["items"])
                self._listed.set()
                version = found["metadata"]["resourceVersion"]
                for kind, item in self._api.watch(self._path, version, timeout_s=_WATCH_S):
                    if self._closing.is_set():
                        return
                    if kind != "BOOKMARK":
                        self._take(key_of(item), None if kind == "DELETED" else item)
            except (OSError, http.client.HTTPException, ApiError, ValueError):
                # The server is away, or the version is too old: begin anew.
                self._closing.wait(_RETRY_S)

    def _take_list(self, items: list[Object]) -> None:
        new = {key_of(item): item for item in items}
        for key in [*self._items.keys() - new.keys(), *new]:
            self._take(key, new.get(key))

    def _take(self, key: tuple[str, str], item: Object | None) -> None:
        with self._lock:
            before = self._items.pop(key, None)
            if item is not None:
                self._items[key] = item
        if self._changed is None or (before is None and item is None):
            return
        if before is not None and item is not None and before["metadata"]["uid"] != item["metadata"]["uid"]:
            self._changed(before, None)
            before = None
        self._changed(before, item)
