"""A connection that does not wait for ever: for the head of a request, or for a client that no longer reads."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dllm.serving.errors import ApiError

HEAD_SECONDS = 20.0
"""In which the head of a request has to arrive."""

READ_SECONDS = 30.0
"""For which a client may leave what was sent to it unread, once the buffers are full."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, which ends when its client stalls, and whose own errors are in OpenAI's shape."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        """A response was sent; the next request may have begun already."""
        super().on_response_complete()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The buffers are full."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and close."""
        body = ApiError(400, f"{msg} Send HTTP/1.1.", code="invalid_http").response(close=True)
        for event in (
            h11.Response(status_code=400, headers=body.raw_headers, reason=b"Bad Request"),
            h11.Data(data=bytes(body.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head(self) -> None:
        """Start or stop the clock of a request's head."""
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        elif not waits and self._head is not None:
            self._head.cancel()
            self._head = None
