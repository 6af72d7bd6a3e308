"""Programs written in Python that many tests start: each by a copy of an interpreter that has loaded its packages.

`warm_interpreter` writes commands that stand in for real ones, on PATH. They hand arguments, directory, environment and
files to a process of the real one's interpreter, which forks and becomes the program, and pass on what ends them; where
that process is gone, or a variable differs that packages read while they are loaded, a command starts the real program.
What a copy has loaded of its interpreter's packages its parent loads, too, for the next one; what comes from a checkout
is loaded anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

EARLY = ("HF_", "OMP_", "GOTO_", "OPENBLAS_", "MKL_", "NUMEXPR_", "VECLIB_", "TRANSFORMERS_", "TORCH", "CUDA", "TQDM_")
"""Beginnings of the variables that packages read while they are loaded."""

ASK = """#!{python} -IS
# {program}
import json, os, signal, socket, struct, sys
with socket.socket(socket.AF_UNIX) as server:
    try:
        server.connect({name!r})
        words = {words!r} + sys.argv[1:]
        if not words or words[0].startswith("-") and words[0] != "-m":
            raise OSError
        asked = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [struct.pack("=q", len(asked))], [0, 1, 2])
        server.sendall(asked)
        answer = server.recv(4, socket.MSG_WAITALL)
        if answer:
            copy = struct.unpack("=i", answer)[0]
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: os.kill(copy, number))
            answer = server.recv(4, socket.MSG_WAITALL)
    except OSError:
        answer = b""
if answer:
    status = struct.unpack("=i", answer)[0]
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
os.execv({program!r}, [{program!r}, *sys.argv[1:]])
"""


def interpreter_of(program: Path) -> Path:
    """The Python that a script names in its first line."""
    with open(program, encoding="utf-8") as file:
        return Path(file.readline().removeprefix("#!").strip())


@contextlib.contextmanager
def warm_interpreter(
    python: Path, programs: list[Path], home: Path, environment: dict[str, str], early=(), first=()
) -> Iterator[list[Path]]:
    """Write commands below `home` that do what these programs do, scripts of a Python or that itself.

    environment: in which packages are loaded; early: beginnings of the variables in which a command must agree with it;
    first: modules that most of the programs load, loaded when the first of them is asked for.
    Elsewhere than on Linux the programs themselves: a fork of a process with these packages is not safe there.
    """
    if sys.platform != "linux":
        yield programs
        return
    name = f"\0test-{secrets.token_hex(16)}"
    commands = [home / program.name for program in programs]
    itself = commands[programs.index(python)] if python in programs else python
    server = [python, "-I", __file__, name[1:], itself, json.dumps([early, first])]
    running = subprocess.Popen(server, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    running.stdout.read(1)
    for program, command in zip(programs, commands, strict=True):
        words = [] if program == python else [str(program)]
        command.write_text(ASK.format(python=python, program=str(program), name=name, words=words))
        command.chmod(0o755)
    try:
        yield commands
    finally:
        running.stdin.close()
        running.wait()


def serve(name: str, itself: str, early: tuple[str, ...], first: list[str]) -> None:
    """Answer until standard input ends; `itself` is the command that scripts take for their Python."""
    own = chosen(os.environ, early)
    sys.executable = itself
    workers: dict[int, tuple[int, socket.socket, int]] = {}
    asking: dict[socket.socket, int] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen(64)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        while True:
            ready = select.select([0, server, *workers, *asking], [], [])[0]
            if 0 in ready:
                return
            for client in [client for client in asking if client in ready]:  # it was killed
                os.kill(asking.pop(client), signal.SIGKILL)
            for handle in [handle for handle in workers if handle in ready]:
                worker, client, told = workers.pop(handle)
                asking.pop(client, None)
                os.close(handle)
                with contextlib.suppress(OSError):
                    client.sendall(struct.pack("=i", os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])))
                client.close()
                with os.fdopen(told) as file:
                    file.seek(0)
                    load(json.loads(file.read() or "[]"))
            if server in ready:
                client, _ = server.accept()
                head, files, _, _ = socket.recv_fds(client, 8, 3)
                job = json.loads(client.recv(struct.unpack("=q", head)[0], socket.MSG_WAITALL))
                load(first)
                first = []
                if chosen(job[2], early) == own and single():
                    told = os.memfd_create("told")
                    if not (worker := os.fork()):
                        server.close()
                        client.close()
                        become(job, files, told)
                    workers[os.pidfd_open(worker)] = worker, client, told
                    asking[client] = worker
                    with contextlib.suppress(OSError):
                        client.sendall(struct.pack("=i", worker))
                else:
                    client.close()
                for file in files:
                    os.close(file)


def chosen(environment: Mapping[str, str], early: tuple[str, ...]) -> dict[str, str]:
    """The variables that begin with one of these."""
    return {name: value for name, value in environment.items() if early and name.startswith(early)}


def single() -> bool:
    """Whether this process has one thread; pyarrow's allocator has its own, and expects forks."""
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return len(threads) == 1 + threads.count("jemalloc_bg_thd")


def load(modules: list[str]) -> None:
    """Import what can be imported, whatever it says."""
    said, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # and not another `sys.stderr`, which packages keep for what they log
    for name in modules:
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
    os.dup2(said, 2)
    os.close(said)
    os.close(nowhere)
    if modules:
        gc.collect()
        gc.freeze()


def become(job, files: list[int], told: int) -> None:
    """Be the program, in a copy of this process, and tell which packages it has loaded."""
    words, directory, environment = job
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    before, status = set(sys.modules), None
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        if words[0] == "-m":
            sys.path.insert(0, directory)
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) or end.code is None else print(end.code, file=sys.stderr) or 1
    except BaseException as end:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT if isinstance(end, KeyboardInterrupt) else 1
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        packages = (sys.prefix, os.path.dirname(os.__file__))
        loaded = [name for name in sys.modules if name not in before]
        loaded = [name for name in loaded if str(getattr(sys.modules[name], "__file__", "")).startswith(packages)]
        os.write(told, json.dumps(loaded).encode())
        if status == -signal.SIGINT:  # as an interpreter ends
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status or 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    early, first = json.loads(sys.argv[3])
    serve(sys.argv[1], sys.argv[2], tuple(early), first)
