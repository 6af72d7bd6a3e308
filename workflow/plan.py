"""From the project's entries to the configs that jobs read: what the Snakefile needs to know, and no rule.

Every config is written when the Snakefile is parsed, atomically and only if its content changed, so that a changed
setting reruns exactly what depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dllm.chat.settings import SampleConfig, SpeedConfig
from dllm.config import (
    EvaluationEntry,
    Project,
    download_configs,
    download_name,
    overlaid,
    prepare_configs,
    run_configs,
    write_when_changed,
)
from dllm.evaluation.settings import EvaluationConfig
from dllm.planning.project import ProjectPlan, plan_project
from dllm.report.plan import ReportPlan

ROOT = Path(__file__).resolve().parent.parent
"""The repository, below which every work directory is named."""


@dataclass(frozen=True)
class Plan:
    """Every job's config, by kind and name."""

    project: Project
    downloads: dict
    data: dict
    runs: dict
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

    @cached_property
    def costs(self) -> ProjectPlan:
        """What every job is predicted to take, counted where its data is prepared already."""
        return plan_project(self.project, ROOT / self.project.workdir)

    def asks(self, rule: str, resource: str, name: str | None = None) -> Callable:
        """A rule's resource as a function of its wildcards: as predicted, or as the entry states it.

        The job is called by its wildcards, `row/benchmark` for instance; `name` stands for a rule without any.
        """

        def asked(wildcards) -> int | str | None:
            return self.resources(rule, "/".join(wildcards) if name is None else name).get(resource)

        return asked

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

    def launch(self, rule: str) -> Callable:
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
            script = f"python {self.up}/workflow/launch.py --with {self.up}/config/accelerate/{kind}.yaml"
            return " ".join([script, *said, "--"])

        return command

    @property
    def up(self) -> str:
        """The way from the work directory to the repository, where jobs start."""
        return os.path.relpath(ROOT, ROOT / self.project.workdir)

    def record_of(self, name: str) -> str:
        """Record of a model or run: the edge of the graph that `init` and `checkpoint` draw."""
        return f"runs/{name}.json" if name in self.project.runs else f"downloads/{name}.json"

    def data_records(self, config) -> list[str]:
        """Records of the downloads that a prepared dataset reads."""
        return sorted({f"{part.path}.json" for part in config.parts} | {f"{config.model_path}.json"})

    def train_inputs(self, run: str) -> list[str]:
        """Records of the data and of the start of a run."""
        config = self.runs[run]
        return [f"{config.data_path}.json", self.record_of(config.init)]

    def offline(self, run: str) -> int:
        """Whether a run trains without the network (1): all do but those whose data is streamed (0)."""
        return int(not self.project.datasets[self.project.runs[run].data].stream)

    def evaluation_inputs(self, row: str, benchmark: str) -> list[str]:
        """Records of the checkpoint and of the benchmark's data."""
        entry = self.project.evaluations[row]
        records = [self.record_of(entry.checkpoint)]
        dataset = self.project.benchmarks[benchmark].dataset
        if dataset:
            records.append(f"downloads/{download_name(self.project, dataset)}.json")
        return records

    def speed_inputs(self, name: str) -> list[str]:
        """Records of the checkpoint and of the questions."""
        entry = self.project.speed[name]
        dataset = entry.questions.split("/")[0]
        return [
            self.record_of(entry.checkpoint),
            f"downloads/{download_name(self.project, dataset)}.json",
        ]

    def artifacts(self) -> list[str]:
        """Records of everything large, and the answers of the evaluations."""
        kinds = {"downloads": self.downloads, "data": self.data, "runs": self.runs}
        records = [f"{kind}/{name}.json" for kind, names in kinds.items() for name in names]
        return [*records, *(f"evals/{row}/{benchmark}.samples.jsonl" for row, benchmark in self.evaluations)]

    def report_inputs(self) -> list[str]:
        """Everything a report reads: evaluations, records of runs, samples, speed."""
        runs = [f"runs/{run}.json" for run in self.project.runs]
        evaluations = [f"evals/{row}/{benchmark}.json" for row, benchmark in self.evaluations]
        samples = [f"samples/{name}.json" for name in self.samples]
        return [*runs, *evaluations, *samples, *(f"speed/{name}.json" for name in self.speed)]


def make_plan(project: Project) -> Plan:
    """All configs of a project. Raises ConfigError or ValueError, one line, for what does not fit together."""
    return Plan(
        project=project,
        downloads=download_configs(project),
        data=prepare_configs(project),
        runs=run_configs(project),
        evaluations=evaluation_configs(project),
        samples={name: sample_config(project, name) for name in project.samples},
        speed={name: speed_config(project, name) for name in project.speed},
        report=report_plan(project),
    )


def checkpoint_path(project: Project, name: str) -> str:
    """Directory of the model that a run or a download brings."""
    return f"runs/{name}/model" if name in project.runs else f"downloads/{name}"


def evaluation_configs(project: Project) -> dict[tuple[str, str], EvaluationConfig]:
    """One config per row and benchmark of the results table."""
    configs = {}
    for row, entry in project.evaluations.items():
        for name in project.benchmarks_of(entry):
            benchmark = project.benchmarks[name]
            data = None
            if benchmark.dataset:
                data = f"downloads/{download_name(project, benchmark.dataset)}"
                data += "/benchmarks" if benchmark.tasks_from == "miniature" else ""
            configs[row, name] = EvaluationConfig(
                run=row,
                checkpoint=checkpoint_path(project, entry.checkpoint),
                model_kind=entry.kind,
                benchmark=name,
                task=benchmark.task,
                task_directory="miniature" if benchmark.tasks_from == "miniature" else None,
                data=data,
                revision=benchmark.revision,
                shots=benchmark.shots,
                fewshot_as_multiturn=entry.chat_template and benchmark.shots > 0,
                chat_template=entry.chat_template,
                metric=benchmark.metric,
                filter=benchmark.filter,
                further_metrics=benchmark.also,
                chance=benchmark.chance,
                limit=benchmark.documents,
                generation=overlaid(benchmark.generation, entry.generation),
                scorer=project.scorer_of(entry),
                seed=benchmark.seed,
            )
    return configs


def sample_config(project: Project, name: str) -> SampleConfig:
    """What `dllm sample` is told for the report."""
    entry = project.samples[name]
    return SampleConfig(
        run=name,
        checkpoint=checkpoint_path(project, entry.checkpoint),
        conversations=entry.conversations,
        film_prompt=entry.film,
        generation=entry.generation,
    )


def speed_config(project: Project, name: str) -> SpeedConfig:
    """What `dllm speed` is told."""
    entry = project.speed[name]
    dataset, _, file = entry.questions.partition("/")
    return SpeedConfig(
        run=name,
        checkpoint=checkpoint_path(project, entry.checkpoint),
        questions=f"downloads/{download_name(project, dataset)}/{file}",
        prompt=entry.prompt,
        answer=entry.answer,
        limit=entry.documents,
        steps=entry.steps,
        generation=entry.generation,
        options=entry.options,
    )


def report_plan(project: Project) -> ReportPlan:
    """What the report shows, in the report's own terms."""

    def recipe(run: str) -> str:
        return "published" if project.runs[run].recipe.startswith("published") else "corrected"

    def curves(section: str) -> list[dict]:
        return [
            {"run": curve.run, "label": curve.label, "recipe": recipe(curve.run)}
            for curve in getattr(project.report, section)
        ]

    used = {name for entry in project.evaluations.values() for name in project.benchmarks_of(entry)}
    benchmarks = [name for name in project.benchmarks if name in used]
    estimators = rows_that_differ_in_estimator(project)
    again = estimators[1:]
    results = [
        {
            "run": name,
            "label": entry.label,
            "recipe": "published" if entry.scorer == "published" else "corrected",
            "kind": "again" if name in again else row_kind(entry),
            "published_as": project.reported[entry.compare].label if entry.compare else "",
            "close_to": project.reported[entry.close_to].label if entry.close_to else "",
            "benchmarks": [] if set(project.benchmarks_of(entry)) == used else project.benchmarks_of(entry),
        }
        for name, entry in project.evaluations.items()
    ]
    # systems have a table of their own for what they say
    first = "" if project.report.systems else next(iter(project.samples), "")
    return ReportPlan.model_validate(
        {
            "title": project.report.title,
            "toy": project.report.toy,
            "pretraining": curves("pretraining"),
            "openwebtext": curves("openwebtext"),
            "ablation": [{"start": c["label"], "run": c["run"], "recipe": c["recipe"]} for c in curves("ablation")],
            "chat": curves("chat"),
            "results": results,
            "benchmarks": [
                {
                    "name": name,
                    "label": project.benchmarks[name].label,
                    "chance": project.benchmarks[name].chance,
                    "reported_chance": project.benchmarks[name].reported_chance,
                }
                for name in benchmarks
            ],
            "reported": [
                {"label": row.label, "source": row.source, "note": row.note, "values": dict(row.scores)}
                for row in project.reported.values()
            ],
            "film": first,
            "samples": first,
            "speed": next(iter(project.speed), ""),
            "estimators": estimators,
            "systems": systems(project),
        }
    )


def systems(project: Project) -> list[dict]:
    """The systems that the report compares, each with the runs that made it and its sample conversations."""
    found = []
    for name in project.report.systems:
        entry = project.evaluations[name]
        trained = project.runs.get(entry.checkpoint)
        samples = [sample for sample, asked in project.samples.items() if asked.checkpoint == entry.checkpoint]
        found.append(
            {
                "row": name,
                "label": entry.label,
                "algorithm": trained.algorithm if trained else "",
                "stages": project.stages(entry.checkpoint),
                "parameters": None if trained else project.models[entry.checkpoint].parameters,
                "samples": next(iter(samples), ""),
            }
        )
    return found


def row_kind(entry: EvaluationEntry) -> str:
    """What a row of the results stands for."""
    if entry.control:
        return "control"
    return "ar" if entry.kind == "hf" else "ours"


def rows_that_differ_in_estimator(project: Project) -> list[str]:
    """The first evaluation with a Monte Carlo estimator and the one beside it that differs in the estimator alone."""
    for name, entry in project.evaluations.items():
        scorer = project.scorers[entry.scorer]
        for other, candidate in project.evaluations.items():
            like = scorer.model_copy(update={"likelihood": project.scorers[candidate.scorer].likelihood})
            same_model = candidate.checkpoint == entry.checkpoint and candidate.chat_template == entry.chat_template
            estimators = scorer.likelihood.estimator, like.likelihood.estimator
            if same_model and like == project.scorers[candidate.scorer] and estimators == ("mc", "auto"):
                return [other, name]
    return []
