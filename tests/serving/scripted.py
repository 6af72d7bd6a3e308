"""A server that speaks the API of `dllm serve` and says what a script tells it: for faults, and for pictures.

No model is behind it: an answer is a text that is known, revealed in an order that follows from a seed.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dllm.serving.page import page_routes

MASK, END = "[MASK]", "[SEP]"
DEFAULTS = {"max_tokens": 64, "steps": None, "block_size": 32, "reveal_rule": "confidence", "temperature": 0.0}
ENDS = 3
"""Tokens behind the end of an answer."""


@dataclass
class Script:
    """What the server does; a test changes it while the server runs, and reads what it was asked."""

    answer: Callable[[str], str] = lambda question: f"You said: {question}"
    fill: str = " filled"
    models: tuple[str, ...] = ("toy",)
    pass_seconds: float = 0.0
    per_pass: int = 2
    refuse: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    """(status, headers, message) of the next requests."""
    cut_after: int | None = None
    """Passes after which the connection breaks."""
    hold_after: int | None = None
    """Passes after which nothing comes any more."""
    most_messages: int = 1000
    """What fits the model."""
    key: str = ""
    bodies: list[dict] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client went away before its answer was complete."""


def error(status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers)


def application(script: Script) -> Starlette:
    """The page and the routes that it asks."""

    def refused(request: Request) -> Response | None:
        if script.key and request.headers.get("authorization") != f"Bearer {script.key}":
            return error(401, "this server wants an API key")
        if request.method == "POST" and script.refuse:
            status, headers, message = script.refuse.pop(0)
            return error(status, message, headers)
        return None

    async def models(request: Request) -> Response:
        facts = {"mask_token": MASK, "end_token": END, "defaults": DEFAULTS}
        data = [{"id": name, "object": "model", "dllm": facts} for name in script.models]
        return refused(request) or JSONResponse({"object": "list", "data": data})

    async def chat(request: Request) -> Response:
        body = await request.json()
        if no := refused(request):
            return no
        if len(body["messages"]) > script.most_messages:
            return error(400, "the conversation is too long", code="context_length_exceeded")
        script.bodies.append(body)
        text = script.answer(body["messages"][-1]["content"])
        pieces = re.findall(r"\s*\S+", text) + [END] * ENDS
        seen = [None] * len(pieces)
        return StreamingResponse(stream(script, body, pieces, seen, text), media_type="text/event-stream")

    async def infill(request: Request) -> Response:
        body = await request.json()
        if no := refused(request):
            return no
        script.bodies.append(body)
        pieces = re.findall(r"\s*(?:\[MASK\]|[^\s\[]+)", body["text"])
        seen = [None if piece.strip() == MASK else piece for piece in pieces]
        pieces = [piece.replace(MASK, script.fill) for piece in pieces]
        return StreamingResponse(stream(script, body, pieces, seen, "".join(pieces)), media_type="text/event-stream")

    routes = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/infill", infill, methods=["POST"]),
        *page_routes(),
    ]
    return Starlette(routes=routes)


async def stream(
    script: Script, body: dict, pieces: list[str], seen: list[str | None], text: str
) -> AsyncIterator[str]:
    """The events of one answer: each pass reveals some masks of `seen`."""
    rng = random.Random(f"{text} {body.get('seed', 0)} {body.get('temperature')}")
    masked = [at for at, piece in enumerate(seen) if piece is None]
    masked.sort(key=lambda at: at + rng.uniform(-6, 6))
    confidence = [0.0 if piece is None else 1.0 for piece in seen]
    per_pass = -(-len(masked) // body["steps"]) if body.get("steps") else script.per_pass
    seen, passes = [*seen], 0

    def event(name: str = "", **content: object) -> str:
        chunk = {"id": "x", "object": "chat.completion.chunk", "choices": [], **content}
        return (f"event: {name}\n" if name else "") + f"data: {json.dumps(chunk)}\n\n"

    try:
        for first in range(0, len(masked), per_pass):
            await asyncio.sleep(script.pass_seconds)
            if passes == script.cut_after:
                await asyncio.sleep(0.05)  # a browser drops what comes together with the end
                raise ConnectionResetError("as the script says")
            if passes == script.hold_after:
                await asyncio.sleep(60)
            revealed, passes = masked[first : first + per_pass], passes + 1
            for at in revealed:
                seen[at], confidence[at] = pieces[at], round(min(0.99, rng.betavariate(4, 1.2)), 3)
            canvas = {"index": 0, "step": passes, "pieces": seen, "confidence": confidence, "revealed": revealed}
            yield event("canvas", canvas=canvas)
        yield event(choices=[{"index": 0, "delta": {"content": text}, "text": text, "finish_reason": None}])
        last = {"passes": passes, "seconds": 0.1 * passes, "seed": body.get("seed", 0)}
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], dllm=last)
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        script.gone.set()
        raise


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address of a server of `app` in a thread of this process."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(10)
