"""JSON for the core's dataclasses: strict both ways, so that what cannot be read is an error and never a default."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def to_json(value: object) -> bytes:
    """Stable encoding: sets are sorted, so that equal values give equal bytes."""
    return msgspec.json.encode(value, order="deterministic")


def from_json(data: bytes | str, kind: type[T]) -> T:
    """Decode and check every type; msgspec.ValidationError or DecodeError when the data is not a `kind`."""
    return msgspec.json.decode(data, type=kind, strict=True)


def to_plain(value: object) -> Any:
    """The value as dicts, lists, strings and numbers, for people's JSON."""
    return msgspec.to_builtins(value, order="deterministic")
