"""What a primary's directory tells of the time before its cluster, by the rights of pg_rewind alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import owned_directory
from own_fixtures import own_template, servers
from own_server import Servers

from instance_manager.core.types import Timeline
from instance_manager.postgres.source_questions import SourceNotReady, ancestry
from instance_manager.postgres.sql import session

__all__ = ["own_template", "servers"]

ONE, TWO = Timeline(1), Timeline(2)


async def test_a_primary_tells_its_first_history_a_note_its_tablespaces_and_whether_it_keeps_where_it_began(
    servers: Servers,
) -> None:
    primary = await servers.primary()
    nothing = await ancestry(primary.source(), ONE, "note.json")
    assert (nothing.history, nothing.note, nothing.keeps_fork) == ("", None, False)
    standby = await servers.standby(primary)
    (standby.data / "note.json").write_text("who knows")
    await standby.fetchval("select pg_promote()")
    async with session(standby.server) as opened:
        await opened.execute("checkpoint")
    told = await ancestry(standby.source(), TWO, "note.json")
    assert told.history == (standby.data / "pg_wal" / "00000002.history").read_text()
    assert (told.note, told.keeps_fork) == ("who knows", True)
    for segment in (standby.data / "pg_wal").glob("00000002????????????????"):
        segment.rename(segment.with_suffix(".away"))
    assert not (await ancestry(standby.source(), TWO, "note.json")).keeps_fork
    space = owned_directory(servers.root / "space")
    async with session(standby.server) as opened:
        await opened.execute(f"create tablespace space location '{space}'")
        oid = await opened.fetchval("select oid from pg_tablespace where spcname = 'space'")
    assert told.tablespaces == {}
    assert (await ancestry(standby.source(), TWO, "note.json")).tablespaces == {oid: str(space)}
    with pytest.raises(SourceNotReady, match="Connect call failed"):
        await ancestry(replace(standby.source(), port=1), TWO, "note.json")
