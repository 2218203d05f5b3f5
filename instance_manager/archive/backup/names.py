"""Where the objects of base backups lie: barman-cloud's folder, and ours for what barman must not see.

<server>/base/<id>/backup.info                          written last: what has none is no backup
<server>/base/<id>/data.tar.lz4, data_0001.tar.lz4 ...   the data directory; the last one has pg_control and backup_label
<server>/base/<id>/<oid>.tar.lz4 ...                     a tablespace
<server>/base/<id>/annotations/keep                      barman's "keep": `full` or `standalone`
<server>/instance-manager/incremental/<id>i/...          the same of an incremental backup, which barman would restore wrongly
<server>/instance-manager/backups/<id>/begun.json        the id is taken
<server>/instance-manager/backups/<id>/<tar>.members.gz  what the tar holds, with hashes
<server>/instance-manager/backups/<id>/manifest.json     the hashes of all of it
<server>/instance-manager/backups/<id>/deleting.json     it is being deleted: never restored again
<server>/instance-manager/requests/<request>/...         who wants a backup, and who takes it
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from instance_manager.archive.codecs import SUFFIXES
from instance_manager.archive.layout import Layout

_BACKUP_ID = re.compile(r"\d{8}T\d{6}i?")
_TAR = re.compile(r"(data|\d{1,10})(_\d{4,})?\.tar(\.[a-z0-9]+)?")


@dataclass(frozen=True, slots=True)
class TarName:
    """A tar's name taken apart: `data_0001.tar.lz4`."""

    stem: str
    part: int
    suffix: str

    @property
    def tablespace_oid(self) -> int | None:
        """None: the data directory."""
        return None if self.stem == "data" else int(self.stem)


@dataclass(frozen=True, slots=True)
class BackupNames:
    """Names of one backup's objects."""

    layout: Layout
    backup_id: str

    @property
    def folder(self) -> str:
        """barman's tools list what is below `base`, and would lay an incremental backup out as if it were whole."""
        parent = incremental_backups(self.layout) if is_incremental_id(self.backup_id) else self.layout.base
        return f"{parent}{self.backup_id}/"

    @property
    def info(self) -> str:
        return f"{self.folder}backup.info"

    @property
    def keep(self) -> str:
        return f"{self.folder}annotations/keep"

    @property
    def own_folder(self) -> str:
        return f"{own_backups(self.layout)}{self.backup_id}/"

    @property
    def begun(self) -> str:
        return f"{self.own_folder}begun.json"

    @property
    def manifest(self) -> str:
        return f"{self.own_folder}manifest.json"

    @property
    def deleting(self) -> str:
        return f"{self.own_folder}deleting.json"

    def tar(self, name: str, suffix: str) -> str:
        return f"{self.folder}{name}.tar{suffix}"

    def members(self, tar_name: str) -> str:
        return f"{self.own_folder}{tar_name}.members.gz"


def own_backups(layout: Layout) -> str:
    """The folder of ours with one folder for each backup."""
    return f"{layout.server}/instance-manager/backups/"


def incremental_backups(layout: Layout) -> str:
    """The folder beside barman's with one folder for each incremental backup."""
    return f"{layout.server}/instance-manager/incremental/"


def is_backup_id(text: str) -> bool:
    """The form that barman demands, `20251128T210500`; with an `i` behind it the backup is an incremental one."""
    return _BACKUP_ID.fullmatch(text) is not None


def is_incremental_id(backup_id: str) -> bool:
    return backup_id.endswith("i")


def requests_folder(layout: Layout) -> str:
    return f"{layout.server}/instance-manager/requests/"


def parse_tar_name(object_name: str) -> TarName | None:
    """None: no tar of a backup, or in a codec that cannot be read (snappy)."""
    match = _TAR.fullmatch(object_name.rpartition("/")[2])
    if match is None or (match[3] or "") not in SUFFIXES.values():
        return None
    return TarName(match[1], int((match[2] or "_0")[1:]), match[3] or "")
