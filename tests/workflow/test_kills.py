"""A graph killed again and again: the same command comes to the same numbers in the end."""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.conftest import BIN, ROOT, snakemake, variables, warm_jobs
from tests.workflow.rehearsal import overlays, reference, results
from workflow.warm import of_jobs

pytestmark = pytest.mark.slow

MOMENTS = {
    "logs/prepare/*.log": 0.2,  # something is being prepared
    ".work/chat-large-*/step-*": 0.3,  # the longest has a checkpoint
    "logs/evaluate/*/*.log": 0.1,  # the model is evaluated
}
"""When it is killed, one moment after another: at most so many seconds after the first file of this name is there."""


def test_a_graph_killed_at_three_moments_ends_with_the_same_numbers(tmp_path, tmp_path_factory, worker_id):
    """SIGKILL to everything at once, as when a machine goes down; then what docs/reproduce.md says to do."""
    delays = random.Random(20)
    files, work = overlays(tmp_path), tmp_path / "work"
    options = ["--cores", "2", "--rerun-incomplete", "--until", "evaluate"]  # the report is written in seconds
    with warm_jobs(of_jobs(variables())) as names:  # it alone survives, and its jobs do not
        whole = results(reference(tmp_path_factory, worker_id, **names))
        for name, seconds in MOMENTS.items():
            # as `--unlock` does, which takes as long as a start
            shutil.rmtree(work / ".snakemake/locks", ignore_errors=True)
            assert not list(work.glob(name)), "the kills hit one part of the graph after another"
            kill(
                options, files, variables() | names, lambda name=name: any(work.glob(name)), delays.uniform(0, seconds)
            )
        snakemake("--unlock", overlays=files)
        snakemake(*options, overlays=files, **names)
    check(work, whole)


def kill(
    options: list[str], files: list[Path], environment: dict[str, str], begun: Callable[[], bool], seconds: float
) -> None:
    """Run Snakemake and kill it and all its jobs so many seconds after something has begun."""
    command = [str(BIN / "snakemake"), *options, "--configfile", *map(str, files)]
    with tempfile.TemporaryFile("w+") as said:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
        )
        while not begun() and running.poll() is None:
            time.sleep(0.02)
        time.sleep(seconds)
        said.seek(0)
        assert running.poll() is None, f"it ended before: {said.read()}"
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def check(workdir: Path, whole: dict[str, object]) -> None:
    """Raise AssertionError unless a finished work directory says what the uninterrupted run says."""
    found = results(workdir)
    assert len([name for name in found if name.startswith("evals/")]) == 4
    assert found == {name: what for name, what in whole.items() if name in found}
    left = [*workdir.glob(".work/*/metrics.jsonl"), *workdir.glob(".work/.*"), *workdir.glob("*/.*.partial")]
    assert not left, "what is half done goes when the whole is there"
