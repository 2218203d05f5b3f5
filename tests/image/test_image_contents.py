"""What is in the image, and what must not be."""

from __future__ import annotations

import json
import re

import pytest
from image_engine import ROOT, Engine

from instance_manager import __version__

SIZE_MAX_BYTES = 260 * 1000 * 1000
"""Measured: 215 MB with Postgres 15 for amd64. More than this means that something came in unseen."""
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "ld", "as", "make", "cpp", "ld.bfd", "ld.gold")


@pytest.fixture(scope="module")
def configuration(engine: Engine) -> dict[str, object]:
    (image,) = json.loads(engine.call("image", "inspect", engine.image))
    return {**image["Config"], "Size": image["Size"]}


def test_the_container_is_a_plain_user_and_starts_the_manager(configuration: dict[str, object]) -> None:
    assert configuration["User"] == "999:999"
    assert configuration["Entrypoint"] == ["instance-manager"]
    assert configuration["Cmd"] == ["run", "--config", "/etc/instance-manager/instance-manager.yaml"]
    assert configuration["StopSignal"] in ("SIGTERM", "15")


def test_the_labels_name_the_versions(configuration: dict[str, object], engine: Engine) -> None:
    labels = configuration["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}(-changed)?|unknown", labels["org.opencontainers.image.revision"])
    if engine.built_from is not None:
        assert labels["org.opencontainers.image.revision"].removesuffix("-changed") == engine.built_from
    assert labels["org.opencontainers.image.base.name"]
    assert labels["dev.instance-manager.postgres.source"] in ("pgdg", "debian")
    version = engine.run(["--entrypoint", "postgres"], ["--version"])
    assert f"(PostgreSQL) {labels['dev.instance-manager.postgres.major']}." in version
    assert engine.run([], ["--version"]).strip() == f"instance-manager {__version__}"


def test_it_is_small(configuration: dict[str, object]) -> None:
    size = configuration["Size"]
    assert isinstance(size, int)
    assert size < SIZE_MAX_BYTES, f"{size / 1e6:.0f} MB"


def test_no_program_changes_its_user(engine: Engine) -> None:
    assert engine.shell("find / -xdev -type f -perm /6000").split() == []
    # The check itself must be able to see one.
    assert engine.shell("touch /tmp/x; chmod 4755 /tmp/x; find /tmp -xdev -type f -perm /6000").split() == ["/tmp/x"]


def test_there_is_no_compiler_and_nothing_to_install_python_packages_with(engine: Engine) -> None:
    assert engine.shell(f"for name in {' '.join(COMPILERS)} pip pip3; do command -v $name; done; true").split() == []
    assert engine.shell("python -c 'import importlib.util as u; print(u.find_spec(\"pip\"))'").strip() == "None"


def test_no_private_key_is_shared_by_all_who_run_it(engine: Engine) -> None:
    found = engine.shell(
        "grep -rlE --exclude-dir=proc --exclude-dir=sys -e '-----BEGIN .*PRIVATE KEY' /etc /opt /root /var || true"
    )
    assert found.split() == []


def test_all_python_is_compiled_so_that_a_start_on_a_read_only_root_compiles_nothing(engine: Engine) -> None:
    script = """
import pathlib, importlib.util
for folder in ("/opt/instance-manager/lib", "/usr/lib/python3.11"):
    sources = list(pathlib.Path(folder).rglob("*.py"))
    assert len(sources) > 100, folder
    for source in sources:
        compiled = pathlib.Path(importlib.util.cache_from_source(str(source)))
        if not compiled.exists() or compiled.read_bytes()[4] != 1:  # 1: by hash, and not looked at again
            print(source)
"""
    assert engine.run(["--entrypoint", "python"], ["-I", "-c", script]).split() == []


def test_the_packages_are_those_of_the_lock(engine: Engine) -> None:
    script = """
import importlib.metadata as m
for d in m.distributions():
    print(f"{d.name}=={d.version}".lower().replace("_", "-"))
"""
    installed = set(engine.run(["--entrypoint", "python"], ["-I", "-c", script]).split())
    locked = re.findall(r"^([\w.-]+==\S+)", (ROOT / "image" / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert installed == {*locked, f"instance-manager=={__version__}"}
