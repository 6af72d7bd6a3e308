"""What is checked before every request: who may ask, how much, how long, and whether new requests are let in."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dllm.serving.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no other host's name can stand for."""

NEEDS_KEY = ("/v1/", "/metrics")
"""Where a key is asked for, if there is one; pages and `/health` hold nothing that is secret."""

SAME_SITE = ("same-origin", "none")
"""What a browser says in `Sec-Fetch-Site` of a request that no other site made."""

BODY_FOLLOWS = {"content-length", "transfer-encoding"}
"""Headers of a request that has a body."""

MOST_READ_OFF = 2**26
"""Most bytes that are read of a body that is refused."""

HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Limits:
    """body: most bytes of a body; body_seconds: in which it has to arrive."""

    body: int = 2**20
    body_seconds: float = 20.0


@dataclass
class Gate:
    """Whether requests are let in, and how many of them are at work."""

    closing: bool = False
    busy: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """Let a request in. Raises ApiError (503) while the server is shutting down."""
        if self.closing:
            raise ApiError(503, "the server is shutting down; ask again when it is back", retry_after=5)
        self.busy += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request is done."""
        self.busy -= 1
        if not self.busy:
            self._idle.set()

    async def emptied(self, timeout: float) -> None:
        """Wait until no request is at work, for `timeout` seconds at most."""
        if self.busy:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                pass


@dataclass(frozen=True)
class Guard:
    """An ASGI application in front of another one, which gets whole bodies only.

    key: what `Authorization: Bearer` has to say, or None; hosts: the names a request may call this server by, or None
    for any; observe: told the scope, the status and the seconds of every answer (status 0: the client went away first).
    """

    app: ASGIApp
    gate: Gate
    limits: Limits
    key: bytes | None
    hosts: frozenset[str] | None
    observe: Callable[[Scope, int, float], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = uuid4().hex
            await send(message)

        try:
            await self._guarded(scope, receive, send_with_headers)
        finally:
            self.observe(scope, status, time.perf_counter() - begin)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            asks = scope["method"] not in ("GET", "HEAD")
            if asks:
                _check_origin(headers)
            if self.key and scope["path"].startswith(NEEDS_KEY):
                self._check_key(headers)
            if not asks:
                return await self.app(scope, receive, send)
            self._check_body(headers, scope["method"])
            self.gate.enter()
        except ApiError as error:
            if BODY_FOLLOWS.intersection(headers) and "expect" not in headers:  # which waits to be asked for its body
                await self._read_off(receive)
            return await error.response(close=True)(scope, receive, send)
        try:
            body = await self._body(receive)
        except ApiError as error:
            self.gate.leave()
            return await error.response(close=True)(scope, receive, send)
        try:
            if body is not None:
                await self.app(scope, _replayed(body, receive), send)
        finally:
            self.gate.leave()

    def _check_host(self, headers: Headers) -> None:
        name = urlsplit(f"//{headers.get('host', '')}").hostname if _is_host(headers.get("host", "")) else None
        if self.hosts is not None and name not in self.hosts:
            raise ApiError(421, "this server does not go by the name in the header Host; call it by its address")

    def _check_key(self, headers: Headers) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        known, said = (hashlib.sha256(key).digest() for key in (self.key or b"", given.strip().encode()))
        if not hmac.compare_digest(known, said) or kind.lower() != "bearer":
            raise ApiError(401, "no valid API key; send the header Authorization: Bearer KEY")

    def _check_body(self, headers: Headers, method: str) -> None:
        """What the head of a request says of its body."""
        stated = headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > self.limits.body:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":  # no path takes another method with a body
            raise ApiError(415, f"the content type is {kind or 'not stated'}; send application/json")
        if (coding := headers.get("content-encoding", "identity")).lower() != "identity":
            raise ApiError(415, f"the content encoding is {coding[:80]}; send the body as it is")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limits.body} bytes; send less")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, or None if the client went away. Raises ApiError: too large, too slow."""
        body, ended = bytearray(), False
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while not ended and len(body) <= self.limits.body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    ended = not message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.limits.body_seconds:g} s; send it again"
            ) from None
        if len(body) <= self.limits.body:
            return bytes(body)
        if not ended:
            await self._read_off(receive)
        raise self._too_large()

    async def _read_off(self, receive: Receive) -> None:
        """Read what is left of a body that is refused, and forget it.

        Many clients read no answer before they have sent all, and find a connection that is closed on them reset.
        """
        left = MOST_READ_OFF
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            pass


def _is_host(name: str) -> bool:
    """Whether a header Host can be read as one."""
    try:
        return bool(urlsplit(f"//{name}").hostname) and urlsplit(f"//{name}").port is not False
    except ValueError:
        return False


def _check_origin(headers: Headers) -> None:
    """Raise ApiError (403) for a request that a browser makes for a page of another site."""
    origin, fetched = headers.get("origin"), headers.get("sec-fetch-site")
    own = origin is None or (_is_host(headers.get("host", "")) and origin.partition("://")[2] == headers["host"])
    if not own or (fetched is not None and fetched not in SAME_SITE):
        raise ApiError(403, "a page of another site may not ask this server", code="cross_origin")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, and then whatever else comes: that the client goes away."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
