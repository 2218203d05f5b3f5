"""The real vip-manager, unmodified, on a cluster of ours: VIP_MANAGER=PROGRAM pytest tests/cluster/vip_manager_program.py

Debian's does not know Patroni's API, and the module of one that does cannot be had from Go's proxy: it is built by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "vip_in_namespace.py"
MOVES_WITHIN_S = 5.0
"""Its interval is 0.2 s; the rest is for a busy machine."""


def vip_manager() -> str:
    found = os.environ.get("VIP_MANAGER") or shutil.which("vip-manager")
    assert found is not None, "name one in VIP_MANAGER"
    told = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=20, check=False)
    assert "patroni" in told.stdout + told.stderr, f"{found} does not know --dcs-type patroni"
    return found


@pytest.mark.timeout(400)
def test_the_address_is_always_the_primarys(tmp_path: Path) -> None:
    program = vip_manager()
    log = tmp_path / "log"
    ended = subprocess.run(
        ["unshare", "--net", sys.executable, str(SCRIPT), program, str(log)],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}{log.read_text() if log.exists() else ''}"
    told = json.loads(ended.stdout.splitlines()[-1])
    print(told)
    assert told.pop("at last") is True
    assert sorted(told) == ["after a kill", "after a switchover", "at first"]
    assert max(told.values()) < MOVES_WITHIN_S, told
