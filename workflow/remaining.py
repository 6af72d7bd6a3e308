"""How long a run has still to go, said as its jobs end: planned seconds, at the speed of the run so far."""

from __future__ import annotations

import logging
import sys
import time

from dllm.numbers import duration

SAID_EVERY = 10.0
"""Seconds between two lines, at least."""


class Remaining(logging.Handler):
    """Listens to Snakemake's log. seconds: what each job is planned to take, by its number; cores: that share them."""

    def __init__(self, seconds: dict[int, float], cores: int):
        super().__init__()
        self.seconds, self.cores, self.jobs, self.done = dict(seconds), cores, len(seconds), 0.0
        self.started = self.said = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Say what is left when a job has ended."""
        if getattr(getattr(record, "event", None), "name", "") != "JOB_FINISHED":
            return
        self.done += self.seconds.pop(getattr(record, "job_id", -1), 0.0)
        now = time.monotonic()
        if self.seconds and now - self.said >= SAID_EVERY:
            self.said = now
            ended = self.jobs - len(self.seconds)
            print(f"Jobs done: {ended} of {self.jobs}, about {duration(self.left(now))} left", file=sys.stderr)

    def left(self, now: float) -> float:
        """Seconds to go: as planned until a tenth is done, then at the speed so far."""
        left = sum(self.seconds.values())
        planned = left / self.cores
        enough = self.done > 0.1 * (left + self.done)
        return (now - self.started) * left / self.done if enough else planned


def say_remaining(workflow, plan) -> None:
    """Say what this run is planned to take, and from now on what is left of it."""
    if not (workflow.is_main_process and workflow.local_exec):
        return  # a cluster has queues of its own
    seconds = {}
    for job in workflow.dag.needrun_jobs():
        rule = job.rule.name
        name = ("report", rule) if not job.wildcards else (rule, "/".join(job.wildcards))
        if name in plan.costs.jobs:
            seconds[job.jobid] = plan.costs.jobs[name].cost.seconds
    if seconds:
        found = Remaining(seconds, workflow.cores)
        print(f"Jobs: {len(seconds)}, planned to take {duration(found.left(found.started))}", file=sys.stderr)
        logging.getLogger("snakemake.logging").addHandler(found)
