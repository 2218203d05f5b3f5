"""What comes from outside into a file, a statement or a command line stays one value in its place, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_config import with_value, written

from instance_manager.config import ConfigurationError, load_configuration
from instance_manager.launch import LaunchError, postgres_problems, prepare_directories
from instance_manager.postgres.configuration import parse_settings, render_conninfo, render_settings
from instance_manager.postgres.host_based_access import AccessLineRefused, check_line
from instance_manager.postgres.sql import quote_identifier, quote_literal

NASTY = [
    "a\nfsync = off",
    "a\rb",
    "a\x00b",
    "a'b",
    'a"b',
    "a\\'b",
    "a; DROP DATABASE app",
    "a = 1, b",
    "$(id)",
    "`id`",
    "../../etc/passwd",
    "a b",
    "\u2028x",
    "",
    "-c shell",
    "A" * 200,
]


def problems_of(directory: Path, place: str, value: object) -> str:
    """Of a whole file, as `config check` and a reload find them; empty: it is taken."""
    try:
        configuration = load_configuration(written(directory, with_value(place, value)))
    except ConfigurationError as error:
        return str(error)
    return "\n".join(postgres_problems(configuration))


@pytest.mark.parametrize("name", NASTY)
def test_names_of_parameters_inject_nothing(tmp_path: Path, name: str) -> None:
    """cloudnative-pg#11029: a name with a line end brought a line of its own."""
    assert "is no name of a parameter" in problems_of(tmp_path, "postgres.parameters", {name: "x"})
    with pytest.raises(ValueError, match="not a name of a parameter"):
        render_settings({name: "x"})


@pytest.mark.parametrize("value", NASTY)
def test_values_of_parameters_stay_one_value_on_one_line(tmp_path: Path, value: str) -> None:
    if any(ord(character) < 32 for character in value):
        assert "without control characters" in problems_of(tmp_path, "postgres.parameters", {"work_mem": value})
        return
    assert problems_of(tmp_path, "postgres.parameters", {"app.word": value}) == ""
    rendered = render_settings({"app.word": value})
    assert rendered.count("\n") == 1
    assert parse_settings(rendered) == {"app.word": value}


@pytest.mark.parametrize("key", ["application_owner", "application_database"])
@pytest.mark.parametrize("name", [*NASTY, "postgres", "pg_monitor", "streaming_replica", "App"])
def test_names_inside_postgres_are_plain_and_not_reserved(tmp_path: Path, key: str, name: str) -> None:
    assert f"postgres.{key}: " in problems_of(tmp_path, f"postgres.{key}", name)
    if name in NASTY:
        with pytest.raises(ValueError, match="not a name for a database object"):
            quote_identifier(name)


@pytest.mark.parametrize(
    "entry",
    [
        {"roles": [{"name": "NAME"}]},
        {"roles": [{"name": "r", "member_of": ["NAME"]}]},
        {"roles": [{"name": "r", "valid_until": "NAME"}]},
        {"databases": [{"name": "NAME", "owner": "app"}]},
        {"databases": [{"name": "d", "owner": "NAME"}]},
        {"databases": [{"name": "d", "owner": "app", "encoding": "NAME"}]},
        {"extensions": [{"name": "NAME"}]},
        {"extensions": [{"name": "x", "version": "NAME"}]},
        {"extensions": [{"name": "x", "schema": "NAME"}]},
    ],
    ids=str,
)
def test_what_is_declared_has_plain_names_only(tmp_path: Path, entry: dict[str, list[dict[str, Any]]]) -> None:
    (section, (fields,)) = next((key, value) for key, value in entry.items())
    for name in NASTY:
        filled = {
            key: name if value == "NAME" else [name] if value == ["NAME"] else value for key, value in fields.items()
        }
        assert f"managed.{section}" in problems_of(tmp_path, "managed", {section: [filled]}), name


@pytest.mark.parametrize(
    "role",
    [
        {"name": "postgres"},
        {"name": "streaming_replica"},
        {"name": "app"},
        {"name": "r", "member_of": ["pg_execute_server_program"]},
        {"name": "r", "member_of": ["postgres"]},
        {"name": "r", "superuser": True},
        {"name": "r", "replication": True},
    ],
)
def test_no_declaration_asks_for_the_superusers_rights(tmp_path: Path, role: dict[str, object]) -> None:
    assert problems_of(tmp_path, "managed", {"roles": [role]})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("host all all 0.0.0.0/0 scram-sha-256\nlocal all all trust", "not one line"),
        ("host all all 0.0.0.0/0 trust", "'trust' is not allowed"),
        ("host all all 0.0.0.0/0 ldap ldapserver=x", "needs ldapbasedn or ldapprefix"),
        ("host all all 0.0.0.0/0 radius radiusservers=x", "needs radiussecrets"),
        ("host all all 0.0.0.0/0 scram-sha-256 map=x", "has no option map"),
        ("host all all 0.0.0.0/0 cert", "cert is not for host"),
        ("host all all 0.0.0.0/0 peer", "peer is not for host"),
    ],
)
def test_a_line_that_the_server_would_not_start_with_is_refused_before(tmp_path: Path, line: str, told: str) -> None:
    assert told in problems_of(tmp_path, "postgres.host_based_access", [line])


@pytest.mark.parametrize(
    "option",
    ['ldapbindpasswd="a secret"', '"ldapbindpasswd=a secret"', "ldapbindpasswd=asecret", 'radiussecrets="a secret"'],
)
def test_a_refused_line_is_told_without_the_secret_in_it(option: str) -> None:
    for line in (f"host all all all ldap {option} bad=1", f"host all all all trust {option}", f"nothing {option}"):
        with pytest.raises(AccessLineRefused) as caught:
            check_line(line)
        assert "secret" not in str(caught.value).replace("radiussecrets", "")


@pytest.mark.parametrize("value", [value for value in NASTY if not any(ord(c) < 32 for c in value)])
def test_connection_strings_keep_each_value_in_its_place(value: str) -> None:
    text = render_conninfo({"host": value, "user": "x"})
    assert text.endswith(" user='x'")
    inner = text.removeprefix("host='").removesuffix("' user='x'")
    assert inner.replace("\\\\", "").replace("\\'", "").count("'") == 0


@pytest.mark.parametrize("value", [value for value in NASTY if "\0" not in value])
def test_literals_of_sql_end_where_they_should(value: str) -> None:
    text = quote_literal(value).strip().removeprefix("E")
    assert text[0] == text[-1] == "'"
    assert "'" not in text[1:-1].replace("''", "")


def test_what_postgres_must_not_be_told_stops_the_start_and_not_postgres(tmp_path: Path) -> None:
    configuration = load_configuration(written(tmp_path, with_value("postgres.parameters", {"fsync": False})))
    with pytest.raises(LaunchError, match=r"postgres\.parameters: fsync"):
        prepare_directories(configuration)
