"""The description of the API: an OpenAPI document, and a page made of it that asks no other host for anything."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from dllm import __version__
from dllm.serving.schemas import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    EditRequest,
    Failure,
    InfillRequest,
    ModelCard,
    Models,
    ScoreRequest,
    Scores,
    TextChunk,
    TextCompletion,
)

REFERENCE = "#/components/schemas/"


@dataclass(frozen=True)
class Endpoint:
    """A path: what it does, what it takes and gives (None: no JSON of ours), a body to try it with."""

    method: str
    path: str
    summary: str
    takes: type[BaseModel] | None = None
    gives: type[BaseModel] | None = None
    streams: type[BaseModel] | None = None
    example: Any = None


HELLO = {"model": "MODEL", "messages": [{"role": "user", "content": "Hello!"}]}

ENDPOINTS = (
    Endpoint(
        "post",
        "/v1/chat/completions",
        "Answer a conversation. A stream sends text as soon as everything left of it is revealed.",
        ChatRequest,
        ChatCompletion,
        ChatChunk,
        HELLO | {"max_tokens": 64, "stream": True, "canvas": True},
    ),
    Endpoint(
        "post",
        "/v1/completions",
        "Continue texts.",
        CompletionRequest,
        TextCompletion,
        TextChunk,
        {"model": "MODEL", "prompt": "The capital of France", "max_tokens": 16},
    ),
    Endpoint(
        "post",
        "/v1/infill",
        "Fill the holes of a text, wherever they are. The text comes as a whole, canvases while it is made.",
        InfillRequest,
        TextCompletion,
        TextChunk,
        {"model": "MODEL", "text": "Paris is the [MASK] of [MASK]."},
    ),
    Endpoint(
        "post",
        "/v1/edit",
        "Make a draft better; for models trained with edit_flows.",
        EditRequest,
        TextCompletion,
        TextChunk,
        {"model": "MODEL", "draft": "I a am toy toy."},
    ),
    Endpoint(
        "post",
        "/v1/score",
        "How likely continuations are: a bound in nats, its standard error, the passes it took.",
        ScoreRequest,
        Scores,
        None,
        {"model": "MODEL", "prompt": "The capital of France is", "continuations": [" Paris", " Rome"]},
    ),
    Endpoint("get", "/v1/models", "The models that are served.", gives=Models),
    Endpoint("get", "/v1/models/{id}", "One of them.", gives=ModelCard),
    Endpoint("get", "/health", "Answers while the process is alive."),
    Endpoint("get", "/ready", "Answers 200 while new requests are let in, else 503."),
    Endpoint("get", "/metrics", "Counters for Prometheus."),
)


@cache
def openapi() -> str:
    """The OpenAPI document."""
    kinds = {Failure: None} | {
        kind: None for one in ENDPOINTS for kind in (one.takes, one.gives, one.streams) if kind is not None
    }
    named, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=REFERENCE + "{model}", title="dllm"
    )
    parts = {kind: named[kind, "validation"] for kind in kinds}
    paths: dict[str, dict[str, Any]] = {}
    for one in ENDPOINTS:
        paths.setdefault(one.path, {})[one.method] = _operation(one, parts)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "dllm serve",
            "version": __version__,
            "description": "Diffusion language models behind the API of OpenAI, with what only they can do beside it.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return json.dumps(document)


def _operation(one: Endpoint, parts: dict[Any, Any]) -> dict[str, Any]:
    """What a path does, in OpenAPI's words."""
    content = {"application/json": {"schema": parts[one.gives]}} if one.gives else {}
    if one.streams:
        content["text/event-stream"] = {"schema": parts[one.streams]}
    failure = {"application/json": {"schema": parts[Failure]}}
    responses: dict[str, Any] = {
        "200": {"description": "done"} | ({"content": content} if content else {}),
        "default": {"description": "an error", "content": failure},
    }
    operation: dict[str, Any] = {"summary": one.summary, "responses": responses}
    if one.takes:
        body = {"schema": parts[one.takes], "example": one.example}
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if "{id}" in one.path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if one.path.startswith(("/v1/", "/metrics")):
        operation["security"] = [{}, {"key": []}]
    return operation


@lru_cache(maxsize=8)
def _page(address: str) -> tuple[str, str]:
    """The page of the documentation with examples that ask `address`, and its content security policy."""
    document = json.loads(openapi())
    schemas = document["components"]["schemas"]
    sections = [
        {
            "name": f"{one.method.upper()} {one.path}",
            "anchor": one.path.strip("/").replace("/", "-"),
            "summary": _marked_up(one.summary),
            "example": json.dumps(one.example, indent=2) if one.example else "",
            "path": one.path,
            "tables": [
                {
                    "title": title,
                    "about": _marked_up(schemas[kind.__name__].get("description", "")),
                    "rows": _rows(kind, schemas),
                }
                for title, kind in (("Takes", one.takes), ("Gives", one.gives), ("Streams chunks", one.streams))
                if kind is not None
            ],
        }
        for one in ENDPOINTS
    ]
    files = resources.files("dllm.serving").joinpath("templates")
    style = files.joinpath("docs.css").read_text(encoding="utf-8")
    template = files.joinpath("docs.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.render(info=document["info"], sections=sections, style=style, address=address), policy


def _rows(kind: type[BaseModel], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, type, default and help of the fields of a schema."""
    schema = schemas[kind.__name__]
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "type": _type(field),
            "default": "required" if name in required else _default(field.get("default")),
            "text": _marked_up(field.get("description", "")),
        }
        for name, field in schema["properties"].items()
    ]


def _default(value: Any) -> str:
    """What a parameter is if it is left out; nothing where that is the model's own value, or none."""
    return "" if value is None else json.dumps(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _marked_up(text: str) -> Markup:
    """A text whose words in backticks are code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(text.split("`"))
    )


def _type(field: dict[str, Any]) -> str:
    """A type in a few words, with its limits."""
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "$ref" in field:
        return field["$ref"].removeprefix(REFERENCE)
    if "enum" in field or "const" in field:
        return ", ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return "(" + ", ".join(_type(part) for part in field["prefixItems"]) + ")"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {_number(field[name])}" for name, word in signs.items() if name in field]
    return " ".join([field.get("type", "anything"), *limits])


def documentation(address: str) -> Response:
    """The page at `/docs` of the server that was asked as `address`."""
    page, policy = _page(address)
    return Response(page, headers={"content-security-policy": policy}, media_type="text/html")
