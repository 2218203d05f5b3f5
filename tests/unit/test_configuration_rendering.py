"""The rendering of Postgres's configuration: nothing that a user says gets past the tables, or onto a line of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance_manager.core.types import MemberId
from instance_manager.postgres.configuration import (
    NOBODY_CAN_SATISFY,
    NOTHING_SYNCHRONOUS,
    REPLICATION_CONF,
    CollectedLog,
    ParametersRefused,
    ReplicationSettings,
    StaticSettings,
    changes_that_need_restart,
    check_parameters,
    parse_settings,
    render_conninfo,
    render_postgresql_conf,
    render_replication_conf,
    render_settings,
    render_synchronous_standby_names,
    strip_auto_conf,
    without_settings,
)
from instance_manager.postgres.control_data import HotStandbySettings
from instance_manager.postgres.host_based_access import (
    Access,
    AccessLineRefused,
    AccessSettings,
    check_line,
    render_hba,
    render_ident,
    rendered_access,
)
from instance_manager.postgres.hot_standby import (
    RestartOrder,
    hot_standby_settings_of,
    restart_order,
    settings_for_standby,
)
from instance_manager.postgres.parameters import DEFAULTS, FIXED, REFUSED


def static(**changes: object) -> StaticSettings:
    options: dict[str, object] = {
        "major": 15,
        "cluster_name": "a_01234567",
        "listen_address": "127.0.0.1",
        "port": 5432,
        "socket_directory": Path("/run/x"),
        "instances": 3,
        **changes,
    }
    return StaticSettings(**options)  # type: ignore[arg-type]


def test_every_fixed_and_refused_parameter_is_refused_with_its_reason() -> None:
    for name, reason in (FIXED | REFUSED).items():
        assert check_parameters({name: "x"}) == (f"{name}: {reason}",)


@pytest.mark.parametrize(("major", "form"), [(14, "csvlog"), (15, "jsonlog"), (18, "jsonlog")])
def test_the_log_is_collected_into_files_that_are_left_by_size_and_never_written_again(major: int, form: str) -> None:
    log = CollectedLog(Path("/var/log/it's"), "postgres-%S.log", 8 << 20)
    rendered = parse_settings(render_postgresql_conf(static(major=major, log=log)))
    assert {key: rendered[key] for key in rendered if key.startswith("log") and key in FIXED} == {
        "logging_collector": "on",
        "log_destination": form,
        "log_directory": "/var/log/it's",
        "log_filename": "postgres-%S.log",
        "log_file_mode": "0600",
        "log_rotation_age": "0",
        "log_rotation_size": "8192kB",
        "log_truncate_on_rotation": "off",
        "log_timezone": "UTC",
    }


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ParametersRefused) as refused:
        render_postgresql_conf(static(parameters={"fsync": False, "include": "/etc/passwd", "work_mem": "1MB"}))
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["fsync", "include"]


def test_no_default_is_one_that_a_user_could_not_set() -> None:
    assert check_parameters(DEFAULTS) == ()
    assert not DEFAULTS.keys() & (FIXED.keys() | REFUSED.keys())


@pytest.mark.parametrize("value", ["off", "local", "remote_write", False, 0, "OFF", "ON"])
def test_a_synchronous_commit_that_acknowledges_too_early_is_refused(value: str | bool | int) -> None:
    assert len(check_parameters({"synchronous_commit": value})) == 1


@pytest.mark.parametrize("value", ["on", "remote_apply", True])
def test_a_synchronous_commit_that_waits_for_the_flush_is_allowed(value: str | bool) -> None:
    assert check_parameters({"synchronous_commit": value}) == ()


def test_walsenders_and_slots_are_never_below_what_replication_needs() -> None:
    assert len(check_parameters({"max_wal_senders": 2, "max_replication_slots": True})) == 2
    rendered = parse_settings(render_postgresql_conf(static(instances=5, parameters={"max_wal_senders": 9})))
    assert rendered["max_wal_senders"] == "14"
    assert rendered["max_replication_slots"] == "14"


def test_the_users_value_beats_the_default_and_ours_beats_both() -> None:
    rendered = parse_settings(
        render_postgresql_conf(static(parameters={"wal_keep_size": "1GB", "wal_level": "logical"}))
    )
    assert rendered["wal_keep_size"] == "1GB"
    assert rendered["wal_level"] == "logical"
    assert rendered["fsync"] == "on"
    assert rendered["restart_after_crash"] == "off"
    assert rendered["include"] == REPLICATION_CONF
    assert "allow_alter_system" not in rendered
    assert parse_settings(render_postgresql_conf(static(major=17)))["allow_alter_system"] == "off"


def test_wal_is_summarized_where_incremental_backups_are_wanted_and_the_server_can() -> None:
    def rendered(major: int, **changes: object) -> str | None:
        return parse_settings(render_postgresql_conf(static(major=major, **changes))).get("summarize_wal")

    assert rendered(17, summarize_wal=True) == "on"
    assert rendered(17) is None
    assert rendered(16, summarize_wal=True) is None
    assert rendered(18, summarize_wal=True, parameters={"summarize_wal": False}) == "off"


NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,20}(\.[a-z_][a-z0-9_]{0,20})?", fullmatch=True).filter(
    lambda name: not name.startswith("include")
)


@given(st.dictionaries(NAMES, st.text(max_size=40)))
def test_what_is_rendered_is_parsed_back_as_the_same_or_refused(settings: dict[str, str]) -> None:
    try:
        text = render_settings(dict(settings))
    except ValueError:
        assert any(not value.isprintable() for value in settings.values())
        return
    assert parse_settings(text) == settings
    assert len(text.split("\n")) == len(settings) + 1


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_name_that_is_none_never_reaches_the_file(name: str, value: str) -> None:
    problems = check_parameters({name: value})
    if not problems:
        assert parse_settings(render_settings({name: value})) == {name: value}


@pytest.mark.parametrize(
    "name", ["a\nfsync", "a = 1\nb", "include", "include_dir", "A", "a b", "", "a.b.c", "1a", "a;"]
)
def test_names_that_inject_are_refused(name: str) -> None:
    assert check_parameters({name: "x"})
    with pytest.raises(ValueError, match="name of a parameter"):
        render_settings({name: "x"})


@pytest.mark.parametrize("value", ["x\nfsync = off", "x\rfsync = off", "\0", float("nan"), float("inf"), "\ud800"])
def test_values_that_inject_are_refused(value: str | float) -> None:
    assert check_parameters({"work_mem": value})


def test_alter_system_cannot_undo_what_is_ours() -> None:
    text = (
        "# Do not edit this file manually!\n"
        "work_mem = '64MB'\n"
        "synchronous_standby_names = ''\n"
        "FSync = 'off'\n"
        "synchronous_commit 'local'\n"
        "synchronous_commit = 'on'\n"
        "include '/tmp/x'\n"
        "max_wal_senders = '1'\n"
        "plpgsql.variable_conflict = 'error'\n"
        "what is this\n"
    )
    stripped = strip_auto_conf(text)
    assert parse_settings(stripped.text) == {
        "work_mem": "64MB",
        "synchronous_commit": "on",
        "plpgsql.variable_conflict": "error",
    }
    assert len(stripped.warnings) == 6
    assert strip_auto_conf(stripped.text).warnings == ()


def test_settings_become_comments_and_so_does_what_could_bring_them_in() -> None:
    lines = [
        "# a comment",
        "",
        "work_mem = '5MB'",
        "Restore_Command='x'",
        " restore_command 'it''s'",
        "include 'more.conf'",
        "?",
    ]
    changed = without_settings("\n".join(lines), frozenset({"restore_command"})).split("\n")
    assert changed == [*lines[:3], *(f"# {line}" for line in lines[3:])]
    assert without_settings("\n".join(changed), frozenset({"restore_command"})).split("\n") == changed


def test_the_synchronous_list_is_sorted_and_quoted_and_empty_for_none() -> None:
    members = [MemberId("b_00000002"), MemberId("a_00000001")]
    assert render_synchronous_standby_names(1, members) == 'ANY 1 ("a_00000001", "b_00000002")'
    assert render_synchronous_standby_names(0, members) == NOTHING_SYNCHRONOUS
    for count, names in ((2, members[:1]), (1, []), (-1, members), (1, [MemberId("*")])):
        with pytest.raises(ValueError, match=r"synchronous|id of a member"):
            render_synchronous_standby_names(count, names)


def test_a_server_whose_role_is_not_known_waits_for_nobody_that_can_exist() -> None:
    rendered = parse_settings(render_replication_conf(ReplicationSettings()))
    assert rendered["synchronous_standby_names"] == NOBODY_CAN_SATISFY
    assert rendered["primary_conninfo"] == ""
    hot = HotStandbySettings(200, 8, 10, 0, 64)
    assert parse_settings(render_replication_conf(ReplicationSettings(hot_standby=hot)))["max_connections"] == "200"


def test_connection_strings_are_quoted() -> None:
    assert render_conninfo({"host": "h", "passfile": "/a b'c\\"}) == "host='h' passfile='/a b\\'c\\\\'"
    with pytest.raises(ValueError, match="connection string"):
        render_conninfo({"host": "a\nb"})


def test_a_standby_has_at_least_what_its_primary_had() -> None:
    wanted = hot_standby_settings_of({"max_connections": 50}, instances=3)
    control = HotStandbySettings(100, 4, 10, 5, 64)
    assert settings_for_standby(wanted, control) == HotStandbySettings(100, 8, 10, 5, 64)


@pytest.mark.parametrize(
    ("connections", "workers", "order"),
    [
        (100, 8, RestartOrder.ANY),
        (200, 8, RestartOrder.STANDBYS_FIRST),
        (50, 8, RestartOrder.PRIMARY_FIRST),
        (50, 16, RestartOrder.TWO_PASSES),
    ],
)
def test_who_takes_a_change_first(connections: int, workers: int, order: RestartOrder) -> None:
    current = HotStandbySettings(100, 8, 10, 0, 64)
    assert restart_order(current, HotStandbySettings(connections, workers, 10, 0, 64)) is order


def test_only_changes_that_are_read_at_the_start_need_a_restart() -> None:
    before = render_postgresql_conf(static())
    after = render_postgresql_conf(static(parameters={"shared_buffers": "1GB", "work_mem": "8MB"}))
    assert changes_that_need_restart(before, after) == ("shared_buffers",)


def test_a_closed_server_admits_the_agent_and_replication_only() -> None:
    settings = AccessSettings(
        replication_networks=("10.0.0.0/8",),
        application_networks=("0.0.0.0/0",),
        lines=("host  all all   samenet scram-sha-256",),
    )
    closed = render_hba(settings, Access.CLOSED)
    assert "0.0.0.0/0" not in closed
    assert "samenet" not in closed
    opened = render_hba(settings, Access.OPEN).splitlines()
    assert "host all all samenet scram-sha-256" in opened
    assert opened.index('host all "postgres" all reject') < opened.index("host all all samenet scram-sha-256")


@pytest.mark.parametrize(
    "settings",
    [
        AccessSettings(),
        AccessSettings(superuser="admin", require_tls=True, replication_by_certificate=True),
        AccessSettings(
            application_networks=("0.0.0.0/0",),
            superuser_networks=("10.0.0.0/8",),
            lines=("local all all scram-sha-256", "host all all all reject"),
        ),
    ],
)
@pytest.mark.parametrize("access", Access)
def test_p8_the_state_of_the_gate_is_told_by_the_file_whatever_the_settings_were(
    settings: AccessSettings, access: Access
) -> None:
    """An agent whose configuration has changed finds the file of the one before."""
    assert rendered_access(render_hba(settings, access)) is access


def test_p8_what_was_edited_or_is_none_of_ours_is_no_gate() -> None:
    closed = render_hba(AccessSettings(), Access.CLOSED)
    assert rendered_access("") is None
    assert rendered_access("local all all scram-sha-256\n") is None
    assert rendered_access(closed + "host all app all scram-sha-256\n") is None
    assert rendered_access("".join(closed.splitlines(keepends=True)[:-1])) is None


@pytest.mark.parametrize(
    "line",
    [
        "host all all 0.0.0.0/0 trust",
        "host all all 0.0.0.0/0 md5",
        "host all all 0.0.0.0/0 password",
        "local all all ident",
        "host replication all 0.0.0.0/0 scram-sha-256",
        'host "x",replication all 0.0.0.0/0 scram-sha-256',
        "host all all 0.0.0.0/0 scram-sha-256\nlocal all all trust",
        "host all all 0.0.0.0/0 scram-sha-256 # trust",
        "include /tmp/hba",
        "host all @/etc/passwd all scram-sha-256",
        "host all all all scram-sha-256 \\",
        "local all postgres peer map=instance_manager",
        'host all "all all trust',
        "host all all scram-sha-256",
        "local app, replication all peer",
        "host app ,replication all scram-sha-256",
        'local re"plication" all scram-sha-256',
        "host all all all ldap a=b,trust",
        "",
        "host all all 127.0.0.1 255.255.255.255 trust",
    ],
)
def test_access_lines_that_give_away_what_is_ours_are_refused(line: str) -> None:
    with pytest.raises(AccessLineRefused):
        check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "host all all 10.0.0.0/8 scram-sha-256",
        "hostssl app,other +group .example.org cert clientcert=verify-full",
        "host all all 10.0.0.0 255.0.0.0 scram-sha-256",
        'local "my db" all scram-sha-256',
        'host all all all ldap ldapserver=ldap.example.net ldapprefix="cn="',
    ],
)
def test_ordinary_access_lines_are_allowed(line: str) -> None:
    assert check_line(line)


def test_strange_names_and_networks_do_not_reach_the_access_files() -> None:
    with pytest.raises(ValueError, match="operating system user"):
        render_ident(agent_os_user='a" b\nx')
    for network in ("all", "0.0.0.0/0 trust\nlocal", "a b", ""):
        with pytest.raises(ValueError, match="neither a network"):
            render_hba(AccessSettings(application_networks=(network,)), Access.OPEN)
