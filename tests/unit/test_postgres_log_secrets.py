"""Planted secrets in every text that Postgres may log; and what has none stays as it is."""

from __future__ import annotations

import time

import pytest

from instance_manager.postgres_log.secrets import TEXT_MAX_CHARACTERS, hide_secrets, may_hold_secret

S = "hunter2-Xq9"


def told(**record: object) -> dict[str, object]:
    if may_hold_secret(repr(record).encode()):
        hide_secrets(record)
    return record


@pytest.mark.parametrize(
    "statement",
    [
        f"ALTER ROLE nobody PASSWORD '{S}'",
        f"alter user nobody with encrypted password '{S}' valid until 'infinity'",
        f"ALTER ROLE nobody PASSWORD E'{S}'",
        f"ALTER ROLE nobody PASSWORD E'a\\'{S}'",
        f"ALTER ROLE nobody PASSWORD 'a\\'{S}'",
        f"ALTER ROLE nobody PASSWORD U&'{S}'",
        f"ALTER ROLE nobody PASSWORD $${S}$$",
        f"ALTER ROLE nobody PASSWORD $x${S}$x$",
        f"ALTER ROLE nobody PASSWORD '{S}",
        f"ALTER ROLE nobody PASSWORD $x${S}",
        f'ALTER ROLE nobody PASSWORD "{S}"',
        f'ALTER ROLE "no body" PASSWORD "{S}',
        f"ALTER ROLE nobody PASSWORD {S}",
        f"ALTER ROLE nobody\n  PASSWORD\n  {S}",
        f"ALTR ROLE nobody PASSWORD {S}",
        f"-- don't\nALTER ROLE nobody PASSWORD '{S}'",
        f"/* don't */ ALTER ROLE nobody PASSWORD '{S}'",
        f"/* a /* don't */ ' */ ALTER ROLE nobody PASSWORD '{S}'",
        f"ALTER ROLE \"o'brien\" PASSWORD '{S}'",
        f"ALTER ROLE nobody PASSWORD 'it''s {S}'",
        f"SELECT 'a', $$b'c$$; CREATE ROLE x LOGIN PASSWORD '{S}'; SELECT 'd'",
        f"CREATE SUBSCRIPTION s CONNECTION 'host=h user=u password={S}' PUBLICATION p",
        f"CREATE USER MAPPING FOR u SERVER s OPTIONS (user 'u', password '{S}')",
        f"SELECT dblink_connect('postgresql://u:{S}@host/db')",
        f"SELECT * FROM t WHERE note = 'postgres://u:{S}@host/db'",  # noqa: S608
        f"UPDATE account SET password = crypt('{S}', gen_salt('bf'))",  # noqa: S608
        f"SELECT set_config('app.secret', '{S}', false)",
        f"COPY (SELECT 1) TO PROGRAM 'curl --user a:{S} --secret'",
    ],
)
def test_a_statement_with_a_password_is_told_without_it(statement: str) -> None:
    for record in (
        told(message="role does not exist", statement=statement),
        told(message=f"statement: {statement}"),
        told(message=f"duration: 1.234 ms  execute <unnamed>: {statement}"),
        told(message="x", internal_query=statement, context="PL/pgSQL function f() line 1 at EXECUTE"),
    ):
        assert S not in repr(record), record
        assert "***" in repr(record)


@pytest.mark.parametrize(
    "record",
    [
        {"message": f'syntax error at or near ""{S}""', "statement": f'ALTER ROLE x PASSWORD "{S}"'},
        {"message": f'syntax error at or near "{S}"', "statement": f"ALTER ROLE x PASSWORD {S}"},
        {"message": f'unterminated quoted string at or near "\'{S}"', "statement": f"ALTER ROLE x PASSWORD '{S}"},
        {"message": f'invalid input syntax for type integer: "{S}"', "statement": f"SELECT set_secret('{S}'::int)"},
        {
            "message": "execute <unnamed>: UPDATE account SET password = $1",
            "detail": f"parameters: $1 = '{S}', $2 = 'x'",
        },
        {
            "message": "null value",
            "statement": "INSERT INTO account (password) VALUES ($1)",
            "context": f"unnamed portal with parameters: $1 = '{S}'",
        },
        {"message": "x", "context": f"SQL statement \"ALTER ROLE x PASSWORD '{S}'\"\nPL/pgSQL function f()"},
        {"message": "too long", "context": f'COPY account, line 1, column password: "{S}"'},
        {
            "message": 'LDAP authentication failed for user "app"',
            "detail": f'Connection matched file "pg_hba.conf" line 9: "host all all all ldap ldapbindpasswd={S}"',
        },
        {
            "message": "x",
            "detail": f'Connection matched file "pg_hba.conf" line 9: "host all all all radius radiussecrets="{S}""',
        },
        {"message": f'syntax error at or near "{S}"'},
        {"message": f'unterminated quoted string at or near "\'{S};\nSELECT 1"'},
        {"message": f"could not connect: postgresql://app:{S}@db/app"},
    ],
)
def test_what_repeats_a_secret_is_told_without_it(record: dict[str, object]) -> None:
    assert S not in repr(told(**record)), record


@pytest.mark.parametrize(
    "record",
    [
        {"message": 'password authentication failed for user "app"'},
        {"message": "division by zero", "statement": "SELECT 'a' / 0"},
        {"message": 'relation "t" does not exist', "statement": "SELECT * FROM t WHERE name = 'it''s'"},
        {"message": "x", "statement": "SELECT password FROM account"},
        {"message": "could not connect to https://example.org/path"},
    ],
)
def test_what_holds_no_secret_is_told_as_it_is(record: dict[str, object]) -> None:
    assert told(**record) == record


def test_the_shape_of_a_statement_stays_readable() -> None:
    found = told(message="x", statement=f"ALTER ROLE \"app\" PASSWORD '{S}' VALID UNTIL 'infinity'")
    assert found["statement"] == "ALTER ROLE \"app\" PASSWORD '***' VALID UNTIL '***'"


@pytest.mark.parametrize(
    "piece", ["password ", "user password ", "passw", "a", "'", '"', "$a$", "/*", "--", "\\'", "x="]
)
def test_a_text_made_to_be_slow_costs_little(piece: str) -> None:
    statement = "ALTER USER x PASSWORD 'y' secret " + piece * (1_000_000 // len(piece))
    begun_s = time.process_time()
    found = told(message=statement, statement=statement)
    assert time.process_time() - begun_s < 1.0
    assert len(str(found["statement"])) <= 2 * TEXT_MAX_CHARACTERS
