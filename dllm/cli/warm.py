"""A process that has the packages loaded and answers `dllm ...` by a copy of itself: seconds saved at each short job.

The Snakefile starts it where a run has many jobs on one machine without an accelerator, and leaves its name in
DLLM_WARM. `dllm` then asks it (`dllm.cli.ask`). The copy has the arguments, directory, environment, files and process
group of who asked; its exit status is passed on, and so are signals. Whoever asked does the work itself where nobody
answers, or where a variable differs that packages read while loaded, or a file of this package has changed since.
See docs/decisions/0013-a-warm-process.md.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from dllm.cli.ask import FORWARDED, VARIABLE, peer, read
from dllm.cli.main import main

READ_LATER = {"PWD", "OLDPWD", "SHLVL", "_", "LINES", "COLUMNS", "TMPDIR", "TMP", "TEMP", "TEMPDIR", "DLLM_DEBUG"} | {
    "DLLM_PROCESSES", "ACCELERATE_USE_CPU", VARIABLE
}  # fmt: skip
"""Variables that may differ from those of the warm process, because no package reads them while it is loaded."""

PACKAGE = Path(__file__).resolve().parent.parent

LOADED = """
torch._dynamo torch.nn.utils.parametrize accelerate datasets tokenizers.trainers
lm_eval.tasks lm_eval.evaluator matplotlib.pyplot pandas
transformers.models.auto.modeling_auto transformers.models.bert.modeling_bert transformers.models.llama.modeling_llama
transformers.models.roberta.modeling_roberta transformers.models.modernbert.modeling_modernbert
transformers.models.auto.tokenization_auto transformers.convert_slow_tokenizer
dllm.chat.speed dllm.cli.train dllm.cli.evaluate dllm.cli.sample dllm.cli.speed dllm.cli.report
dllm.evaluation.adapter dllm.evaluation.causal dllm.evaluation.stored dllm.training.trainer
dllm.report.tables dllm.report.figures dllm.report.claims dllm.report.page
""".split()
"""What jobs load, here once."""


def start(environment: Mapping[str, str]) -> tuple[subprocess.Popen, str] | None:
    """Start a warm process for jobs of this environment; (process, its name), None where it cannot be.

    It ends when this process does, or closes its standard input, and when the last of its workers has.
    """
    if sys.platform != "linux":  # elsewhere a fork of a process with these packages is not safe
        return None
    name = f"dllm-{secrets.token_hex(16)}"
    command = [sys.executable, "-m", "dllm.cli.warm", name]
    own: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    ready = subprocess.Popen(command, env=dict(environment), **own)
    assert ready.stdout is not None
    ready.stdout.read(1)  # it listens from here on; who asks before all is loaded waits
    return ready, name


def serve(name: str) -> int:
    """Answer until standard input ends. A copy ends with its job, and its exit status is that of the job."""
    for number in (signal.SIGINT, *FORWARDED):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent, and not before its workers
    own = _decides(os.environ)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen(64)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the end of what `start` reads
        if not _load():
            return 1
        workers: dict[int, tuple[int, socket.socket]] = {}
        clients: dict[socket.socket, int] = {}
        listening: list = [server, 0]
        while listening or workers:
            ready = select.select([*listening, *workers, *clients], [], [])[0]
            for handle in [handle for handle in workers if handle in ready]:
                worker, client = workers.pop(handle)
                _tell(client, os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
                clients.pop(client, None)
                client.close()
                os.close(handle)
            for client in [client for client in clients if client in ready]:
                os.kill(clients.pop(client), signal.SIGKILL)  # who asked is gone
            if 0 in ready and not os.read(0, 1):
                listening = []
                server.close()
            if server in ready and listening:
                client, _ = server.accept()
                job = _received(client, own)
                if job is None:
                    client.close()
                elif worker := os.fork():
                    handle = os.pidfd_open(worker)
                    workers[handle], clients[client] = (worker, client), worker
                    _tell(client, worker)
                    for file in job[1]:
                        os.close(file)
                else:
                    _leave(_work(job, peer(client)[0], [server, client, *(other for _, other in workers.values())]))
    return 0


def _load() -> bool:
    """Load what jobs need; False where a copy of this process would not be a process as any other."""
    os.environ["TQDM_DISABLE"] = "1"  # read while tqdm is loaded; our own bars say for themselves whether they show
    for name in LOADED:
        import_module(name)
    import torch
    from accelerate.utils.other import extract_model_from_parallel
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    extract_model_from_parallel(torch.nn.Identity())  # loads DeepSpeed where it is installed, as saving a model does
    get_checkpoint_conversion_mapping("bert")  # makes those of all models
    _read_formula()
    del os.environ["TQDM_DISABLE"]
    gc.collect()
    gc.freeze()
    # a driver does not survive a fork, nor does a thread; pyarrow's allocator expects forks and starts its own anew
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return not torch.accelerator.is_available() and len(threads) == 1 + threads.count("jemalloc_bg_thd")


def _read_formula() -> None:
    """Read a formula as the scores of MATH do: it loads packages, and its parser fills its tables as it reads."""
    with contextlib.suppress(ImportError):  # an extra of lm-eval
        from math_verify import parse
        from sympy.parsing.latex import parse_latex

        parse_latex(r"\frac{1}{2} + \sqrt{x}"), parse(r"$\frac{1}{2}$")


def _received(client: socket.socket, own: tuple) -> tuple[list, list[int]] | None:
    """([arguments, directory, environment, umask], files) from a client; None if it shall do the work itself."""
    client.settimeout(10)
    files: list[int] = []
    try:
        head, files, _, _ = socket.recv_fds(client, 8, 3)
        asked = json.loads(read(client, struct.unpack("=q", head)[0]))
        client.settimeout(None)
        if _decides(asked[2]) == own and peer(client)[1] == os.getuid():
            return asked, files
    except (OSError, ValueError, struct.error):  # nobody is there any more, or files are just being changed
        pass
    for file in files:
        os.close(file)
    return None


def _work(job: tuple[list, list[int]], client: int, others: list[socket.socket]) -> int:
    """Become the job, in a copy of the warm process, and return its exit status."""
    (arguments, directory, environment, umask), files = job
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody would tell its status
    for other in others:
        other.close()
    for file, number in zip(files, (0, 1, 2), strict=True):
        os.dup2(file, number)
        os.close(file)
    with contextlib.suppress(OSError):
        os.setpgid(0, os.getpgid(client))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    os.chdir(directory)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    sys.argv[1:] = arguments
    return main(arguments)


def _leave(status: int) -> NoReturn:
    """End a copy of the warm process as an interpreter ends, but for freeing every object that was loaded.

    That would write to all the memory which the copy shares with its parent: half a second of CPU a job.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing does at this point
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _decides(environment: Mapping[str, str]) -> tuple:
    """What must be as it was when this process loaded its packages: variables, and the files of this package."""
    paths = [path for path in PACKAGE.rglob("*.*") if "__pycache__" not in path.parts]
    files = sorted((path, path.stat().st_mtime_ns) for path in paths)
    return {name: value for name, value in environment.items() if name not in READ_LATER}, files


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        client.sendall(struct.pack("=i", number))


if __name__ == "__main__":
    raise SystemExit(serve(sys.argv[1]))
