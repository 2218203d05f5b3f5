"""What stands in for the image: the machine's own Postgres and Python, with this checkout's package in a venv.

No registry and no build is needed for a test of the cluster, and the code under test is that of the checkout. The image
itself is tested in tests/image.
"""

from __future__ import annotations

import compileall
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from kube_api import Object

USER = 999
ROOT = Path(__file__).resolve().parents[2]
_VENV = "/opt/instance-manager"
_PACKAGES = f"{_VENV}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
_ACCOUNTS = f"root:x:0:0:root:/root:/bin/sh\npostgres:x:{USER}:{USER}:postgres:/var/lib/postgresql:/bin/sh\n"
_GROUPS = f"root:x:0:\npostgres:x:{USER}:\n"
_COMMAND = f"""\
#!{_VENV}/bin/python -I
import sys
from instance_manager.cli import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Image:
    """What an image gives to a container besides its root filesystem."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    working_directory: str = "/"
    user: int = USER
    files: tuple[Object, ...] = ()
    links: tuple[Object, ...] = ()
    mounts: tuple[Object, ...] = ()


def instance_manager_image() -> Image:
    """The package compiled, as in the image: without its bytecode every start takes longer and more memory."""
    package = ROOT / "instance_manager"
    compileall.compile_dir(package, quiet=2)
    python, python_mounts = interpreter()
    configuration = f"home = {Path(python).parent}\ninclude-system-site-packages = false\nversion = {sys.version_info.major}.{sys.version_info.minor}\n"
    return Image(
        entrypoint=("instance-manager",),
        command=("run", "--config", "/etc/instance-manager/instance-manager.yaml"),
        environment={
            "PATH": f"{_VENV}/bin:/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PGHOST": "/var/lib/postgresql/instance/socket",
            "INSTANCE_MANAGER_SOCKET": "/var/lib/postgresql/instance/control.sock",
        },
        files=(
            {"path": "/etc/passwd", "text": _ACCOUNTS, "mode": 0o644},
            {"path": "/etc/group", "text": _GROUPS, "mode": 0o644},
            {"path": f"{_VENV}/pyvenv.cfg", "text": configuration, "mode": 0o644},
            {"path": f"{_VENV}/bin/instance-manager", "text": _COMMAND, "mode": 0o755},
            {"path": f"{_PACKAGES}/dependencies.pth", "text": f"{_VENV}/dependencies\n", "mode": 0o644},
        ),
        links=({"path": f"{_VENV}/bin/python", "target": python},),
        mounts=(
            *python_mounts,
            {"source": str(package), "target": f"{_PACKAGES}/instance_manager", "read_only": True},
            {"source": sysconfig.get_path("purelib"), "target": f"{_VENV}/dependencies", "read_only": True},
        ),
    )


def interpreter() -> tuple[str, tuple[Object, ...]]:
    """Debian's, which the image has too (it is built for speed, and others' often are not); where there is none of the version of these
    tests, whose packages it must read, theirs. And what a container must mount for it: it may lie in a home that is closed to others.

    At its own path, because its libraries are found by it.
    """
    of_debian = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    if of_debian.exists():
        return str(of_debian), ()
    executable, prefix = Path(sys.executable).resolve(), str(Path(sys.base_prefix).resolve())
    return str(executable), ({"source": prefix, "target": prefix, "read_only": True},)
