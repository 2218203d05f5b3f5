"""Peers and control over TLS: who gets in by which proof, and that certificates are renewed while the listeners stand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from http_certificates import CONTROL_TOKEN, Authorities, loaded, make_authorities, with_tls
from http_harness import STATUS, TOKEN, FakeService
from msgspec.structs import replace
from test_http_control import VERBS

from instance_manager import certificates
from instance_manager.certificate_sets import Certificates
from instance_manager.config import Configuration
from instance_manager.config_security import TlsSection
from instance_manager.http import control_routes
from instance_manager.http.control import REFUSALS_TOLD_MAX
from instance_manager.http.control_client import CommandRefused, InstanceNotReachable, Network, send_command
from instance_manager.http.limits import Rates
from instance_manager.http.listening import HANDSHAKE_TIMEOUT_S, HANDSHAKES_MAX
from instance_manager.http.peers import PeerClient, PeerTls
from instance_manager.http.ports import ControlResult
from instance_manager.http.server import NETWORK_CONTROL_CONNECTIONS_MAX, Listeners, serve
from instance_manager.ports import PeerRefused, PeerRejected, PeerSilent


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    return make_authorities(tmp_path_factory.mktemp("authorities"))


@dataclass
class Served:
    service: FakeService
    configuration: Configuration
    certificates: Certificates
    listeners: Listeners

    @property
    def peer_url(self) -> str:
        return f"https://127.0.0.1:{self.configuration.me.peer_port}"

    @property
    def control_url(self) -> str:
        assert self.configuration.control is not None
        return f"https://{self.configuration.control.listen}"


@pytest.fixture
async def served(directory: Path, authorities: Authorities) -> AsyncIterator[Served]:
    configuration = with_tls(directory, authorities)
    service, sets = FakeService(), loaded(configuration)
    async with serve(service, configuration, sets) as listeners:
        yield Served(service, configuration, sets, listeners)


@pytest.fixture
def peers_of(served: Served, authorities: Authorities) -> dict[str, Path]:
    return {
        "member": authorities.member("demo-2"),
        "user": authorities.ours / "control/bob",
        "other host": authorities.member("elsewhere"),
        "other authority": authorities.theirs / "members/demo-2",
    }


async def post(
    url: str,
    context: ssl.SSLContext | bool,
    *,
    token: str | None = None,
    body: bytes | None = b"{}",
    content_type: str | None = "application/json",
) -> tuple[int, str]:
    """Status and text; 0 where the handshake or the connection was refused."""
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    if content_type is not None:
        headers["Content-Type"] = content_type
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        try:
            async with session.post(url, data=body, headers=headers, ssl=context) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, ConnectionError) as error:
            return 0, str(error)


@pytest.mark.parametrize(
    ("shown", "token", "status"),
    [
        ("member", TOKEN, 200),
        ("member", "another-token-of-16", 401),
        ("member", None, 401),
        ("user", TOKEN, 403),
        ("other host", TOKEN, 403),
        ("other authority", TOKEN, 0),
        (None, TOKEN, 0),
    ],
)
async def test_a_peer_needs_the_certificate_of_a_member_and_the_token(
    served: Served,
    authorities: Authorities,
    peers_of: dict[str, Path],
    shown: str | None,
    token: str | None,
    status: int,
) -> None:
    context = authorities.client(peers_of[shown] if shown is not None else None)
    found, text = await post(f"{served.peer_url}/peer/echo", context, token=token, body=b"[1]")
    assert found == status, text
    assert status != 200 or text == "[1]"


async def test_where_peers_need_tls_none_is_answered_without(served: Served) -> None:
    plain = f"127.0.0.1:{served.configuration.me.http_port}"
    assert (await post(f"http://{plain}/peer/echo", True, token=TOKEN))[0] == 403
    assert (await post(f"{served.peer_url.replace('https', 'http')}/peer/echo", True, token=TOKEN))[0] in (0, 400)


async def test_the_peers_listener_has_no_other_route(served: Served, authorities: Authorities) -> None:
    context = authorities.client(authorities.member("demo-2"))
    for path in ("/control/pause", "/status", "/primary"):
        assert (await post(f"{served.peer_url}{path}", context, token=TOKEN))[0] == 404


IDENTITIES = {
    "nobody": 401,
    "a token that is wrong": 401,
    "the peers' token": 401,
    "a certificate that is not allowed": 403,
    "a member's certificate": 403,
    "a certificate of another authority": 0,
    "without TLS": 0,
    "an allowed certificate": 200,
    "the token": 200,
    "a certificate that is not allowed, and the token": 200,
}


def shown_by(identity: str, authorities: Authorities) -> tuple[Path | None, str | None]:
    bob = authorities.ours / "control/bob"
    return {
        "nobody": (None, None),
        "a token that is wrong": (None, "0000000000000000-control"),
        "the peers' token": (None, TOKEN),
        "a certificate that is not allowed": (bob, None),
        "a member's certificate": (authorities.member("demo-1"), None),
        "a certificate of another authority": (authorities.theirs / "control/alice", None),
        "without TLS": (None, CONTROL_TOKEN),
        "an allowed certificate": (authorities.ours / "control/alice", None),
        "the token": (None, CONTROL_TOKEN),
        "a certificate that is not allowed, and the token": (bob, CONTROL_TOKEN),
    }[identity]


NEEDS_ARGUMENTS = {"/switchover": 400, "/failover": 412}
"""Patroni's names that an empty body does not satisfy."""


@pytest.mark.parametrize("identity", IDENTITIES)
async def test_who_may_control_over_the_network_and_who_may_not(
    served: Served, authorities: Authorities, identity: str
) -> None:
    """Each verb, by both names; one that the fake service does not know is a 404 for those who may."""
    certificate, token = shown_by(identity, authorities)
    context = authorities.client(certificate)
    known = {name.lstrip("/") for name in control_routes.VERBS} - {"reinitialize"} | {"reinit", "echo"}
    for path in (*(f"/control/{verb}" for verb in (*VERBS, "log-level", "echo")), *control_routes.VERBS):
        url = f"{served.control_url}{path}"
        if identity == "without TLS":
            url = url.replace("https", "http")
        status, text = await post(url, context, token=token)
        wanted = IDENTITIES[identity]
        if wanted == 200 and path.startswith("/control/") and path.removeprefix("/control/") not in known:
            wanted = 404
        if wanted == 200 and path in NEEDS_ARGUMENTS:
            wanted = NEEDS_ARGUMENTS[path]
        assert status == wanted or (wanted == 0 and status == 400), (path, text)


@pytest.mark.parametrize("path", ["/control/slow", "/pause", "/restart"])
async def test_a_foreign_page_in_a_browser_with_the_certificate_controls_nothing(
    served: Served, authorities: Authorities, path: str
) -> None:
    """What a form or a script of another origin can send without being asked: these three types, or none."""
    served.service.go_on.set()
    alice = authorities.client(authorities.ours / "control/alice")
    url = f"{served.control_url}{path}"
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", None):
        status, text = await post(url, alice, content_type=content_type, body=None if content_type is None else b"{}")
        assert (status, "application/json" in text) == (415, True), content_type
    assert served.service.asked == []
    assert (await post(url, alice, content_type="application/json; charset=utf-8"))[0] == 200
    by_token = await post(url, authorities.client(None), token=CONTROL_TOKEN, content_type="text/plain")
    assert by_token[0] == 200, "no browser sends a token by itself"


async def test_a_refused_caller_reaches_no_verb(served: Served, authorities: Authorities) -> None:
    served.service.go_on.set()
    await post(f"{served.control_url}/control/slow", authorities.client(authorities.ours / "control/bob"))
    assert served.service.finished == []
    await post(f"{served.control_url}/control/slow", authorities.client(authorities.ours / "control/alice"))
    assert served.service.finished == ["slow"]


async def test_refused_callers_cannot_fill_the_log(
    served: Served, authorities: Authorities, caplog: pytest.LogCaptureFixture
) -> None:
    connector = aiohttp.TCPConnector(ssl=authorities.client(None))
    async with aiohttp.ClientSession(connector=connector) as session:
        for _ in range(REFUSALS_TOLD_MAX + 20):
            async with session.post(f"{served.control_url}/control/pause") as response:
                assert response.status == 401
    told = [record for record in caplog.records if "control refused" in record.getMessage()]
    assert len(told) == REFUSALS_TOLD_MAX


async def test_control_over_the_network_is_logged_with_who_it_was(
    served: Served, authorities: Authorities, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await post(f"{served.control_url}/control/echo", authorities.client(authorities.ours / "control/alice"))
    await post(f"{served.control_url}/control/echo", authorities.client(None), token="0000000000000000-wrong")
    assert "control: echo by certificate alice" in caplog.text
    assert "control refused: the token is another" in caplog.text
    assert "0000000000000000" not in caplog.text


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_the_old_versions_of_tls_are_refused(served: Served, authorities: Authorities) -> None:
    for url in (served.peer_url, served.control_url):
        context = authorities.client(authorities.member("demo-2"))
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        assert (await post(f"{url}/peer/echo", context, token=TOKEN))[0] == 0


async def test_who_never_shakes_hands_makes_room_for_who_does(served: Served, authorities: Authorities) -> None:
    """A connection costs 300 KiB before it has proven anything: without a bound a few thousand end the pod."""
    port = served.configuration.me.peer_port
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(HANDSHAKES_MAX + 20)]
    try:
        context = authorities.client(authorities.member("demo-2"))
        assert (await post(f"{served.peer_url}/peer/echo", context, token=TOKEN, body=b"[1]")) == (200, "[1]")
        # Sooner than the handshake's own deadline: the oldest were given up for the others.
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S / 2):
            for reader, _ in silent[:20]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
    finally:
        for _, writer in silent:
            writer.close()


async def test_an_address_that_shakes_hands_too_often_is_closed_until_time_has_passed(
    served: Served, authorities: Authorities, caplog: pytest.LogCaptureFixture
) -> None:
    """Each handshake costs the loop that renews the Lease a millisecond or more, whoever asks for it."""
    listener = served.listeners.peers
    assert listener is not None
    listener._rates = Rates(per_s=5, burst=20)
    context, port = authorities.client(authorities.member("demo-2")), served.configuration.me.peer_port

    async def shakes_hands() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
        except (ConnectionError, ssl.SSLError):
            return False
        writer.close()
        return True

    # More than are ever refilled while they are made, however slow the machine is: some are refused at least.
    done = [await shakes_hands() for _ in range(20)]
    assert all(done)
    refused = await asyncio.gather(*(shakes_hands() for _ in range(40)))
    assert refused.count(False) > 20
    assert caplog.text.count("begins more than 5 TLS connections a second") == 1
    async with asyncio.timeout(10):
        while True:
            if await shakes_hands():
                break
            await asyncio.sleep(0.1)


async def test_who_shows_no_certificate_holds_few_connections_for_control(
    served: Served, authorities: Authorities
) -> None:
    assert served.configuration.control is not None
    host, port = served.configuration.control.address
    context = authorities.client(None)
    held = []
    for _ in range(NETWORK_CONTROL_CONNECTIONS_MAX + 2):
        held.append(await asyncio.open_connection(host, port, ssl=context))
    try:
        # Sooner than a silent connection's own deadline of 10 s.
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await held[0][0].read() == b""
    finally:
        for _, writer in held:
            writer.transport.abort()


async def serial_number(served: Served, context: ssl.SSLContext) -> str:
    assert served.configuration.me.peer_port is not None
    _, writer = await asyncio.open_connection("127.0.0.1", served.configuration.me.peer_port, ssl=context)
    serial = str(writer.get_extra_info("peercert")["serialNumber"])
    writer.close()
    return serial


async def test_a_renewed_certificate_is_shown_to_new_connections_and_the_others_stay(
    directory: Path, tmp_path: Path
) -> None:
    own = make_authorities(tmp_path)
    configuration = with_tls(directory, own)
    sets = loaded(configuration)
    async with serve(FakeService(), configuration, sets) as listeners:
        served = Served(FakeService(), configuration, sets, listeners)
        context = own.client(own.member("demo-2"))
        before = await serial_number(served, context)
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {TOKEN}"}) as kept:
            async with kept.post(f"{served.peer_url}/peer/echo", data=b"1") as response:
                assert response.status == 200
            shutil.rmtree(own.member("demo-1"))
            certificates.make(own.ours, [certificates.member("demo-1", ["127.0.0.1"])], cluster="ours", renew=False)
            assert set(sets.look()) == {"postgres", "peers", "control"}
            await listeners.renew()
            assert await serial_number(served, context) != before
            connector._ssl = own.client(None)  # a new connection without a certificate would be refused
            async with kept.post(f"{served.peer_url}/peer/echo", data=b"2") as response:
                assert response.status == 200


async def test_an_authority_that_was_replaced_is_trusted_no_longer(directory: Path, tmp_path: Path) -> None:
    own = make_authorities(tmp_path)
    configuration = with_tls(directory, own)
    sets = loaded(configuration)
    old = own.client(own.member("demo-2"), by=own.theirs / "members/demo-1")
    async with serve(FakeService(), configuration, sets) as listeners:
        served = Served(FakeService(), configuration, sets, listeners)
        shutil.rmtree(own.member("demo-1"))
        shutil.copytree(own.theirs / "members/demo-1", own.member("demo-1"))
        sets.look()
        await listeners.renew()
        new = own.client(own.theirs / "members/demo-2", by=own.theirs / "members/demo-1")
        assert (await post(f"{served.peer_url}/peer/echo", new, token=TOKEN))[0] == 200
        assert (await post(f"{served.peer_url}/peer/echo", old, token=TOKEN))[0] == 0


def client_of(served: Served, directory: Path, *, required: bool = True, authority: Path | None = None) -> PeerClient:
    """As a member asks, with the certificate in `directory`."""
    context = ssl.create_default_context(cafile=str((authority or directory) / "ca.crt"))
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return PeerClient(
        served.configuration.members, served.configuration.secrets.peer_token, tls=PeerTls(lambda: context, required)
    )


async def test_a_member_asks_another_by_mutual_tls(served: Served, authorities: Authorities) -> None:
    async with client_of(served, authorities.member("demo-2")) as peers:
        assert await peers.call("demo-1", "echo", b"[1]", deadline_s=5) == b"[1]"
        with pytest.raises(PeerRefused):
            await peers.call("demo-2", "echo", b"", deadline_s=5)


async def test_what_a_peer_goes_on_telling_comes_by_mutual_tls_too(served: Served, authorities: Authorities) -> None:
    async with client_of(served, authorities.member("demo-2")) as peers:
        with pytest.raises(PeerRejected, match="no such call"):
            await anext(peers.listen("demo-1", "unheard-of", b"", silence_s=5))
    async with client_of(served, authorities.ours / "control/bob", authority=authorities.member("demo-1")) as stranger:
        with pytest.raises(PeerRejected, match="covers no member's host"):
            await anext(stranger.listen("demo-1", "unheard-of", b"", silence_s=5))


async def test_a_member_does_not_believe_a_server_of_another_authority_or_host(
    served: Served, authorities: Authorities, directory: Path
) -> None:
    foreign = authorities.theirs / "members/demo-2"
    async with client_of(served, authorities.member("demo-2"), authority=foreign) as peers:
        with pytest.raises(PeerSilent, match="certificate is refused"):
            await peers.call("demo-1", "echo", b"", deadline_s=5)
    (directory / "impostor").mkdir()
    impostor = with_tls(directory / "impostor", authorities)
    impostor = replace(impostor, control=None, tls=TlsSection(directory=authorities.member("elsewhere")))
    sets = loaded(impostor)
    async with serve(FakeService(), impostor, sets) as listeners:
        elsewhere = Served(FakeService(), impostor, sets, listeners)
        async with client_of(elsewhere, authorities.member("demo-2")) as peers:
            with pytest.raises(PeerSilent, match="certificate is refused"):
                await peers.call("demo-1", "echo", b"", deadline_s=5)


async def test_a_peer_that_is_not_believed_is_no_peer_that_is_dead(served: Served, authorities: Authorities) -> None:
    """A refused connection is at once a reason to suspect; a wrong certificate is not."""
    async with client_of(
        served, authorities.theirs / "members/demo-2", authority=authorities.member("demo-1")
    ) as peers:
        with pytest.raises(PeerSilent):
            await peers.call("demo-1", "echo", b"", deadline_s=5)
    async with client_of(served, authorities.member("elsewhere")) as peers:
        with pytest.raises(PeerRejected):
            await peers.call("demo-1", "echo", b"", deadline_s=5)


async def test_while_tls_is_turned_on_members_with_and_without_it_understand_each_other(
    directory: Path, authorities: Authorities, configuration: Configuration
) -> None:
    token = configuration.secrets.peer_token
    async with serve(FakeService(), configuration):
        members = tuple(replace(member, peer_port=1) for member in configuration.members)
        context = authorities.client(authorities.member("demo-2"))
        async with PeerClient(members, token, tls=PeerTls(lambda: context, required=False)) as new:
            assert await new.call("demo-1", "echo", b"old", deadline_s=5) == b"old"
        async with PeerClient(members, token, tls=PeerTls(lambda: context, required=True)) as strict:
            with pytest.raises(PeerRefused):
                await strict.call("demo-1", "echo", b"old", deadline_s=5)
    permissive = with_tls(directory, authorities, mode="permissive")
    async with (
        serve(FakeService(), permissive, loaded(permissive)),
        PeerClient(permissive.members, token) as old,
    ):
        assert await old.call("demo-1", "echo", b"new", deadline_s=5) == b"new"


def network(served: Served, authorities: Authorities, **changes: object) -> Network:
    assert served.configuration.control is not None
    host, port = served.configuration.control.address
    settings: dict[str, object] = {
        "host": host,
        "port": port,
        "authority": authorities.member("demo-1") / "ca.crt",
        "certificate": authorities.ours / "control/alice",
    }
    return Network(**(settings | changes))  # type: ignore[arg-type]


def ask(target: Network) -> ControlResult:
    *_, last = send_command(target, "echo", {"to": "demo-2"}, silence_s=5)
    assert isinstance(last, ControlResult)
    return last


async def test_commands_reach_an_instance_over_the_network(served: Served, authorities: Authorities) -> None:
    by_certificate = await asyncio.to_thread(ask, network(served, authorities))
    assert by_certificate.message == "{'to': 'demo-2'}"
    assert by_certificate.status == STATUS
    by_token = await asyncio.to_thread(ask, network(served, authorities, certificate=None, token=CONTROL_TOKEN))
    assert by_token.ok


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"certificate": "control/bob"}, CommandRefused, "not among control.allowed_names"),
        ({"certificate": None, "token": "0000000000000000"}, CommandRefused, "the token is another"),
        ({"server_name": "elsewhere.example"}, InstanceNotReachable, "certificate is refused"),
    ],
)
async def test_a_command_that_is_refused_says_why(
    served: Served, authorities: Authorities, changes: dict[str, object], error: type[Exception], text: str
) -> None:
    if isinstance(changes.get("certificate"), str):
        changes = changes | {"certificate": authorities.ours / str(changes["certificate"])}
    with pytest.raises(error, match=text):
        await asyncio.to_thread(ask, network(served, authorities, **changes))


async def test_a_token_that_was_replaced_counts_at_once(served: Served, authorities: Authorities) -> None:
    assert served.configuration.control is not None
    token_file = served.configuration.control.token_file
    assert token_file is not None
    token_file.write_text("abcdef0123456789-new")
    url, context = f"{served.control_url}/control/echo", authorities.client(None)
    assert (await post(url, context, token="abcdef0123456789-new"))[0] == 200
    assert (await post(url, context, token=CONTROL_TOKEN))[0] == 401
    status, text = await post(url, context, token="abcdef0123456789-new")
    assert (status, json.loads(text)["result"]["ok"]) == (200, True)
