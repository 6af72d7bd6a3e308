"""A graph killed again and again: the same command comes to the same numbers in the end."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import BIN, ROOT, snakemake, variables, warm_jobs
from tests.workflow.rehearsal import overlays, reference, results
from workflow.warm import of_jobs

pytestmark = pytest.mark.slow

KILLS = 8
SHARES = (1.0, 5.5)
"""From a start to its kill, in times of what Snakemake takes to start; that depends on what else the machine does."""


def test_a_graph_killed_at_eight_moments_ends_with_the_same_numbers(tmp_path, tmp_path_factory, worker_id):
    """SIGKILL to everything at once, as when a machine goes down; then what docs/reproduce.md says to do."""
    whole = results(reference(tmp_path_factory, worker_id))
    moments = random.Random(20)
    files = overlays(tmp_path)
    options = ["--cores", "2", "--rerun-incomplete", "--until", "evaluate"]  # the report is written in seconds
    started = time.monotonic()
    snakemake("--unlock", overlays=files)
    seconds = time.monotonic() - started
    kills = 0
    with warm_jobs(of_jobs(variables())) as names:  # it alone survives, and its jobs do not
        while kills < KILLS:
            # as `--unlock` does, which takes as long as a start
            shutil.rmtree(tmp_path / "work/.snakemake/locks", ignore_errors=True)
            if killed(options, files, variables() | names, seconds * moments.uniform(*SHARES)):
                kills += 1
            else:  # finished in between: the next kills hit another run
                check(tmp_path / "work", whole)
                shutil.rmtree(tmp_path / "work")
        snakemake("--unlock", overlays=files)
        snakemake(*options, overlays=files, **names)
    check(tmp_path / "work", whole)


def killed(options: list[str], files: list[Path], environment: dict[str, str], seconds: float) -> bool:
    """Run Snakemake and kill it and all its jobs after so many seconds; False if it finished before."""
    command = [str(BIN / "snakemake"), *options, "--configfile", *map(str, files)]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, _ = running.communicate(timeout=seconds)
        assert running.returncode == 0, said.decode()
        return False
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        return True


def check(workdir: Path, whole: dict[str, object]) -> None:
    """Raise AssertionError unless a finished work directory says what the uninterrupted run says."""
    found = results(workdir)
    assert len([name for name in found if name.startswith("evals/")]) == 4
    assert found == {name: what for name, what in whole.items() if name in found}
    left = [*workdir.glob(".work/*/metrics.jsonl"), *workdir.glob(".work/.*"), *workdir.glob("*/.*.partial")]
    assert not left, "what is half done goes when the whole is there"
