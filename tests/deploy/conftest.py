from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from deploy_manifests import DEPLOY, KUSTOMIZATIONS, Manifests, rendered


@pytest.fixture(params=KUSTOMIZATIONS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """Every kustomization that is shipped, one after the other."""
    return rendered(DEPLOY / request.param)
