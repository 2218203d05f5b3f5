"""The time of day: in the record's `renewed_at`, in what is shown, and of certificates. Nothing else is ever decided by it."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp() -> str:
    """Now in UTC with six digits of the second, as Kubernetes writes a MicroTime: `2025-01-31T09:08:07.000012Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # noqa: TID251


def local_time() -> str:
    """Now on the user's wall, `09:08:07`, for a view that refreshes."""
    return datetime.now().astimezone().strftime("%H:%M:%S")  # noqa: TID251


def now_utc() -> datetime:
    """Now, for what a certificate says of its own life, which is written and judged by the wall clock everywhere; for the schedule of
    backups, and the ids of requests, where a wrong clock costs a backup too many."""
    return datetime.now(UTC)  # noqa: TID251


def unix_seconds() -> float:
    """Now, for formats that tell a time so."""
    return datetime.now(UTC).timestamp()  # noqa: TID251
