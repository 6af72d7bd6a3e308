"""A process that has everything imported and answers `dllm ...` by a fork of itself: a graph of short jobs in minutes.

Every job is a process of its own with the arguments, directory, environment and files that it was started with. Only
the imports, seconds of each start, are shared. `sitecustomize` below makes any Python that is about to run `dllm` ask
the server in its place, so that rules and launcher stay as they are.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESS = "DLLM_FORK_SERVER_{}"
"""Variable with the socket of the server whose hub is offline (1) or not (0), which is decided at import."""

CLIENT = """
import os, sys

def _ask():
    words = sys.orig_argv
    if words[1:3] == ["-m", "dllm"]:
        arguments = words[3:]
    elif len(words) > 1 and words[1].endswith("/bin/dllm"):
        arguments = words[2:]
    else:
        return
    offline = os.environ.get("HF_HUB_OFFLINE", "0")
    address = os.environ.get("DLLM_FORK_SERVER_" + offline)
    if not address:
        return
    import json, socket
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        asked = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(asked)
        answer = server.recv(1)
    os._exit(answer[0] if answer else 70)

_ask()
"""


@contextmanager
def fork_servers(directory: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """`environment` with which every `dllm` is answered by one of two servers, one of which is offline."""
    (directory / "client").mkdir(parents=True)
    (directory / "client" / "sitecustomize.py").write_text(CLIENT)
    servers, added = [], {}
    path = os.pathsep.join([str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    try:
        for offline in ("0", "1"):
            added[ADDRESS.format(offline)] = str(directory / f"socket-{offline}")
            command = [sys.executable, "-m", "tests.fork_server", added[ADDRESS.format(offline)]]
            servers.append(subprocess.Popen(command, env=environment | {"HF_HUB_OFFLINE": offline, "PYTHONPATH": path}))
        deadline = time.monotonic() + 300
        while not all(Path(address).exists() for address in added.values()):
            assert time.monotonic() < deadline and all(server.poll() is None for server in servers), "no server"
            time.sleep(0.2)
        yield environment | added | {"PYTHONPATH": f"{directory / 'client'}{os.pathsep}{path}"}
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _serve(address: str) -> None:
    _imports()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.new")
        server.listen()
        os.rename(f"{address}.new", address)
        while True:
            client, _ = server.accept()
            if os.fork():
                client.close()
                continue
            server.close()
            _answer(client)


def _imports() -> None:
    """What jobs import, here once."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import lm_eval.tasks  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch
    import transformers.models.auto  # noqa: F401

    import dllm.chat.speed
    import dllm.cli.main
    import dllm.evaluation.adapter
    import dllm.evaluation.causal
    import dllm.report.page
    import dllm.training.trainer  # noqa: F401

    torch.set_num_threads(1)


def _answer(client: socket.socket) -> None:
    """Run one command line in this process, which is a fork, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(client, 8, 3)
    size, asked = int.from_bytes(head, "big"), b""
    while len(asked) < size:
        asked += client.recv(size - len(asked))
    arguments, directory, environment = json.loads(asked)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["dllm", *arguments]
    status = 70
    try:
        from dllm.cli.main import main

        status = main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(bytes([status & 255]))
        os._exit(status & 255)


if __name__ == "__main__":
    _serve(sys.argv[1])
