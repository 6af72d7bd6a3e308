"""Servers on a loopback port, and the plainest of clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from dllm.chat.settings import chat_context, chat_generation
from dllm.serving.app import Server, make_server
from dllm.serving.connection import Connection
from dllm.serving.engine import Engine
from dllm.serving.models import Served
from dllm.serving.run import address, bound

TURNS = [{"role": "user", "content": "Hello!"}]


def served(model, *, id: str = "toy", engine=None) -> Served:
    """A model with an engine, as `dllm serve` has it."""
    context = chat_context(model.backbone.sidecar, model.max_length)
    defaults = chat_generation(model.backbone.sidecar, context).model_copy(update={"max_new_tokens": 16})
    return Served(id, model, engine or Engine(model, name=id), defaults, context)


@dataclass
class Running:
    url: str
    server: Server

    @property
    def engine(self):
        return self.server.served[0].engine


@contextmanager
def running(models: Sequence[Served], **options) -> Iterator[Running]:
    """A server in a thread. No signal ends it: this context does."""
    server, made = make_server(models, **options), bound("127.0.0.1", 0)
    web = uvicorn.Server(
        uvicorn.Config(server.app, http=Connection, ws="none", lifespan="off", log_level="error", access_log=False)
    )
    started = threading.Event()

    async def serve() -> None:
        serving = asyncio.create_task(web.serve(sockets=[made]))
        while not (web.started or serving.done()):
            await asyncio.sleep(0.005)
        started.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60)
    try:
        yield Running(address(made, "127.0.0.1"), server)
    finally:
        for one in models:
            one.engine.close(finish=False, timeout=10)
        web.should_exit = web.force_exit = True
        thread.join(20)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self):
        return json.loads(self.text)

    @property
    def error(self) -> dict:
        return self.json["error"]


def ask(url: str, path: str, body=None, *, method: str | None = None, headers: dict | None = None) -> Answer:
    """One request; a body that is neither text nor bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    given = {"content-type": "application/json"} if body is not None else {}
    if body is not None and not isinstance(body, str | bytes):
        body = json.dumps(body)
    method = method or ("GET" if body is None else "POST")
    try:
        connection.request(method, path, body, given | (headers or {}))
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read().decode())
    finally:
        connection.close()


def chunks(text: str) -> list[tuple[str, dict]]:
    """Events of a stream: their name and data; the last one, `[DONE]`, as an empty one."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            found.append((lines.get("event", ""), {} if data == "[DONE]" else json.loads(data)))
    return found


OWN = {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Variables of a server's process."""


@contextmanager
def process(*words: str, cwd=None, python=sys.executable, **more: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`dllm serve` as a process, and its address; killed at the end if it is still there. more: variables."""
    command = [python, "-m", "dllm", "serve", *words]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    made = subprocess.Popen(command, env=os.environ | OWN | more, **options)
    try:
        line = made.stdout.readline()
        assert "http://" in line, made.communicate()
        yield made, line.split(": ")[-1].strip()
    finally:
        made.kill()
        made.communicate()
