"""Which names an object may have: what is safe as a key and as a path at once."""

from __future__ import annotations

import re

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=@+-]{0,199}")
_LONGEST = 900


def check_name(name: str) -> str:
    """The name itself. ValueError: it could leave a directory, be hidden in it, or be read in two ways."""
    if len(name) > _LONGEST or not all(_PART.fullmatch(part) for part in name.split("/")):
        raise ValueError(f"not a name for an object: {name[:200]!r}")
    return name


def check_prefix(prefix: str) -> str:
    """A prefix of names, possibly empty or ending with `/`. ValueError, as `check_name`."""
    head, slash, last = prefix.rpartition("/")
    if slash:
        check_name(head)
    if last:
        check_name(last)
    return prefix
