"""The OpenAPI document, made from the tables by which requests are answered and the types that are sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from instance_manager import __version__
from instance_manager.http.answers import ErrorBody, json_response
from instance_manager.http.routes import Parameter, Reply, Route

PATH = "/openapi.json"
_EVERYWHERE: Mapping[int, Reply] = {
    400: Reply("not HTTP, or a parameter that cannot be read", ErrorBody),
    429: Reply("too many requests from this address: wait a second", ErrorBody),
}


def document(title: str, routes: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1. Each method of each route is an operation of its own."""
    routes = tuple(routes)
    types: list[Any] = []
    for route in routes:
        for reply in (*route.replies.values(), *_EVERYWHERE.values()):
            if reply.body is not None and reply.body not in types:
                types.append(reply.body)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = list(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for route in routes:
        paths[route.path] = {method.lower(): _operation(route, method, schema_of) for method in route.methods}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": dict(components)},
    }
    if any(route.needs is not None for route in routes):
        made["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return made


def route(title: str, routes: Iterable[Route]) -> Route:
    """The document's own route; it is made at the first request."""
    described = tuple(routes)
    made: list[dict[str, Any]] = []

    async def handle(request: web.Request) -> web.Response:
        if not made:
            made.append(document(title, (*described, own)))
        return json_response(200, None if request.method == "OPTIONS" else made[0])

    own = Route(
        path=PATH,
        handler=handle,
        summary="This document.",
        replies={200: Reply("OpenAPI 3.1", dict[str, Any])},
    )
    return own


def _operation(route: Route, method: str, schema_of: list[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{method.lower()}{route.path.translate(_NAMES)}",
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": _PATH_WORD} for name in _in_path(route.path)),
            *(_parameter(parameter) for parameter in route.parameters),
        ],
        "responses": {
            str(code): _response(reply, method, schema_of)
            for code, reply in sorted({**_EVERYWHERE, **route.replies}.items())
        },
    }
    if method == "POST":
        operation["requestBody"] = {"content": {"application/json": {"schema": {}}}}
    if route.needs is not None:
        operation["description"] = f"Needs {route.needs}."
        operation["security"] = [{"bearer": []}]
    return operation


_NAMES = str.maketrans({"/": "_", "-": "_", "{": None, "}": None, ".": "_"})
_PATH_WORD = {"type": "string", "pattern": "^[a-z][a-z_-]*$"}


def _in_path(path: str) -> tuple[str, ...]:
    return tuple(part[1:-1] for part in path.split("/") if part.startswith("{"))


def _parameter(parameter: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if parameter.pattern is not None:
        schema["pattern"] = parameter.pattern
    if parameter.choices:
        schema["enum"] = list(parameter.choices)
    made: dict[str, Any] = {
        "name": parameter.name,
        "in": "query",
        "description": parameter.description,
        "schema": schema,
    }
    if parameter.example is not None:
        made["example"] = parameter.example
    return made


def _response(reply: Reply, method: str, schema_of: list[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    made: dict[str, Any] = {"description": reply.description}
    if reply.body is not None and method not in ("HEAD", "OPTIONS"):
        schema = next(schema for body, schema in schema_of if body is reply.body or body == reply.body)
        made["content"] = {
            content_type: {"schema": schema if content_type == "application/json" else {"type": "string"}}
            for content_type in reply.content_types
        }
    return made
