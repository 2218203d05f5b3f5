"""A cluster of another name, made as deploy/README.md tells."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from deploy_manifests import DEPLOY, rendered


def test_a_copy_with_another_name_is_a_whole_cluster(tmp_path: Path) -> None:
    copy = tmp_path / "orders"
    shutil.copytree(DEPLOY / "base", copy)
    for path in copy.iterdir():
        # sed -i 's/\bpg\b/orders/g'
        path.write_text(re.sub(r"\bpg\b", "orders", path.read_text(encoding="utf-8")), encoding="utf-8")
    manifests = rendered(copy)
    assert manifests.name == "orders"
    assert manifests.configuration(tmp_path).members[2].name == "orders-2"
    (secret,) = [volume["secret"] for volume in manifests.pod["volumes"] if "secret" in volume]
    assert secret["secretName"] == "orders-secrets"
    assert not re.search(r"\bpg\b", repr(manifests.objects))
