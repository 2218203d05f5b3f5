"""From a valid configuration to a running supervisor: directories, surroundings, and its command line."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import sys
from pathlib import Path

from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration
from instance_manager.config_sections import ArchiveSection
from instance_manager.metrics.custom import QueriesUnusable, load_queries
from instance_manager.postgres.bootstrap import name_problem
from instance_manager.postgres.configuration import check_parameters
from instance_manager.postgres.host_based_access import (
    Access,
    AccessLineRefused,
    AccessSettings,
    check_line,
    render_hba,
)
from instance_manager.supervisor.companion import COMPANION_SEPARATOR

HEARTBEAT_TIMEOUT_S = 3.0


class LaunchError(Exception):
    """The instance cannot be started; the text says what to do."""


def postgres_problems(configuration: Configuration) -> tuple[str, ...]:
    """What Postgres must not be told, a sentence each: it would not start, or give away what is not the user's."""
    section = configuration.postgres
    found = [f"postgres.parameters: {problem}" for problem in check_parameters(section.parameters)]
    for line in section.host_based_access:
        try:
            check_line(line)
        except AccessLineRefused as error:
            found.append(f"postgres.host_based_access: {error}")
    try:
        render_hba(AccessSettings(application_networks=section.application_networks), Access.OPEN)
    except ValueError as error:
        found.append(f"postgres.application_networks: {error}")
    for key in ("application_owner", "application_database"):
        if (problem := name_problem(getattr(section, key))) is not None:
            found.append(f"postgres.{key}: {problem}")
    return tuple(found)


def surroundings_problems(configuration: Configuration) -> tuple[str, ...]:
    """What a valid configuration still lacks on this machine; each a sentence for the user."""
    found = list(postgres_problems(configuration))
    secret_files = {f"secrets.{key}": path for key, path in configuration.secrets.files.items()}
    if configuration.control is not None and configuration.control.token_file is not None:
        secret_files["control.token_file"] = configuration.control.token_file
    for key, path in secret_files.items():
        try:
            with path.open("rb") as file:
                content = file.read(4096).strip()
            mode = path.stat().st_mode
        except OSError as error:
            found.append(f"{key}: {path} cannot be read: {error.strerror}")
            continue
        if not content:
            found.append(f"{key}: {path} is empty")
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            found.append(f"{key}: {path} is open to other users; chmod 600 it")
    if configuration.tls is not None:
        found += Certificates(
            configuration.tls,
            configuration.control,
            configuration.certificates_directory,
            host=configuration.me.host,
        ).problems()
    if configuration.archive is not None:
        found += _archive_problems(configuration.archive)
    for path in configuration.metrics.queries:
        try:
            load_queries(path)
        except QueriesUnusable as error:
            found.append(f"metrics.queries: {error}")
    programs = configuration.postgres.bin_directory
    if programs is not None and not os.access(programs / "postgres", os.X_OK):
        found.append(f"postgres.bin_directory: {programs} has no program postgres")
    parent = configuration.instance.directory.parent
    if not configuration.instance.directory.exists() and not parent.is_dir():
        found.append(f"instance.directory: {parent} does not exist; create it or change the path")
    return tuple(found)


def prepare_directories(configuration: Configuration) -> None:
    """Make what the supervisor and the agent expect to find. LaunchError: one cannot be made or is no directory."""
    if problems := postgres_problems(configuration):
        raise LaunchError("\n".join(problems))
    owner = pwd.getpwnam(configuration.instance.run_as) if os.geteuid() == 0 else None
    own = (os.geteuid(), os.getegid())
    postgres = (owner.pw_uid, owner.pw_gid) if owner is not None else own
    _make(configuration.instance.directory, 0o755, own)
    _make(configuration.state_directory, 0o700, postgres)
    _make(configuration.socket_directory, 0o755, postgres)
    _make(configuration.log_directory, 0o700, postgres)
    if configuration.coordination.local is not None:
        _make(configuration.coordination.local.locks_directory, 0o700, own)


def supervisor_argv(configuration: Configuration, configuration_file: Path) -> list[str]:
    """The command line that this process becomes. No secret is in it."""
    python = [sys.executable, "-I", "-m"]
    argv = [
        *(*python, "instance_manager.supervisor"),
        *("--name", configuration.instance.name),
        *("--lock-file", str(configuration.lock_file)),
        *("--hard-s", f"{configuration.timings.hard_s:g}"),
        *("--heartbeat-timeout-s", f"{HEARTBEAT_TIMEOUT_S:g}"),
        *("--kill-budget-s", f"{configuration.timings.kill_budget_s:g}"),
        *("--shutdown-timeout-s", f"{configuration.instance.shutdown_timeout_s:g}"),
    ]
    if os.geteuid() == 0:
        argv += ["--postgres-user", configuration.instance.run_as]
    if configuration.instance.termination_log is not None:
        argv += ["--termination-log", str(configuration.instance.termination_log)]
    file = ("--config", str(configuration_file.absolute()))
    argv += ["--", *python, "instance_manager.agent", *file]
    if configuration.archive is not None:
        argv += [COMPANION_SEPARATOR, *python, "instance_manager.archive", *file]
    return argv


def _archive_problems(archive: ArchiveSection) -> list[str]:
    found = []
    if archive.directory is not None and not archive.directory.is_dir():
        found.append(f"archive.directory: {archive.directory} is no directory; create it, or mount it")
    for key in ("credentials_file", "ca_file"):
        path: Path | None = getattr(archive.s3, key, None)
        if path is not None and not os.access(path, os.R_OK):
            found.append(f"archive.s3.{key}: {path} cannot be read")
    return found


def _make(path: Path, mode: int, owner: tuple[int, int]) -> None:
    """Existing directories keep their mode; a wrong owner is mended, through no symbolic link."""
    try:
        if not path.exists():
            path.mkdir(mode=mode, parents=True)
            path.chmod(mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if os.geteuid() == 0 and (found.st_uid, found.st_gid) != owner and owner[0] != 0:
                os.fchown(descriptor, *owner)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be made ready: {error.strerror}; see its parent's owner and mode") from error


def terminal_size() -> tuple[int, int]:
    """Columns and lines, 80 x 24 where there is no terminal."""
    size = shutil.get_terminal_size((80, 24))
    return size.columns, size.lines
