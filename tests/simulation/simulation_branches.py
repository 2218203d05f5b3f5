"""How often each branch of the rules was taken: the core's modules are loaded with a counter at the head of each branch.

A branch is the body of an `if`, `elif`, `else`, `for`, `while`, `case` or function in a module that decides. Each is named
by its function and its first line, so that the summary reads as the rules do. Import this module, and call `count_branches`,
before anything of `instance_manager` is imported.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

MODULES = tuple(
    f"instance_manager.core.{name}"
    for name in ("decide", "observation", "voting", "election", "lease", "quorum", "rejoin")
)
"""Where decisions are made."""
HITS: list[int] = []
NAMES: list[str] = []
"""Of each branch: module, function, and the line that it begins with."""
GUARDS: list[str] = []
"""Those of them that raise: a caller's mistake, which must not happen."""
NOT_HERE = {
    "foreign": "nothing foreign is put into a data directory's place here",
    "_turn": "asked only by who knows its own end",
    "the Lease contradicts itself": "a hand that edits here leaves the fields consistent",
    "holder_peer": "asked of records that have a holder",
    "only promises elect": "asked in asynchronous clusters only",
    "this agent has watched for": "what it has seen unchanged for that long it has watched for that long",
    "I hold the Lease or am writable": "a holder is none of its own voters, and a former one is made one only as a standby",
    "is not after the Lease's": "a candidate asks for more than it has seen, and is refused for an older record before",
    'f"the Lease lasts {record.lease_duration_s': "the time that is asked for is the record's own",
    "serving until the permit ends": "whoever is writable remembers what it wrote last, and repairs",
    "is writable under an earlier life": "here a container's processes end with its supervisor",
    "StandBack(f\"this log ends at {me.end}, which is not in the cluster's history": "a voter refuses its own promise before",
    'q is 0: nobody can be elected (R7)")': "a pre-vote has just judged the very same record",
    "the stamp is of epoch": "a stamp is written with its record's epoch, and leaves it with the next holder",
    "this instance was not the last holder that it knows of": "a directory that was a primary's wrote a record as its holder",
    "and has seen {volume.recorded_epoch}": "a volume notes another's epoch when it follows it, and is no primary's from then on",
    "the end of its log cannot be told": "here a stopped directory's log can always be read to its end",
    "this member has not promised itself": "a candidate promises itself first, or does not ask",
}
"""Branches that this world does not reach, each with the reason; the unit tests of the core do."""

SECOND_LOOKS = {
    "the Lease has no release stamp": "decide has asked the same",
    "another cluster: {request.cluster_uid}": "whose Lease a hand made another cluster's repairs it, and asks for no vote",
    "this log ends at {end}, the release at": "decide has compared what was estimated, and an estimate of that very end is right",
}
"""Branches that ask once more what was asked a moment before: what changes between two callbacks would take them."""

_NAME = "__branch_hits__"


class _Counting(ast.NodeTransformer):
    def __init__(self, module: str, source: str) -> None:
        self._module = module.rsplit(".", 1)[1]
        self._lines = source.splitlines()
        self._function: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._function.append(node.name)
        self.generic_visit(node)
        self._function.pop()
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if self._function:
            node.body = self._counted(node.body)
            if node.orelse and not (len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)):
                node.orelse = self._counted(node.orelse)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST | list[ast.AST]:
        """A return that is no branch of its own counts too: it is what is left when no branch was taken."""
        return node

    def _counted(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        first = body[0]
        number = len(HITS)
        HITS.append(0)
        line = self._lines[first.lineno - 1].strip()
        following = first.lineno
        while line.endswith(("(", ",")):
            line += self._lines[following].strip()
            following += 1
        NAMES.append(f"{self._module}.{self._function[-1]}:{first.lineno}: {line[:100]}")
        if isinstance(first, ast.Raise):
            GUARDS.append(NAMES[-1])
        count = ast.parse(f"{_NAME}[{number}] += 1").body[0]
        for each in ast.walk(count):
            ast.copy_location(each, first)
        return [count, *body]


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        source = Path(self.path).read_text(encoding="utf-8")
        tree = _Counting(fullname, source).visit(ast.parse(source, self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_NAME] = HITS
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None:
            return None
        found.loader = _Loader(fullname, found.origin)
        return found


def count_branches() -> None:
    """To be called once, before the modules are imported."""
    assert not any(module in sys.modules for module in MODULES), "imported already: too late to count"
    sys.meta_path.insert(0, _Finder())


def taken() -> Counter[str]:
    """Since the last call."""
    found = Counter({name: hits for name, hits in zip(NAMES, HITS, strict=True) if hits})
    HITS[:] = [0] * len(HITS)
    return found


def note(name: str) -> str:
    """Why this branch may be at zero, for the summary; empty if it may not."""
    if name in GUARDS:
        return "  (a guard)"
    for words, why in (*NOT_HERE.items(), *SECOND_LOOKS.items()):
        if words in name:
            return f"  ({why})"
    return ""


def wrong_excuses(counters: Counter[str]) -> Iterator[str]:
    """Words of both lists that name no branch, and those of NOT_HERE that name one that was taken after all."""
    for words in (*NOT_HERE, *SECOND_LOOKS):
        named = [name for name in NAMES if words in name]
        if not named or (words in NOT_HERE and any(counters.get(name) for name in named)):
            yield words


def never(counters: Counter[str]) -> Iterator[str]:
    """Branches that were not taken although they could be."""
    return (
        name
        for name in NAMES
        if not counters.get(name)
        and name not in GUARDS
        and not any(words in name for words in (*NOT_HERE, *SECOND_LOOKS))
    )
