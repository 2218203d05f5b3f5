"""What the image installs from PyPI is what pyproject.toml asks for, in the versions that everything is tested with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MEND = "run image/lock.sh"


def _pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", path.read_text(encoding="utf-8"), re.M)
    return {canonicalize_name(name): version for name, version in found}


def test_every_dependency_is_locked_in_a_version_that_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = _pins(ROOT / "image" / "requirements.txt")
    for requirement in map(Requirement, project["dependencies"]):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in image/requirements.txt: {MEND}"
        assert requirement.specifier.contains(version), f"{requirement} is locked as {version}: {MEND}"


def test_what_is_locked_is_what_is_tested() -> None:
    tested = _pins(ROOT / "constraints.txt")
    for name, version in _pins(ROOT / "image" / "requirements.txt").items():
        assert tested.get(name) == version, (
            f"{name} is {version} in the image and {tested.get(name)} in the tests: {MEND}"
        )


def test_every_locked_file_has_its_hash() -> None:
    for name in ("requirements.txt", "build-requirements.txt"):
        text = (ROOT / "image" / name).read_text(encoding="utf-8")
        entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]
        assert entries
        for entry in entries:
            assert "--hash=sha256:" in entry, entry
