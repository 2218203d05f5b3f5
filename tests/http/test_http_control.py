# ruff: noqa: ASYNC240
"""Control: over the Unix socket by its owner or root, and by nobody and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from http_harness import TOKEN, FakeService

from instance_manager.config import Configuration
from instance_manager.config_sections import MemberSection
from instance_manager.http import server
from instance_manager.http.server import ListenError, serve
from instance_manager.http.token import TokenUnusable

VERBS = [
    "switchover",
    "failover",
    "fence",
    "unfence",
    "restart",
    "reload",
    "reinit",
    "pause",
    "resume",
    "status",
    "lease",
]


@pytest.mark.parametrize("verb", [*VERBS, "echo"])
async def test_no_verb_is_reachable_over_tcp(client: aiohttp.ClientSession, verb: str) -> None:
    for method in ("POST", "GET", "PUT"):
        async with client.request(
            method, f"/control/{verb}", data=b"{}", headers={"Authorization": f"Bearer {TOKEN}"}
        ) as response:
            assert response.status == 404


async def test_the_control_application_refuses_a_tcp_connection_even_if_it_were_served_there() -> None:
    runner = aiohttp.web.AppRunner(server.control_application(FakeService()), access_log=None)
    await runner.setup()
    try:
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession() as session, session.post(f"http://{host}:{port}/control/echo") as response:
            assert response.status == 403
    finally:
        await runner.cleanup()


async def test_probes_and_peers_are_not_on_the_control_socket(control: aiohttp.ClientSession) -> None:
    for path in ("/status", "/primary", "/peer/echo"):
        async with control.get(path) as response:
            assert response.status == 404


async def test_a_verb_answers_with_its_result_and_the_new_state(control: aiohttp.ClientSession) -> None:
    async with control.post("/control/echo", json={"to": "demo-2"}) as response:
        lines = [json.loads(line) async for line in response.content]
    assert len(lines) == 1
    assert lines[0]["result"]["ok"] is True
    assert lines[0]["result"]["message"] == "{'to': 'demo-2'}"
    assert lines[0]["result"]["status"]["primary"] == "demo-1"


async def test_progress_is_told_while_the_verb_is_at_work(service: FakeService, control: aiohttp.ClientSession) -> None:
    async with control.post("/control/slow") as response:
        assert json.loads(await response.content.readline()) == {"progress": "one"}
        service.go_on.set()
        assert json.loads(await response.content.readline()) == {"progress": "two"}
        assert json.loads(await response.content.readline()) == {
            "result": {"ok": False, "message": "no", "status": None}
        }


async def test_a_verb_goes_on_to_its_end_when_its_user_goes_away(
    service: FakeService, control: aiohttp.ClientSession
) -> None:
    async with control.post("/control/slow") as response:
        await response.content.readline()
        response.close()
    await asyncio.sleep(0.05)
    service.go_on.set()
    await asyncio.sleep(0.05)
    assert service.finished == ["slow"]


@pytest.mark.parametrize(("verb", "message"), [("fails", "ZeroDivisionError: broken"), ("endless", "without a result")])
async def test_a_verb_that_breaks_still_ends_with_a_result(
    control: aiohttp.ClientSession, verb: str, message: str
) -> None:
    async with control.post(f"/control/{verb}") as response:
        lines = [json.loads(line) async for line in response.content]
    assert lines[-1]["result"]["ok"] is False
    assert message in lines[-1]["result"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/control/unheard-of", b"{}", 404),
        ("/control/refuse", b"{}", 400),
        ("/control/echo", b"[1]", 400),
        ("/control/echo", b"{", 400),
        ("/control/echo", b" " * 70_000, 413),
    ],
)
async def test_a_malformed_command_is_refused(
    control: aiohttp.ClientSession, path: str, body: bytes, code: int
) -> None:
    async with control.post(path, data=body) as response:
        assert response.status == code


async def test_at_most_eight_commands_are_at_work_at_once(service: FakeService, control: aiohttp.ClientSession) -> None:
    waiting = [asyncio.create_task(control.post("/control/slow").__aenter__()) for _ in range(8)]
    responses = await asyncio.gather(*waiting)
    async with control.post("/control/echo") as response:
        assert response.status == 503
    service.go_on.set()
    for waiting_response in responses:
        await waiting_response.read()


async def test_the_socket_is_for_its_owner_only(service: FakeService, configuration: Configuration) -> None:
    found = configuration.control_socket.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600


@pytest.mark.parametrize(("uid", "code"), [(0, 200), (os.geteuid(), 200), (65534, 403)])
async def test_another_user_is_refused_by_the_kernels_word(
    service: FakeService, configuration: Configuration, uid: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(struct, "unpack", lambda form, data: (1, uid, uid))
    connector = aiohttp.UnixConnector(str(configuration.control_socket))
    async with aiohttp.ClientSession(connector=connector) as session, session.post("http://c/control/echo") as response:
        assert response.status == code


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_even_through_an_open_mode(
    service: FakeService, configuration: Configuration
) -> None:
    configuration.control_socket.chmod(0o666)
    for path in (configuration.control_socket.parent, configuration.control_socket.parent.parent):
        path.chmod(0o755)
    script = (
        "import os,socket,sys; os.setuid(65534); s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(b'POST /control/echo HTTP/1.1\\r\\nHost: c\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n');"
        "print(s.recv(100).split()[1].decode())"
    )
    process = await asyncio.create_subprocess_exec(
        "python3", "-c", script, configuration.control_socket, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert output.strip() == b"403"


async def test_a_dead_predecessors_socket_is_replaced_and_ones_own_removed(configuration: Configuration) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(configuration.control_socket))
    async with serve(FakeService(), configuration):
        assert configuration.control_socket.is_socket()
    assert list(configuration.instance.directory.iterdir()) == []


async def test_a_file_in_the_sockets_place_is_left_alone(configuration: Configuration) -> None:
    configuration.control_socket.write_text("precious")
    with pytest.raises(ListenError, match=r"instance\.directory: .* remove it"):
        async with serve(FakeService(), configuration):
            pass
    assert configuration.control_socket.read_text() == "precious"


async def test_a_port_in_use_names_the_key_to_change(configuration: Configuration) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", configuration.me.http_port))
        other.listen()
        with pytest.raises(ListenError, match=r"members, demo-1: http_port \d+ is in use on 127\.0\.0\.1"):
            async with serve(FakeService(), configuration):
                pass


@pytest.mark.parametrize(
    ("host", "reason"), [("192.0.2.1", "no address of this machine|not an address"), ("no.invalid", "no address")]
)
async def test_a_host_that_is_not_ours_names_the_key_to_change(
    configuration: Configuration, host: str, reason: str
) -> None:
    member = MemberSection(name="demo-1", host=host, postgres_port=1, http_port=configuration.me.http_port)
    wrong = msgspec.structs.replace(configuration, members=(member,))
    with pytest.raises(ListenError, match=reason):
        async with serve(FakeService(), wrong):
            pass


@pytest.mark.parametrize("content", [None, "", "short", "with a space in it here", "x" * 2000])
async def test_an_unusable_token_is_told_without_its_content(configuration: Configuration, content: str | None) -> None:
    path = Path(configuration.secrets.peer_token)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(TokenUnusable, match=r"secrets\.peer_token") as told:
        async with serve(FakeService(), configuration):
            pass
    assert not content or content not in str(told.value)


async def test_after_a_stop_the_port_can_be_opened_at_once(configuration: Configuration) -> None:
    async def ask() -> int:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{configuration.me.http_port}/livez") as response,
        ):
            return response.status

    for _ in range(2):
        async with serve(FakeService(), configuration):
            assert await ask() == 200
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask()


def test_the_kernels_credentials_are_three_integers() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        raw: Any = left.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    assert struct.unpack("3i", raw) == (os.getpid(), os.geteuid(), os.getegid())
