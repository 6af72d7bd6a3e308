"""Entries: what a person writes in `config/*.yaml`. One entry reads as one sentence; an overlay holds what differs.

A job (`dllm.config.jobs`) is an entry with every name replaced by a path: what both have in common is stated once, in
RunSettings, TaskSettings, SampleSettings and SpeedSettings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import PrivateAttr, model_validator

from dllm.config.policy import PolicySettings, PreferenceSettings
from dllm.config.rules import adapter_error, budget_error, launch_error, policy_error, raise_first, tokens_error
from dllm.config.settings import (
    DECODING_OPTIONS,
    LARGEST_SEED,
    MANY,
    AdapterSettings,
    AlgorithmName,
    EditSettings,
    FamilyName,
    GenerateSettings,
    OptimizerSettings,
    Recipe,
    Resources,
    RowKindName,
    Scorer,
    Settings,
    checked_options,
    is_none,
    left_at,
    option,
)
from dllm.config.shape import Shape

LONGEST_NAME = 80
"""Letters of an entry's name: names of two entries and more become one file name, which has 255 at most."""

NAME = re.compile(rf"^(?=.{{1,{LONGEST_NAME}}}$)[a-z0-9]+([.-][a-z0-9]+)*$")
REVISION = re.compile(r"^[0-9a-f]{40}$")

HardwareName = Literal["h200", "h100", "a100-80gb", "a100-40gb", "rtx-4090", "cpu"]
HARDWARE: tuple[HardwareName, ...] = get_args(HardwareName)
"""Names of what `dllm plan` can plan for; the figures are in `dllm.planning.hardware`."""


class Pinned(Settings):
    """Something that may be a repository of the hub, at one commit."""

    hub: str | None = option(None, "hub repository")
    revision: str | None = option(None, "40-digit commit; a branch name is refused")

    @model_validator(mode="after")
    def one_commit(self) -> Pinned:
        if self.hub and not (self.revision and REVISION.match(self.revision)):
            raise ValueError(
                f"revision = {self.revision!r} is not a pinned commit; allowed: 40 hexadecimal digits; "
                "look the commit up on the hub's page of the repository"
            )
        return self


class ModelEntry(Pinned):
    """A backbone: a pinned hub repository, a checkpoint on this disk, or a new stock model with random weights."""

    path: str | None = option(
        None, "directory of a checkpoint on this disk, absolute or below the repository", exclude_if=is_none
    )
    new: dict[str, Any] | None = option(
        None,
        "transformers config of a model made from a seed (model_type first); {}: that of the model that brings the "
        "tokenizer, with new random weights",
    )
    published: FamilyName | None = option(
        None, "a `new` model is a stand-in of this family: `new` is its config.json, its tensors have published names"
    )
    seed: int = option(0, "seed of a new model's weights", ge=0, le=LARGEST_SEED)
    tokenizer: str | None = option(
        None, "dataset or model whose tokenizer a new model takes; or a model that has the same tokenizer"
    )
    family: Literal["encoder", "decoder"] = option("encoder", "masked-LM or causal-LM class of transformers")
    prediction: Literal["in_place", "next"] = option("in_place", "whether position i scores token i or token i + 1")
    mask_token: str = option(
        "[MASK]", "token that stands for a masked position; a decoder whose tokenizer has none is given it"
    )
    end_token: str = option("[PAD]", "end of text, padding and start in one")
    end_of_turn: str = option("[/Answer]", "string that ends an answer")
    chat_template: Literal["bert", "own"] = option("bert", "our plain-text template, or the tokenizer's own")
    # for planning only, and so not part of a job's config: a better estimate reruns nothing
    parameters: int | None = option(None, "number of parameters, for planning", gt=0, exclude=True)
    shape: Shape | None = option(None, "sizes of a hub model, for planning", exclude=True)
    licence: str | None = option(None, "licence as its card states it", exclude=True)

    @property
    def special(self) -> tuple[str, ...]:
        """What it changes of its tokenizer."""
        return self.mask_token, self.end_token, self.chat_template

    @model_validator(mode="after")
    def one_source(self) -> ModelEntry:
        if sum(source is not None for source in (self.hub, self.path, self.new)) != 1:
            raise ValueError("needs exactly one of `hub`, `path` and `new`")
        if self.new is not None and not self.tokenizer:
            raise ValueError("a `new` model needs `tokenizer`: the dataset or model that brings one")
        if self.published and not self.new:
            raise ValueError(f"published = {self.published!r} is for a `new` model; leave it out of a hub model")
        return self


class DatasetEntry(Pinned):
    """Rows of text or of conversations: a hub repository, files on this disk, the synthetic world, or a mixture."""

    files: list[str] | None = option(
        None,
        "one or several files of this disk, or patterns (data/*.jsonl), absolute or below the repository; docs/tune.md",
        min_length=1,
        exclude_if=is_none,
    )
    config: str | None = option(None, "the repository's configuration")
    world: str | None = option(
        None, "part of the synthetic world (wikitext, openwebtext, alpaca, tulu, smoltalk, code, all)"
    )
    seed: int = option(0, "seed of the synthetic world", ge=0, le=LARGEST_SEED)
    mix: list[str] | None = option(None, "names of datasets, concatenated split by split")
    kind: RowKindName = option("text", "how a row is read; `auto`, the default of `files`, goes by its columns")
    test_split: str | None = option(None, "name of the set's own test split")
    test_share: float = option(0.05, "share held out where the set has no test split", ge=0, lt=1)
    split_seed: int = option(42, "seed of that split", ge=0, le=LARGEST_SEED)
    append_eos: bool = option(True, "one EOS after every row of text")
    drop_unusable: bool = option(
        False, "drop and count rows without messages or with an empty turn, instead of stopping there"
    )
    rows: int | None = option(None, "use only the first rows of the shuffled train split", gt=0)
    test_rows: int | None = option(
        None,
        "most rows of the test split that are evaluated, spread over it; before the end, a run's `eval_rows` counts",
        gt=0,
        exclude=True,
    )
    stream: bool = option(False, "read its shards over the network while training, and store only one: the test rows")
    shuffle_rows: int = option(16_384, "rows of text shuffled together while a set is streamed", gt=0)
    licence: str | None = option(None, "licence as its card states it; shown when it is fetched")
    counts: dict[str, int] | None = option(
        None, "rows of its splits, exactly; another number is an error", exclude_if=is_none
    )
    # for planning only, until the set is prepared and counted
    documents: int | None = option(None, "rows of the train split, about, for planning", gt=0, exclude=True)
    tokens: int | None = option(None, "tokens of the train split, about, for planning", gt=0, exclude=True)
    test_documents: int | None = option(None, "rows of its own test split, for planning", gt=0, exclude=True)
    target_share: float | None = option(
        None, "share of a conversation's tokens in its last answer, for planning", gt=0, le=1, exclude=True
    )

    @model_validator(mode="before")
    @classmethod
    def files_are_recognised(cls, given: Any) -> Any:
        files = given.get("files") if isinstance(given, dict) else None
        return {"kind": "auto"} | given | {"files": [files] if isinstance(files, str) else files} if files else given

    @model_validator(mode="after")
    def one_source(self) -> DatasetEntry:
        if sum(x is not None for x in (self.hub, self.files, self.world, self.mix)) != 1:
            raise ValueError("needs exactly one of `hub`, `files`, `world` and `mix`")
        if self.files and self.test_split:
            raise ValueError(f"test_split = {self.test_split!r}, and `files` have no splits; set test_share")
        if self.stream and (self.hub is None or self.kind != "text" or self.test_split or self.rows):
            raise ValueError(
                "stream = true is for text from the hub that is used whole and has no test split of its own; "
                "leave out `test_split` and `rows`, or set stream to false"
            )
        return self


class RunSettings(Settings):
    """How one model is trained."""

    algorithm: AlgorithmName = option(
        "mdlm", "masks, blocks, hybrid noise, masked LM, next tokens, edits, rewards, pairs"
    )
    init: str = option(..., "model or run to start from")
    data: str = option(..., "dataset")
    length: int = option(512, "longest row, in tokens", gt=0, le=MANY)
    epochs: float | None = option(None, "passes over the data", ge=1e-6, le=MANY)
    steps: int | None = option(None, "optimiser steps", gt=0, le=10**9)
    stop_after: int | None = option(None, "stop here although the schedule is laid out for all steps", gt=0, le=10**9)
    global_batch_size: int = option(512, "rows per optimiser step, whatever the number of devices", gt=0, le=2**24)
    micro_batch_size: int = option(64, "most rows per device and forward pass", gt=0, le=2**24)
    optimizer: OptimizerSettings = option(OptimizerSettings(), "optimiser and schedule")
    seed: int = option(42, "seed of order and noise", ge=0, le=LARGEST_SEED)
    mlm_share: float = option(0.3, "share of tokens masked by `mlm`", ge=1e-3, lt=1)
    uniform_share: float = option(
        0.2, "most tokens that `hybrid` replaces by random ones, as a share", ge=0, le=1, exclude_if=left_at(0.2)
    )
    evaluations: int = option(10, "evaluations (and checkpoints) over the run", gt=0, le=MANY)
    eval_rows: int | None = option(None, "use only the first rows of the test split", gt=0)
    eval_draws: int = option(1, "noise draws per test row", gt=0, le=MANY)
    micro_batch_tokens: int | None = option(
        None, "most tokens per device and forward pass; not used where the denominator is `micro_batch`", gt=0
    )
    activation_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory")
    compile: bool = option(False, "torch.compile of the backbone")
    edits: EditSettings = option(EditSettings(), "starts and times of `edit_flows`")
    adapter: AdapterSettings | None = option(None, "train LoRA adapters only; none: all weights")
    policy: PolicySettings | None = option(None, "rewards, answers and likelihoods of `grpo`", exclude_if=is_none)
    preferences: PreferenceSettings = option(
        PreferenceSettings(), "weight and passes of `dpo`", exclude_if=left_at(PreferenceSettings())
    )

    @model_validator(mode="after")
    def fits_together(self) -> RunSettings:
        raise_first(
            budget_error(self.epochs, self.steps),
            tokens_error(self.micro_batch_tokens, self.length),
            adapter_error(self.adapter, self.optimizer),
            policy_error(self.algorithm, self.policy, self.global_batch_size),
        )
        return self


class RunEntry(RunSettings):
    """One training run; `init` names a model or another run, which is the edge of the graph."""

    like: str | None = option(None, "another run whose settings are taken where this entry has none")
    recipe: str = option("corrected", "name of a recipe")
    launch: Literal["cpu", "gpu", "ddp", "zero1", "zero2", "zero3", "fsdp"] = option("ddp", "file in config/accelerate")
    resources: Resources = option(Resources(), "what a cluster job asks for")

    @model_validator(mode="after")
    def can_be_launched(self) -> RunEntry:
        quantized = self.adapter is not None and self.adapter.kind == "qlora"
        raise_first(launch_error(self.launch, self.optimizer.name, quantized=quantized))
        return self


class BenchmarkSize(Settings):
    """What a benchmark asks, about, for planning."""

    documents: int = option(..., "questions", gt=0)
    exact: bool = option(False, "`documents` is exact: of a stock task, another number is an error")
    tasks: int = option(1, "tasks of the group that it is; `documents` of a benchmark counts for each of them", gt=0)
    choices: int = option(0, "answers scored per question; 0 means a free answer is generated", ge=0)
    prompt_tokens: int = option(..., "mean prompt, examples included", gt=0)
    answer_tokens: int = option(1, "mean length of a scored answer", gt=0)
    one_prompt: bool = option(True, "whether the answers of a question continue the same prompt")
    greedy: bool = option(False, "whether it is also asked if the answer is the greedy one")


class TaskSettings(Settings):
    """One lm-eval task and what is reported of it."""

    task: str = option(..., "lm-eval task or group")
    revision: str | None = option(None, "pinned commit of the task's dataset on the hub, where it is not downloaded")
    metric: str = option("acc", "headline metric, as lm-eval names it")
    filter: str = option("none", "filter of the headline metric")
    generation: GenerateSettings = option(GenerateSettings(), "sampler of generative tasks")
    seed: int = option(1234, "seed of the examples in the prompt", ge=0, le=LARGEST_SEED)


class BenchmarkEntry(TaskSettings):
    """One benchmark setting: an lm-eval task and what is reported of it."""

    label: str = option(..., "column head of the results table")
    tasks_from: Literal["stock", "miniature"] = option("stock", "lm-eval's own task files, or our miniatures")
    dataset: str | None = option(None, "dataset whose downloaded files the task reads")
    shots: int = option(0, "examples in the prompt", ge=0)
    also: list[str] = option([], "further metrics to report")
    chance: float = option(0.0, "score of guessing, as a share", ge=0, le=1)
    reported_chance: float | None = option(
        None, "score of guessing on the benchmark of the published numbers, if this is a miniature of it", ge=0, le=1
    )
    documents: int | None = option(None, "score only the first documents of each task", gt=0)
    by_name: bool = option(False, "only for rows that name it in `benchmarks`, not for those that have all")
    size: BenchmarkSize | None = option(None, "what it asks, for planning")


class EvaluationEntry(Settings):
    """One row of the results table: a checkpoint, scored on benchmarks."""

    checkpoint: str = option(..., "run or model")
    label: str = option(..., "row head of the results table")
    kind: Literal["dllm", "hf"] = option("dllm", "`hf`: an autoregressive model, through lm-eval's own adapter")
    scorer: str = option("corrected", "name of a scorer")
    benchmarks: list[str] | None = option(None, "names; none means all that are not `by_name`")
    chat_template: bool = option(True, "wrap prompts in the chat template, as in training")
    generation: dict[str, Any] = option({}, "what it changes of the benchmarks' samplers")
    precision: Literal["fp32", "mixed", "bf16"] | None = option(
        None, "as of a scorer; none means that of this row's scorer"
    )
    compare: str | None = option(None, "row of the reported table to compare with")
    close_to: str | None = option(None, "reported row that this model is claimed to come close to")
    control: bool = option(False, "a model that should stay at chance")
    resources: Resources = option(Resources(), "what a cluster job asks for")


class SpeedSettings(Settings):
    """Numbers of steps and ways to decode that are compared on one model."""

    prompt: str = option("{question}", "how a question is put; {question} stands for it")
    answer: str = option(r"(.*)", "regular expression whose first group, in a reference answer, is the answer sought")
    steps: list[int] = option(..., "numbers of steps to compare", min_length=1)
    generation: GenerateSettings = option(GenerateSettings(), "sampler")
    options: dict[str, dict[str, Any]] = option(
        DECODING_OPTIONS, "other decoding to compare with the exact one: name -> what it changes of `generation`"
    )

    @model_validator(mode="after")
    def known_options(self) -> SpeedSettings:
        checked_options(self.options, self.generation)
        return self


class SpeedEntry(SpeedSettings):
    """Steps against time and quality, measured on one run."""

    checkpoint: str = option(..., "run")
    questions: str = option(
        ...,
        "jsonl or parquet file under a download: `<dataset>/<file>`, rows with question and answer, or with choices; "
        "`*` stands for several files",
    )
    documents: int = option(64, "questions asked", gt=0)


class SampleSettings(Settings):
    """Conversations with one model."""

    conversations: list[list[str]] = option(..., "user turns of each conversation", min_length=1)
    generation: GenerateSettings = option(GenerateSettings(), "sampler")


class SampleEntry(SampleSettings):
    """Conversations and the filmstrip shown in the report."""

    checkpoint: str = option(..., "run")
    film: str = option(..., "prompt of the filmstrip")


class CurveEntry(Settings):
    """One curve of a figure."""

    run: str = option(..., "run")
    label: str = option(..., "name in the legend")


class ReportEntry(Settings):
    """What the report shows."""

    title: str = option("Results", "title of the page")
    toy: bool = option(False, "say plainly that these are toy numbers")
    pretraining: list[CurveEntry] = option([], "encoders on Wikitext")
    openwebtext: list[CurveEntry] = option([], "pretraining on OpenWebText")
    ablation: list[CurveEntry] = option([], "the starts of the Alpaca ablation")
    chat: list[CurveEntry] = option([], "chat training")
    policies: list[CurveEntry] = option([], "learning from rewards; runs with one label are seeds of each other")
    preferences: list[CurveEntry] = option([], "learning from preferences")
    systems: list[str] = option([], "evaluations whose models are compared with each other")
    starts: list[str] = option(
        [], "the same where the models differ in the weights they start from: claims on pretraining and size are judged"
    )
    leaderboard: list[str] = option([], "evaluations that the leaderboard ranks, on a page of its own")
    missing: dict[str, str] = option({}, "models that the leaderboard names without scores: label to reason")


class ReportedEntry(Settings):
    """A published row of numbers, in percent, with its source."""

    label: str = option(..., "row head")
    source: str = option(..., "where it was published")
    note: str = option("", "what a reader should know of it")
    by_name: bool = option(False, "shown only where a row compares with it", exclude=True)
    scores: dict[str, float | int] = option(..., "benchmark name to percent")


class Rehearsal(Settings):
    """The most that a rehearsal keeps of everything: the whole graph, cut short (`dllm.config.rehearsal`)."""

    rows: int = option(256, "train rows of a dataset", gt=0)
    test_rows: int = option(64, "test rows of a dataset", gt=0)
    length: int = option(128, "tokens of a row", gt=0)
    steps: int = option(2, "optimiser steps of a run", gt=0)
    batch: int = option(4, "rows of an optimiser step, made of two micro-batches", ge=2, multiple_of=2)
    documents: int = option(1, "documents of each task of a benchmark, and questions of a measurement of speed", gt=0)
    shots: int = option(1, "examples in a prompt", ge=0)
    passes: int = option(5, "forward passes for an answer, scored or generated", ge=5)
    draws: int = option(2, "draws of the estimator `mc`", gt=0)
    new_tokens: int = option(16, "tokens of an answer", ge=2)
    batch_tokens: int = option(4096, "tokens of a forward batch", gt=0)
    conversations: int = option(1, "sample conversations", gt=0)


class Project(Settings):
    """Everything one work directory holds: entries by name."""

    workdir: str = option(..., "where everything of this configuration is written")
    cache: Literal["none", "dvc"] = option(
        "none", "where data and weights are kept: also in a DVC cache, or in the work directory only"
    )
    world_seed: int = option(0, "seed of the synthetic world", ge=0, le=LARGEST_SEED)
    hardware: HardwareName = option("cpu", "what the plan assumes of a GPU job (`cpu`: of every job)")
    utilisation: float | None = option(None, "share of the hardware's peak that training reaches", gt=0, le=1)
    models: dict[str, ModelEntry] = option(..., "backbones")
    datasets: dict[str, DatasetEntry] = option(..., "datasets")
    recipes: dict[str, Recipe] = option(..., "training recipes")
    runs: dict[str, RunEntry] = option(..., "training runs")
    scorers: dict[str, Scorer] = option({}, "ways to score")
    benchmarks: dict[str, BenchmarkEntry] = option({}, "benchmarks")
    evaluations: dict[str, EvaluationEntry] = option({}, "rows of the results table")
    reported: dict[str, ReportedEntry] = option({}, "published rows")
    samples: dict[str, SampleEntry] = option({}, "conversations shown in the report")
    speed: dict[str, SpeedEntry] = option({}, "steps against time and quality")
    report: ReportEntry = option(ReportEntry(), "the report")
    rehearsal: Rehearsal | None = option(None, "run all of it cut short, in a work directory of its own")
    _root: Path = PrivateAttr(Path("."))

    @property
    def root(self) -> Path:
        """The directory that `files`, `path` and `workdir` of the entries start from."""
        return self._root

    def below(self, root: Path) -> Project:
        """This project, with paths that start from `root`."""
        self._root = root
        return self

    def scorer_of(self, entry: EvaluationEntry) -> Scorer:
        """The rules of an evaluation, in its own precision if it states one."""
        scorer = self.scorers[entry.scorer]
        return scorer if entry.precision is None else scorer.model_copy(update={"precision": entry.precision})

    def benchmarks_of(self, entry: EvaluationEntry) -> list[str]:
        """Names of the benchmarks that a row of the results table is scored on."""
        return entry.benchmarks or [name for name, benchmark in self.benchmarks.items() if not benchmark.by_name]

    def stages(self, run: str) -> list[str]:
        """The runs that make a run, each of which starts from the one before, itself the last; none for a model."""
        chain: list[str] = []
        while run in self.runs:
            chain.insert(0, run)
            run = self.runs[run].init
        return chain

    def root_model(self, name: str) -> str:
        """Name of the model at the root of a run's chain of `init`."""
        while name in self.runs:
            name = self.runs[name].init
        return name
