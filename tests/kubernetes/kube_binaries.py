"""The programs of a Kubernetes control plane for tests: found, downloaded, or built once into the user's cache.

    python tests/kubernetes/kube_binaries.py

fetches what is missing and shows progress; a first build takes long. Tests only look (`find`), so that no download and no
build runs inside a test's deadline. The order: $KUBEBUILDER_ASSETS (as controller-runtime's envtest has it), the cache,
the release index of envtest, the Go modules of Kubernetes and etcd. The system's etcd serves too if it is new enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "programs"))

import go_programs
from go_programs import GoProgram, Say, build, locked
from go_programs import Unavailable as Unavailable

VERSION = "1.34.1"
TOOLS = Path(__file__).resolve().parent / "tools"
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
}
"""The Go package of each program."""
SYSTEM_PATH = ":/usr/bin:/usr/sbin"
REQUEST_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Programs:
    etcd: Path
    apiserver: Path
    controller_manager: Path
    kubectl: Path


@dataclass(frozen=True, slots=True)
class Sources:
    """Where programs are downloaded from."""

    index: str = "https://raw.githubusercontent.com/kubernetes-sigs/controller-tools/HEAD/envtest-releases.yaml"
    releases: str = "https://dl.k8s.io"


def cache_directory() -> Path:
    return go_programs.cache_directory(f"kubernetes-{VERSION}")


def find() -> Programs:
    """What is here already, without network and without waiting. Unavailable: something is missing."""
    found = {name: _look(name) for name in PACKAGES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise Unavailable(
            f"{', '.join(missing)} of Kubernetes {VERSION}: run `python tests/kubernetes/kube_binaries.py`, "
            "or set KUBEBUILDER_ASSETS"
        )
    etcd, apiserver, controller_manager, kubectl = (path for path in found.values() if path is not None)
    return Programs(etcd, apiserver, controller_manager, kubectl)


def provide(say: Say = print, sources: Sources | None = None) -> Programs:
    """Fetch or build what is missing; only one process at a time does it. Unavailable."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock", say):
        with contextlib.suppress(Unavailable):
            return find()
        tried = [attempt for attempt in (_download(cache, sources or Sources(), say), _build(cache, say)) if attempt]
        try:
            return find()
        except Unavailable as missing:
            raise Unavailable("; ".join([str(missing), *tried])) from missing


def _look(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for directory in (Path(assets) if assets else None, cache_directory()):
        if directory is not None and os.access(directory / name, os.X_OK):
            return directory / name
    # The system's kube-apiserver or kubectl could be of any version.
    system = shutil.which(name, path=f"{os.environ.get('PATH', '')}{SYSTEM_PATH}") if name == "etcd" else None
    return Path(system) if system is not None and _is_new_enough(system) else None


def _is_new_enough(etcd: str) -> bool:
    """Without progress notifications on request, as before 3.4.31 and 3.5.13, the API server refuses watches that begin
    with what there is now."""
    said = subprocess.run([etcd, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"etcd Version: 3\.(\d+)\.(\d+)", said)
    return found is not None and (int(found[1]), int(found[2])) >= {"4": (4, 31)}.get(found[1], (5, 13))


# --- download ---


def _download(cache: Path, sources: Sources, say: Say) -> str | None:
    """Take what the releases have; the reason why not, else None."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    if architecture is None:
        return f"there are no releases for {platform.machine()}"
    archive = f"envtest-v{VERSION}-linux-{architecture}.tar.gz"
    try:
        release = yaml.safe_load(_get(sources.index))["releases"][f"v{VERSION}"][archive]
        say(f"downloading {release['selfLink']}")
        content = _checked(_get(release["selfLink"]), release["hash"], archive)
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            for entry in files:
                member = files.extractfile(entry) if Path(entry.name).name in PACKAGES else None
                if member is not None:
                    _place(cache / Path(entry.name).name, member.read())
        address = f"{sources.releases}/v{VERSION}/bin/linux/{architecture}/kube-controller-manager"
        say(f"downloading {address}")
        expected = _get(f"{address}.sha512").decode("ascii").split()[0]
        _place(cache / "kube-controller-manager", _checked(_get(address), expected, "kube-controller-manager"))
    except (OSError, urllib.error.URLError, KeyError, tarfile.TarError, yaml.YAMLError, Unavailable) as error:
        reason = f"download: {type(error).__name__}: {error}"
        say(reason)
        return reason
    return None


def _get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=REQUEST_DEADLINE_S) as answer:  # noqa: S310
        content: bytes = answer.read()
        return content


def _checked(content: bytes, sha512: str, what: str) -> bytes:
    found = hashlib.sha512(content).hexdigest()
    if found != sha512:
        raise Unavailable(f"{what} has the SHA-512 {found[:16]}..., not {sha512[:16]}... as its release says")
    return content


def _place(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.chmod(0o755)
    new.replace(path)


# --- build ---


def _build(cache: Path, say: Say) -> str | None:
    """What is missing yet; the reason why not, else None."""
    major, minor, _ = VERSION.split(".")
    version = "k8s.io/component-base/version.git"
    flags = f"-X {version}Version=v{VERSION} -X {version}Major={major} -X {version}Minor={minor}"
    missing = [name for name in PACKAGES if _look(name) is None]
    return build([GoProgram(name, PACKAGES[name], TOOLS, flags) for name in missing], cache, say)


def main() -> int:
    try:
        programs = provide(lambda text: print(text, flush=True))
    except Unavailable as missing:
        print(f"not available: {missing}", file=sys.stderr)
        return 1
    for path in (programs.etcd, programs.apiserver, programs.controller_manager, programs.kubectl):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
