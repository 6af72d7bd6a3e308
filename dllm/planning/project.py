"""The plan of a configuration: every job of the workflow with its cost, and what does not fit.

A job is known by its rule and the name of what it makes (a run, `row/benchmark`, a download), as in the workflow.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dllm.config import (
    BenchmarkEntry,
    BenchmarkSize,
    EvaluationEntry,
    GenerateSettings,
    Project,
    Resources,
    Shape,
    checkpoint_directory,
    download_configs,
    download_name,
    overlaid,
    prepare_configs,
    prepared_name,
)
from dllm.families import DIFFUSION_GEMMA
from dllm.planning.cost import (
    GIB,
    Cost,
    Place,
    generated_answers,
    likelihood_answers,
    renoised_answers,
    scoring,
    training,
)
from dllm.planning.data import COMPRESSED, TEXT_BYTES, Prepared, prepared
from dllm.planning.hardware import Hardware, hardware
from dllm.planning.shapes import differences, is_known, parameters, shape_of, translated

RULES = ("download", "prepare", "train", "evaluate", "sample", "speed", "report")

DOWNLOAD_BYTES_PER_SECOND = 50e6
SHARD_BYTES = 0.5e9
"""Size of a shard at the hub, at most: all that is stored of a streamed set."""
ROWS_PER_CORE, ROW_SECONDS, TOKEN_SECONDS = 10_000, 1e-4, 3.2e-6
"""`dllm prepare`: rows for which it takes another core (at most MOST_CORES), and seconds of one core for a row and for
a token of it. Measured on one core of the laptop run with a WordPiece tokenizer: 970 conversations of 280 tokens a
second, 330 of 1,020; short texts 7,800."""

MOST_CORES = 8
PREPARE_GIB, PROCESS_GIB, SOURCE_ROW_BYTES = 0.45, 0.15, 100
"""Memory of `dllm prepare` with one process, for each further one, and for each row of its sources; how large rows and
row groups are does not count, for a block of rows is in memory at a time. Measured: 0.70 GiB with two processes."""

SAMPLE_PROMPT, QUESTION_PROMPT = 60, 120
"""Tokens of a conversation or a question before its answer, if the entries do not state them."""

REPORT_JOBS = ("tables", "figures", "claims", "page")

UNPLANNED = Resources(memory_gib=16, runtime_minutes=1440, disk_gib=16)
"""What a job asks for that cannot be planned, because a size is not stated."""

MARGIN_TIME, MARGIN_MEMORY, MARGIN_DISK = 2.0, 1.5, 1.25
"""Factors by which a job asks for more than predicted: a killed job costs more than a generous request."""

LEAST_GIB = {"prepare": 2.0}
"""What the jobs of a rule ask for at least: how much memory rows take depends on rows that nobody has seen yet."""


@dataclass(frozen=True)
class Job:
    """One job: where it runs, what it costs, what it waits for, and what is doubtful about it."""

    rule: str
    name: str
    cost: Cost
    place: Place
    stated: Resources = Resources()
    after: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    known: bool = True

    @property
    def device_hours(self) -> float:
        """GPU hours, or core hours of a job without one."""
        return self.cost.seconds / 3600 * self.place.units

    @property
    def resources(self) -> dict[str, int]:
        """What the job asks of a cluster: a stated value, or the predicted one with a margin, rounded up.

        mem_mb and cpus_per_task are per machine, gpu is the total.
        """
        cost, stated = self.cost, self.stated
        memory, minutes, disk = (
            getattr(stated, name) or (None if self.known else getattr(UNPLANNED, name))
            for name in ("memory_gib", "runtime_minutes", "disk_gib")
        )
        predicted = (cost.kept_gib + cost.scratch_gib) * MARGIN_DISK * 1024
        least = LEAST_GIB.get(self.rule, 0)
        return {
            "mem_mb": memory * 1024 if memory else _up(max(cost.host_gib * MARGIN_MEMORY, least) * 1024, 256),
            "runtime": minutes or _up(cost.seconds * MARGIN_TIME / 60 + 2, 5),
            "disk_mb": disk * 1024 if disk else _up(predicted, 64),
            "gpu": self.place.devices,
            "nodes": self.place.nodes,
            "cpus_per_task": stated.cpus_per_task,
        }


def _up(value: float, step: int) -> int:
    return max(1, math.ceil(value / step - 1e-9)) * step


@dataclass(frozen=True)
class ProjectPlan:
    """All jobs of a project on some hardware, by (rule, name)."""

    project: Project
    hardware: Hardware
    jobs: dict[tuple[str, str], Job]
    notes: list[str] = field(default_factory=list)

    def job(self, rule: str, name: str = "") -> Job:
        """The job that makes `name`. Raises ValueError, one line, for one that is not planned."""
        try:
            return self.jobs[rule, name]
        except KeyError:
            raise ValueError(f"{rule} {name}: not a job of this configuration; see dllm plan --verbose") from None

    @property
    def warnings(self) -> list[str]:
        """One line for everything doubtful."""
        lines = [f"{job.rule} {job.name}: {text}" for job in self.jobs.values() for text in job.warnings]
        return [*self.notes, *lines]

    @cached_property
    def chains(self) -> dict[tuple[str, str], tuple[float, list[Job]]]:
        """The chain of jobs that takes longest of those that each job begins, and its seconds, alone on a machine."""
        waiting: dict[tuple[str, str], list[tuple[str, str]]] = {key: [] for key in self.jobs}
        for key, job in self.jobs.items():
            for made in job.after:
                if made in waiting:
                    waiting[made].append(key)
        found: dict[tuple[str, str], tuple[float, list[Job]]] = {}

        def begun_by(key: tuple[str, str]) -> tuple[float, list[Job]]:
            if key not in found:
                job = self.jobs[key]
                seconds, chain = max(map(begun_by, waiting[key]), default=(0.0, []), key=_seconds)
                found[key] = seconds + job.cost.seconds, [job, *chain]
            return found[key]

        return {key: begun_by(key) for key in self.jobs}

    @property
    def longest_chain(self) -> tuple[float, list[Job]]:
        """Seconds of the chain of jobs that takes longest with a machine for every job, and the chain."""
        return max(self.chains.values(), default=(0.0, []), key=_seconds)


def _seconds(pair: tuple[float, list[Job]]) -> float:
    return pair[0]


def plan_project(
    project: Project, workdir: str | Path = ".", *, on: str | None = None, utilisation: float | None = None
) -> ProjectPlan:
    """The plan of a project. `workdir` is where prepared data and downloads are looked for, to be counted.

    on, utilisation: hardware and its share of the peak, in place of the project's own. Raises ValueError, one line,
    for unknown hardware.
    """
    return _Planner(
        project,
        Path(workdir),
        hardware(on or project.hardware, project.utilisation if utilisation is None else utilisation),
    ).plan()


class _Planner:
    """Collects the jobs of one project; each method adds those of one rule."""

    def __init__(self, project: Project, workdir: Path, machine: Hardware):
        self.project, self.workdir, self.machine = project, workdir, machine
        self.processor = hardware("cpu") if machine.is_gpu else machine
        self.jobs: dict[tuple[str, str], Job] = {}
        self.notes: list[str] = []
        self.shapes: dict[str, Shape | None] = {}
        self.data: dict[str, Prepared | None] = {}

    def plan(self) -> ProjectPlan:
        self._downloads()
        self._preparations()
        self._runs()
        self._evaluations()
        self._samples()
        self._speed()
        self._report()
        return ProjectPlan(self.project, self.machine, self.jobs, self.notes)

    # what the jobs share

    def shape(self, name: str) -> Shape | None:
        """The shape of a run's or model's root model; a downloaded config.json is checked against what is stated."""
        root = self.project.root_model(name)
        if root not in self.shapes:
            self.shapes[root] = self._looked_up(root)
        return self.shapes[root]

    def _looked_up(self, root: str) -> Shape | None:
        entry = self.project.models[root]
        downloaded = self._downloaded(root)
        if entry.new == {} and not downloaded:
            return self.shape(str(entry.tokenizer))
        if downloaded and entry.shape and (wrong := differences(entry.shape, downloaded)):
            self.notes.append(f"models.{root}.shape: {'; '.join(wrong)} in its config.json; correct the entry")
        try:
            shape = downloaded or shape_of(entry)
        except ValidationError as error:
            problem = error.errors()[0]
            self.notes.append(
                f"models.{root}.new: {problem['loc'][0]} = {problem['input']!r} is not a size; it is not planned"
            )
            return None
        if shape is None:
            self.notes.append(f"models.{root}: no `shape`, so what is made of it is not planned; state it")
        elif not is_known(shape):
            self.notes.append(f"models.{root}: {shape.model_type} is counted as if it were a llama; read as a guess")
        return shape

    def _downloaded(self, root: str) -> Shape | None:
        directory, stated = self.workdir / "downloads" / root, self.project.models[root].path
        if stated and not directory.exists():
            directory = checkpoint_directory(stated, self.project.root, f"models.{root}.path")
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            return translated(config)
        except (OSError, ValueError, TypeError):
            return None

    def place(self, resources: Resources) -> Place:
        """Where a job runs: on the accelerators it asks for, unless the plan is for a CPU."""
        devices = resources.nodes * resources.gpus_per_node
        if devices and self.machine.is_gpu:
            return Place(self.machine, devices, resources.cpus_per_task, resources.nodes)
        return Place(self.processor, 0, resources.nodes * resources.cpus_per_task, resources.nodes)

    def add(self, rule: str, name: str, cost: Cost | None, place: Place, **more: Any) -> None:
        """Add a job, with everything that is doubtful about it; cost: None if a size is not stated."""
        job = Job(rule, name, cost or Cost(), place, known=cost is not None, **more)
        doubts = list(job.warnings)
        if cost is None:
            doubts.append("cannot be planned: a size is not stated")
        if place.hardware.is_gpu and job.cost.device_gib > place.hardware.memory_gib:
            doubts.append(
                f"needs about {job.cost.device_gib:.0f} GiB on a device, a {place.hardware.name} has "
                f"{place.hardware.memory_gib:.0f}; lower micro_batch_size, or checkpoint activations"
            )
        stated = job.stated
        if stated.memory_gib and stated.memory_gib < job.cost.host_gib:
            doubts.append(f"resources.memory_gib = {stated.memory_gib}, predicted {job.cost.host_gib:.1f}")
        if stated.runtime_minutes and stated.runtime_minutes * 60 < job.cost.seconds:
            doubts.append(
                f"resources.runtime_minutes = {stated.runtime_minutes}, predicted {job.cost.seconds / 60:.0f}"
            )
        self.jobs[rule, name] = replace(job, warnings=tuple(doubts))

    # rule by rule

    def _downloads(self) -> None:
        for name, config in download_configs(self.project).items():
            size: float | None = None
            rate, after = DOWNLOAD_BYTES_PER_SECOND, list[tuple[str, str]]()
            if config.model:
                shape = self.shape(name)
                size = parameters(shape).total * 4 + (3e6 if config.model.hub else 0.1e6) if shape else None
                if config.tokenizer_path:
                    after = [("download", Path(config.tokenizer_path).name)]
            elif name == "pocket-world":
                size, rate = 5.2e6, 1e6  # made here, not fetched
            elif tokens := self.project.datasets[name].tokens:
                size = tokens * TEXT_BYTES * COMPRESSED
                size = min(size, SHARD_BYTES) if self.project.datasets[name].stream else size
            cost = Cost(seconds=5 + size / rate, host_gib=0.5, kept_gib=size / GIB) if size else None
            self.add("download", name, cost, Place(self.processor), after=tuple(after))

    def _preparations(self) -> None:
        for name, config in prepare_configs(self.project).items():
            shape = self.shape(Path(config.model_path).name)
            found = self.data[name] = prepared(config, self.workdir, shape.vocabulary) if shape else None
            sources = {("download", Path(part.path).name) for part in config.parts}
            cost, cores = None, 1
            if found:
                streamed = config.parts[0].entry.stream
                stored = [found.test] if streamed else [found.train, found.test]
                kept, rows = sum(split.tokens for split in stored), sum(split.rows for split in stored)
                read = kept if streamed else found.read_tokens
                source = found.read_rows if streamed else found.source_rows  # of a streamed set, one shard is there
                cores = max(1, min(MOST_CORES, int(found.read_rows / ROWS_PER_CORE)))
                size = (kept * found.bytes_per_token + rows * 12) / GIB
                cost = Cost(
                    tokens=read,
                    seconds=5 + (found.read_rows * ROW_SECONDS + read * TOKEN_SECONDS) / cores,
                    host_gib=PREPARE_GIB + PROCESS_GIB * cores + source * SOURCE_ROW_BYTES / GIB,
                    kept_gib=size,
                    scratch_gib=size,  # the shards, until they are joined
                )
            after = (*sorted(sources), ("download", Path(config.model_path).name))
            asked = Resources(cpus_per_task=cores)
            self.add("prepare", name, cost, self.place(asked), stated=asked, after=after)

    def _runs(self) -> None:
        for name, run in self.project.runs.items():
            data_name, shape = prepared_name(self.project, name), self.shape(name)
            data, place = self.data[data_name], self.place(run.resources)
            cost, doubts = None, []
            if shape and data:
                test_rows = self.project.datasets[run.data].test_rows
                cost = training(run, self.project.recipes[run.recipe], shape, data, place, test_rows)
                if run.length > shape.positions:
                    doubts.append(f"length = {run.length}, the model has {shape.positions} positions")
                if place.devices and run.global_batch_size % place.devices:
                    doubts.append(f"global_batch_size = {run.global_batch_size} does not divide by {place.devices}")
            bound = run.policy.bound_data if run.policy else None
            read = dict.fromkeys([data_name, prepared_name(self.project, name, bound)])
            after = (*(("prepare", prepared) for prepared in read), self._origin(run.init))
            self.add("train", name, cost, place, stated=run.resources, after=after, warnings=tuple(doubts))

    def _origin(self, name: str) -> tuple[str, str]:
        return ("train", name) if name in self.project.runs else ("download", name)

    def _evaluations(self) -> None:
        for row, entry in self.project.evaluations.items():
            place, shape = self.place(entry.resources), self.shape(entry.checkpoint)
            for name in self.project.benchmarks_of(entry):
                benchmark, cost = self.project.benchmarks[name], None
                if shape and benchmark.size:
                    cost = self._evaluation_cost(entry, benchmark, benchmark.size, shape, place)
                after = [self._origin(entry.checkpoint)]
                if benchmark.dataset:
                    after.append(("download", download_name(self.project, benchmark.dataset)))
                self.add("evaluate", f"{row}/{name}", cost, place, stated=entry.resources, after=tuple(after))

    def _evaluation_cost(
        self, entry: EvaluationEntry, benchmark: BenchmarkEntry, size: BenchmarkSize, shape: Shape, place: Place
    ) -> Cost:
        causal, scorer = entry.kind == "hf", self.project.scorer_of(entry)
        documents = min(size.documents, (benchmark.documents or size.documents) * size.tasks)
        room = max(1, shape.positions - (size.answer_tokens if size.choices else benchmark.generation.max_new_tokens))
        size = size.model_copy(update={"prompt_tokens": min(size.prompt_tokens, room)})
        sampler = overlaid(benchmark.generation, entry.generation)
        if size.choices:
            answers = likelihood_answers(size, documents, scorer, causal=causal, rows=sampler.batch_size)
        elif shape.model_type == DIFFUSION_GEMMA.stock:
            answers = renoised_answers(size.prompt_tokens, documents, sampler)
        else:
            hides = self._hides(entry.checkpoint, sampler.ahead)
            answers = generated_answers(size.prompt_tokens, documents, sampler, causal=causal, hides=hides)
        cost = scoring(answers, shape, place, precision=scorer.precision, causal=causal)
        written = documents * (size.prompt_tokens * TEXT_BYTES + 600) / GIB
        return replace(cost, kept_gib=written, scratch_gib=written / 4)

    def _hides(self, checkpoint: str, ahead: str) -> bool:
        """Whether a checkpoint does not see the blocks right of the active one."""
        run = self.project.runs.get(checkpoint)
        ends_at_block = run is not None and self.project.recipes[run.recipe].response_end == "block"
        return ahead == "hidden" or (ahead == "auto" and ends_at_block)

    def _samples(self) -> None:
        for name, entry in self.project.samples.items():
            turns = 1 + sum(len(conversation) for conversation in entry.conversations)
            # the turns of a conversation wait for each other, so nothing is batched
            settings = entry.generation.model_copy(update={"batch_size": 1})
            self._generation("sample", name, entry.checkpoint, turns, SAMPLE_PROMPT, [settings])

    def _speed(self) -> None:
        for name, entry in self.project.speed.items():
            settings = [entry.generation.model_copy(update={"steps": steps}) for steps in entry.steps]
            more = (("download", download_name(self.project, entry.questions.split("/")[0])),)
            self._generation("speed", name, entry.checkpoint, entry.documents, QUESTION_PROMPT, settings, more)

    def _generation(
        self,
        rule: str,
        name: str,
        checkpoint: str,
        documents: int,
        prompt: int,
        settings: list[GenerateSettings],
        after: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """A job that answers the same prompts under each of some settings, one process for all."""
        shape, cost = self.shape(checkpoint), None
        run = self.project.runs[checkpoint]
        place = self.place(Resources(gpus_per_node=min(1, run.resources.gpus_per_node)))
        if shape:
            costs = []
            for one in settings:
                room = max(1, shape.positions - one.max_new_tokens)
                hides = self._hides(checkpoint, one.ahead)
                answers = generated_answers(min(prompt, room), documents, one, causal=False, hides=hides)
                costs.append(scoring(answers, shape, place))
            start = place.hardware.startup_seconds
            sums = {name: sum(getattr(one, name) for one in costs) for name in ("tokens", "flops", "passes")}
            most = {name: max(getattr(one, name) for one in costs) for name in ("host_gib", "device_gib")}
            seconds = start + sum(one.seconds - start for one in costs)
            cost = Cost(**sums, **most, seconds=seconds, kept_gib=1e6 / GIB)
        self.add(rule, name, cost, place, after=(("train", checkpoint), *after))

    def _report(self) -> None:
        sources = tuple(key for key in self.jobs if key[0] in ("train", "evaluate", "sample", "speed"))
        for name in REPORT_JOBS:
            figures = name in ("figures", "page")
            cost = Cost(seconds=12 if name == "figures" else 4, host_gib=0.3, kept_gib=(10e6 if figures else 1e6) / GIB)
            after = sources if name != "page" else tuple(("report", job) for job in REPORT_JOBS if job != "page")
            self.add("report", name, cost, Place(self.processor), after=after)
