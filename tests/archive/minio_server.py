"""MinIO on loopback, over TLS with an authority of its own: killed and started again as a test wants."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from certificates import make_certificate
from harness import free_port
from s3_server import CREDENTIALS

sys.path.append(str(Path(__file__).resolve().parents[1] / "programs"))

from minio_program import find

KMS_KEY = "archive"
"""The key that it encrypts with where a test asks for it."""
START_DEADLINE_S = 60.0
_PR_SET_PDEATHSIG = 1


class Minio:
    """One drive below `root`, and one port, over all its starts."""

    def __init__(self, root: Path) -> None:
        self._program, self._root = find(), root
        self._certificates = root / "certificates"
        self._certificates.mkdir()
        self.certificate, key = make_certificate(self._certificates)
        # Under the names that it looks for.
        shutil.copy(self.certificate, self._certificates / "public.crt")
        shutil.copy(key, self._certificates / "private.key")
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it serves. RuntimeError with its log: it does not."""
        argv = [str(self._program), "server", "--quiet", "--address", f"127.0.0.1:{self.port}"]
        argv += ["--certs-dir", str(self._certificates), str(self._root / "drive")]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **{"PATH": os.environ["PATH"], "HOME": str(self._root)},
                    "MINIO_ROOT_USER": CREDENTIALS["AWS_ACCESS_KEY_ID"],
                    "MINIO_ROOT_PASSWORD": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
                    "MINIO_KMS_SECRET_KEY": f"{KMS_KEY}:{base64.b64encode(bytes(32)).decode()}",
                    # Nothing of it leaves this machine.
                    **{"MINIO_UPDATE": "off", "MINIO_BROWSER": "off"},
                },
                preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                start_new_session=True,
            )
        end_s = time.monotonic() + START_DEADLINE_S
        while not self._serves():
            if self.process.poll() is not None or time.monotonic() > end_s:
                self.kill()
                raise RuntimeError(f"MinIO does not serve: {self._log.read_text()[-3000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; whatever it had not finished stays as it is."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def _log(self) -> Path:
        return self._root / "minio.log"

    def _serves(self) -> bool:
        trusted = ssl.create_default_context(cafile=self.certificate)
        ready = f"{self.url}/minio/health/ready"
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(ready, timeout=2, context=trusted),  # noqa: S310
        ):
            return True
        return False


@contextlib.contextmanager
def minio_server(root: Path) -> Iterator[Minio]:
    """Below an empty directory. Unavailable: it was not built."""
    os.environ.update(CREDENTIALS)
    made = Minio(root)
    made.start()
    try:
        yield made
    finally:
        made.kill()
