"""The user's commands against a running cluster, each as a process of its own."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import yaml
from cluster_tools import (
    ask,
    cli,
    done,
    is_writable,
    log_end,
    messages,
    psql,
    record,
    stopped,
    superuser_sql,
    target_of,
    volume,
    wait_other_primary,
)

from instance_manager.demo import processes
from instance_manager.demo.cluster import LocalCluster

pytest_plugins = ("cluster_fixtures",)
pytestmark = pytest.mark.timeout(180)


def test_status_says_on_every_instance_who_is_primary_and_that_nothing_is_at_risk(
    lasting_cluster: LocalCluster,
) -> None:
    primary = lasting_cluster.wait_primary()
    for name in lasting_cluster.names:
        text = done(lasting_cluster, name, "status")
        assert f"demo: primary {primary}, clients are let in, epoch " in text
        assert "at risk: nothing" in text
        assert re.search(rf"^{primary}\* +primary +running ", text, re.MULTILINE)
        assert f"why, as decided by {name}, latest first:" in text


def test_status_as_json_is_the_same_picture_on_every_instance(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    for name in lasting_cluster.names:
        told = json.loads(done(lasting_cluster, name, "status", "--json"))
        assert told["primary"] == primary
        assert told["told_by"] == name
        assert told["epoch"] == record(lasting_cluster).epoch
        assert told["at_risk"] == []
        assert told["accepts_clients"] is True
        assert {each["name"]: each["role"] for each in told["instances"]} == {
            each: "primary" if each == primary else "standby" for each in lasting_cluster.names
        }


def test_switchover_goes_to_the_best_standby_and_says_so(lasting_cluster: LocalCluster) -> None:
    old = lasting_cluster.wait_primary()
    before = record(lasting_cluster).epoch
    out = done(lasting_cluster, old, "switchover")
    new = lasting_cluster.wait_primary()
    assert new != old
    assert f"{new} is the primary since epoch {before + 1}, " in out


def test_switchover_to_a_named_standby_asked_of_another_one(lasting_cluster: LocalCluster) -> None:
    old = lasting_cluster.wait_primary()
    target, asked = lasting_cluster.standbys()
    out = done(lasting_cluster, asked, "switchover", "--to", target)
    assert f"{target} is the primary since epoch " in out
    assert lasting_cluster.wait_primary() == target
    assert f"{target} is the primary already" in done(lasting_cluster, old, "switchover", "--to", target)


def test_switchover_to_an_unknown_instance_is_wrong_use(lasting_cluster: LocalCluster) -> None:
    told = ask(lasting_cluster, lasting_cluster.names[0], "switchover", "--to", "nobody")
    assert told.code == 2
    assert "no instance 'nobody'; there are demo-1, demo-2, demo-3" in told.err


def test_a_fenced_standby_is_stopped_no_target_of_a_switchover_and_runs_again_unfenced(
    lasting_cluster: LocalCluster,
) -> None:
    primary = lasting_cluster.wait_primary()
    target, other = lasting_cluster.standbys()
    assert f"{target} is fenced: its Postgres is stopped" in done(lasting_cluster, other, "fence", target)
    assert lasting_cluster.processes(target).postmaster is None
    assert "fenced" in done(lasting_cluster, primary, "status")

    refused = ask(lasting_cluster, primary, "switchover", "--to", target)
    assert refused.code == 1
    assert f"refused: {target} is fenced" in refused.out
    assert lasting_cluster.primary() == primary

    assert f"{target} runs again" in done(lasting_cluster, primary, "unfence", target)
    assert lasting_cluster.wait_redundant(60) == primary


def test_a_fenced_primary_hands_over_first(lasting_cluster: LocalCluster) -> None:
    old = lasting_cluster.wait_primary()
    before = record(lasting_cluster).epoch
    assert f"{old} is fenced" in done(lasting_cluster, lasting_cluster.standbys()[0], "fence", old)
    new = wait_other_primary(lasting_cluster, old)
    now = record(lasting_cluster)
    assert now.epoch == before + 1, "handed over, not elected after an outage"
    assert now.fenced == {old}
    assert lasting_cluster.processes(old).postmaster is None
    assert f"{old} runs again" in done(lasting_cluster, old, "unfence", old)
    assert lasting_cluster.wait_redundant(60) == new


def test_a_standby_that_lags_is_no_target_of_a_switchover(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    target = lasting_cluster.standbys()[0]
    receivers = lasting_cluster.processes(target).children_of_postmaster("walreceiver")
    assert receivers
    with stopped(*receivers):
        lasting_cluster.wait(
            lambda: (
                target not in {voter.rsplit("_", 1)[0].replace("_", "-") for voter in record(lasting_cluster).voters}
            ),
            15,
            "the silent standby is dropped from the voters",
        )
        refused = ask(lasting_cluster, primary, "switchover", "--to", target)
    assert refused.code == 1
    assert f"refused: {target} " in refused.out
    assert lasting_cluster.primary() == primary


def test_while_paused_a_killed_postgres_of_the_primary_restarts_in_place(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    before = record(lasting_cluster)
    assert "paused: no failover until `resume`" in done(lasting_cluster, primary, "pause")
    postmaster = lasting_cluster.processes(primary).postmaster
    assert postmaster is not None
    processes.send([postmaster], signal.SIGKILL)
    lasting_cluster.wait(lambda: is_writable(lasting_cluster, primary), 40, f"{primary} is writable again")
    now = record(lasting_cluster)
    assert now.holder is not None
    assert now.holder.name == primary
    assert now.epoch > before.epoch, "it serves again only behind a later epoch"
    assert now.chain == before.chain, "the same timeline: nobody was promoted"
    assert now.paused
    assert "PAUSED" in done(lasting_cluster, primary, "status")
    assert "resumed: failover is on" in done(lasting_cluster, lasting_cluster.standbys()[0], "resume")
    assert not record(lasting_cluster).paused


def test_restart_of_a_standby_asked_of_the_primary(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    target = lasting_cluster.standbys()[0]
    before = lasting_cluster.processes(target).postmaster
    assert f"{target} was restarted and is standby" in done(lasting_cluster, primary, "restart", target)
    after = lasting_cluster.processes(target).postmaster
    assert before is not None
    assert after is not None
    assert after.pid != before.pid
    assert lasting_cluster.wait_redundant(60) == primary


def test_restart_of_the_primary_in_place_loses_nothing_and_is_no_failover(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    psql(lasting_cluster.connection_string(), "DROP TABLE IF EXISTS kept; CREATE TABLE kept AS SELECT 1")
    before = record(lasting_cluster)
    assert f"{primary} was restarted and is primary" in done(lasting_cluster, primary, "restart")
    now = record(lasting_cluster)
    assert now.holder is not None
    assert now.holder.name == primary
    assert now.epoch > before.epoch
    assert now.chain == before.chain
    assert psql(lasting_cluster.connection_string(), "SELECT count(*) FROM kept").out == "1"


def _with_parameters(path: Path, text: str, parameters: str) -> None:
    changed = re.sub(r"  parameters:\n(    .*\n)+", f"  parameters:\n{parameters}", text)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def test_reload_applies_what_can_change_and_names_what_needs_a_restart(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.standbys()[0]
    path = lasting_cluster.layout.config(name)
    text = path.read_text(encoding="utf-8")
    try:
        _with_parameters(path, text, "    shared_buffers: 40MB\n    work_mem: 7MB\n")
        out = done(lasting_cluster, name, "reload")
        assert re.search(r"reloaded; these need a restart of Postgres.*: shared_buffers", out)
        lasting_cluster.wait(lambda: psql(target_of(lasting_cluster, name), "SHOW work_mem").out == "7MB", 10, "7MB")
        assert psql(target_of(lasting_cluster, name), "SHOW shared_buffers").out == "32MB"
    finally:
        path.write_text(text, encoding="utf-8")
    done(lasting_cluster, name, "reload")
    lasting_cluster.wait(lambda: psql(target_of(lasting_cluster, name), "SHOW work_mem").out == "4MB", 10, "4MB")


def test_reload_lets_in_by_a_new_line_of_pg_hba_conf(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.wait_primary()
    path = lasting_cluster.layout.config(name)
    text = path.read_text(encoding="utf-8")
    rules = "SELECT count(*) FROM pg_hba_file_rules WHERE address = '198.51.100.0'"
    assert superuser_sql(lasting_cluster, name, rules) == "0"
    try:
        content = yaml.safe_load(text)
        content["postgres"]["host_based_access"] = ["host all all 198.51.100.0/24 scram-sha-256"]
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        assert "reloaded" in done(lasting_cluster, name, "reload")
        assert superuser_sql(lasting_cluster, name, rules) == "1"
        assert is_writable(lasting_cluster, name)
    finally:
        path.write_text(text, encoding="utf-8")
        done(lasting_cluster, name, "reload")
    assert superuser_sql(lasting_cluster, name, rules) == "0"


def test_reload_of_a_faulty_file_changes_nothing_and_says_where_it_is_wrong(lasting_cluster: LocalCluster) -> None:
    name = lasting_cluster.standbys()[0]
    path = lasting_cluster.layout.config(name)
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text + "nonsense: 1\n", encoding="utf-8")
        told = ask(lasting_cluster, name, "reload")
    finally:
        path.write_text(text, encoding="utf-8")
    assert told.code == 1
    assert "unknown field `nonsense`" in told.out + told.err


def test_p7_reinit_sets_a_standby_aside_and_clones_it_as_a_new_member(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    target = lasting_cluster.standbys()[0]
    old = volume(lasting_cluster, target).member_id
    told = done(lasting_cluster, primary, "reinit", target)
    assert f"{target} will be set aside and made anew" in told
    lasting_cluster.wait(
        lambda: volume(lasting_cluster, target).member_id not in (None, old), 60, f"{target} is another member"
    )
    assert lasting_cluster.wait_redundant(60) == primary
    new = volume(lasting_cluster, target).member_id
    now = record(lasting_cluster)
    assert new in now.voters
    assert old not in now.voters
    aside = [path for path in lasting_cluster.layout.instance(target).iterdir() if path.name.startswith("data.")]
    assert aside, "the old directory is kept"


def test_reinit_of_the_primary_is_refused(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    for asked in lasting_cluster.names:
        told = ask(lasting_cluster, asked, "reinit", primary)
        assert told.code == 1, str(told)
        assert "only a standby with a serving primary can be cloned anew; switch over first" in told.out + told.err
    assert lasting_cluster.primary() == primary


def test_r15_failover_with_loss_is_refused_while_the_primary_lives(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    before = record(lasting_cluster).epoch
    offsets = {name: log_end(lasting_cluster, name) for name in lasting_cluster.names}
    for asked in lasting_cluster.names:
        told = ask(lasting_cluster, asked, "failover", "--allow-data-loss", "--yes")
        assert told.code == 1, str(told)
        assert f"refused: {primary} is writable" in told.out
        assert "is a reachable voter and does not suspect the primary" in told.out
        assert f"cluster demo, epoch {before}, timeline " in told.out
    assert record(lasting_cluster).epoch == before
    for name in lasting_cluster.names:
        since = messages(lasting_cluster, name, offset=offsets[name])
        assert not any("failover with loss" in line for line in since)


def test_failover_without_the_word_for_it_is_wrong_use(lasting_cluster: LocalCluster) -> None:
    told = ask(lasting_cluster, lasting_cluster.names[0], "failover")
    assert told.code == 2
    assert "Say --allow-data-loss" in told.err


def test_lease_shows_the_record_also_when_the_instance_does_not_answer(lasting_cluster: LocalCluster) -> None:
    primary = lasting_cluster.wait_primary()
    now = record(lasting_cluster)
    out = done(lasting_cluster, primary, "lease")
    assert f"{now.epoch}  (the epoch)" in out
    assert f"{primary.replace('-', '_')}_" in out
    assert "1  (2 of 2 promises elect)" in out


def test_config_check_says_good_or_where_it_is_wrong(lasting_cluster: LocalCluster, tmp_path: Path) -> None:
    path = lasting_cluster.layout.config(lasting_cluster.names[0])
    good = cli("config", "check", "--config", str(path))
    assert good.code == 0, str(good)
    assert "durability preferred, a commit is on 2 disks" in good.out
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(path.read_text(encoding="utf-8") + "timings:\n  hard_s: 11\n", encoding="utf-8")
    bad = cli("config", "check", "--config", str(faulty))
    assert bad.code == 2
    assert "hard_s 11 is too long for lease_duration_s 10" in bad.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("fence",),
        ("fence", "nobody"),
        ("unfence", "nobody"),
        ("reinit", "nobody"),
        ("restart", "nobody"),
        ("switchover", "--timeout", "-1"),
        ("no-such-command",),
    ],
)
def test_wrong_use_exits_2_with_the_reason_and_does_nothing(
    lasting_cluster: LocalCluster, arguments: tuple[str, ...]
) -> None:
    name = lasting_cluster.names[0]
    offset = log_end(lasting_cluster, name)
    told = ask(lasting_cluster, name, *arguments)
    assert told.code == 2, str(told)
    assert told.err.strip()
    assert not any(line.startswith(("role ", "hand over")) for line in messages(lasting_cluster, name, offset=offset))
