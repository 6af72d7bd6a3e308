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
    settings = workflow.scheduling_settings  # None where jobs are planned and not run
    limit = settings and settings.max_jobs_per_timespan
    if limit and (limit.max_jobs, limit.timespan) == DEFAULT:
        settings.max_jobs_per_timespan = None
