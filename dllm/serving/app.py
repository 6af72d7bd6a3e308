"""The server as an ASGI application: its routes, and what each does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from dllm.models.tokenizers import encode_texts
from dllm.serving.answers import INTERNAL, Wanted, streamed, wanted, whole
from dllm.serving.asking import Asking, Gone
from dllm.serving.documentation import documentation, openapi
from dllm.serving.errors import CODES, ApiError, mistake, refusal
from dllm.serving.events import Scored
from dllm.serving.guard import Gate, Guard, Limits
from dllm.serving.metrics import Metrics
from dllm.serving.models import Served
from dllm.serving.page import page_routes
from dllm.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    EditRequest,
    InfillRequest,
    Models,
    Sampling,
    ScoreOf,
    ScoreRequest,
    Scores,
    Usage,
)

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Server:
    """The application, the gate that closes when it has to stop, and the models."""

    app: Guard
    gate: Gate
    served: Sequence[Served]


def make_server(
    served: Sequence[Served],
    *,
    limits: Limits | None = None,
    key: bytes | None = None,
    hosts: frozenset[str] | None = None,
) -> Server:
    """A server of some models. key, hosts: see `Guard`."""
    api = Api(served)
    routes = [
        *page_routes(),
        Route("/docs", api.docs),
        Route("/health", api.health),
        Route("/metrics", api.numbers),
        Route("/openapi.json", api.openapi),
        Route("/ready", api.ready),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/edit", api.edit, methods=["POST"]),
        Route("/v1/infill", api.infill, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{id:path}", api.one_model),
        Route("/v1/score", api.score, methods=["POST"]),
    ]
    paths = {route.path.replace(":path", "") for route in routes}

    def observe(scope: Scope, status: int, seconds: float) -> None:
        known = "/v1/models/{id}" if scope["path"].startswith("/v1/models/") else scope["path"]
        path = known if known in paths else "other"
        api.metrics.answered(path, status, seconds)

    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    guard = Guard(app, api.gate, limits or Limits(), key, hosts, observe)
    return Server(guard, api.gate, served)


class Api:
    """What each path does."""

    def __init__(self, served: Sequence[Served]):
        self.served = {one.id: one for one in served}
        self.metrics = Metrics({one.id: one.engine for one in served})
        self.gate = Gate()
        self.created = int(time.time())

    # ----------------------------------------------------------------------------------------------------------------
    # Texts

    async def chat(self, request: Request) -> Any:
        """`POST /v1/chat/completions`."""
        body = await _body(request, ChatRequest)
        one, settings = self._sampler(body)
        turns = [message.turn() for message in body.messages]

        def submit(on_event: Any) -> Any:
            one.check_context(turns, settings)
            return one.engine.answer(turns, settings, n=body.n, on_event=on_event, snapshots=body.stream)

        return await self._answer(request, body, wanted("chat", one.id, [submit], settings.seed, each=body.n))

    async def completions(self, request: Request) -> Any:
        """`POST /v1/completions`."""
        body = await _body(request, CompletionRequest)
        one, settings = self._sampler(body)
        asked = [
            partial(_keywords, one.engine.answer, prompt, settings, n=body.n, snapshots=body.stream)
            for prompt in body.prompts()
        ]
        return await self._answer(request, body, wanted("text", one.id, asked, settings.seed, each=body.n))

    async def infill(self, request: Request) -> Any:
        """`POST /v1/infill`."""
        body = await _body(request, InfillRequest)
        one, settings = self._sampler(body)
        asked = [partial(_keywords, one.engine.infill, body.text, settings, snapshots=body.stream)]
        return await self._answer(request, body, wanted("infill", one.id, asked, settings.seed))

    async def edit(self, request: Request) -> Any:
        """`POST /v1/edit`."""
        body = await _body(request, EditRequest)
        one, settings = self._sampler(body)
        asked = [partial(_keywords, one.engine.edit, body.draft, body.given(), settings, snapshots=body.stream)]
        return await self._answer(request, body, wanted("edit", one.id, asked, settings.seed))

    async def score(self, request: Request) -> Any:
        """`POST /v1/score`."""
        body = await _body(request, ScoreRequest)
        one, given, texts = self._model(body.model), body.given(), body.continuations
        settings = body.settings()
        tokens: list[int] = []

        def submit(on_event: Any) -> Any:
            with one.engine.encoding:
                tokens.extend(map(len, encode_texts(one.model.backbone.tokenizer, texts)))
            return one.engine.score([given or []] * len(texts), texts, settings, on_event=on_event)

        async with Asking(request.receive) as asking:
            await asking.submit([submit])
            try:
                scored = [item[1] async for item in asking.events(1) if item and isinstance(item[1], Scored)][0]
            except Gone:
                return _no_answer
        data = [
            ScoreOf(index=number, nats=s.nats, standard_error=s.standard_error, passes=s.passes, tokens=count)
            for number, (s, count) in enumerate(zip(scored.scores, tokens, strict=True))
        ]
        given_tokens, made = scored.prompt_tokens, scored.tokens
        usage = Usage(prompt_tokens=given_tokens, completion_tokens=made, total_tokens=given_tokens + made)
        return _json(Scores(object="list", model=one.id, data=data, usage=usage))

    async def _answer(self, request: Request, body: Sampling, want: Wanted) -> Any:
        if body.stream:
            want = want.streaming(body.canvas, body.stream_options.include_usage)
            return await streamed(want, request.receive, self.metrics)
        return await whole(want, request.receive, self.metrics) or _no_answer

    def _sampler(self, body: Sampling) -> tuple[Served, Any]:
        one = self._model(body.model)
        try:
            return one, one.settings(body.changes())
        except ValueError as error:
            raise mistake(error) from None

    def _model(self, name: str) -> Served:
        if name not in self.served:
            raise ApiError(
                404,
                f"no model {name[:80]!r} here; there is {', '.join(self.served)}",
                param="model",
                code="model_not_found",
            )
        return self.served[name]

    # ----------------------------------------------------------------------------------------------------------------
    # About the server

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return _json(Models(object="list", data=[one.card(self.created) for one in self.served.values()]))

    async def one_model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        return _json(self._model(request.path_params["id"]).card(self.created))

    async def health(self, request: Request) -> Response:
        """`GET /health`: the process is alive."""
        return Response('{"status":"ok"}', media_type="application/json")

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: new requests are let in."""
        if self.gate.closing:
            raise ApiError(503, "the server is shutting down")
        return Response('{"status":"ready"}', media_type="application/json")

    async def numbers(self, request: Request) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return Response(openapi(), media_type="application/json")

    async def docs(self, request: Request) -> Response:
        """`GET /docs`."""
        return documentation(str(request.base_url).rstrip("/"))


def _keywords(method: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """A method of an engine; the last of what is given is who hears of its events."""
    *given_before, on_event = given
    return method(*given_before, on_event=on_event, **options)


async def _body(request: Request, kind: type[Body]) -> Body:
    """The body of a request. Raises ApiError (400)."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise refusal(error) from None


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


async def _no_answer(scope: Scope, receive: Any, send: Any) -> None:
    """Send nothing: the client has gone."""


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    words = {
        404: f"there is no {request.url.path[:200]!r} here; see /docs",
        405: f"{request.method} is not for this path",
    }
    code = CODES.get(error.status_code)
    answer = ApiError(error.status_code, words.get(error.status_code, error.detail), code=code or "invalid_request")
    answer.headers |= dict(error.headers or {})
    return answer.response()


async def _bug(request: Request, error: Exception) -> Response:
    """The answer to a bug of ours; Starlette raises the error again, and uvicorn writes it to standard error."""
    return ApiError(500, INTERNAL).response(close=True)
