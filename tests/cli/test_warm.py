"""A warm process: each job is still a process with its own arguments, environment, output, status and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm.cli import warm
from dllm.cli.ask import VARIABLE
from dllm.config import write_when_changed
from dllm.provenance import read_record
from dllm.training.trainer import INTERRUPTED
from tests.training.conftest import metrics_of, run_config, workdir  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nobody is warm elsewhere")
ROOT = Path(__file__).parent.parent.parent
OWN = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def started():
    """The warm processes of these tests, each with its name: the last one may still be there."""
    found: list[tuple[subprocess.Popen, str]] = []
    yield found
    for process, _ in found:
        process.kill()
        process.wait()


@pytest.fixture
def served(started):
    """(warm process, environment of its jobs)."""
    if not started or started[-1][0].stdin.closed:
        started.append(warm.start(OWN))
    process, name = started[-1]
    return process, OWN | {VARIABLE: name}


def dllm(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "dllm", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def workers(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def until(condition) -> None:
    deadline = time.monotonic() + 600  # of a busy machine
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def long_run(directory: Path, name: str, **options) -> subprocess.Popen:
    """A training that has begun and would take minutes."""
    write_when_changed(directory / "long.yaml", run_config(name, steps=20_000, evaluations=1))
    running = dllm("train", "long.yaml", "--quiet", cwd=directory, **options)
    until(lambda: [p for p in directory.glob(f".work/{name}-*/metrics.jsonl") if '"train"' in p.read_text()])
    return running


def test_a_warm_process_runs_jobs_as_they_run_alone(served, workdir):  # noqa: F811
    process, environment = served
    write_when_changed(workdir / "run.yaml", run_config())
    assert dllm("train", "run.yaml", "--quiet", cwd=workdir, env=OWN).wait() == 0
    alone = (read_record(workdir / "runs/run.json"), metrics_of(workdir, "run"))
    done = dllm("train", "run.yaml", "--replace", "--quiet", cwd=workdir, env=environment)
    said, complained = done.communicate()
    assert (done.returncode, said) == (0, "run: runs/run\n"), complained
    assert (read_record(workdir / "runs/run.json"), metrics_of(workdir, "run")) == alone
    # a mistake: its line and its status
    wrong = dllm("train", "nothing.yaml", cwd=workdir, env=environment)
    assert wrong.communicate()[1].startswith("dllm train: error: nothing.yaml: no such file") and wrong.returncode == 2
    before = os.stat(warm.__file__)
    # what packages read while they are loaded must be the same
    asked = "import sys; from dllm.cli.ask import ask; sys.stdout.write(str(ask(['--version'])))"
    told = [
        subprocess.run([sys.executable, "-c", asked], env=environment | more, capture_output=True, text=True).stdout
        for more in ({}, {"COLUMNS": "99"}, {"HF_HUB_OFFLINE": "0"}, {"NEW": "1"}, {VARIABLE: "dllm-nobody"})
    ]
    assert [line.split("\n")[-1] for line in told] == ["0", "0", "None", "None", "None"]
    os.utime(warm.__file__, ns=(1, 1))  # edited code is loaded anew
    assert subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True).stdout == b"None"
    os.utime(warm.__file__, ns=(before.st_atime_ns, before.st_mtime_ns))
    # a preempted run saves its state, a killed one is gone at once
    terminated = long_run(workdir, "terminated", env=environment)
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait() == INTERRUPTED and not workers(process)
    killed = long_run(workdir, "killed", env=environment)
    assert len(workers(process)) == 1
    killed.kill()
    until(lambda: not workers(process))
    # Ctrl-C in a terminal goes to the whole group, the worker too
    stopped = long_run(workdir, "stopped", env=environment, start_new_session=True)
    os.kill(workers(process)[0], signal.SIGINT)
    assert stopped.wait() == 130 and "interrupted" in stopped.stderr.read()


def test_jobs_outlive_their_run_but_not_the_warm_process(served, workdir):  # noqa: F811
    process, environment = served
    write_when_changed(workdir / "run.yaml", run_config(steps=60))
    running = dllm("train", "run.yaml", "--quiet", cwd=workdir, env=environment)
    until(lambda: workers(process))
    process.stdin.close()  # as when Snakemake is killed
    assert running.wait() == 0 and process.wait() == 0 and (workdir / "runs/run.json").exists()
    later = dllm("--version", env=environment)
    assert later.communicate()[0].startswith("dllm ") and later.returncode == 0

    process, name = warm.start(OWN)
    lost = long_run(workdir, "lost", env=OWN | {VARIABLE: name})
    (worker,) = workers(process)
    process.kill()
    assert "the warm process of this run has gone" in lost.communicate()[1] and lost.returncode == 70
    until(lambda: not Path(f"/proc/{worker}").exists())
