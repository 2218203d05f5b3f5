"""`instance-manager certificates`: for a configuration or for named members, and never for nonsense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_config import with_value, written

from instance_manager.cli import main
from instance_manager.config import ConfigurationError, load_configuration
from instance_manager.status import CertificateStatus, ClusterStatus, ManagedStatus
from instance_manager.status_view import render_status
from instance_manager.tls import examine


def certificates(*arguments: object) -> int:
    return main(["certificates", *map(str, arguments)])


def test_a_configuration_names_every_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path, with_value("cluster.name", "orders"))
    directory = tmp_path / "made"
    assert certificates("--directory", directory, "--config", config, "--user", "alice", "--name", "orders-rw") == 0
    assert "a new authority" in capsys.readouterr().out
    assert sorted(path.name for path in (directory / "members").iterdir()) == ["demo-1", "demo-2", "demo-3"]
    assert examine(directory / "members/demo-2").names == {"demo-2", "127.0.0.1", "orders-rw"}
    for client in ("replication", "control/alice"):
        examine(directory / client, server=directory / "members/demo-1")
    assert certificates("--directory", directory, "--config", config, "--user", "alice", "--name", "orders-rw") == 0
    assert "everything is there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--member", "pg-0"),
        ("--member", "../../etc=host"),
        ("--member", "pg-0=a b"),
        ("--member", "pg-0=host", "--user", "../x"),
        ("--member", "pg-0=host", "--days", "0"),
    ],
)
def test_wrong_use_makes_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    directory = tmp_path / "made"
    try:
        code = certificates("--directory", directory, *arguments)
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    assert not directory.exists()


@pytest.mark.parametrize(
    ("tls", "control", "told"),
    [
        ({}, None, "tls: names no certificate"),
        ({"directory": "/t"}, None, "demo-1 has no peer_port"),
        ({"peers": "/t"}, None, "demo-1 has no peer_port"),
        ({"peers": "/t", "replication": "/r"}, None, r"tls\.replication: needs a certificate of Postgres"),
        ({"postgres": "/t", "replication": "/r", "mode": "permissive"}, None, r"tls\.replication: needs"),
        (None, {"listen": "0.0.0.0:8010", "allowed_names": ["a"]}, "control over the network needs TLS"),
        ({"postgres": "/t"}, {"listen": "0.0.0.0:8010", "allowed_names": ["a"]}, "control over the network needs TLS"),
        ({"control": "/t"}, {"listen": "0.0.0.0:8010"}, "control: nobody may"),
        ({"control": "/t"}, {"listen": "8010", "allowed_names": ["a"]}, "is not HOST:PORT"),
        ({"control": "/t"}, {"listen": "h:99999", "allowed_names": ["a"]}, "is not HOST:PORT"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(
    tmp_path: Path, tls: dict[str, str] | None, control: dict[str, object] | None, told: str
) -> None:
    content = with_value("log_level", "info")
    content |= {"tls": tls} if tls is not None else {}
    content |= {"control": control} if control is not None else {}
    with pytest.raises(ConfigurationError, match=told):
        load_configuration(written(tmp_path, content))


def test_without_the_sections_nothing_changes(tmp_path: Path) -> None:
    configuration = load_configuration(written(tmp_path, with_value("log_level", "info")))
    assert (configuration.tls, configuration.control) == (None, None)
    assert (configuration.managed.roles, configuration.managed.databases, configuration.managed.extensions) == (
        (),
        (),
        (),
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--host", "h:1"), "needs --ca FILE"),
        (("--host", "h:1", "--ca", "/ca"), "who asks?"),
        (("--host", "h", "--ca", "/ca", "--token-file", "/t"), "is not HOST:PORT"),
        (("--host", "h:1", "--ca", "/ca", "--token-file", "/nowhere"), "cannot be read"),
        (("--host", "h:1", "--certificate", "/nowhere"), "cannot be used"),
    ],
)
def test_a_command_over_the_network_says_what_it_lacks(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert main(["status", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_file_with_more_than_a_token_is_refused_without_showing_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-token-of-a-user\nanother-of-somebody")
    assert main(["status", "--host", "h:1", "--ca", "/ca", "--token-file", str(tmp_path / "token")]) == 2
    told = capsys.readouterr().err
    assert "must hold one token" in told
    assert "a-token" not in told


def test_the_view_tells_lives_of_certificates_and_what_is_kept(status: ClusterStatus) -> None:
    shown = render_status(
        replace(
            status,
            certificates=(CertificateStatus(use="peers", names=("a",), days_left=12.4),),
            managed=(
                ManagedStatus(what="role a", state="as declared"),
                ManagedStatus(what="role b", state="failed", problem="x"),
            ),
        )
    )
    assert "certificates: peers 12 d" in shown
    assert "kept inside Postgres: 1 as declared, 1 failed" in shown


@pytest.fixture
def status() -> ClusterStatus:
    return ClusterStatus(
        cluster="demo",
        told_by="demo-1",
        primary="demo-1",
        epoch=3,
        timeline=2,
        system_identifier="7300000000000000001",
        lease_age_s=0.5,
        lease_readable=True,
        seconds_to_fence=5.5,
        durability="preferred",
        voters=("demo-2",),
        quorum=1,
        synchronous_wanted=1,
        synchronous_standby_names='ANY 1 ("demo_2_01234567")',
        paused=False,
        fenced=(),
        accepts_clients=True,
        at_risk=(),
        instances=(),
        decisions=(),
    )
