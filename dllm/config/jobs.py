"""Jobs: the config of each command, and how it follows from the entries. Paths are relative to the work directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer, model_validator

from dllm.algorithms import algorithm_named
from dllm.config.entries import (
    BenchmarkEntry,
    DatasetEntry,
    EvaluationEntry,
    ModelEntry,
    Project,
    RunEntry,
    RunSettings,
    SampleSettings,
    SpeedSettings,
    TaskSettings,
)
from dllm.config.policy import own_rewards
from dllm.config.rules import raise_first
from dllm.config.settings import Recipe, Scorer, Settings, is_none, option, overlaid
from dllm.config.sources import checkpoint_directory, checkpoint_files, content_digest, dataset_files, seen_from
from dllm.provenance import write_atomically


class Job(Settings):
    """The config of one job."""

    written_first: ClassVar[tuple[str, ...]] = ()
    """Settings that its file begins with. A file whose text changes runs its job again, so their order stays."""

    once_had: ClassVar[dict[str, Any]] = {}
    """Settings that were removed, with the value whose meaning stayed: a job that was done with it is done."""

    @model_serializer(mode="wrap")
    def in_order(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written = write(self)
        return {name: written[name] for name in (*self.written_first, *written) if name in written}


class DownloadConfig(Job):
    """What `dllm download` makes: one pinned model or dataset, or the synthetic world."""

    name: str = option(..., "name of the directory below downloads/")
    what: Literal["model", "dataset"] = option(..., "which of the two it is")
    model: ModelEntry | None = option(None, "entry of the model")
    dataset: DatasetEntry | None = option(None, "entry of the dataset")
    tokenizer_path: str | None = option(None, "download with the tokenizer of a new model, or with the same one")
    sources: list[str] | None = option(None, "files on this disk that are copied", exclude_if=is_none)
    content: str | None = option(None, "digest of what is in them: changed content is copied again", exclude_if=is_none)

    @model_validator(mode="after")
    def _check_entry(self) -> Self:
        if getattr(self, self.what) is None:
            raise ValueError(f"what = {self.what!r}, and there is no entry of a {self.what}; let the workflow write it")
        return self


class DataPart(Settings):
    """One source of a prepared dataset."""

    name: str = option(..., "name of the dataset")
    path: str = option(..., "directory of the download")
    entry: DatasetEntry = option(..., "its entry")


class PrepareConfig(Job):
    """What `dllm prepare` makes: token files of one dataset for one tokenizer and length."""

    name: str = option(..., "name of the directory below data/")
    parts: list[DataPart] = option(..., "datasets, concatenated split by split")
    model_path: str = option(..., "directory of the model whose tokenizer is used")
    model: ModelEntry = option(..., "its entry")
    length: int = option(..., "longest row, in tokens")
    split: Literal["disjoint", "overlapping"] = option(..., "as of a recipe")
    rows: int | None = option(None, "use only the first rows of the shuffled train split")


class RunConfig(Job, RunSettings):
    """The config of `dllm train`."""

    once_had = {"layout": "packed", "head_chunk": None}
    written_first = ("name", "algorithm", "init", "init_path", "model", "data", "data_path", "recipe_name", "recipe")

    name: str = option(..., "name of the directory below runs/")
    init_path: str = option(..., "directory of the model to start from")
    model: ModelEntry = option(..., "entry of the model at the root of the chain of `init`")
    data_path: str = option(..., "directory of the token files")
    test_rows: int | None = option(None, "of the dataset's entry", gt=0, exclude_if=is_none)
    recipe_name: str = option(..., "name of the recipe")
    recipe: Recipe = option(..., "the recipe itself")
    policy_data_path: str | None = option(
        None, "directory of the token files of `policy.bound_data`", exclude_if=is_none
    )
    policy_content: str | None = option(
        None, "digest of the files of rewards: changed rewards train again", exclude_if=is_none
    )

    @property
    def bound_path(self) -> str:
        """Directory of the token files whose test rows the bound is evaluated on."""
        return self.policy_data_path or self.data_path

    @model_validator(mode="after")
    def the_recipe_is_allowed(self) -> RunConfig:
        if error := algorithm_named(self.algorithm).recipe_error(self.recipe):
            raise_first(f"recipe {self.recipe_name!r} {error}")
        return self


class EvaluationConfig(Job, TaskSettings):
    """One number of the results table before it is known."""

    written_first = (
        *("run", "checkpoint", "model_kind", "benchmark", "task", "task_directory", "data", "revision", "shots"),
        *("fewshot_as_multiturn", "chat_template", "metric", "filter", "further_metrics", "chance", "limit"),
        *("generation", "scorer", "seed"),
    )

    run: str = option(..., "name of the evaluated row; the scores are written to evals/<run>/<benchmark>.json")
    checkpoint: str = option(..., "directory of the model")
    model_kind: Literal["dllm", "hf"] = option(
        "dllm", "a diffusion model, or an autoregressive one through lm-eval's `hf`"
    )
    benchmark: str = option(..., "name of the benchmark")
    task_directory: str | None = option(
        None, "directory of task files: `miniature`, or a path; none means lm-eval's own task"
    )
    data: str | None = option(
        None, "directory the task files read as {DATA}; of a stock task: the fetched snapshot of its dataset"
    )
    shots: int | None = option(None, "examples in the prompt; none keeps the task's own number", ge=0)
    fewshot_as_multiturn: bool = option(False, "examples as turns of the conversation, not as one user turn")
    chat_template: bool = option(True, "wrap prompts in the chat template, exactly as in training")
    further_metrics: list[str] = option([], "metrics that must be there too: `acc_norm` or `exact_match,strict-match`")
    chance: float | None = option(None, "score of guessing, as a share", ge=0, le=1)
    limit: int | None = option(None, "score only the first documents of each task", gt=0)
    scorer: Scorer = option(Scorer(), "rules of the likelihood")
    expected_documents: int | None = option(
        None, "documents of all its tasks; another number is an error", gt=0, exclude_if=is_none
    )


class SampleConfig(Job, SampleSettings):
    """Conversations and the filmstrip shown in the report."""

    written_first = ("run", "checkpoint", "conversations", "film_prompt")

    run: str = option(..., "name of the sampled run")
    checkpoint: str = option(..., "directory of the model")
    film_prompt: str = option(..., "prompt of the filmstrip")


class SpeedConfig(Job, SpeedSettings):
    """Steps and decoding options against time and quality, measured on one run."""

    written_first = ("run", "checkpoint", "questions", "prompt", "answer", "limit")

    run: str = option(..., "name of the measured run")
    checkpoint: str = option(..., "directory of the model")
    questions: str = option(..., "jsonl file; rows with question and answer")
    limit: int = option(64, "questions asked: the first ones of the file", gt=0)


# --------------------------------------------------------------------------------------------------------------------
# Names and paths


def checkpoint_path(project: Project, name: str) -> str:
    """Directory of the model that a run or a download brings."""
    return f"runs/{name}/model" if name in project.runs else f"downloads/{name}"


def download_name(project: Project, dataset: str) -> str:
    """Name of the download that brings a dataset; all parts of the synthetic world are one download."""
    return "pocket-world" if project.datasets[dataset].world else dataset


def download_path(project: Project, dataset: str) -> str:
    """Directory of the download that brings a dataset."""
    return f"downloads/{download_name(project, dataset)}"


def prepared_name(project: Project, run: str, data: str | None = None) -> str:
    """Name of the token files a run reads: dataset, tokenizer, length (and the published split, where asked for).

    data: another dataset than the run's own.
    """
    entry = project.runs[run]
    entry = entry.model_copy(update={"data": data}) if data else entry
    root = project.root_model(run)
    # a stand-in of a published family has that family's special tokens and template on top
    tokenizer = root if project.models[root].published else _tokenizer_of(project, root)
    if tokenizer in project.models and project.models[tokenizer].special != project.models[root].special:
        tokenizer = root
    leaky = "--overlapping" if _overlapping(project, entry) else ""
    return f"{entry.data}--{tokenizer}--{entry.length}{leaky}"


def _tokenizer_of(project: Project, model: str) -> str:
    """Name of the dataset or model that brings a model's tokenizer, or stands for all models that have it."""
    other = project.models[model].tokenizer
    return model if other is None else other if other in project.datasets else _tokenizer_of(project, other)


def _overlapping(project: Project, run: RunEntry) -> bool:
    """Whether a run reads the published split: it concerns instruction sets that come without a test split (F7)."""
    dataset = project.datasets[run.data]
    parts = [project.datasets[name] for name in dataset.mix or [run.data]]
    leaky = [part for part in parts if part.kind != "text" and part.test_split is None]
    return bool(leaky) and project.recipes[run.recipe].split == "overlapping"


# --------------------------------------------------------------------------------------------------------------------
# From entries to jobs


def download_configs(project: Project) -> dict[str, DownloadConfig]:
    """What must be fetched (or made), by name: only what a run or an evaluation uses."""
    configs: dict[str, DownloadConfig] = {}

    def need_dataset(name: str) -> None:
        entry = project.datasets[name]
        for part in entry.mix or []:
            need_dataset(part)
        if entry.mix is None:
            download = download_name(project, name)
            whole = DatasetEntry(world="all", seed=project.world_seed, kind="world") if entry.world else entry
            whole = whole.model_copy(update={"counts": None})  # checked where rows are read: nothing is fetched again
            configs[download] = DownloadConfig(
                name=download, what="dataset", dataset=whole, **_own_files(project, name, entry)
            )

    def need_model(name: str) -> None:
        entry, path = project.models[name], None
        if entry.tokenizer in project.datasets:
            need_dataset(entry.tokenizer)
            path = download_path(project, entry.tokenizer)
        elif entry.tokenizer:
            need_model(entry.tokenizer)
            path = f"downloads/{entry.tokenizer}"
        configs[name] = DownloadConfig(
            name=name, what="model", model=entry, tokenizer_path=path, **_own_checkpoint(project, name, entry)
        )

    for name, data in runs_and_data(project):
        need_model(project.root_model(name))
        need_dataset(data)
    for row in project.evaluations.values():
        need_model(project.root_model(row.checkpoint))
    for benchmark in project.benchmarks.values() if project.evaluations else ():
        if benchmark.dataset:
            need_dataset(benchmark.dataset)
    for timing in project.speed.values():
        need_dataset(timing.questions.split("/")[0])
    return configs


def _own_files(project: Project, name: str, entry: DatasetEntry) -> dict[str, Any]:
    """`sources` and `content` of a dataset of files on this disk."""
    if not entry.files:
        return {}
    where, workdir = f"datasets.{name}.files", project.root / project.workdir
    files = {path: stated for stated in entry.files for path in dataset_files([stated], project.root, where)}
    return {
        "sources": [seen_from(path, stated, workdir) for path, stated in files.items()],
        "content": content_digest(files),
    }


def _own_checkpoint(project: Project, name: str, entry: ModelEntry) -> dict[str, Any]:
    """`sources` and `content` of a checkpoint on this disk."""
    if not entry.path:
        return {}
    files = checkpoint_files(checkpoint_directory(entry.path, project.root, f"models.{name}.path"))
    sources = [seen_from(path, entry.path, project.root / project.workdir) for path in files]
    return {"sources": sources, "content": content_digest(files)}


def runs_and_data(project: Project) -> list[tuple[str, str]]:
    """Every run with each dataset that it reads."""
    pairs = [(name, run.data) for name, run in project.runs.items()]
    return pairs + [
        (n, run.policy.bound_data) for n, run in project.runs.items() if run.policy and run.policy.bound_data
    ]


def prepare_configs(project: Project) -> dict[str, PrepareConfig]:
    """The token files that the runs read, by name."""
    configs: dict[str, PrepareConfig] = {}
    for run, data in runs_and_data(project):
        entry = project.runs[run].model_copy(update={"data": data})
        name, root, dataset = prepared_name(project, run, data), project.root_model(run), project.datasets[data]
        if name in configs:  # models that share a tokenizer share its token files; the first one names them
            continue
        configs[name] = PrepareConfig(
            name=name,
            parts=[
                DataPart(name=part, path=download_path(project, part), entry=project.datasets[part])
                for part in dataset.mix or [entry.data]
            ],
            model_path=checkpoint_path(project, root),
            model=project.models[root],
            length=entry.length,
            split="overlapping" if _overlapping(project, entry) else "disjoint",
            rows=dataset.rows,
        )
    return configs


def run_configs(project: Project) -> dict[str, RunConfig]:
    """The config of each training run, by name."""
    configs = {}
    for name, entry in project.runs.items():
        data = prepared_name(project, name)
        configs[name] = RunConfig(
            **(_shared(entry, RunSettings, but="data") | _of_policy(project, name, entry)),
            name=name,
            init_path=checkpoint_path(project, entry.init),
            model=project.models[project.root_model(name)],
            data=data,
            data_path=f"data/{data}",
            test_rows=project.datasets[entry.data].test_rows,
            recipe_name=entry.recipe,
            recipe=project.recipes[entry.recipe],
        )
    return configs


def _of_policy(project: Project, run: str, entry: RunEntry) -> dict[str, Any]:
    """The settings of a run that learns from rewards, with its data and files in place of their names."""
    policy = entry.policy
    if policy is None:
        return {}
    found = own_rewards(policy, project.root, project.root / project.workdir)
    if policy.bound_data:
        found["policy_data_path"] = f"data/{prepared_name(project, run, policy.bound_data)}"
    return found


def evaluation_configs(project: Project) -> dict[tuple[str, str], EvaluationConfig]:
    """The config of each evaluation, by row and benchmark of the results table."""
    return {
        (row, benchmark): _evaluation(project, row, entry, benchmark, project.benchmarks[benchmark])
        for row, entry in project.evaluations.items()
        for benchmark in project.benchmarks_of(entry)
    }


def _evaluation(
    project: Project, row: str, entry: EvaluationEntry, name: str, benchmark: BenchmarkEntry
) -> EvaluationConfig:
    size = benchmark.size
    miniature, scorer = benchmark.tasks_from == "miniature", project.scorer_of(entry)
    data = None
    if benchmark.dataset:
        data = download_path(project, benchmark.dataset) + ("/benchmarks" if miniature else "")
    return EvaluationConfig(
        **_shared(benchmark, TaskSettings, but="generation"),
        run=row,
        checkpoint=checkpoint_path(project, entry.checkpoint),
        model_kind=entry.kind,
        benchmark=name,
        task_directory="miniature" if miniature else None,
        data=data,
        shots=benchmark.shots,
        fewshot_as_multiturn=entry.chat_template and benchmark.shots > 0 and scorer.fewshot_as_multiturn,
        chat_template=entry.chat_template,
        further_metrics=benchmark.also,
        chance=benchmark.chance,
        limit=benchmark.documents,
        generation=overlaid(benchmark.generation, entry.generation),
        scorer=scorer,
        expected_documents=size.documents if size and size.exact and not miniature else None,
    )


def sample_configs(project: Project) -> dict[str, SampleConfig]:
    """The config of each `dllm sample` for the report, by name."""
    return {
        name: SampleConfig(
            **_shared(entry, SampleSettings),
            run=name,
            checkpoint=checkpoint_path(project, entry.checkpoint),
            film_prompt=entry.film,
        )
        for name, entry in project.samples.items()
    }


def speed_configs(project: Project) -> dict[str, SpeedConfig]:
    """The config of each `dllm speed`, by name."""
    configs = {}
    for name, entry in project.speed.items():
        dataset, _, file = entry.questions.partition("/")
        configs[name] = SpeedConfig(
            **_shared(entry, SpeedSettings),
            run=name,
            checkpoint=checkpoint_path(project, entry.checkpoint),
            questions=f"{download_path(project, dataset)}/{file}",
            limit=entry.documents,
        )
    return configs


def _shared(entry: Settings, settings: type[Settings], *, but: str = "") -> dict[str, Any]:
    """The settings that an entry and its job have in common, except one that the job resolves."""
    return {name: getattr(entry, name) for name in settings.model_fields if name != but}


# --------------------------------------------------------------------------------------------------------------------
# Files


def digest(settings: BaseModel | dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of a settings object's canonical JSON."""
    content = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    content = getattr(settings, "once_had", {}) | content
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_when_changed(path: str | Path, settings: BaseModel | dict[str, Any]) -> Path:
    """Write a config as YAML, atomically and only if its content differs, and return its path."""
    path, text = Path(path), yaml_text(settings)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return path
    write_atomically(path, text)
    return path


def yaml_text(settings: BaseModel | dict[str, Any]) -> str:
    """A settings object as YAML."""
    content = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the same text five times as fast, where it is built
    return yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True, width=118)


def schema() -> dict[str, Any]:
    """JSON schema of the merged configuration, for editors."""
    return Project.model_json_schema()
