"""Programs are downloaded whole and checked, or not at all. A build is too long for a test: `make kubernetes` does it."""

from __future__ import annotations

import hashlib
import http.server
import io
import platform
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import kube_binaries
import pytest
import yaml
from kube_binaries import VERSION, Sources, Unavailable, cache_directory, find, provide

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
ARCHIVE = f"envtest-v{VERSION}-linux-{ARCHITECTURE}.tar.gz"
MANAGER = f"v{VERSION}/bin/linux/{ARCHITECTURE}/kube-controller-manager"

pytestmark = pytest.mark.skipif(not ARCHITECTURE, reason="there are no releases for this architecture")


class Releases:
    """A server with the files of a release."""

    def __init__(self, address: str, files: dict[str, bytes]) -> None:
        self.files = files
        self.sources = Sources(index=f"{address}/index.yaml", releases=address)
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            for name in ("etcd", "kube-apiserver", "kubectl"):
                entry = tarfile.TarInfo(f"controller-tools/envtest/{name}")
                entry.size = len(name)
                archive.addfile(entry, io.BytesIO(name.encode()))
        files[ARCHIVE] = content.getvalue()
        release = {"hash": hashlib.sha512(files[ARCHIVE]).hexdigest(), "selfLink": f"{address}/{ARCHIVE}"}
        files["index.yaml"] = yaml.safe_dump({"releases": {f"v{VERSION}": {ARCHIVE: release}}}).encode()
        files[MANAGER] = b"kube-controller-manager"
        files[f"{MANAGER}.sha512"] = hashlib.sha512(files[MANAGER]).hexdigest().encode()


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Releases]:
    """An empty cache, no Go, and a server in place of the internet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kube_binaries, "SYSTEM_PATH", "")
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.strip("/"))
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Releases(f"http://127.0.0.1:{server.server_port}", files)
        server.shutdown()


def test_a_release_is_downloaded_once(releases: Releases) -> None:
    said: list[str] = []
    programs = provide(said.append, releases.sources)
    assert programs.controller_manager.read_bytes() == b"kube-controller-manager"
    assert programs.etcd.parent == cache_directory()
    releases.files.clear()
    said.clear()
    assert provide(said.append, releases.sources) == programs == find()
    assert said == []


def test_a_download_that_is_not_what_its_release_says_is_refused(releases: Releases) -> None:
    releases.files[ARCHIVE] += b"more"
    with pytest.raises(Unavailable, match="SHA-512"):
        provide(lambda _: None, releases.sources)
    assert [path.name for path in cache_directory().iterdir()] == ["lock"]


def test_what_cannot_be_had_is_named_with_what_was_tried(releases: Releases) -> None:
    releases.files.clear()
    with pytest.raises(Unavailable, match=r"kube-apiserver.*download: HTTPError.*there is no go"):
        provide(lambda _: None, releases.sources)


def test_assets_of_the_user_come_first(releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(lambda _: None, releases.sources)
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "kube-apiserver").write_text("own")
    (assets / "kube-apiserver").chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    assert find().apiserver == assets / "kube-apiserver"
    assert find().kubectl.parent == cache_directory()
