"""Which archive a command means: of an instance's configuration, of the running demo, or named in full."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from instance_manager.archive.codecs import Codec
from instance_manager.archive.layout import Layout
from instance_manager.archive.lineage import ForeignArchive, read_lineage
from instance_manager.archive.stores.directory import DirectoryStore
from instance_manager.archive.stores.s3 import S3Settings, S3Store
from instance_manager.config import Configuration, ConfigurationError, load_configuration
from instance_manager.config_sections import ArchiveSection, S3Section
from instance_manager.heap import use_one_heap
from instance_manager.ports import ObjectStore, ObjectStoreError

LOOK_DEADLINE_S = 30.0
WRONG_USE = 2


class WrongUse(Exception):
    """The command's arguments do not say what is needed; nothing was done."""


@dataclass(frozen=True, slots=True)
class Where:
    """An archive, and the instance whose it is where one was named."""

    store: ObjectStore
    layout: Layout
    configuration: Configuration | None


def make_store(archive: ArchiveSection) -> ObjectStore:
    """The store that the configuration names; nothing is asked of it yet."""
    if archive.directory is not None:
        return DirectoryStore(archive.directory)
    s3 = archive.s3
    if s3 is None:
        raise ConfigurationError("archive: give either directory or s3")
    return S3Store(
        S3Settings(
            bucket=s3.bucket,
            prefix=s3.prefix,
            endpoint=s3.endpoint,
            region=s3.region,
            path_style=s3.path_style,
            credentials_file=s3.credentials_file,
            profile=s3.profile,
            ca_file=s3.ca_file,
            encryption=s3.server_side_encryption,
            kms_key_id=s3.kms_key_id,
            emulate_conditional_writes=s3.conditional_writes == "emulated",
        )
    )


def add_where(parser: argparse.ArgumentParser, *, default: object = None) -> None:
    """The options that name an archive. `default`: argparse.SUPPRESS below a command that has them too."""
    group = parser.add_argument_group("which archive", "by default the running demo's")
    group.add_argument("--config", type=Path, metavar="FILE", default=default, help="an instance's configuration file")
    group.add_argument("--directory", type=Path, metavar="DIR", default=default, help="an archive in a directory")
    group.add_argument("--bucket", metavar="NAME", default=default, help="an archive in S3")
    group.add_argument("--prefix", metavar="NAMES", default=default, help="before every name in the bucket")
    group.add_argument("--endpoint", metavar="URL", default=default, help="of S3; by default AWS's")
    group.add_argument("--region", metavar="NAME", default=default)
    group.add_argument("--path-style", action="store_true", default=default, help="bucket in the path, not in the host")
    group.add_argument("--credentials-file", type=Path, metavar="FILE", default=default)
    group.add_argument("--ca-file", type=Path, metavar="FILE", default=default)
    group.add_argument("--server", metavar="NAME", default=default, help="the archive's name in the store")


async def find_archive(namespace: argparse.Namespace) -> Where:
    """WrongUse; ForeignArchive; ObjectStoreError."""
    configuration: Configuration | None = None
    if namespace.directory is not None or namespace.bucket is not None:
        section, server = _named_section(namespace), namespace.server
        if server is None:
            raise WrongUse("give --server NAME: the name under which the archive lies in the store")
    else:
        configuration = _configuration(namespace)
        if configuration.archive is None:
            raise WrongUse("this instance has no archive: its configuration has no section `archive`")
        section = configuration.archive
        server = namespace.server or section.server_name or configuration.cluster.name
    store = make_store(section)
    layout = Layout(server, Codec(section.codec))
    lineage = await read_lineage(store, layout, deadline_s=LOOK_DEADLINE_S)
    if lineage is not None:
        layout = Layout(server, Codec(lineage.codec))
    return Where(store, layout, configuration)


def _named_section(namespace: argparse.Namespace) -> ArchiveSection:
    if namespace.directory is not None:
        return ArchiveSection(directory=namespace.directory.absolute())
    return ArchiveSection(
        s3=S3Section(
            bucket=namespace.bucket,
            prefix=namespace.prefix or "",
            endpoint=namespace.endpoint,
            region=namespace.region,
            path_style=bool(namespace.path_style),
            credentials_file=namespace.credentials_file,
            ca_file=namespace.ca_file,
        )
    )


def _configuration(namespace: argparse.Namespace) -> Configuration:
    from instance_manager.demo_locator import DemoLocatorError, read_running_demo

    file = namespace.config
    if file is None:
        try:
            demo = read_running_demo()
        except DemoLocatorError as error:
            raise WrongUse(str(error)) from error
        if demo is None or not demo.sockets:
            raise WrongUse(
                "which archive? Give --config FILE, or --directory DIR or --bucket NAME with --server NAME, or start "
                "`instance-manager demo`"
            )
        file = demo.directory / "config" / f"{min(demo.sockets)}.yaml"
    try:
        return load_configuration(file)
    except ConfigurationError as error:
        raise WrongUse(str(error)) from error


def carry_out(namespace: argparse.Namespace, work: Callable[[Where], Awaitable[int]]) -> int:
    """The exit code of a command that works on an archive; what goes wrong is a line on standard error."""
    import sys

    async def run() -> int:
        where = await find_archive(namespace)
        try:
            return await work(where)
        finally:
            await where.store.close()

    use_one_heap()
    try:
        return asyncio.run(run())
    except WrongUse as error:
        print(f"instance-manager: {error}", file=sys.stderr)
        return WRONG_USE
    except (ForeignArchive, ObjectStoreError) as error:
        print(f"instance-manager: the archive: {error}", file=sys.stderr)
        return 1
