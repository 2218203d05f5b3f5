"""The document tells what is served, and what is served is what it tells: schemathesis asks every operation of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from aiohttp import web
from http_harness import STATUS, TOKEN, FakeService, make_configuration, primary_probes, standby_details, standby_probes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from instance_manager.http.limits import LimitedRunner, Limits
from instance_manager.http.server import control_application, public_application
from instance_manager.http.token import PeerToken

EXAMPLES = 6
"""For each operation and mode; HEAD and OPTIONS answer as GET does, and are asked less."""


class _Lasting(FakeService):
    """Its snapshots never grow old; every second one is a standby's."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def probes(self) -> Any:
        self._asked += 1
        if self._asked % 2:
            self.about = standby_details(tags={"zone": "a"})
            return standby_probes()
        self.about = FakeService().about
        return primary_probes()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Served by a thread of its own: schemathesis asks synchronously."""
    configuration = make_configuration(tmp_path_factory.mktemp("served"))
    found: Future[int] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        token = PeerToken(configuration.secrets.peer_token)
        limits = Limits(requests_per_s=100_000, burst=100_000)
        runner = LimitedRunner(public_application(_Lasting(), token, limits), limits, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.set_result(runner.addresses[0][1])
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    yield found.result(timeout=20)
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


def test_every_operation_answers_as_the_document_says(port: int) -> None:
    """Good and bad parameters, methods, headers and bodies; no 500, only documented codes, types and bodies."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    asked = set()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        headers = {"Authorization": f"Bearer {TOKEN}"} if operation.path.startswith("/peer/") else {}
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        if operation.method in ("head", "options"):
            modes = modes[:1]
        for mode in modes:
            _ask(operation, mode, headers, EXAMPLES if len(modes) > 1 else 1)
        asked.add((operation.path, operation.method))
    assert len(asked) > 80


def _ask(operation: Any, mode: GenerationMode, headers: dict[str, str], examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        # 503 and 504 are answers that the document tells, and no errors of the server.
        response = case.call_and_validate(headers=headers, excluded_checks=[not_a_server_error])
        assert response.status_code < 500 or response.status_code in (503, 504)

    # Of what takes no parameter there is nothing that could be wrong.
    with contextlib.suppress(Unsatisfiable):
        ask()


@pytest.mark.parametrize("kind", ["public", "control"])
async def test_every_route_that_is_served_is_in_the_document(tmp_path: Path, kind: str) -> None:
    if kind == "control":
        application = control_application(FakeService())
    else:
        token = PeerToken(make_configuration(tmp_path).secrets.peer_token)
        application = public_application(FakeService(), token)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        # Two slashes are answered as one, and are no route of their own.
        served = {
            (route.resource.canonical.replace("//", "/"), route.method.lower())
            for route in application.router.routes()
            if route.resource
        }
        told = await _document(application)
    finally:
        await runner.cleanup()
    assert served == {(path, method) for path, methods in told["paths"].items() for method in methods}


async def _document(application: web.Application) -> Any:
    from aiohttp.test_utils import make_mocked_request
    from msgspec import json

    request = make_mocked_request("GET", "/openapi.json")
    match = await application.router.resolve(request)
    response = await match.handler(request)
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    return json.decode(response.body)


async def test_the_document_is_made_of_the_types_that_are_sent(tmp_path: Path) -> None:
    told = await _document(
        public_application(FakeService(), PeerToken(make_configuration(tmp_path).secrets.peer_token))
    )
    assert set(told["components"]["schemas"]["ClusterStatus"]["properties"]) == set(STATUS.__dataclass_fields__)
    assert told["paths"]["/peer/{call}"]["post"]["security"] == [{"bearer": []}]
    assert "security" not in told["paths"]["/status"]["get"]
    assert [parameter["name"] for parameter in told["paths"]["/replica"]["get"]["parameters"]] == [
        "lag",
        "replication_state",
    ]
