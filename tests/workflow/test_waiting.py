"""Snakemake looks for jobs when one has ended."""

import subprocess
from types import SimpleNamespace

import pytest
from snakemake.cli import parse_args
from snakemake.scheduling.job_scheduler import JobRateLimiter

from tests.workflow.conftest import BIN, ROOT, variables
from workflow.waiting import wait_for_jobs


@pytest.mark.parametrize(("words", "kept"), [([], None), (["--max-jobs-per-timespan", "5/1m"], 60)])
def test_the_limit_of_jobs_a_second_is_lifted_unless_it_was_stated(words, kept):
    _, args = parse_args(["--cores", "1", "--workflow-profile", "none", *words])
    scheduler = SimpleNamespace(job_rate_limiter=JobRateLimiter(args.max_jobs_per_timespan))
    wait_for_jobs(SimpleNamespace(scheduler=scheduler))
    assert (scheduler.job_rate_limiter and scheduler.job_rate_limiter.timespan) == kept


def test_a_run_without_a_limit_stays_without_one():
    scheduler = SimpleNamespace(job_rate_limiter=None)
    wait_for_jobs(SimpleNamespace(scheduler=scheduler))
    assert scheduler.job_rate_limiter is None


def test_a_graph_is_run_without_looking_for_jobs_in_between(tmp_path):
    """The whole Snakemake: no timer is left that would make it look again."""
    (tmp_path / "Snakefile").write_text(
        "import sys, threading\n"
        f"sys.path.insert(0, {str(ROOT / 'workflow')!r})\n"
        "from waiting import wait_for_jobs\n"
        "onstart: wait_for_jobs(workflow)\n"
        "onsuccess: print(sum(isinstance(t, threading.Timer) for t in threading.enumerate()), 'timers')\n"
        "rule all:\n    input: 'b'\n"
        "rule a:\n    output: 'a'\n    shell: 'touch a'\n"
        "rule b:\n    input: 'a'\n    output: 'b'\n    shell: 'touch b'\n"
    )
    command = [str(BIN / "snakemake"), "--cores", "1", "--quiet", "all"]
    done = subprocess.run(command, cwd=tmp_path, env=variables(), capture_output=True, text=True)
    assert done.returncode == 0 and "0 timers" in done.stdout + done.stderr, done.stderr
