"""A graph killed again and again: the same command comes to the same numbers in the end."""

import os
import random
import signal
import subprocess

import pytest

from tests.workflow.conftest import BIN, ROOT, snakemake
from tests.workflow.rehearsal import overlays, reference, results

pytestmark = pytest.mark.slow

KILLS = 20
SHARES = (0.04, 0.18)
"""From a start to its kill, as shares of the time that the whole takes when nobody interrupts it."""


def test_a_graph_killed_at_twenty_moments_ends_with_the_same_numbers(tmp_path, tmp_path_factory, worker_id):
    """SIGKILL to everything at once, as when a machine goes down; then what docs/reproduce.md says to do."""
    whole, seconds = reference(tmp_path_factory, worker_id)
    moments = random.Random(20)
    files = overlays(tmp_path)
    options = ["--cores", "2", "--rerun-incomplete", "--until", "evaluate"]  # the report is written in seconds
    command = [str(BIN / "snakemake"), *options, "--configfile", *map(str, files)]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    kills = 0
    while kills < KILLS:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            said, _ = running.communicate(timeout=seconds * moments.uniform(*SHARES))
            assert running.returncode == 0, said.decode()
            break
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
            kills += 1
        snakemake("--unlock", overlays=files)
    assert kills >= KILLS // 2, f"finished after {kills} kills"
    snakemake(*options, overlays=files)
    found = results(tmp_path / "work")
    assert len([name for name in found if name.startswith("evals/")]) == 4
    assert found == {name: what for name, what in results(whole).items() if name in found}
    left = [path.name for path in (tmp_path / "work/.work").iterdir() if path.name not in ("locks", "answers")]
    assert not left, "resumable state goes when the artifact is there"
