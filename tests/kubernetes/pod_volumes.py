"""Volumes of a pod as directories, filled and owned as the kubelet does it.

ConfigMaps, Secrets and projected volumes have the kubelet's `..data` link, which is exchanged in one rename, so that a
reader sees the old files or the new ones. What the kubelet takes up to a minute for happens here at once.
"""

from __future__ import annotations

import base64
import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kube_api import Object

_versions = itertools.count(1)
_READ_ONLY_GROUP = 0o440
_READ_WRITE_GROUP = 0o660


class NotThereYet(Exception):
    """A volume cannot be set up now; the text says what is missing, as the kubelet's Event would."""


class UnsupportedPod(Exception):
    """The pod asks for what this runner does not do."""


class Sources(Protocol):
    """Where the contents come from."""

    def config_map(self, namespace: str, name: str) -> Object | None: ...
    def secret(self, namespace: str, name: str) -> Object | None: ...
    def token(self, pod: Object, audience: str | None, seconds: int) -> str: ...
    def claim(self, pod: Object, name: str) -> Path:
        """The directory of a claim; NotThereYet while another living pod has it, as an attached disk would."""
        ...


@dataclass(frozen=True, slots=True)
class File:
    content: bytes
    mode: int


class PodVolumes:
    """All volumes of one pod, in one directory."""

    def __init__(self, pod: Object, directory: Path, sources: Sources) -> None:
        self._pod = pod
        self._namespace: str = pod["metadata"]["namespace"]
        self._directory = directory
        self._sources = sources
        self._group: int | None = pod["spec"].get("securityContext", {}).get("fsGroup")
        self._paths: dict[str, Path] = {}
        self._tokens: dict[tuple[str, str], bytes] = {}

    def set_up(self) -> None:
        """NotThereYet: to be tried again later; UnsupportedPod."""
        for volume in self._pod["spec"].get("volumes", ()):
            name = volume["name"]
            if name in self._paths:
                continue
            if "persistentVolumeClaim" in volume:
                path = self._sources.claim(self._pod, volume["persistentVolumeClaim"]["claimName"])
                self._own_directory(path)
            else:
                path = self._directory / name
                path.mkdir(parents=True, exist_ok=True)
                if "emptyDir" in volume:
                    path.chmod(0o777)
                    self._own_directory(path)
                else:
                    publish(path, self._files(volume), self._group)
            self._paths[name] = path

    def path(self, name: str) -> Path:
        return self._paths[name]

    def refresh(self) -> None:
        """Take in what changed in the ConfigMaps and Secrets; one that is gone leaves the files as they are."""
        for volume in self._pod["spec"].get("volumes", ()):
            if volume["name"] in self._paths and volume.keys() & {"configMap", "secret", "projected"}:
                try:
                    files = self._files(volume)
                except NotThereYet:
                    continue
                publish(self._paths[volume["name"]], files, self._group)

    def rotate_tokens(self) -> None:
        """New tokens in place of the old, which stay valid for their time."""
        self._tokens.clear()
        self.refresh()

    def mounts(self, container: Object) -> list[Object]:
        """What of them the container sees, and where."""
        found = []
        for mount in container.get("volumeMounts", ()):
            source = self._paths[mount["name"]]
            if "subPath" in mount:
                source = source / mount["subPath"]
                source.mkdir(exist_ok=True)
            found.append(
                {"source": str(source), "target": mount["mountPath"], "read_only": mount.get("readOnly", False)}
            )
        for outer, inner in itertools.permutations(found, 2):
            below = Path(inner["target"])
            if below.is_relative_to(outer["target"]):
                # In a read-only volume the place for another could not be made later.
                (Path(outer["source"]) / below.relative_to(outer["target"])).mkdir(parents=True, exist_ok=True)
        return found

    def _own_directory(self, path: Path) -> None:
        if self._group is not None:
            os.chown(path, -1, self._group)
            path.chmod(path.stat().st_mode & 0o7777 | _READ_WRITE_GROUP | 0o2110)

    def _files(self, volume: Object) -> dict[str, File]:
        match volume:
            case {"configMap": source}:
                return self._config_map(source, source["name"], source.get("defaultMode", 0o644))
            case {"secret": source}:
                return self._secret(source, source["secretName"], source.get("defaultMode", 0o644))
            case {"projected": projected}:
                found: dict[str, File] = {}
                for source in projected["sources"]:
                    found |= self._projected(source, projected.get("defaultMode", 0o644))
                return found
            case {"downwardAPI": source}:
                return self._downward(source, source.get("defaultMode", 0o644))
            case _:
                raise UnsupportedPod(f"a volume of this kind: {', '.join(volume)}")

    def _projected(self, source: Object, mode: int) -> dict[str, File]:
        match source:
            case {"serviceAccountToken": token}:
                key = (token["path"], token.get("audience", ""))
                if key not in self._tokens:
                    seconds = token.get("expirationSeconds", 3600)
                    self._tokens[key] = self._sources.token(self._pod, token.get("audience"), seconds).encode()
                # As the kubelet: with an fsGroup, nobody but the group reads a token.
                return {token["path"]: File(self._tokens[key], mode if self._group is None else 0o600)}
            case {"configMap": inner}:
                return self._config_map(inner, inner["name"], mode)
            case {"secret": inner}:
                return self._secret(inner, inner["name"], mode)
            case {"downwardAPI": inner}:
                return self._downward(inner, mode)
            case _:
                raise UnsupportedPod(f"a projected source of this kind: {', '.join(source)}")

    def _config_map(self, source: Object, name: str, mode: int) -> dict[str, File]:
        found = self._sources.config_map(self._namespace, name)
        data = {} if found is None else {key: text.encode() for key, text in found.get("data", {}).items()}
        return self._chosen(source, f"configmap {name!r}", None if found is None else data, mode)

    def _secret(self, source: Object, name: str, mode: int) -> dict[str, File]:
        found = self._sources.secret(self._namespace, name)
        data = {} if found is None else {key: base64.b64decode(text) for key, text in found.get("data", {}).items()}
        return self._chosen(source, f"secret {name!r}", None if found is None else data, mode)

    def _downward(self, source: Object, mode: int) -> dict[str, File]:
        return {
            item["path"]: File(field_of(self._pod, item["fieldRef"]["fieldPath"]).encode(), item.get("mode", mode))
            for item in source["items"]
        }

    def _chosen(self, source: Object, what: str, data: Mapping[str, bytes] | None, mode: int) -> dict[str, File]:
        if data is None:
            if source.get("optional"):
                return {}
            raise NotThereYet(f"{what} not found")
        if "items" not in source:
            return {key: File(content, mode) for key, content in data.items()}
        missing = [item["key"] for item in source["items"] if item["key"] not in data]
        if missing and not source.get("optional"):
            raise NotThereYet(f"{what} has no key {missing[0]!r}")
        return {
            item["path"]: File(data[item["key"]], item.get("mode", mode))
            for item in source["items"]
            if item["key"] in data
        }


def publish(directory: Path, files: Mapping[str, File], group: int | None) -> None:
    """Make exactly these files the directory's content, all of them in one rename; nothing if they are there already."""
    data = directory / "..data"
    if data.is_symlink() and {path.name: path.read_bytes() for path in data.iterdir()} == {
        name: file.content for name, file in files.items()
    }:
        return
    old = data.readlink() if data.is_symlink() else None
    new = directory / f"..version_{next(_versions)}"
    new.mkdir(mode=0o755)
    new.chmod(0o755)
    for name, file in files.items():
        path = new / name
        path.write_bytes(file.content)
        path.chmod(file.mode if group is None else file.mode | _READ_ONLY_GROUP)
        if group is not None:
            os.chown(path, -1, group)
    link = directory / "..data_new"
    link.symlink_to(new.name)
    link.replace(data)
    for name in files:
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    for path in directory.iterdir():
        if path.is_symlink() and not path.name.startswith("..") and path.name not in files:
            path.unlink()
    if old is not None:
        shutil.rmtree(directory / old)


def environment_of(pod: Object, container: Object, sources: Sources) -> dict[str, str]:
    """The container's own variables; NotThereYet, UnsupportedPod."""
    namespace = pod["metadata"]["namespace"]
    readers: dict[str, Callable[[Object], str]] = {
        "fieldRef": lambda source: field_of(pod, source["fieldPath"]),
        "configMapKeyRef": lambda source: _key(sources.config_map(namespace, source["name"]), source),
        "secretKeyRef": lambda source: base64.b64decode(
            _key(sources.secret(namespace, source["name"]), source)
        ).decode(),
    }
    found: dict[str, str] = {}
    for variable in container.get("env", ()):
        if "valueFrom" in variable:
            ((kind, source),) = variable["valueFrom"].items()
            if kind not in readers:
                raise UnsupportedPod(f"an environment variable from {kind}")
            found[variable["name"]] = readers[kind](source)
        else:
            found[variable["name"]] = variable.get("value", "")
    return found


def _key(found: Object | None, source: Object) -> str:
    if found is None or source["key"] not in found.get("data", {}):
        raise NotThereYet(f"{source['name']!r} with key {source['key']!r} not found")
    return str(found["data"][source["key"]])


def field_of(pod: Object, path: str) -> str:
    """What a fieldRef of the downward API stands for: `metadata.uid`, `status.podIP`, `metadata.labels['NAME']`."""
    base, _, key = path.partition("['")
    value = pod
    for part in base.split("."):
        value = value.get(part, {})
    if key:
        value = value.get(key.removesuffix("']"), "")
    return value if isinstance(value, str) else ""
