"""How far the walks over the rules as they are go: within CI's budget, and deeper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from breadth_first import Model
from permits_model import PermitRules, PermitsModel
from permits_words import DEFAULT_TICKS, Ticks
from protocol_model import ProtocolModel
from protocol_rules import ProtocolRules
from protocol_words import Bounds
from views_model import ViewRules, ViewsModel


@dataclass(frozen=True, kw_only=True)
class Walked:
    """One walk; `least`: a walk that silently became smaller has lost something."""

    build: Callable[[], Model[Any]]
    least: int
    state_limit: int | None = None
    """Ended there, if it is too big to be finished."""


def views(standbys: int, k_max: int, least: int, *, late_writes: bool = True) -> Walked:
    return Walked(
        build=lambda: ViewsModel(ViewRules(), standbys=standbys, k_max=k_max, late_writes=late_writes), least=least
    )


def protocol(least: int, *, limit: int | None = None, **bounds: Any) -> Walked:
    return Walked(build=lambda: ProtocolModel(ProtocolRules(), Bounds(**bounds)), least=least, state_limit=limit)


def permits(least: int, *, limit: int | None = None, ticks: Ticks = DEFAULT_TICKS, **bounds: Any) -> Walked:
    settings = {"epochs": 2, "restarts": 0, "releases": 0, "extensions": False} | bounds
    return Walked(build=lambda: PermitsModel(PermitRules(), ticks=ticks, **settings), least=least, state_limit=limit)


SHORT = Ticks(2, 3, 1)
PROMPT = Ticks(2, 3, 0)
SHORTEST = Ticks(1, 2, 1)
"""Too short for an extension to be of use."""

CI: tuple[Walked, ...] = (
    views(2, 1, 5_000),
    views(2, 2, 15_000),
    views(3, 1, 60_000),
    views(3, 2, 45_000, late_writes=False),
    protocol(30_000, writes=2, epochs=3),
    protocol(55_000, writes=1, epochs=3, crashes=1),
    protocol(80_000, writes=1, epochs=3, unknown_writes=1),
    protocol(38_000, writes=1, epochs=3, agent_restarts=1),
    protocol(14_000, writes=1, epochs=3, reaffirms=1),
    protocol(14_000, writes=1, epochs=3, lost_tails=1),
    protocol(10_000, writes=1, epochs=3, give_back=True),
    protocol(25_000, writes=1, epochs=2, releases=1),
    protocol(15_000, instances=3, writes=1, epochs=3, quorum_steps="none"),
    protocol(50_000, writes=1, epochs=2, damages=1),
    permits(60_000, mode="asynchronous"),
    permits(250_000, mode="asynchronous", releases=1, ticks=SHORT),
    permits(200_000, mode="asynchronous", extensions=True, ticks=SHORT),
    permits(80_000, mode="synchronous", extensions=True, ticks=PROMPT),
    permits(60_000, mode="asynchronous", restarts=1, ticks=SHORTEST),
    permits(80_000, mode="asynchronous", clears=1, ticks=SHORTEST),
)

DEEP_LIMIT = 20_000_000

DEEP: tuple[Walked, ...] = (
    views(3, 2, 300_000),
    views(3, 3, 300_000),
    protocol(900_000, writes=1, epochs=3, damages=1),
    protocol(900_000, writes=1, epochs=3, damages=1, crashes=1, limit=DEEP_LIMIT),
    protocol(1_900_000, writes=1, epochs=4, crashes=1, unknown_writes=1, limit=DEEP_LIMIT),
    protocol(300_000, writes=2, epochs=3, crashes=1, unknown_writes=1, limit=DEEP_LIMIT),
    protocol(170_000, writes=1, epochs=3, releases=1),
    protocol(300_000, writes=1, epochs=3, releases=1, crashes=1, unknown_writes=1, limit=DEEP_LIMIT),
    protocol(300_000, writes=1, epochs=3, agent_restarts=1, unknown_writes=1, limit=DEEP_LIMIT),
    protocol(300_000, writes=1, epochs=4, crashes=1, clones=1, reaffirms=1, limit=DEEP_LIMIT),
    protocol(300_000, writes=1, epochs=4, give_back=True, unknown_writes=1, crashes=1, limit=DEEP_LIMIT),
    protocol(140_000, instances=3, k=2, writes=1, epochs=2, quorum_steps="alone or all"),
    protocol(150_000, instances=3, writes=1, epochs=3, quorum_steps="none", crashes=1),
    protocol(
        300_000, instances=3, writes=2, epochs=3, quorum_steps="none", crashes=1, unknown_writes=1, limit=DEEP_LIMIT
    ),
    protocol(300_000, instances=3, writes=1, epochs=3, quorum_steps="alone or all", crashes=1, limit=DEEP_LIMIT),
    protocol(300_000, instances=3, writes=1, epochs=2, limit=DEEP_LIMIT),
    permits(300_000, mode="asynchronous", epochs=3),
    permits(300_000, mode="asynchronous", restarts=1, limit=DEEP_LIMIT),
    permits(300_000, mode="asynchronous", releases=1, restarts=1, ticks=SHORT, limit=DEEP_LIMIT),
    permits(300_000, mode="asynchronous", extensions=True, ticks=SHORT, limit=DEEP_LIMIT),
    permits(300_000, mode="asynchronous", extensions=True, restarts=1, clears=1, ticks=SHORT, limit=DEEP_LIMIT),
    permits(300_000, mode="synchronous", extensions=True, ticks=SHORT, limit=DEEP_LIMIT),
    permits(300_000, mode="asynchronous", instances=3, extensions=True, ticks=SHORT, limit=DEEP_LIMIT),
    permits(300_000, mode="synchronous", instances=3, extensions=True, ticks=SHORT, limit=DEEP_LIMIT),
)

SETTINGS: dict[str, tuple[Walked, ...]] = {"ci": CI, "deep": DEEP}
