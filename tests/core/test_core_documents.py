"""What documents repeat of the code is the same there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from instance_manager.core.roles import diagram
from instance_manager.core.timing import Timings

DOCS = Path(__file__).parents[2] / "docs"


def test_the_diagram_of_roles_in_the_document_is_drawn_from_the_table() -> None:
    text = (DOCS / "failover.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{diagram()}```" in text


def test_every_timing_is_documented_with_its_default() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    defaults = Timings()
    for each in fields(Timings):
        assert f"| `{each.name}` | {getattr(defaults, each.name):g} |" in text
