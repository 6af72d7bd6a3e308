"""Texts of a model as answers of HTTP: whole, or as a stream of chunks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dllm.serving.asking import Asking, Gone, Submit
from dllm.serving.errors import ApiError
from dllm.serving.events import Edited, Finished, Snapshot
from dllm.serving.metrics import Metrics
from dllm.serving.schemas import (
    CanvasState,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Cost,
    Delta,
    Reply,
    TextChoice,
    TextChunk,
    TextCompletion,
    Usage,
)

Kind = Literal["chat", "text", "infill", "edit"]

KINDS = {
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "text": ("cmpl", "text_completion", "text_completion"),
    "infill": ("infill", "infill", "infill.chunk"),
    "edit": ("edit", "edit", "edit.chunk"),
}
"""What is made -> the beginning of its id, the name of its object, that of a chunk of it."""

INTERNAL = "something went wrong in the server, not in the request; its log says what"


@dataclass(frozen=True)
class Wanted:
    """What a request asks for: `asked` of an engine, `each` answers of every item, the first with the seed `seed`."""

    kind: Kind
    model: str
    asked: Sequence[Submit]
    each: int
    seed: int
    canvas: bool = False
    include_usage: bool = False
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """How many texts."""
        return len(self.asked) * self.each

    def streaming(self, canvas: bool, include_usage: bool) -> Wanted:
        """The same as a stream."""
        return replace(self, canvas=canvas, include_usage=include_usage)


def wanted(kind: Kind, model: str, asked: Sequence[Submit], seed: int, **more: Any) -> Wanted:
    """What a request asks for, with an id and the time."""
    made = {"id": f"{KINDS[kind][0]}-{uuid4().hex}", "created": int(time.time()), "model": model}
    return Wanted(kind, model, asked, more.pop("each", 1), seed, made=made, **more)


async def whole(want: Wanted, receive: Receive, metrics: Metrics) -> Response | None:
    """All texts at once; None if the client went away. Raises ApiError."""
    ended: dict[int, Finished] = {}
    async with Asking(receive) as asking:
        await asking.submit(want.asked, want.each)
        try:
            async for item in asking.events(want.answers):
                if item is not None and isinstance(item[1], Finished):
                    ended[item[0]] = item[1]
                    metrics.ended(want.model, item[1])
        except Gone:
            return None
    texts = [ended[number] for number in range(want.answers)]
    body: BaseModel
    cost = Cost(passes=sum(t.passes for t in texts), seconds=round(max(t.seconds for t in texts), 6), seed=want.seed)
    common: dict[str, Any] = want.made | {"usage": usage(texts[:: want.each], texts), "dllm": cost}
    if want.kind == "chat":
        replies = [Reply(role="assistant", content=text.text) for text in texts]
        choices = [
            ChatChoice(index=number, message=reply, logprobs=None, finish_reason=text.reason)
            for number, (reply, text) in enumerate(zip(replies, texts, strict=True))
        ]
        body = ChatCompletion(object="chat.completion", choices=choices, **common)
    else:
        parts = [
            TextChoice(index=number, text=text.text, logprobs=None, finish_reason=text.reason)
            for number, text in enumerate(texts)
        ]
        name: Any = KINDS[want.kind][1]
        body = TextCompletion(object=name, choices=parts, **common)
    return Response(body.model_dump_json(), media_type="application/json")


def usage(prompts: Sequence[Finished], texts: Sequence[Finished]) -> Usage:
    """Tokens of prompts, each counted once, and of texts."""
    given, made = sum(text.prompt_tokens for text in prompts), sum(text.tokens for text in texts)
    return Usage(prompt_tokens=given, completion_tokens=made, total_tokens=given + made)


class Stream:
    """An answer in server-sent events. It is made after the request was taken: until then an error has a status."""

    def __init__(self, want: Wanted, asking: Asking, metrics: Metrics):
        self.want, self.asking, self.metrics = want, asking, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. The rows are freed if the client goes away."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        async with self.asking:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for data in self._events():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    await asyncio.sleep(0)  # many events may wait: others have their turns between them
            except Gone:
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        want, begin, said = self.want, time.perf_counter(), [""] * self.want.answers
        ended: dict[int, Finished] = {}
        if want.kind == "chat":
            for number in range(want.answers):
                yield self._chunk(number, "", role="assistant")
        try:
            async for item in self.asking.events(want.answers):
                if item is None:
                    yield b": still at work\n\n"
                    continue
                number, event = item
                if isinstance(event, Snapshot | Edited) and want.canvas:
                    yield self._canvas(number, event)
                new = self._new(event, said[number])
                if new:
                    if not any(said):
                        self.metrics.first_text(want.model, time.perf_counter() - begin)
                    said[number] += new
                    yield self._chunk(number, new)
                if isinstance(event, Finished):
                    ended[number] = event
                    self.metrics.ended(want.model, event)
                    yield self._last(number, event)
        except Gone:
            raise
        except Exception as error:
            yield _broken(error)
            return
        if want.include_usage:
            texts = [ended[number] for number in range(want.answers)]
            yield self._event(choices=[], usage=usage(texts[:: want.each], texts))
        yield b"data: [DONE]\n\n"

    def _new(self, event: object, said: str) -> str:
        """What an event adds to a text. What was said is never taken back."""
        if self.want.kind in ("infill", "edit") and not isinstance(event, Finished):
            return ""  # a draft changes anywhere
        text = event.text if isinstance(event, Snapshot | Finished) else said
        if not text.startswith(said):
            raise RuntimeError(f"a stream said {said[-20:]!r}, and the text is {text[: len(said) + 20]!r}")
        return text[len(said) :]

    def _chunk(self, number: int, text: str, *, role: Literal["assistant"] | None = None) -> bytes:
        if self.want.kind == "chat":
            delta = Delta(role=role, content=text) if role else Delta(content=text)
            return self._event(choices=[ChunkChoice(index=number, delta=delta, logprobs=None, finish_reason=None)])
        return self._event(choices=[TextChoice(index=number, text=text, logprobs=None, finish_reason=None)])

    def _last(self, number: int, event: Finished) -> bytes:
        seed = self.want.seed + number % self.want.each
        cost = Cost(passes=event.passes, seconds=round(event.seconds, 6), seed=seed)
        reason = event.reason
        if self.want.kind == "chat":
            choice = ChunkChoice(index=number, delta=Delta(), logprobs=None, finish_reason=reason)
            return self._event(choices=[choice], dllm=cost)
        return self._event(choices=[TextChoice(index=number, text="", logprobs=None, finish_reason=reason)], dllm=cost)

    def _canvas(self, number: int, event: Snapshot | Edited) -> bytes:
        if isinstance(event, Edited):
            state = CanvasState(index=number, step=event.step, edits=list(event.pieces))  # type: ignore[arg-type]
        else:
            state = CanvasState(
                index=number,
                step=event.step,
                pieces=list(event.pieces),
                confidence=[round(value, 4) for value in event.confidence],
                revealed=list(event.revealed),
            )
        return b"event: canvas\n" + self._event(choices=[], canvas=state)

    def _event(self, **parts: Any) -> bytes:
        name: Any = KINDS[self.want.kind][2]
        kind = ChatChunk if self.want.kind == "chat" else TextChunk
        return _data(kind(object=name, **self.want.made, **parts))


def _data(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def _broken(error: Exception) -> bytes:
    """The end of a stream whose answer failed: an error in OpenAI's shape."""
    if not isinstance(error, ApiError):
        logging.getLogger(__name__).error("a stream ended with an error", exc_info=error)
        error = ApiError(500, INTERNAL)
    return _data(error.body)


async def streamed(want: Wanted, receive: Receive, metrics: Metrics) -> Stream:
    """The stream of what is asked for, which has been taken. Raises ApiError if it is not."""
    asking = Asking(receive)
    try:
        await asking.submit(want.asked, want.each)
    except BaseException:
        await asking.__aexit__()
        raise
    return Stream(want, asking, metrics)
