"""A server as a process: it listens, serves, and on SIGTERM finishes what it has begun."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing

import uvicorn

from dllm.serving.app import Server
from dllm.serving.connection import Connection

SENDING_SECONDS = 10.0
"""In which the last answers have to reach their clients."""

BACKLOG = 1024
"""Most connections that wait to be accepted."""


def bound(host: str, port: int) -> socket.socket:
    """A socket bound there, which listens as soon as it is served. Raises ValueError, one line, if it cannot."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: a port is a number from 0 (any free one) to {2**16 - 1}")
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _taken(host, port, error) from None
    return made


def _taken(host: str, port: int, error: Exception) -> ValueError:
    """What is said of a place that cannot be had."""
    reason = getattr(error, "strerror", None) or error
    return ValueError(f"--host {host} --port {port}: {reason}; take another port or host")


def address(made: socket.socket, host: str) -> str:
    """The URL of a bound socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{made.getsockname()[1]}"


def run_server(server: Server, made: socket.socket, *, grace: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends what still runs.

    grace: most seconds for what was begun; ready: called when requests are answered. Raises ValueError, one line, if
    another server began to listen at the same place since the socket was bound.
    """
    try:
        made.listen(BACKLOG)
    except OSError as error:
        host, port, *_ = made.getsockname()
        raise _taken(host, port, error) from None
    for name in ("asyncio", "uvicorn.error"):  # which warn of every client that goes away or sends no HTTP
        logging.getLogger(name).setLevel(logging.ERROR)
    config = uvicorn.Config(
        server.app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=5,
    )
    with closing(made):
        asyncio.run(_serve(server, uvicorn.Server(config), made, grace, ready))


async def _serve(
    server: Server, web: uvicorn.Server, made: socket.socket, grace: float, ready: Callable[[], None]
) -> None:
    loop, stops = asyncio.get_running_loop(), asyncio.Event()
    serving = loop.create_task(web.serve(sockets=[made]))
    while not web.started and not serving.done():
        await asyncio.sleep(0.01)  # uvicorn has no event for this
    # in place of uvicorn's own handlers, which would stop listening at once
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _asked_to_stop, server, web, stops)
    ready()
    stopping = loop.create_task(_stop(server, web, stops, grace))
    await serving
    stopping.cancel()


def _asked_to_stop(server: Server, web: uvicorn.Server, stops: asyncio.Event) -> None:
    if stops.is_set():
        print("dllm serve: stopping at once", file=sys.stderr, flush=True)
        web.should_exit = web.force_exit = True
        return
    server.gate.closing = True
    stops.set()
    if server.gate.busy:
        print(f"dllm serve: finishing {server.gate.busy} requests; again to stop at once", file=sys.stderr, flush=True)


async def _stop(server: Server, web: uvicorn.Server, stops: asyncio.Event, grace: float) -> None:
    """Refuse what is new, finish what was begun, leave."""
    await stops.wait()
    await server.gate.emptied(grace)
    closes = (asyncio.to_thread(one.engine.close, finish=True, timeout=SENDING_SECONDS) for one in server.served)
    await asyncio.gather(*closes)
    await server.gate.emptied(SENDING_SECONDS)
    web.should_exit = True
