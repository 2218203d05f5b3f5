"""How a rule is broken: one line of the real code is exchanged for another, and comes back afterwards.

The line that is looked for stands in the variant itself, so a reader sees what is bent; when the code has moved on and the
line is not there any more (or is there twice), the variant fails loudly instead of testing nothing.
"""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

Patch = Callable[[], AbstractContextManager[None]]
Edit = tuple[str, str]

_PREFIX = "instance_manager"


class NoLongerFits(Exception):
    """The code that a variant bends has changed: the variant must be looked at."""


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """An attribute of a class or a module. A function of a module is replaced wherever it was imported by its name."""
    before = inspect.getattr_static(owner, name)
    places = [owner]
    if isinstance(owner, ModuleType) and callable(before):
        places += [
            module
            for key, module in list(sys.modules.items())
            if (key.startswith(_PREFIX) or key.startswith("simulated"))
            and module is not owner
            and module.__dict__.get(name) is before
        ]
    for place in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, before)


@contextmanager
def _bent(owner: Any, name: str, edits: tuple[Edit, ...]) -> Iterator[None]:
    function: Any = inspect.getattr_static(owner, name)
    plain: Any = function.fget if isinstance(function, property) else function
    source = inspect.getsource(plain)
    for old, new in edits:
        if source.count(old) != 1:
            raise NoLongerFits(f"{owner.__name__}.{name} has {source.count(old)} times: {old}")
        source = source.replace(old, new)
    namespace: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    code = compile(textwrap.dedent(source), f"<bent {owner.__name__}.{name}>", "exec", flags=flags, dont_inherit=True)
    exec(code, inspect.unwrap(plain).__globals__, namespace)  # noqa: S102 - our own source, with one line exchanged
    with replaced(owner, name, namespace[name]):
        yield


def bent(owner: Any, name: str, *edits: Edit) -> Patch:
    """The function `name` of a class or module, with each old text, which must be there once, exchanged for a new one."""
    return lambda: _bent(owner, name, edits)


def swapped(owner: Any, name: str, value: object) -> Patch:
    return lambda: replaced(owner, name, value)


def wrapped(owner: Any, name: str, wrap: Callable[[Any], object]) -> Patch:
    """`wrap` gets what is there, and returns what takes its place."""
    return lambda: replaced(owner, name, wrap(inspect.getattr_static(owner, name)))


def together(*patches: Patch) -> Patch:
    """One rule that is written down in several places."""

    @contextmanager
    def applied() -> Iterator[None]:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return applied
