"""deploy/monitoring: what is generated is up to date, and every alert fires for what it means, and for nothing else."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from monitoring_tools import promtool

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
POD = 'namespace="n", pod="pg-0", cluster="pg"'
OTHER = 'namespace="n", pod="pg-1", cluster="pg"'
P = "instance_manager_"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("monitoring_generate", MONITORING / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["monitoring_generate"] = module
    spec.loader.exec_module(module)
    return module


generate = _generator()
NAMES = [rule["alert"] for rule in generate.rule_groups()["groups"][0]["rules"]]

# Series of a cluster in which nothing is wrong, one value a minute.
QUIET: dict[str, str] = {
    f"up{{job='n/instance-manager', {POD}}}": "1x70",
    f"{P}accepts_writes{{{POD}}}": "1x70",
    f"{P}accepts_writes{{{OTHER}}}": "0x70",
    f"{P}quorum{{{POD}}}": "1x70",
    f"{P}synchronous_standbys_wanted{{{POD}}}": "1x70",
    f"{P}synchronous_standbys_actual{{{POD}}}": "1x70",
    f"{P}lease_readable{{{POD}}}": "1x70",
    f"{P}lease_held{{{POD}}}": "1x70",
    f"{P}lease_held{{{OTHER}}}": "0x70",
    f"{P}seconds_to_fence{{{POD}}}": "5x70",
    f"{P}seconds_to_fence{{{OTHER}}}": "0x70",
    f'{P}lease_renewals_total{{result="success", {POD}}}': "0+30x70",
    f'{P}lease_renewals_total{{result="unavailable", {POD}}}': "3x70",
    f'{P}self_fences_total{{reason="soft_deadline", {POD}}}': "1x70",
    f'{P}failovers_total{{kind="election", {POD}}}': "2x70",
    f'{P}failovers_total{{kind="handover", {POD}}}': "0+1x70",
    f'{P}peer_reachable{{peer="pg-1", {POD}}}': "1x70",
    f"pg_up{{{POD}}}": "1x70",
    f"pg_up{{{OTHER}}}": "0x70",
    f"{P}fenced{{{OTHER}}}": "1x30 0x10 1x40",
    f"{P}healthy{{{POD}}}": "1x70",
    f"{P}not_receiving_seconds{{{POD}}}": "0x70",
    f"{P}replication_lag_bytes{{{OTHER}}}": "1000x70",
    f"pg_replication_lag_seconds{{{OTHER}}}": "1x70",
    f'{P}volume_free_bytes{{volume="instance", {POD}}}': "50000000000x70",
    f'{P}volume_size_bytes{{volume="instance", {POD}}}': "100000000000x70",
    f'{P}volume_fsync_seconds{{volume="instance", {POD}}}': "0.01x3 2 0.01x70",
    f'{P}slot_retained_bytes{{slot_name="s", wal_status="reserved", {POD}}}': "1000x70",
    f'{P}rejoins_total{{kind="rewind", result="failed", {POD}}}': "1x70",
    f'{P}rejoins_total{{kind="clone", result="success", {POD}}}': "0+1x70",
    f"{P}agent_restarts_total{{{POD}}}": "1x70",
    f'{P}event_loop_lag_seconds_bucket{{le="0.005", {POD}}}': "0+120x70",
    f'{P}event_loop_lag_seconds_bucket{{le="1.0", {POD}}}': "0+120x70",
    f'{P}event_loop_lag_seconds_bucket{{le="+Inf", {POD}}}': "0+120x70",
    f'{P}process_resident_memory_bytes{{process="agent", {POD}}}': "90000000x70",
    f"{P}paused{{{POD}}}": "0x70",
    f"{P}archive_up{{{POD}}}": "1x70",
    f"{P}archive_sound{{{POD}}}": "1x70",
    f"{P}archive_oldest_ready_age_seconds{{{POD}}}": "2x70",
    f"{P}archive_lag_seconds{{{POD}}}": "2x70",
    f"{P}archive_seconds_until_full{{{POD}}}": "1000000000x70",
    f"{P}archive_good_backups{{{POD}}}": "3x70",
    f"{P}archive_newest_backup_timestamp_seconds{{{POD}}}": "-600000x70",
    f"{P}archive_gap_behind_newest_backup{{{POD}}}": "0x70",
    f'{P}certificate_days_left{{use="peers", {POD}}}': "60x70",
    f'{P}certificate_files_usable{{use="peers", {POD}}}': "1x70",
    f"{P}archive_conflicts_total{{{POD}}}": "1x70",
    f"{P}archive_gap_segments{{{POD}}}": "0x70",
    f"{P}archive_restore_damaged_total{{{POD}}}": "0x70",
    f'{P}collector_success{{collector="pg_locks", database="postgres", {POD}}}': "1x70",
    f"{P}custom_queries_load_error{{{POD}}}": "0x70",
    f"{P}postgres_log_records_dropped_total{{{POD}}}": "1x70",
    f'pg_database_wraparound_age_datfrozenxid_seconds{{datname="app", {POD}}}': "200000000x70",
    f'pg_stat_activity_count{{datname="app", state="idle", {POD}}}': "50x70",
    f"pg_settings_max_connections{{{POD}}}": "100x70",
    f'pg_stat_activity_max_tx_duration{{datname="app", state="active", {POD}}}': "1x70",
    f'pg_stat_database_checksum_failures{{datname="app", {POD}}}': "0x70",
}

# What makes each alert fire after an hour: series that take the place of the quiet ones.
FIRING: dict[str, dict[str, str]] = {
    "NoPrimary": {f"{P}accepts_writes{{{POD}}}": "0x70"},
    "TwoPrimaries": {f"{P}accepts_writes{{{OTHER}}}": "1x70"},
    "NoFailoverPossible": {f"{P}quorum{{{POD}}}": "0x70"},
    "FewerSynchronousStandbys": {f"{P}synchronous_standbys_actual{{{POD}}}": "0x70"},
    "LeaseUnreadable": {f"{P}lease_readable{{{POD}}}": "0x70"},
    "RenewalsFail": {f'{P}lease_renewals_total{{result="unavailable", {POD}}}': "0+10x70"},
    "AboutToFence": {f"{P}seconds_to_fence{{{POD}}}": "1x70"},
    "FencedItself": {f'{P}self_fences_total{{reason="soft_deadline", {POD}}}': "1x55 2x100"},
    "Failover": {f'{P}failovers_total{{kind="election", {POD}}}': "2x55 3x100"},
    "PeerUnreachable": {f'{P}peer_reachable{{peer="pg-1", {POD}}}': "0x70"},
    "ScrapeFails": {f"up{{job='n/instance-manager', {POD}}}": "0x70"},
    "PostgresDown": {f"pg_up{{{POD}}}": "0x70"},
    "Unhealthy": {f"{P}healthy{{{POD}}}": "0x70"},
    "NotReceiving": {f"{P}not_receiving_seconds{{{POD}}}": "0+60x70"},
    "ReplicationLag": {f"{P}replication_lag_bytes{{{OTHER}}}": "300000000x70"},
    "ReplayLag": {f"pg_replication_lag_seconds{{{OTHER}}}": "400x70"},
    "VolumeFillsUp": {f'{P}volume_free_bytes{{volume="instance", {POD}}}': "9000000000x70"},
    "VolumeFullSoon": {f'{P}volume_free_bytes{{volume="instance", {POD}}}': "90000000000-400000000x70"},
    "SlowDisk": {f'{P}volume_fsync_seconds{{volume="instance", {POD}}}': "0.8x70"},
    "SlotKeepsWal": {f'{P}slot_retained_bytes{{slot_name="s", wal_status="reserved", {POD}}}': "20000000000x70"},
    "SlotLost": {f'{P}slot_retained_bytes{{slot_name="s", wal_status="lost", {POD}}}': "0x70"},
    "RejoinFails": {f'{P}rejoins_total{{kind="rewind", result="failed", {POD}}}': "0+1x70"},
    "AgentRestarts": {f"{P}agent_restarts_total{{{POD}}}": "0+1x70"},
    "LoopLag": {
        f'{P}event_loop_lag_seconds_bucket{{le="0.005", {POD}}}': "0x70",
    },
    "MemoryHigh": {f'{P}process_resident_memory_bytes{{process="agent", {POD}}}': "900000000x70"},
    "PausedForLong": {f"{P}paused{{{POD}}}": "1x70"},
    "FencedForLong": {f"{P}fenced{{{OTHER}}}": "1x70"},
    "ArchiverDown": {f"{P}archive_up{{{POD}}}": "0x70"},
    "ArchiveUnsound": {f"{P}archive_sound{{{POD}}}": "0x70"},
    "ArchiveBehind": {f"{P}archive_oldest_ready_age_seconds{{{POD}}}": "0+60x70"},
    "ArchiveLag": {f"{P}archive_lag_seconds{{{POD}}}": "200x70"},
    "ArchiveFillsVolume": {f"{P}archive_seconds_until_full{{{POD}}}": "3000x70"},
    "NoBackup": {f"{P}archive_good_backups{{{POD}}}": "0x70"},
    "BackupOld": {f"{P}archive_newest_backup_timestamp_seconds{{{POD}}}": "-700000x70"},
    "CertificateEndsSoon": {f'{P}certificate_days_left{{use="peers", {POD}}}': "6x70"},
    "CertificateNotUsed": {f'{P}certificate_files_usable{{use="peers", {POD}}}': "0x70"},
    "ArchiveConflict": {f"{P}archive_conflicts_total{{{POD}}}": "1x50 2x100"},
    "ArchiveGap": {f"{P}archive_gap_segments{{{POD}}}": "2x70"},
    "ArchiveDamaged": {f"{P}archive_restore_damaged_total{{{POD}}}": "0x50 1x100"},
    "PostgresLogDropped": {f"{P}postgres_log_records_dropped_total{{{POD}}}": "0x50 7x100"},
    "CollectorFails": {f'{P}collector_success{{collector="pg_locks", database="postgres", {POD}}}': "0x70"},
    "CustomQueriesUnusable": {f"{P}custom_queries_load_error{{{POD}}}": "1x70"},
    "WraparoundNear": {f'pg_database_wraparound_age_datfrozenxid_seconds{{datname="app", {POD}}}': "1500000000x70"},
    "ConnectionsNearLimit": {f'pg_stat_activity_count{{datname="app", state="idle", {POD}}}': "95x70"},
    "LongTransaction": {f'pg_stat_activity_max_tx_duration{{datname="app", state="active", {POD}}}': "4000x70"},
    "ChecksumFailure": {f'pg_stat_database_checksum_failures{{datname="app", {POD}}}': "0x50 1x100"},
}


@pytest.mark.parametrize("path", sorted(generate.outputs()), ids=lambda path: str(path.name))
def test_generated_files_are_as_their_sources_make_them(path: Path) -> None:
    assert path.read_text() == generate.outputs()[path], "run `python deploy/monitoring/generate.py`"


def test_the_manifest_holds_the_rules_that_are_tested() -> None:
    manifest = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())
    assert manifest["spec"] == generate.rule_groups()


def test_each_alert_has_a_runbook_with_its_three_paragraphs() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/runbooks.md").read_text(), flags=re.MULTILINE)[1:]
    assert [section.split("\n")[0] for section in sections] == NAMES
    for section in sections:
        for word in ("**What it means.** ", "**What to look at.** ", "**What to do.** "):
            assert len(section.partition(word)[2].split("\n")[0]) > 20, section
    for rule in generate.rule_groups()["groups"][0]["rules"]:
        assert rule["annotations"]["runbook_url"].endswith(f"#{rule['alert'].lower()}")


def test_every_alert_fires_for_what_it_means_and_for_nothing_else(tmp_path: Path) -> None:
    """One trial for each alert, in which exactly it fires after an hour and a half, and one in which none does."""
    assert sorted(f"InstanceManager{name}" for name in FIRING) == sorted(NAMES)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(generate.rule_groups()))
    trials = [_trial("", {})] + [_trial(f"InstanceManager{name}", series) for name, series in FIRING.items()]
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "5m", "tests": trials}, width=10_000)
    )
    code, report = promtool("check", "rules", str(tmp_path / "rules.yaml"))
    assert code == 0, report
    code, report = promtool("test", "rules", str(tmp_path / "tests.yaml"))
    assert code == 0, report


def _trial(alert: str, changes: dict[str, str]) -> dict[str, Any]:
    unknown = changes.keys() - QUIET.keys()
    assert len(unknown) <= (1 if alert.endswith("SlotLost") else 0), unknown
    series = {**QUIET, **changes}
    return {
        "name": alert or "quiet",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        # `ALERTS` with its labels would repeat the rules: which of them fire is what is asked.
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "1h5m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
            }
        ],
    }
