"""Settings of which a standby must not have less than its primary: their values, and who takes a change first."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict

from instance_manager.postgres.control_data import HotStandbySettings
from instance_manager.postgres.parameters import HOT_STANDBY_DEFAULTS, minimums_for


def hot_standby_settings_of(
    parameters: Mapping[str, str | int | float | bool], *, instances: int
) -> HotStandbySettings:
    """The hot-standby-sensitive settings that these user parameters lead to, Postgres's defaults filled in."""
    minimums = minimums_for(instances)

    def value(name: str) -> int:
        return max(minimums.get(name, 0), int(parameters.get(name, HOT_STANDBY_DEFAULTS[name])))

    return HotStandbySettings(
        max_connections=value("max_connections"),
        max_worker_processes=value("max_worker_processes"),
        max_wal_senders=value("max_wal_senders"),
        max_prepared_transactions=value("max_prepared_transactions"),
        max_locks_per_transaction=value("max_locks_per_transaction"),
    )


def settings_for_standby(wanted: HotStandbySettings, control: HotStandbySettings) -> HotStandbySettings:
    """What a standby must start with: never less than pg_controldata has of the primary, or it does not start."""
    wanted_values = asdict(wanted)
    control_values = asdict(control)
    return HotStandbySettings(**{name: max(value, control_values[name]) for name, value in wanted_values.items()})


class RestartOrder(enum.Enum):
    """Which instance takes a change of hot-standby-sensitive settings first."""

    ANY = "any"
    STANDBYS_FIRST = "standbys first"
    """Something is raised: a primary with more than its standby stops the standby's replay."""
    PRIMARY_FIRST = "primary first"
    """Something is lowered: a standby must not have less than the primary's WAL still says."""
    TWO_PASSES = "two passes"
    """Both: first raise on standbys and primary, then lower on primary and standbys."""


def restart_order(current: HotStandbySettings, wanted: HotStandbySettings) -> RestartOrder:
    """The order for the whole cluster; `current` is what the primary runs with."""
    before = asdict(current)
    raised = any(value > before[name] for name, value in asdict(wanted).items())
    lowered = any(value < before[name] for name, value in asdict(wanted).items())
    if raised and lowered:
        return RestartOrder.TWO_PASSES
    if raised:
        return RestartOrder.STANDBYS_FIRST
    return RestartOrder.PRIMARY_FIRST if lowered else RestartOrder.ANY
