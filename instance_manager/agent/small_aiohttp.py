"""Imports aiohttp without what no instance uses. Imported for that alone, before anything else of ours imports aiohttp.

aiohttp makes a TLS context with every public authority as it is imported: 2 MiB, and 0.1 s of a core, where the system has them in one
file. An instance trusts only the authorities that its configuration names. And frozenlist's extension needs the C++
library: 0.9 MiB for lists of a few middlewares.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator

_WHILE_IMPORTED = {
    "FROZENLIST_NO_EXTENSIONS": "1",
    # OpenSSL's own variables. What is made later finds the user's again.
    "SSL_CERT_FILE": os.devnull,
    "SSL_CERT_DIR": os.devnull,
}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


with _environment(_WHILE_IMPORTED):
    importlib.import_module("aiohttp")
