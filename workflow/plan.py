"""All jobs of a project (`dllm.config` makes them): what the Snakefile needs to know, and no rule.

Every config is written when the Snakefile is parsed, atomically and only if its content changed, so that a changed
setting reruns exactly what depends on it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm.config import (
    DownloadConfig,
    EvaluationConfig,
    PrepareConfig,
    Project,
    RunConfig,
    SampleConfig,
    SpeedConfig,
    download_configs,
    evaluation_configs,
    prepare_configs,
    rehearsed,
    run_configs,
    sample_configs,
    speed_configs,
    write_when_changed,
)
from dllm.planning.project import ProjectPlan, plan_project
from dllm.planning.rehearsal import MADE, outcome
from dllm.provenance import write_atomically
from dllm.report.plan import ReportPlan
from dllm.report.rehearsal import rehearsal_page

ROOT = Path(__file__).resolve().parent.parent
"""The repository, below which every work directory is named."""


PLACES = ("gpu", "nodes", "cpus_per_task", "tasks", "mpi", "gres", "tasks_per_gpu")
"""Resources that say on how many machines and devices a job runs."""


def one_of(names: Iterable[str]) -> str:
    """A wildcard of these names alone: Snakemake then says in one line that nothing makes a target of another name."""
    return "|".join(map(re.escape, names)) or "(?!)"


@dataclass(frozen=True)
class Plan:
    """Every job's config, by kind and name. `full`: what is rehearsed, if this is a rehearsal; else the project."""

    project: Project
    full: Project
    downloads: dict[str, DownloadConfig]
    data: dict[str, PrepareConfig]
    runs: dict[str, RunConfig]
    evaluations: dict[tuple[str, str], EvaluationConfig]
    samples: dict[str, SampleConfig]
    speed: dict[str, SpeedConfig]
    report: ReportPlan

    def write(self, directory: str | Path) -> None:
        """Write all configs below `directory`/configs."""
        root = Path(directory) / "configs"
        for kind in ("downloads", "data", "runs", "samples", "speed"):
            for name, config in getattr(self, kind).items():
                write_when_changed(root / kind / f"{name}.yaml", config)
        for (row, benchmark), config in self.evaluations.items():
            write_when_changed(root / "evals" / row / f"{benchmark}.yaml", config)
        write_when_changed(root / "report.yaml", self.report)
        if self.report.leaderboard:
            planned = json.dumps(self.planned(), indent=1) + "\n"
            place = root / "planned.json"
            if not place.is_file() or place.read_text(encoding="utf-8") != planned:
                write_atomically(place, planned)

    def planned(self) -> dict[str, dict[str, Any]]:
        """What the leaderboard says of cells that are not measured yet, and of the runs behind its rows."""
        return {
            name if rule == "evaluate" else f"{rule}/{name}": {
                "hours": round(job.device_hours, 4),
                "device": "GPU" if job.place.hardware.is_gpu else "core",
                "gib": round(job.cost.device_gib or job.cost.host_gib, 2),
            }
            for (rule, name), job in self.costs.jobs.items()
            if rule in ("evaluate", "train") and job.known
        }

    @cached_property
    def costs(self) -> ProjectPlan:
        """What every job is predicted to take, counted where its data is prepared already."""
        return plan_project(self.project, ROOT / self.project.workdir)

    def requests(self, rule: str, *more: str, name: str | None = None) -> dict[str, Callable]:
        """Memory, time, disk and `more` resources of a rule, each a function of its wildcards.

        They are as predicted, or as the entry states them. The job is named by its wildcards (`row/benchmark`), or by
        `name` if the rule has none. A preparation that failed asks for so much more memory at each further attempt.
        """

        def request(resource: str) -> Callable:
            def requested(wildcards, attempt: int) -> int | str | None:
                found = self.resources(rule, "/".join(wildcards) if name is None else name).get(resource)
                return found * attempt if rule == "prepare" and resource == "mem_mb" and found else found

            return requested

        return {resource: request(resource) for resource in ("mem_mb", "runtime", "disk_mb", *more)}

    @cached_property
    def _urgency(self) -> dict[tuple[str, str], int]:
        """The place of every job, where those whose longest chain of jobs to the end is shorter come before it."""
        chains = self.costs.chains
        ordered = sorted(chains, key=lambda key: (chains[key][0], len(chains[key][1])))
        return {key: place for place, key in enumerate(ordered)}

    def priority(self, rule: str) -> Callable:
        """How early Snakemake starts a job that is ready, as a function of its wildcards: the longest chain first."""

        def found(wildcards) -> int:
            return self._urgency.get((rule, "/".join(wildcards)), 0)

        return found

    def resources(self, rule: str, name: str) -> Mapping[str, int | str]:
        """Everything a job asks its executor for. On several machines: one task each, which the launcher starts.

        `mpi` tells the Slurm executor to leave `srun` to the job; with it stand `tasks`, GPUs per machine (`gres`), and
        no further tasks per GPU. A job on one machine must have none of these.
        """
        asked = self.costs.job(rule, name).resources
        nodes, gpus = asked["nodes"], asked["gpu"]
        if nodes == 1:
            return asked
        several: dict[str, int | str] = {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}
        if gpus:
            several["gres"] = f"gpu:{gpus // nodes}"
        return {**asked, **several}

    def launch_command(self, rule: str) -> Callable:
        """How a rule starts `dllm` on what its job asked for, as a function of wildcards and resources.

        What depends on resources never makes Snakemake run a job again: where it runs does not change its result.
        """

        def command(wildcards, resources) -> str:
            asked = {name: resources.get(name) or 0 for name in ("nodes", "gpu", "cpus_per_task")}
            nodes = asked["nodes"] or 1
            options = {"nodes": nodes, "gpus": asked["gpu"] // nodes, "cpus": asked["cpus_per_task"]}
            if rule == "evaluate" and nodes == 1 and options["gpus"] < 2:
                return "dllm"
            kind = self.project.runs[wildcards.run].launch if rule == "train" else "ddp" if options["gpus"] else "cpu"
            said = [f"--{name} {value}" for name, value in options.items() if value > 1 or (name == "gpus" and value)]
            root = self.path_to_root
            script = f"python {root}/workflow/launch.py --with {root}/config/accelerate/{kind}.yaml"
            return " ".join([script, *said, "--"])

        return command

    @property
    def path_to_root(self) -> str:
        """The way from the work directory, where jobs start, to the repository; either may be a symbolic link."""
        return os.path.relpath(ROOT, (ROOT / self.project.workdir).resolve())

    def inputs(self, rule: str, name: str) -> list[str]:
        """Records of what a job reads, which are the edges of the graph; none of a job that is not planned."""
        job = self.costs.jobs.get((rule, name))
        records = [MADE[kind].format(made) for kind, made in job.after] if job else []
        return sorted(records) if rule == "prepare" else records

    def offline(self, run: str) -> int:
        """Whether a run trains without the network (1): all do but those whose data is streamed (0)."""
        return int(not self.project.datasets[self.project.runs[run].data].stream)

    def made_here(self, name: str) -> int:
        """Whether a download is made on the spot, from a seed, and needs no network (1)."""
        entry = self.downloads[name].model or self.downloads[name].dataset
        return int(bool(getattr(entry, "new", None) or getattr(entry, "world", None)))

    def artifacts(self) -> list[str]:
        """Records of everything large, and the answers of the evaluations."""
        kinds: dict[str, Mapping[str, Any]] = {"downloads": self.downloads, "data": self.data, "runs": self.runs}
        records = [f"{kind}/{name}.json" for kind, names in kinds.items() for name in names]
        return [*records, *(f"evals/{row}/{benchmark}.samples.jsonl" for row, benchmark in self.evaluations)]

    def report_inputs(self) -> list[str]:
        """Everything a report reads: evaluations, records of runs, samples, speed."""
        return self.inputs("report", "tables")

    def close_rehearsal(self) -> None:
        """Write and print what a rehearsal has shown, whole or broken off; nothing outside of one."""
        if self.project.rehearsal is None:
            return
        workdir = ROOT / self.project.workdir
        found = outcome(self.costs, plan_project(self.full, ROOT / self.full.workdir), workdir)
        write_atomically(workdir / "report" / "rehearsal.json", found.as_json())
        write_atomically(workdir / "report" / "rehearsal.html", rehearsal_page(found))
        print(f"{found.line()}\n{workdir / 'report' / 'rehearsal.html'}", file=sys.stderr)


def check_writable(workdir: str | Path) -> None:
    """Raise PermissionError if this user cannot write where Snakemake will, which says so in a traceback only."""
    root = Path(workdir)
    for path in (root, *root.glob(".snakemake"), *root.glob(".snakemake/*/")):
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def make_plan(full: Project) -> Plan:
    """All jobs of a project. Raises ConfigError or ValueError, one line, for what does not fit together."""
    project = rehearsed(full)
    return Plan(
        project=project,
        full=full,
        downloads=download_configs(project),
        data=prepare_configs(project),
        runs=run_configs(project),
        evaluations=evaluation_configs(project),
        samples=sample_configs(project),
        speed=speed_configs(project),
        report=ReportPlan.of(project),
    )
