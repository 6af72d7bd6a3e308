"""When a run has a warm process for its jobs (`dllm.cli.warm`): many short ones, here, without an accelerator."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from subprocess import Popen

from dllm.cli.ask import VARIABLE
from dllm.cli.warm import start

FEWEST = 6
"""Jobs for which it pays: it takes about as long to start as two of them."""

THREADS = ("OMP", "GOTO", "OPENBLAS", "MKL", "NUMEXPR")
"""Snakemake and the rules set these, _NUM_THREADS, for a job."""

STARTED: list[Popen] = []
"""The warm process of this run. Its standard input closes when this process ends, however that is."""


def of_jobs(environment: Mapping[str, str], offline: int = 1) -> dict[str, str]:
    """The environment of a job of one thread, from that of Snakemake."""
    threads = {f"{name}_NUM_THREADS": "1" for name in THREADS} | {"VECLIB_MAXIMUM_THREADS": "1"}
    return {**environment, **threads, "HF_HUB_OFFLINE": str(offline)}


def start_warm(workflow) -> None:
    """Start a warm process for the jobs of this run, where it saves time; it ends with Snakemake."""
    if not (workflow.is_main_process and workflow.local_exec) or VARIABLE in os.environ:
        return
    if len(list(workflow.dag.needrun_jobs())) < FEWEST:
        return
    started = start(of_jobs(os.environ))
    if started:
        os.environ[VARIABLE] = started[1]
        STARTED.append(started[0])
        print("One process loads Python's packages for the short jobs of this run.", file=sys.stderr)
