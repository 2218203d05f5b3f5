"""Where the programs of one Postgres major version are."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from instance_manager.postgres.server import LocalPostgresError, LocalServer, run_program

SUPPORTED_MAJORS = (14, 15, 16, 17, 18)
REQUIRED_PROGRAMS = (
    "postgres",
    "initdb",
    "pg_basebackup",
    "pg_controldata",
    "pg_rewind",
    "pg_waldump",
)
DEBIAN_LIBRARY = Path("/usr/lib/postgresql")
_VERSION = re.compile(r"postgres \(PostgreSQL\) (\d+)(?:\.(\d+))?((?:devel|beta|rc)\d*)?")


class BinariesNotFound(LocalPostgresError):
    """No directory holds all the programs that are needed; the text says where they were sought and what to install."""


@dataclass(frozen=True, slots=True)
class ServerVersion:
    """Version of the programs, such as 15.18; `minor` is -1 for a development or beta version."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" if self.minor >= 0 else f"{self.major} (pre-release)"


def missing_programs(directory: Path) -> tuple[str, ...]:
    """Which of the programs we need are not in `directory`, or cannot be executed."""
    return tuple(name for name in REQUIRED_PROGRAMS if not os.access(directory / name, os.X_OK))


def find_bin_directory(
    *,
    major: int | None = None,
    explicit: Path | None = None,
    library: Path = DEBIAN_LIBRARY,
    search_path: str | None = None,
) -> Path:
    """The directory of Postgres's programs: `explicit`, else Debian's for `major` (or the newest there), else PATH's.

    Debian's directory goes before PATH, because Debian's /usr/bin holds wrappers for client programs only. `major`
    None: any supported one. BinariesNotFound names what is missing and the package to install. An explicit directory
    is never replaced by another.
    """
    if explicit is not None:
        missing = missing_programs(explicit)
        if missing:
            raise BinariesNotFound(
                f"postgres.bin_directory {explicit} has no {', '.join(missing)}: give the directory that `initdb` is in"
            )
        return explicit
    majors = SUPPORTED_MAJORS[::-1] if major is None else (major,)
    sought = [library / str(each) / "bin" for each in majors]
    found_on_path = shutil.which("postgres", path=search_path)
    if found_on_path is not None:
        # A link in /usr/local/bin points to the directory where the others are.
        sought.append(Path(found_on_path).resolve().parent)
    incomplete = []
    for directory in sought:
        missing = missing_programs(directory)
        if not missing:
            return directory
        if len(missing) < len(REQUIRED_PROGRAMS):
            incomplete.append(f"{directory} has no {', '.join(missing)}")
    package = f"postgresql-{major}" if major is not None else "postgresql-17"
    raise BinariesNotFound(
        f"no Postgres programs in {library}/<major>/bin or on PATH"
        + (f" ({'; '.join(incomplete)})" if incomplete else "")
        + f": install the package {package}, or set postgres.bin_directory"
    )


def parse_server_version(text: str) -> ServerVersion:
    """From what `postgres --version` prints; ValueError for anything else."""
    match = _VERSION.match(text.strip())
    if match is None:
        raise ValueError(f"not a version of Postgres: {text.strip()!r}")
    return ServerVersion(int(match[1]), -1 if match[3] or match[2] is None else int(match[2]))


async def server_version(server: LocalServer, *, deadline_s: float = 10.0) -> ServerVersion:
    """Ask the program itself. LocalPostgresError, as `run_program`; BinariesNotFound: a major that is not supported."""
    version = parse_server_version(
        await run_program(server, [server.program("postgres"), "--version"], deadline_s=deadline_s)
    )
    if version.major not in SUPPORTED_MAJORS:
        raise BinariesNotFound(
            f"{server.bin_directory} holds Postgres {version}; supported are {SUPPORTED_MAJORS[0]} to {SUPPORTED_MAJORS[-1]}"
        )
    return version
