"""Snakemake waits for its jobs, and does not look for others meanwhile."""

from __future__ import annotations

DEFAULT = (100, 1)
"""Jobs that Snakemake starts at most, and in how many seconds, unless it is told otherwise."""


def wait_for_jobs(workflow) -> None:
    """Lift Snakemake's own limit of jobs a second; one that was stated is kept.

    Under a limit it looks for jobs to start again after that time, and once more after each such look, and it begins
    another such series at each job that ends: of a graph of 190 jobs that takes five minutes, a hundred seconds of CPU.
    Without one it looks when a job has ended.
    """
    scheduler = workflow.scheduler
    limited = scheduler.job_rate_limiter  # None where nothing is run
    if limited and (limited._limit.max_jobs, limited.timespan) == DEFAULT:
        scheduler.job_rate_limiter = None
