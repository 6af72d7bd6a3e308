"""Programs that a model wrote, run one by one where they can do little harm.

    >>> run_program("def double(x):\\n    return x + x\\n\\nassert double(2) == 5")
    Outcome(passed=False, reason='AssertionError')

Every program gets a fresh interpreter in an empty temporary directory, with a made-up environment, without input, and
with /dev/null for its output. It has passed if and only if its last statement was reached: the child then hands a
secret number to its supervisor, another process, so that a printed success, `sys.exit(0)` or a crash count as failures.

Guaranteed on every POSIX system: nothing of the caller's environment, arguments, open files and standard input is
passed on; limits on processor time, wall time, file size, open files and (where the system has RLIMIT_AS) memory per
process; the whole process group and, on Linux, every descendant is killed at the end.

Added where the kernel allows it (`isolation()` says what holds on this machine):
- `namespaces`: no network at all, no process outside can be seen by number or signalled, and nothing outlives the end.
- `landlock`: only the temporary directory can be written, only it and the interpreter's libraries can be read.
- `nobody`: started by root, a program runs as nobody, so that the limit on processes holds. It holds for other users
  anyway, but counts all of their processes where there are no namespaces.
Without namespaces, sockets and signals are taken away inside the interpreter, which a program can undo on purpose.

Not guaranteed: a program written to deceive could read the secret number out of its own interpreter; the memory of
several processes adds up (as many as PROCESSES times the limit); nothing defends against faults of the kernel. To run
programs of an enemy, put a virtual machine around this.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dllm.provenance import cores

CHILD = Path(__file__).with_name("sandbox_child.py")

SECONDS = 3.0
"""Processor seconds of a program: what the published pass rates of HumanEval allow on the clock."""
MEMORY_MIB = 1024
PROCESSES = 64
FILE_MIB = 16
WALL_PER_CPU = 4
"""Wall seconds per processor second: room for a busy machine, so that results do not depend on its load."""
START_UP_SECONDS = 60
ISOLATION = ("namespaces", "landlock", "nobody")
"""The isolation that is requested from the kernel."""


@dataclass(frozen=True)
class Outcome:
    """Whether a program reached its end, and if not, why: `AssertionError: ...`, `timed out after 3 s`, ..."""

    passed: bool
    reason: str


def run_program(source: str, *, seconds: float = SECONDS, memory_mib: int = MEMORY_MIB) -> Outcome:
    """Run a Python program to its end, or to the first limit.

    seconds: processor time from the first statement on, rounded up to whole seconds; WALL_PER_CPU times as long on the
    clock. memory_mib: address space of each process. Raises ValueError for limits that are not positive.
    """
    answer = _answer(source, seconds, memory_mib)
    return Outcome(answer["passed"], answer["reason"])


def run_programs(
    sources: Sequence[str], *, workers: int | None = None, done: Callable[[int, Outcome], None] | None = None
) -> list[Outcome]:
    """`run_program` of each source, in their order, `workers` at a time (None: one per core that this process may use).

    done(i, outcome) is called from this thread, in order, as soon as it is known.
    """
    outcomes = []
    with ThreadPoolExecutor(max_workers=workers or cores()) as pool:
        running = pool.map(run_program, sources)
        try:
            for i, outcome in enumerate(running):
                outcomes.append(outcome)
                if done:
                    done(i, outcome)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


@lru_cache(maxsize=1)
def isolation() -> tuple[str, ...]:
    """Which of `namespaces`, `landlock` and `nobody` hold on this machine, beyond the limits."""
    return tuple(_answer("pass", SECONDS, MEMORY_MIB)["isolation"])


def check_limits(seconds: float, memory_mib: int) -> None:
    """Raise ValueError, one line, for limits that are not positive numbers."""
    for name, value in (("seconds", seconds), ("memory_mib", memory_mib)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"sandbox: {name} = {value} is not a limit; choose a positive number")


def _answer(source: str, seconds: float, memory_mib: int) -> dict:
    """{passed, reason, isolation} from the child."""
    check_limits(seconds, memory_mib)
    request: dict[str, Any] = {
        "source": source,
        "seconds": math.ceil(seconds),
        "wall_seconds": WALL_PER_CPU * seconds,
        "memory_mib": int(memory_mib),
        "processes": PROCESSES,
        "file_mib": FILE_MIB,
        "isolation": ISOLATION,
    }
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as directory:
        child = subprocess.Popen(
            # as `python -I`, but for the hash seed: with it, the order of a set is the same in every run
            [sys.executable, "-s", "-P", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=_environment(directory),
            start_new_session=True,
        )
        try:
            longest = START_UP_SECONDS + 2 * request["wall_seconds"]
            output, _ = child.communicate(json.dumps(request).encode(), timeout=longest)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.communicate()
    try:
        return json.loads(output)
    except ValueError:
        return {"passed": False, "reason": "the program ended its supervisor", "isolation": []}


def _environment(directory: str) -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = {"HOME": directory, "TMPDIR": directory, "PATH": os.defpath}
    return {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC", **places, **one_thread}
