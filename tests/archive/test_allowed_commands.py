"""The commands of a server under an agent: they end when the agent stops allowing them, whatever becomes of the archiver."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive_harness import until
from test_commands import shell

from instance_manager.archive import commands
from instance_manager.archive.receipts import RECEIPTS
from instance_manager.postgres.archive_commands import ALLOWS, allow
from instance_manager.postgres.promotion import install_restore_command
from instance_manager.postgres.server import LocalServer

A = "000000010000000000000005"
PYTHON = Path(os.path.realpath(sys.executable))


class Place:
    """The directories of one server, and a socket at which a listener never answers."""

    def __init__(self, root: Path, program: Path) -> None:
        self.program_of_client = program
        self.socket = root / "a.sock"
        self.server = LocalServer(
            data_directory=root / "data",
            socket_directory=root / "s",
            state_directory=root / "state",
            listen_address="127.0.0.1",
            port=1,
            bin_directory=Path("/"),
            run_as=None,
        )
        (root / "data" / "pg_wal").mkdir(parents=True)
        (root / "state").mkdir()
        self.client = commands.install_client(self.server.state_directory, None)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket))
        self.listener.listen()

    async def archive(self) -> tuple[int, str]:
        state = self.server.state_directory
        command = commands.archive_command(
            self.program_of_client, self.client, self.socket, state / ALLOWS, state / RECEIPTS
        )
        return await shell(command, A)

    async def restore(self, words: str | None = None, name: str = A) -> tuple[int, str]:
        words = words or commands.client_words(self.program_of_client, self.client, self.socket)
        return await shell(install_restore_command(self.server, words), name, cwd=self.server.data_directory)

    @property
    def restored(self) -> Path:
        return self.server.data_directory / "pg_wal" / "RECOVERYXLOG"

    def program(self, text: str) -> str:
        """Words of a client of the test's own."""
        path = self.server.state_directory / "client.sh"
        path.write_text(text)
        return f"/bin/sh {shlex.quote(str(path))}".replace("%", "%%")


@pytest.fixture(params=["perl", "python"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Once for each language of the client: both must do the same."""
    with tempfile.TemporaryDirectory(prefix="im ar'$ %") as directory:
        made = Place(Path(directory), commands.PERL if request.param == "perl" else PYTHON)
        yield made
        made.listener.close()


async def test_without_permission_nobody_is_asked(place: Place) -> None:
    """126 ends Postgres's archiver at once: after a 1 a shutdown would wait for two more tries, a second apart."""
    place.listener.close()
    assert await place.archive() == (126, "")
    allow(place.server, "fetch")
    assert await place.archive() == (126, "")
    assert (await place.restore(place.program("touch asked; exit 0")))[0] == 0
    allow(place.server, "push")
    (place.server.data_directory / "asked").unlink()
    assert await place.restore(place.program("touch asked; exit 0")) == (1, "")
    assert not (place.server.data_directory / "asked").exists()


async def test_a_push_that_waits_for_a_hanging_archiver_ends_with_its_permission(place: Place) -> None:
    allow(place.server, "push")
    pushing = asyncio.create_task(place.archive())
    held, _ = await asyncio.to_thread(place.listener.accept)
    assert not pushing.done()
    allow(place.server, None)
    assert (await asyncio.wait_for(pushing, 10))[0] == 126
    held.close()


async def test_p9_a_fetch_that_waits_for_a_hanging_archiver_ends_with_its_permission(place: Place) -> None:
    allow(place.server, "fetch")
    fetching = asyncio.create_task(place.restore())
    held, _ = await asyncio.to_thread(place.listener.accept)
    assert not fetching.done()
    allow(place.server, None)
    assert await asyncio.wait_for(fetching, 10) == (1, ""), "and not because the archiver ended"
    held.close()


async def test_p9_what_arrives_after_the_permission_has_gone_is_thrown_away(place: Place) -> None:
    allow(place.server, "fetch")
    client = place.program('touch begun; while [ ! -e go ]; do sleep 0.02; done; echo wal >"$4"; exit 0')
    fetching = asyncio.create_task(place.restore(client))
    begun = place.server.data_directory / "begun"
    await until(begun.exists)
    allow(place.server, None)
    (place.server.data_directory / "go").touch()
    assert (await asyncio.wait_for(fetching, 10))[0] == 1
    assert not place.restored.exists()


async def test_what_the_client_brings_while_allowed_is_there(place: Place) -> None:
    allow(place.server, "fetch")
    assert await place.restore(place.program('echo "$1 $2 $3" >"$4"; exit 0')) == (0, "")
    assert place.restored.read_text() == f"fetch standby {A}\n"


@pytest.mark.parametrize("code", [1, 10, 11, 12, 126, 127, 255])
async def test_whatever_else_the_client_ends_with_is_absent_to_a_standby(place: Place, code: int) -> None:
    allow(place.server, "fetch")
    assert (await place.restore(place.program(f"exit {code}")))[0] == 1


async def test_p4_during_a_promotion_the_archive_is_not_asked(place: Place) -> None:
    allow(place.server, "fetch")
    (place.server.state_directory / "claim").write_text("9\n")
    client = place.program("touch asked; exit 0")
    assert (await place.restore(client))[0] == 1
    assert (await place.restore(client, "00000008.history"))[0] == 0
    assert place.restored.read_bytes() == b""
    assert not (place.server.data_directory / "asked").exists()
