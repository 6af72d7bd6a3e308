"""From the engine's thread to the loop of the server: what becomes of one request's answers, one after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from starlette.types import Receive

from dllm.serving.engine import Handle, OnEvent
from dllm.serving.errors import ApiError, mistake
from dllm.serving.events import Closed, Event, Finished, Full, Scored, TooLong

Submit = Callable[[OnEvent], Handle]
"""Asks an engine for something."""

QUIET_SECONDS = 10.0
"""After which a stream says that it is still there."""


class Gone(Exception):
    """The client has gone; nobody waits for an answer."""


class Asking:
    """The events of one request: its answers, and whether its client is still there.

    Used as a context: whatever ends it, the rows of what has not ended are freed.
    """

    def __init__(self, receive: Receive):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._watch = self._loop.create_task(self._watched(receive))

    async def __aenter__(self) -> Asking:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        for handle in self._handles:
            handle.cancel()

    async def submit(self, asked: Sequence[Submit], each: int = 1) -> None:
        """Ask for all of it; each: answers per item, numbered in order. Raises ApiError."""
        for number, submit in enumerate(asked):
            heard = partial(self._heard, number * each)
            self._handles.append(await _in_thread(submit, heard))

    async def events(self, answers: int) -> AsyncIterator[tuple[int, Event] | None]:
        """What happens, until so many answers have ended; None after a while in which nothing does.

        Raises ApiError for an answer that failed, and Gone when the client has left.
        """
        left = answers
        while left:
            try:
                number, event = await asyncio.wait_for(self._events.get(), QUIET_SECONDS)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise failure(event)
            left -= isinstance(event, Finished | Scored)
            yield number, event

    def _heard(self, first: int, number: int, event: Event) -> None:
        """Called in the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (first + number, event))
        except RuntimeError:
            pass  # the loop has ended, and with it whoever waited

    async def _watched(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((0, Gone()))


async def _in_thread(submit: Submit, heard: OnEvent) -> Handle:
    """Ask in a thread, as texts are tokenized there; what was asked for nobody any more is given up."""
    asked = asyncio.create_task(asyncio.to_thread(submit, heard))
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(_given_up)
        raise
    except Exception as error:
        raise failure(error) from error


def _given_up(asked: asyncio.Task[Handle]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().cancel()


def failure(error: Exception) -> Exception:
    """What is said of an error of the engine: an ApiError where it was foreseen."""
    if isinstance(error, Full):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, Closed):
        return ApiError(503, "the server is shutting down; ask again when it is back", retry_after=5)
    if isinstance(error, TooLong):
        return ApiError(504, f"{error}; ask for fewer tokens or steps".replace("\n", " "))
    if isinstance(error, ValueError):
        return mistake(error)
    return error
