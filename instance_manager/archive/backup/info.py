"""`backup.info` of barman: what a backup is, one `key=value` a line. It is written last, so what has one is whole."""

from __future__ import annotations

import ast
import datetime
import re
from dataclasses import dataclass

from instance_manager.archive.backup.names import is_incremental_id
from instance_manager.archive.wal_names import Segment, SegmentSize
from instance_manager.core.types import Lsn, Timeline, format_lsn, parse_lsn

DONE = "DONE"
DEFAULT_SEGMENT_BYTES = 16 << 20
_LINE = re.compile(r"([a-z_]+)=(.*)")


class InfoInvalid(Exception):
    """Not a backup.info that says what a backup needs."""


@dataclass(frozen=True, slots=True)
class Tablespace:
    """One outside of the data directory; its content is in tars of its own, named by `oid`."""

    name: str
    oid: int
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupInfo:
    """One backup, ours or barman's."""

    backup_id: str
    status: str = DONE
    """barman's: DONE, FAILED, STARTED, ...; only DONE can be restored."""
    name: str | None = None
    timeline: Timeline
    begin_lsn: Lsn
    end_lsn: Lsn | None
    """WAL up to here makes it consistent; None: it is not done."""
    begin_time: datetime.datetime
    end_time: datetime.datetime | None
    system_identifier: str
    segment_bytes: int = DEFAULT_SEGMENT_BYTES
    version_number: int
    """Of Postgres, as `server_version_num`."""
    data_directory: str
    tablespaces: tuple[Tablespace, ...] = ()
    compression: str | None = None
    """As barman names it: `gzip`, `bzip2`, `lz4`; None: none. The objects' names tell too."""
    size_bytes: int | None = None
    """Of the cluster's files."""
    stored_bytes: int | None = None
    backup_label: str | None = None
    parent_id: str | None = None
    """The backup before, without which this one is nothing; None: a full one."""
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.status == DONE and self.end_lsn is not None and self.end_time is not None

    @property
    def is_own(self) -> bool:
        """Taken by this program, and so never without a manifest."""
        return f"LABEL: {label_of(self.backup_id)}\n" in (self.backup_label or "")

    @property
    def segment_size(self) -> SegmentSize:
        return SegmentSize(self.segment_bytes)

    @property
    def begin_segment(self) -> Segment:
        """The first segment that a recovery from it needs."""
        return self.segment_size.containing(self.timeline, self.begin_lsn)

    @property
    def end_segment(self) -> Segment:
        """The last one without which it is not consistent."""
        end = self.end_lsn if self.end_lsn is not None else self.begin_lsn
        # A position at a boundary is the end of the segment before it.
        return self.segment_size.containing(self.timeline, Lsn(max(end - 1, self.begin_lsn)))

    @property
    def major(self) -> int:
        return self.version_number // 10000


def label_of(backup_id: str) -> str:
    """What Postgres is told that the backup is."""
    return f"instance-manager {backup_id}"


def render_info(info: BackupInfo) -> bytes:
    """All keys of barman 3, `None` where there is nothing to say. ValueError: a line end in a value."""
    size = info.segment_size
    spaces = [(each.name, each.oid, each.location) for each in info.tablespaces]
    values = {
        "backup_label": repr(info.backup_label) if info.backup_label else None,
        "backup_name": info.name,
        "begin_offset": info.begin_lsn % size.size_bytes,
        "begin_time": _render_time(info.begin_time),
        "begin_wal": size.name(info.begin_segment),
        "begin_xlog": format_lsn(info.begin_lsn),
        "children_backup_ids": None,
        "cluster_size": info.size_bytes,
        "compression": info.compression,
        "config_file": f"{info.data_directory}/postgresql.conf",
        "copy_stats": None,
        "data_checksums": None,
        "deduplicated_size": info.stored_bytes,
        "encryption": None,
        "end_offset": None if info.end_lsn is None else info.end_lsn % size.size_bytes,
        "end_time": None if info.end_time is None else _render_time(info.end_time),
        "end_wal": None if info.end_lsn is None else size.name(info.end_segment),
        "end_xlog": None if info.end_lsn is None else format_lsn(info.end_lsn),
        "error": info.error,
        "hba_file": f"{info.data_directory}/pg_hba.conf",
        "ident_file": f"{info.data_directory}/pg_ident.conf",
        "included_files": None,
        "mode": "concurrent",
        "parent_backup_id": info.parent_id,
        "pgdata": info.data_directory,
        "server_name": "cloud",
        "size": info.stored_bytes,
        "status": info.status,
        "summarize_wal": None,
        "systemid": info.system_identifier,
        "tablespaces": repr(spaces) if spaces else None,
        "timeline": info.timeline,
        "version": info.version_number,
        "xlog_segment_size": info.segment_bytes,
    }
    if info.name is None:
        del values["backup_name"]
    lines = [f"{key}={value}" for key, value in values.items()]
    if any("\n" in line or "\r" in line for line in lines):
        raise ValueError("a line end in a value of backup.info")
    return "".join(f"{line}\n" for line in lines).encode()


def parse_info(backup_id: str, content: bytes) -> BackupInfo:
    """From any barman's file. InfoInvalid: something is missing or is not what it must be."""
    values: dict[str, str] = {}
    for line in content.decode(errors="replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is not None and match[2] != "None":
            values[match[1]] = match[2]
    try:
        end_lsn, end_time = values.get("end_xlog"), values.get("end_time")
        return BackupInfo(
            backup_id=backup_id,
            status=values.get("status", "EMPTY"),
            name=values.get("backup_name"),
            timeline=Timeline(int(values["timeline"])),
            begin_lsn=parse_lsn(values["begin_xlog"]),
            end_lsn=None if end_lsn is None else parse_lsn(end_lsn),
            begin_time=_parse_time(values["begin_time"]),
            end_time=None if end_time is None else _parse_time(end_time),
            system_identifier=values.get("systemid", ""),
            segment_bytes=SegmentSize(int(values.get("xlog_segment_size", DEFAULT_SEGMENT_BYTES))).size_bytes,
            version_number=int(values["version"]),
            data_directory=values["pgdata"],
            tablespaces=_parse_tablespaces(values.get("tablespaces")),
            compression=values.get("compression"),
            size_bytes=_number(values.get("cluster_size")),
            stored_bytes=_number(values.get("size")),
            backup_label=_text(values.get("backup_label")),
            parent_id=values.get("parent_backup_id") if is_incremental_id(backup_id) else None,
            error=values.get("error"),
        )
    except KeyError as error:
        raise InfoInvalid(f"backup {backup_id}: its backup.info says nothing of {error.args[0]}") from error
    except (ValueError, SyntaxError, TypeError) as error:
        raise InfoInvalid(f"backup {backup_id}: its backup.info cannot be read: {error}") from error


def _render_time(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).isoformat(sep=" ", timespec="microseconds")


def _parse_time(text: str) -> datetime.datetime:
    """barman writes an ISO time, and from old versions one without a zone, which is then the local one."""
    return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)


def _parse_tablespaces(text: str | None) -> tuple[Tablespace, ...]:
    found = ast.literal_eval(text) if text else ()
    return tuple(Tablespace(str(name), int(oid), str(location)) for name, oid, location in found)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _text(text: str | None) -> str | None:
    return None if text is None else str(ast.literal_eval(text))
