"""The Grafana dashboard: rows of panels, from which `generate.py` makes dashboard.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

P = "instance_manager_"
SELECT = '{namespace="$namespace", cluster="$cluster", pod=~"$pod"}'
ALL = '{namespace="$namespace", cluster="$cluster"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    queries: tuple[tuple[str, str], ...]
    """PromQL and its legend."""
    unit: str = "short"
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    """A stat tells what is now: what is gone is not shown as the last that was."""
    width: int = 8
    description: str = ""
    thresholds: tuple[tuple[float | None, str], ...] = ()
    """From which value on which colour; the first is for what is below all. Without any, Grafana's: red from 80 on."""
    states: tuple[tuple[int, str, str], ...] = ()
    """Of a state timeline: value, text and colour."""


def _with(selector: str, matcher: str) -> str:
    return selector.removesuffix("}") + ", " + matcher + "}"


def _state(pod_roles: str, value: int) -> str:
    return f"{P}role{_with(SELECT, pod_roles)} * {value}"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            Panel(
                title="Primaries",
                kind="stat",
                width=3,
                queries=((f"sum({P}accepts_writes{ALL})", ""),),
                description="1 in all but the seconds of a failover.",
                thresholds=((None, "red"), (1, "green"), (2, "red")),
            ),
            Panel(
                title="Epoch",
                kind="stat",
                width=3,
                queries=((f"max({P}epoch{ALL})", ""),),
                thresholds=((None, "blue"),),
            ),
            Panel(
                title="Promises a failover needs",
                kind="stat",
                width=4,
                queries=((f"max({P}election_promises_needed{ALL})", ""),),
                description="Empty: nobody can be elected.",
                thresholds=((None, "green"),),
            ),
            Panel(
                title="Commits wait for",
                kind="stat",
                width=4,
                queries=((f"max({P}synchronous_standbys_actual{ALL})", ""),),
                thresholds=((None, "orange"), (1, "green")),
            ),
            # The reds of these three are their alerts' limits.
            Panel(
                title="Fence in",
                kind="stat",
                width=3,
                unit="s",
                queries=((f"max({P}seconds_to_fence{ALL})", ""),),
                thresholds=((None, "red"), (2, "green")),
            ),
            Panel(
                title="Newest backup",
                kind="stat",
                width=3,
                unit="s",
                queries=((f"time() - max({P}archive_newest_backup_timestamp_seconds{ALL})", ""),),
                description="Its age. Empty without an archive, or without a backup.",
                thresholds=((None, "green"), (8 * 86400, "red")),
            ),
            Panel(
                title="Archive waits since",
                kind="stat",
                width=4,
                unit="s",
                queries=((f"max({P}archive_oldest_ready_age_seconds{ALL})", ""),),
                description="Empty without an archive.",
                thresholds=((None, "green"), (300, "red")),
            ),
        ),
    ),
    (
        "Lease and failover",
        (
            Panel(
                title="Role",
                kind="state-timeline",
                queries=(
                    (
                        "sum by (pod) ("
                        + " or ".join(
                            (
                                _state('role="primary"', 4),
                                _state('role=~"candidate|promoting"', 3),
                                _state('role="standby"', 2),
                                _state('role!~"primary|candidate|promoting|standby"', 1),
                            )
                        )
                        + ")",
                        "{{pod}}",
                    ),
                ),
                states=(
                    (4, "primary", "green"),
                    (3, "takes over", "purple"),
                    (2, "standby", "blue"),
                    (1, "neither", "orange"),
                ),
                description="A gap: the instance was not scraped.",
            ),
            Panel(
                title="Seconds to fence",
                unit="s",
                queries=((f"{P}seconds_to_fence{SELECT} and {P}lease_held{SELECT} == 1", "{{pod}}"),),
            ),
            Panel(
                title="Renewals",
                unit="ops",
                queries=(
                    (
                        f"sum by (pod, result) (rate({P}lease_renewals_total{SELECT}[$__rate_interval]))",
                        "{{pod}} {{result}}",
                    ),
                ),
            ),
            Panel(
                title="Duration of renewals, 99 %",
                unit="s",
                queries=(
                    (
                        f"histogram_quantile(0.99, sum by (pod, le) (rate({P}lease_renewal_seconds_bucket{SELECT}[$__rate_interval])))",
                        "{{pod}}",
                    ),
                ),
            ),
            Panel(
                title="Takeovers and self-fences",
                queries=(
                    (f"increase({P}failovers_total{SELECT}[$__rate_interval])", "{{pod}} {{kind}}"),
                    (f"increase({P}self_fences_total{SELECT}[$__rate_interval])", "{{pod}} fenced: {{reason}}"),
                ),
            ),
            Panel(
                title="Duration of the phases of takeovers",
                unit="s",
                queries=(
                    (
                        f"{P}failover_phase_seconds_sum{SELECT} / {P}failover_phase_seconds_count{SELECT}",
                        "{{pod}} {{phase}}",
                    ),
                ),
            ),
            Panel(
                title="Decisions",
                queries=(
                    (
                        f"sum by (pod, decision) (increase({P}decisions_total{SELECT}[$__rate_interval])) > 0",
                        "{{pod}} {{decision}}",
                    ),
                ),
                description="Empty while none changes.",
            ),
            Panel(
                title="Quorum",
                queries=(
                    (f"{P}quorum{SELECT}", "{{pod}} q"),
                    (f"{P}synchronous_standbys_actual{SELECT}", "{{pod}} waits for"),
                    (f"{P}voters{SELECT}", "{{pod}} voters"),
                ),
            ),
            Panel(title="Peers reached", queries=((f"sum by (pod) ({P}peer_reachable{SELECT})", "{{pod}}"),)),
        ),
    ),
    (
        "Replication",
        (
            Panel(title="Lag", unit="bytes", queries=((f"{P}replication_lag_bytes{SELECT}", "{{pod}}"),)),
            Panel(title="Not replayed yet", unit="bytes", queries=((f"{P}replay_lag_bytes{SELECT}", "{{pod}}"),)),
            Panel(
                title="WAL written", unit="Bps", queries=((f"rate({P}lsn_bytes{SELECT}[$__rate_interval])", "{{pod}}"),)
            ),
            Panel(
                title="WAL kept by slots",
                unit="bytes",
                queries=((f"{P}slot_retained_bytes{SELECT}", "{{pod}} {{slot_name}}"),),
            ),
            Panel(title="Timeline", queries=((f"{P}timeline{SELECT}", "{{pod}}"),)),
            Panel(
                title="Rewinds and clones",
                queries=((f"increase({P}rejoins_total{SELECT}[$__rate_interval])", "{{pod}} {{kind}} {{result}}"),),
            ),
        ),
    ),
    (
        "Postgres",
        (
            Panel(
                title="Transactions",
                unit="ops",
                queries=(
                    (
                        f"sum by (pod) (rate(pg_stat_database_xact_commit{SELECT}[$__rate_interval]))",
                        "{{pod}} committed",
                    ),
                    (
                        f"sum by (pod) (rate(pg_stat_database_xact_rollback{SELECT}[$__rate_interval]))",
                        "{{pod}} rolled back",
                    ),
                ),
            ),
            Panel(
                title="Connections",
                queries=(
                    (f"sum by (pod, state) (pg_stat_activity_count{SELECT}) > 0", "{{pod}} {{state}}"),
                    (f"pg_settings_max_connections{SELECT}", "{{pod}} limit"),
                ),
            ),
            Panel(
                title="Oldest transaction",
                unit="s",
                queries=((f"max by (pod) (pg_stat_activity_max_tx_duration{SELECT})", "{{pod}}"),),
            ),
            Panel(
                title="Rows changed",
                unit="ops",
                queries=tuple(
                    (f"sum by (pod) (rate(pg_stat_database_tup_{what}{SELECT}[$__rate_interval]))", "{{pod}} " + what)
                    for what in ("inserted", "updated", "deleted")
                ),
            ),
            Panel(
                title="Cache hits",
                unit="percentunit",
                queries=(
                    (
                        f"sum by (pod) (rate(pg_stat_database_blks_hit{SELECT}[$__rate_interval])) / (sum by (pod) (rate(pg_stat_database_blks_hit{SELECT}[$__rate_interval])) + sum by (pod) (rate(pg_stat_database_blks_read{SELECT}[$__rate_interval])))",
                        "{{pod}}",
                    ),
                ),
            ),
            Panel(
                title="Size of databases",
                unit="bytes",
                queries=((f"pg_database_size_bytes{SELECT}", "{{pod}} {{datname}}"),),
            ),
            Panel(title="Locks", queries=((f"sum by (pod, mode) (pg_locks_count{SELECT}) > 0", "{{pod}} {{mode}}"),)),
            Panel(
                title="Checkpoints",
                unit="ops",
                queries=(
                    (f"rate(pg_stat_bgwriter_checkpoints_timed_total{SELECT}[$__rate_interval])", "{{pod}} by time"),
                    (f"rate(pg_stat_bgwriter_checkpoints_req_total{SELECT}[$__rate_interval])", "{{pod}} asked for"),
                ),
            ),
            Panel(
                title="Deadlocks and conflicts",
                queries=(
                    (
                        f"sum by (pod) (increase(pg_stat_database_deadlocks{SELECT}[$__rate_interval]))",
                        "{{pod}} deadlocks",
                    ),
                    (
                        f"sum by (pod) (increase(pg_stat_database_conflicts{SELECT}[$__rate_interval]))",
                        "{{pod}} conflicts",
                    ),
                ),
            ),
        ),
    ),
    (
        "Volume and archive",
        (
            Panel(title="Free space", unit="bytes", queries=((f"{P}volume_free_bytes{SELECT}", "{{pod}}"),)),
            Panel(title="fsync", unit="s", queries=((f"{P}volume_fsync_seconds{SELECT}", "{{pod}}"),)),
            Panel(title="pg_wal", unit="bytes", queries=((f"pg_wal_size_bytes{SELECT}", "{{pod}}"),)),
            Panel(title="Files that wait", queries=((f"{P}archive_ready_files{SELECT}", "{{pod}}"),)),
            Panel(
                title="Archived",
                unit="ops",
                queries=((f"rate({P}archive_archived_files_total{SELECT}[$__rate_interval])", "{{pod}}"),),
            ),
            Panel(
                title="Behind in the archive",
                unit="s",
                queries=(
                    (f"{P}archive_lag_seconds{SELECT}", "{{pod}}"),
                    (f"{P}archive_stream_lag_seconds{SELECT} and {P}lease_held{SELECT} == 1", "{{pod}} streaming"),
                ),
                description="What the loss of every volume would cost.",
            ),
            Panel(
                title="Behind in the archive, bytes",
                unit="bytes",
                queries=(
                    (f"{P}archive_lag_bytes{SELECT}", "{{pod}}"),
                    (f"{P}archive_ready_bytes{SELECT}", "{{pod}} finished files"),
                ),
            ),
            Panel(
                title="Time of uploads by phase",
                unit="s",
                queries=((f"rate({P}archive_upload_seconds_total{SELECT}[$__rate_interval])", "{{pod}} {{phase}}"),),
                description="Seconds in a second; parallel uploads each count.",
            ),
            Panel(
                title="Gaps and conflicts",
                queries=(
                    (f"{P}archive_gap_segments{SELECT}", "{{pod}} missing segments"),
                    (f"{P}archive_gap_behind_newest_backup{SELECT}", "{{pod}} gap behind the newest backup"),
                    (f"increase({P}archive_conflicts_total{SELECT}[$__rate_interval])", "{{pod}} conflicts"),
                ),
            ),
            Panel(
                title="Recoverable window",
                unit="s",
                queries=(
                    (f"time() - max by (cluster) ({P}archive_recoverable_from_timestamp_seconds{ALL})", "back to"),
                    (
                        f"time() - max by (cluster) ({P}archive_newest_backup_timestamp_seconds{ALL})",
                        "newest backup's age",
                    ),
                ),
            ),
            Panel(
                title="Volume full in",
                unit="s",
                queries=((f"{P}archive_seconds_until_full{SELECT}", "{{pod}}"),),
                description="By the growth of what waits for the archive.",
            ),
            Panel(
                title="Certificates, days left",
                queries=((f"{P}certificate_days_left{SELECT}", "{{pod}} {{use}}"),),
            ),
        ),
    ),
    (
        "Instance manager",
        (
            Panel(
                title="Memory",
                unit="bytes",
                queries=((f"{P}process_resident_memory_bytes{SELECT}", "{{pod}} {{process}}"),),
            ),
            Panel(
                title="Processor of the agent",
                unit="percentunit",
                queries=((f"rate(process_cpu_seconds_total{SELECT}[$__rate_interval])", "{{pod}}"),),
            ),
            Panel(
                title="Loop lag, 99 %",
                unit="s",
                queries=(
                    (
                        f"histogram_quantile(0.99, sum by (pod, le) (rate({P}event_loop_lag_seconds_bucket{SELECT}[$__rate_interval])))",
                        "{{pod}}",
                    ),
                ),
            ),
            Panel(
                title="Restarts of the agent",
                queries=((f"increase({P}agent_restarts_total{SELECT}[$__rate_interval])", "{{pod}}"),),
            ),
            Panel(
                title="Collectors that fail",
                queries=((f"1 - {P}collector_success{SELECT} == 1", "{{pod}} {{collector}} {{database}}"),),
                description="1 for each; empty while none fails.",
            ),
            Panel(
                title="Scrapes", unit="s", queries=((f"pg_exporter_last_scrape_duration_seconds{SELECT}", "{{pod}}"),)
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """What Grafana imports; its data source is a variable."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": top},
            }
        )
        top += 1
        left = 0
        for panel in row:
            height = 4 if panel.kind == "stat" else 8
            if left + panel.width > 24:
                top, left = top + height, 0
            panels.append(_panel(len(panels) + 1, panel, {"h": height, "w": panel.width, "x": left, "y": top}))
            left += panel.width
        top += height
    return {
        "uid": "instance-manager",
        "title": "Instance manager for PostgreSQL",
        "tags": ["postgresql", "instance-manager"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("namespace", f"label_values({P}build_info, namespace)"),
                _variable("cluster", f'label_values({P}build_info{{namespace="$namespace"}}, cluster)'),
                {
                    **_variable(
                        "pod", f'label_values({P}build_info{{namespace="$namespace", cluster="$cluster"}}, pod)'
                    ),
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
    }


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }
    defaults = made["fieldConfig"]["defaults"]
    if panel.thresholds:
        steps = [{"value": value, "color": colour} for value, colour in panel.thresholds]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind == "stat":
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
        for target in made["targets"]:
            target |= {"instant": True, "range": False}
    if panel.kind == "state-timeline":
        states = {
            str(value): {"text": text, "color": colour, "index": index}
            for index, (value, text, colour) in enumerate(panel.states)
        }
        defaults |= {
            "mappings": [{"type": "value", "options": states}],
            # By thresholds, values would be merged by them and not by their mapping.
            "color": {"mode": "palette-classic"},
            "custom": {"fillOpacity": 80, "lineWidth": 0},
        }
        made["options"] = {"mergeValues": True, "showValue": "never", "rowHeight": 0.8}
    return made
