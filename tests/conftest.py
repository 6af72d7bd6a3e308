"""How many tests run at a time, and in which order."""

import contextlib
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

from dllm.cli.warm import LOADED
from tests.warm_programs import EARLY, warm_interpreter

HERE = Path(__file__).parent

# toy models gain nothing from threads, and every core has a worker of its own: what tests start inherits it, too
os.environ.setdefault("OMP_NUM_THREADS", "1")
# workers, and the processes that tests start, read each other's bytecode: no file is compiled twice
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# that of tqdm is shared with forked processes: one that a test kills while it makes a bar would keep it for ever
tqdm.set_lock(threading.RLock())

LONGEST = (
    "workflow/test_smoke.py",
    "cache/test_clone.py",
    "workflow/test_kills.py",
    "slurm/test_slurm.py",
    "training/test_backends.py",
    "cache/test_remotes.py",
)
"""Files of minutes. Those of one test or two come after others: a worker has its next file before it ends one."""

PACKAGES = ("pytest", "openai")
"""What tests import besides the packages of jobs."""


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: many tests wait for processes that wait, too. A worker takes about 1.2 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 2, 8)


COPIES = contextlib.ExitStack()
"""What is there for the workers, from their start to their end."""

WORKER = """#!{python}
import sys
code = sys.argv.pop()
del __file__
exec(code)
"""
"""What `python -c CODE` does: processes that a worker starts do not run the file of its main module again."""


def pytest_xdist_setupnodes(config, specs) -> None:
    """Workers are copies of a process that has loaded the packages, which would take each of them ten seconds.

    For all tests only: some of one file may need less than is loaded here.
    """
    if sys.platform != "linux" or config.args != config.getini("testpaths"):
        return
    home = Path(COPIES.enter_context(tempfile.TemporaryDirectory()))
    worker = home / "real" / "worker"
    worker.parent.mkdir()
    worker.write_text(WORKER.format(python=sys.executable))
    worker.chmod(0o755)
    loaded = [*PACKAGES, *(name for name in LOADED if not name.startswith("dllm."))]
    (command,) = COPIES.enter_context(
        warm_interpreter(Path(sys.executable), [worker], home, dict(os.environ), EARLY, loaded)
    )
    for spec in specs:
        spec.python = str(command)


def pytest_unconfigure() -> None:
    COPIES.close()


def pytest_configure(config) -> None:
    """Each worker begins to collect at another place, so that no two of them compile the same files at a time."""
    worker = getattr(config, "workerinput", None)
    if worker and config.args == config.getini("testpaths"):
        files = sorted(
            str(path) for path in HERE.iterdir() if path.match("test_*.py") or path.is_dir() and path.name[0] != "_"
        )
        first = len(files) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        config.args = files[first:] + files[:first]


def pytest_collection_finish() -> None:
    """What is there now stays: the collector need not look at it again, some thousand times."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items) -> None:
    """The longest files first, then those with slow tests, so that the workers end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    first = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: str(item.path), reverse=True)
    items.sort(key=lambda item: (first.get(item.path, len(first)), item.path not in slow))
