"""What an agent loads, and what it does not: each pod pays for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from instance_manager.wall_clock import now_utc

_LOADED = """
import os, ssl, sys
import instance_manager.agent.__main__
import aiohttp.connector
print("frozenlist._frozenlist" in sys.modules, "FROZENLIST_NO_EXTENSIONS" in os.environ)
print(len(aiohttp.connector._SSL_CONTEXT_VERIFIED.get_ca_certs()), len(ssl.create_default_context().get_ca_certs()))
"""
_HEAPS = """
import ctypes, threading
from instance_manager.heap import use_one_heap
if {one}:
    use_one_heap()
kept, made = [], threading.Barrier(9)
def allocate():
    kept.append(bytes(100_000))  # more than Python's own allocator takes
    made.wait(20)
for _ in range(8):
    threading.Thread(target=allocate, daemon=True).start()
made.wait(20)
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now_utc()).not_valid_after(now_utc().replace(year=9998))
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    path = tmp_path / "authority.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def test_aiohttp_comes_without_public_authorities_and_the_c_plus_plus_library(authority: Path) -> None:
    """And what is asked for later has the user's authorities again."""
    loaded, authorities = _run(_LOADED, SSL_CERT_FILE=str(authority), SSL_CERT_DIR="/nowhere").splitlines()
    assert loaded == "False False"
    assert authorities == "0 1"


def test_threads_allocate_from_one_heap() -> None:
    """By glibc's own account; without the setting each thread that lives has one."""
    assert _run(_HEAPS.format(one=False)).count("<heap nr=") == 9
    assert _run(_HEAPS.format(one=True)).count("<heap nr=") == 1


def _run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
