"""`dllm ...` run by a warm process (`dllm.cli.warm`), if there is one: this process only waits, and saves seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence

VARIABLE = "DLLM_WARM"
"""Names of warm processes, separated by spaces; each takes jobs of the environment that it was started with."""

FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ask(arguments: Sequence[str]) -> int | None:
    """The exit status of `dllm ARGUMENTS`, run by a warm process; None where none takes it."""
    for name in os.environ.get(VARIABLE, "").split():
        with socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(f"\0{name}")
                if peer(server)[1] != os.getuid():
                    continue
                os.umask(umask := os.umask(0))
                asked = json.dumps([list(arguments), os.getcwd(), dict(os.environ), umask]).encode()
                socket.send_fds(server, [struct.pack("=q", len(asked))], [0, 1, 2])
                server.sendall(asked)
                answer = read(server, 4)
            except OSError:
                continue
            if answer:
                return _wait(server, *struct.unpack("=i", answer))
    return None


def _wait(server: socket.socket, worker: int) -> int:
    """Pass signals on to the worker until it has ended, and return its exit status, or die as it died."""

    def forward(number: int, _) -> None:
        os.kill(worker, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the worker too, which is in our group
    answer = read(server, 4)
    status = struct.unpack("=i", answer)[0] if answer else 70
    if not answer:
        print("dllm: error: the warm process of this run has gone; start the same command again", file=sys.stderr)
    if status < 0:
        sys.stdout.flush()
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def peer(other: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    return struct.unpack("=3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[:2]


def read(other: socket.socket, size: int) -> bytes:
    """So many bytes, or none if the other end closes before."""
    found = b""
    while len(found) < size:
        more = other.recv(size - len(found))
        if not more:
            return b""
        found += more
    return found
