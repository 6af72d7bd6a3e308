"""Every setting of the project: what may stand in `config/*.yaml`, and what a job is told.

Two kinds of models live here. *Entries* are what a person writes: one entry reads as one sentence, an overlay holds
only what differs. *Configs* are what a job reads: an entry merged, checked and with every name replaced by a path.
This module reads YAML for everybody else and imports no torch, so that planning and `--help` stay quick.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from dllm.algorithms import ALGORITHMS, algorithm_named
from dllm.provenance import write_atomically

CONFIG_FILES = ("models", "datasets", "experiments", "benchmarks", "reported")


class Settings(BaseModel):
    """A frozen, strict settings object: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


AlgorithmName = Annotated[
    str,
    AfterValidator(lambda name: algorithm_named(name).name),
    WithJsonSchema({"enum": list(ALGORITHMS), "type": "string"}),
]
"""The name of a row in the table of algorithms."""


def option(default: Any = ..., text: str = "", **limits: Any) -> Any:
    """A field with one line of help; `limits` are pydantic's (ge, gt, le, lt)."""
    return Field(default, description=text, **limits)


# --------------------------------------------------------------------------------------------------------------------
# Settings that the package's functions take


class EditSampling(Settings):
    """How Edit Flows samples, beside the steps, temperature, top_p, guidance, seed and length of GenerateSettings."""

    masks: Literal["auto", "drop", "keep"] = option(
        "auto", "masks of the canvas: start without them, or edit them; `auto` keeps them if training had such starts"
    )
    reverse: float = option(0.0, "each step goes so much further, as a share, and back again (a corrector)", ge=0)
    finish: int = option(8, "most passes at the end for edits that are then more likely missing than not", ge=0)


class GenerateSettings(Settings):
    """How a canvas of masks becomes text."""

    max_new_tokens: int = option(128, "length of the canvas behind the prompt, in tokens", gt=0)
    steps: int | None = option(None, "forward passes for the whole canvas; none means one token per pass", gt=0)
    block_size: int = option(32, "tokens per block; the leftmost unfinished block is denoised first", gt=0)
    ahead: Literal["auto", "visible", "hidden"] = option(
        "auto",
        "whether the model sees the masks right of the active block; `auto` hides them from a model whose responses "
        "were trained to end at a block boundary",
    )
    reveal_rule: Literal["confidence", "entropy", "margin", "random", "threshold", "factor", "entropy_bound"] = option(
        "confidence",
        "which masked positions are revealed first; the last three reveal all that are sure enough, in fewer passes",
    )
    threshold: float = option(0.9, "reveal everything at least this probable (rule `threshold`)", ge=0, le=1)
    factor: float = option(1.0, "reveal the n surest if the n-th is above 1 - factor / (n + 1) (rule `factor`)", gt=0)
    entropy_bound: float = option(
        0.1, "reveal the surest while their entropies but the largest sum to this, in nats (`entropy_bound`)", ge=0
    )
    temperature: float = option(0.0, "0 takes the most probable token", ge=0)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this probability", gt=0, le=1)
    guidance: float = option(0.0, "classifier-free guidance scale; 0 is off", ge=0)
    seed: int = option(0, "seed of the token draws; a row's draws depend on this and on its prompt only")
    stop: list[str] = option([], "strings that end an answer")
    early_stop: bool = option(True, "stop a row when its end is revealed and nothing left of it is masked")
    batch_size: int = option(32, "most rows denoised together; it does not change a row's result", gt=0)
    batch_tokens: int = option(
        16384, "most tokens of the rows denoised together; it does not change a row's result", gt=0
    )
    reuse: Literal["none", "prefix", "dual"] = option(
        "none",
        "approximation: between refreshes keep what was computed left of the active block (`prefix`), or on both sides "
        "of it (`dual`)",
    )
    refresh: int | None = option(None, "passes from one refresh of `reuse` to the next; none: once per block", gt=0)
    edits: EditSampling = option(EditSampling(), "what concerns the algorithm `edit_flows` only")

    @model_validator(mode="after")
    def one_kind_of_approximation(self) -> GenerateSettings:
        if self.reuse != "none" and self.guidance:
            raise ValueError(
                f"reuse = {self.reuse!r} does not go together with guidance = {self.guidance:g}; set one of them to "
                "its default (none, 0)"
            )
        if self.refresh is not None and self.reuse == "none":
            raise ValueError(f"refresh = {self.refresh} needs something to refresh; set reuse to prefix or dual")
        return self


DECODING_OPTIONS: dict[str, dict[str, Any]] = {
    "threshold 0.9": {"reveal_rule": "threshold", "threshold": 0.9},
    "factor 1": {"reveal_rule": "factor", "factor": 1.0},
    "entropy bound 0.1": {"reveal_rule": "entropy_bound", "entropy_bound": 0.1},
    "prefix reuse": {"reuse": "prefix"},
    "dual reuse": {"reuse": "dual"},
}
"""Faster ways to decode, by name: what each changes of a sampler."""


def overlaid(generation: GenerateSettings, changes: dict[str, Any]) -> GenerateSettings:
    """A sampler with some settings changed. Raises ValueError, one line, for a name or a value that is none."""
    try:
        return GenerateSettings.model_validate(generation.model_dump() | changes)
    except ValidationError as fault:
        error = fault.errors()[0]
        name = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            raise ValueError(
                f"{name} is not a setting. {did_you_mean(name, list(GenerateSettings.model_fields))}"
            ) from None
        message = error["msg"].removeprefix("Value error, ")
        value = f"{name} = {error['input']!r}: " if name else ""
        raise ValueError(value + message[:1].lower() + message[1:]) from None


def checked_options(options: dict[str, dict[str, Any]], generation: GenerateSettings) -> None:
    """Raise ValueError, one line that names the option, unless each is an overlay of the sampler."""
    for name, changes in options.items():
        try:
            overlaid(generation, changes)
        except ValueError as fault:
            raise ValueError(f"options[{name!r}]: {fault}") from None


class LikelihoodSettings(Settings):
    """How the negative log-likelihood bound of a target is estimated (every estimator has the same expectation)."""

    estimator: Literal["auto", "exact", "enumerate", "chain", "cover", "lattice", "multilevel", "mc"] = option(
        "auto",
        "`mc` is the published one; `auto` picks the exact or least noisy one for the target's length; `multilevel` "
        "computes less behind long contexts",
    )
    budget: int = option(
        64,
        "most forward passes per target (or block of it) of `auto`, `chain`, `cover` and `lattice`; of `multilevel`, "
        "cheap versions, beside fewer exact ones",
        gt=0,
    )
    effort: float | None = option(
        None,
        "spend passes where the noise is: 3, and so many for each root of a nat of the target's nll with everything "
        "masked, up to `budget` (auto, cover, lattice, multilevel); about 1.2 for endings (multilevel: 1.7); none: "
        "always the budget",
        gt=0,
    )
    block_size: int | None = option(
        None,
        "score a target in blocks of so many tokens, each given the clean text before it (the bound of a decoder that "
        "finishes block after block); none: as a whole",
        gt=0,
    )
    mc_draws: int = option(128, "draws of the `mc` estimator", gt=0)
    mc_batch: int = option(32, "draws per batch of the `mc` estimator; its mask counts are spread over a batch", gt=0)
    seed: int = option(0, "seed of masks and orders")
    batch_tokens: int = option(16384, "tokens per forward batch; it does not change a score", gt=0)


class EditSettings(Settings):
    """How Edit Flows is trained (arXiv:2506.09018): the starts it learns to edit, and when edits are made."""

    schedule: Literal["cubic", "linear"] = option("cubic", "share of edits made by time t: t^3 or t")
    starts: list[Literal["empty", "masked", "noisy"]] = option(
        ["empty"], "what a text is edited from, drawn per sample: nothing, masks, or the text with faults", min_length=1
    )
    masks: int = option(32, "most masks of a masked start; their number is drawn from 1 up to it", gt=0)
    fault_share: float = option(0.5, "most faulty tokens of a noisy start, as a share", gt=0, le=1)
    time_ceiling: float = option(0.999, "largest time; the weight of the loss is infinite at 1", gt=0, lt=1)
    adapter_rank: int = option(64, "inner size of the adapters in front of the shared LM head", gt=0)


class AdapterSettings(Settings):
    """LoRA: small matrices trained beside frozen ones. The run leaves them, and whole weights with them merged."""

    kind: Literal["lora", "qlora"] = option(
        "lora", "`qlora` holds the frozen matrices in four bits (with bitsandbytes, launched with cpu or ddp)"
    )
    rank: int = option(16, "inner size of an adapter", gt=0)
    alpha: int = option(32, "adapters count alpha / rank", gt=0)
    dropout: float = option(0.0, "share of an adapter's inputs that are dropped in training", ge=0, lt=1)
    targets: list[str] | None = option(
        None,
        "linear layers that get one, by the ends of their names; none: all inside the model's layers",
        min_length=1,
    )


class OptimizerSettings(Settings):
    """The optimiser and its schedule: linear warm-up, then cosine to zero."""

    name: Literal["adamw", "muon"] = option("adamw", "`muon`: Muon for matrices inside layers, AdamW for the rest")
    learning_rate: float = option(1e-4, "peak learning rate (of AdamW)", gt=0)
    matrix_learning_rate: float | None = option(None, "peak learning rate of Muon; none means `learning_rate`", gt=0)
    betas: list[float] = option([0.9, 0.999], "AdamW's decay rates", min_length=2, max_length=2)
    epsilon: float = option(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = option(0.0, "decoupled weight decay", ge=0)
    clip: float = option(1.0, "gradient norm is clipped here", gt=0)
    warmup_share: float = option(0.1, "share of the steps spent on linear warm-up", ge=0, le=1)


class Recipe(Settings):
    """The switches between the published pipeline and ours (faults F1 to F7, docs/recipes.md)."""

    parameters: Literal["fp32", "bf16"] = option("fp32", "dtype of the master weights; bf16 loses small steps (F1)")
    autocast: Literal["bf16", "none"] = option("bf16", "dtype of the matrix products")
    schedule: Literal["linear", "cosine", "square", "sqrt"] = option("linear", "kept share alpha(t)")
    corruption: Literal["exact", "bernoulli"] = option("exact", "mask exactly k tokens, or each with probability t")
    time_floor: float = option(1e-3, "smallest diffusion time of `bernoulli`", gt=0, lt=1)
    weight: Literal["elbo", "uniform"] = option("elbo", "weight of a row's loss")
    normalisation: Literal["token", "sequence", "batch"] = option("token", "what the summed loss is divided by")
    denominator: Literal["global", "micro_batch"] = option("global", "over what it is counted (F5)")
    response_end: Literal["fill", "block", "one"] = option(
        "block", "EOS to the batch's longest row, to the block boundary, or a single EOS"
    )
    block_size: int = option(32, "tokens per block, of `bd3lm` and of `response_end: block`", gt=0)
    block_anchor: Literal["response", "row"] = option(
        "response", "where `bd3lm` counts its blocks from; the prompt is a block of its own, or cut up like the rest"
    )
    time_low: float = option(0.0, "least diffusion time that `bd3lm` trains on (clipped schedule)", ge=0, lt=1)
    time_high: float = option(1.0, "largest diffusion time that `bd3lm` trains on", gt=0, le=1)
    extra_blocks: int = option(0, "up to this many further blocks of EOS, drawn per sample and epoch", ge=0)
    eval_noise: Literal["fixed", "drawn"] = option("fixed", "the same masks at every evaluation, or new ones (F6)")
    split: Literal["disjoint", "overlapping"] = option("disjoint", "`overlapping` leaves test rows in train (F7)")

    @model_validator(mode="after")
    def some_times(self) -> Recipe:
        if self.time_low >= self.time_high:
            raise ValueError(
                f"time_low = {self.time_low:g} must be less than time_high = {self.time_high:g}; change one of them"
            )
        return self


class Scorer(Settings):
    """How a benchmark is scored: ours, or the published way (faults F2 to F4)."""

    likelihood: LikelihoodSettings = option(LikelihoodSettings(), "estimator of the likelihood")
    special_tokens: Literal["exact", "reference-v0", "reference-v0.1"] = option(
        "exact", "`exact`: no CLS/SEP, each side of the boundary on its own; the others repeat the published splits"
    )
    bf16_scores: bool = option(False, "cross-entropy in bf16, as published")
    precision: Literal["fp32", "mixed", "bf16"] = option(
        "fp32",
        "`mixed`: bf16 matrix products in the layers, weights, LM head and scores in fp32 (of an autoregressive model, "
        "bf16 weights); `bf16`: bf16 weights",
    )


class Resources(Settings):
    """What a cluster job asks for; what is left out is predicted by `dllm plan`."""

    nodes: int = option(1, "machines", gt=0)
    gpus_per_node: int = option(0, "accelerators per machine", ge=0)
    cpus_per_task: int = option(1, "cores per process group", gt=0)
    memory_gib: int | None = option(None, "memory per machine; none means as predicted", gt=0)
    runtime_minutes: int | None = option(None, "time limit; none means as predicted", gt=0)
    disk_gib: int | None = option(None, "disk the job writes; none means as predicted", gt=0)


# --------------------------------------------------------------------------------------------------------------------
# Entries: what a person writes

NAME = re.compile(r"^[a-z0-9]+([.-][a-z0-9]+)*$")
REVISION = re.compile(r"^[0-9a-f]{40}$")


HARDWARE = ("h200", "h100", "a100-80gb", "a100-40gb", "rtx-4090", "cpu")
"""Names of what `dllm plan` can plan for; the figures are in `dllm.planning.hardware`."""


class Shape(Settings):
    """Sizes of a published architecture, as its config.json states them: known before the weights are fetched."""

    model_type: str = option(..., "architecture, as transformers names it")
    layers: int = option(..., "layers", gt=0)
    width: int = option(..., "size of the hidden states", gt=0)
    heads: int = option(..., "attention heads", gt=0)
    kv_heads: int | None = option(None, "heads of keys and values; none means as many", gt=0)
    head_width: int | None = option(None, "size of a head; none means width / heads", gt=0)
    intermediate: int = option(..., "inner size of the feed-forward part", gt=0)
    vocabulary: int = option(..., "rows of the embedding", gt=0)
    positions: int = option(..., "longest row, in tokens", gt=0)
    token_types: int = option(0, "kinds of segments with an embedding of their own", ge=0)
    window: int | None = option(None, "positions that a local layer sees", gt=0)
    global_every: int = option(1, "every so many layers one sees all positions; the others are local", gt=0)
    tied: bool = option(True, "the embedding is the output matrix too")


class ModelEntry(Settings):
    """A backbone: a pinned hub repository, or a new stock model with seeded random weights."""

    hub: str | None = option(None, "hub repository")
    revision: str | None = option(None, "40-digit commit; a branch name is refused")
    new: dict[str, Any] | None = option(None, "transformers config of a model made from a seed (model_type first)")
    published: Literal["LLaDA", "LLaDA-MoE", "LLaDA2", "Dream", "RND1"] | None = option(
        None, "a `new` model is a stand-in of this family: `new` is its config.json, its tensors have published names"
    )
    seed: int = option(0, "seed of a new model's weights")
    tokenizer: str | None = option(None, "dataset that brings the tokenizer of a new model")
    family: Literal["encoder", "decoder"] = option("encoder", "masked-LM or causal-LM class of transformers")
    prediction: Literal["in_place", "next"] = option("in_place", "whether position i scores token i or token i + 1")
    mask_token: str = option(
        "[MASK]", "token that stands for a masked position; a decoder whose tokenizer has none is given it"
    )
    end_token: str = option("[PAD]", "end of text, padding and start in one")
    end_of_turn: str = option("[/Answer]", "string that ends an answer")
    chat_template: Literal["bert", "own"] = option("bert", "our plain-text template, or the tokenizer's own")
    # for planning only, and so no part of what a job is told: a better estimate reruns nothing
    parameters: int | None = option(None, "number of parameters, for planning", gt=0, exclude=True)
    shape: Shape | None = option(None, "sizes of a hub model, for planning", exclude=True)
    licence: str | None = option(None, "licence as its card states it", exclude=True)

    @model_validator(mode="after")
    def one_source(self) -> ModelEntry:
        if (self.hub is None) == (self.new is None):
            raise ValueError("needs exactly one of `hub` and `new`")
        if self.hub and not (self.revision and REVISION.match(self.revision)):
            raise ValueError(
                f"revision = {self.revision!r} is not a pinned commit; allowed: 40 hexadecimal digits; "
                "look the commit up on the hub's page of the repository"
            )
        if self.new and not self.tokenizer:
            raise ValueError("a `new` model needs `tokenizer`: the dataset that brings one")
        if self.published and not self.new:
            raise ValueError(f"published = {self.published!r} is for a `new` model; leave it out of a hub model")
        return self


class DatasetEntry(Settings):
    """Rows of text or of conversations: a pinned hub repository, a part of the synthetic world, or a mixture."""

    hub: str | None = option(None, "hub repository")
    revision: str | None = option(None, "40-digit commit; a branch name is refused")
    config: str | None = option(None, "the repository's configuration")
    world: str | None = option(
        None, "part of the synthetic world (wikitext, openwebtext, alpaca, tulu, smoltalk, code, all)"
    )
    seed: int = option(0, "seed of the synthetic world")
    mix: list[str] | None = option(None, "names of datasets, concatenated split by split")
    kind: Literal["text", "alpaca", "messages", "benchmark", "world"] = option("text", "how a row is read")
    test_split: str | None = option(None, "name of the set's own test split")
    test_share: float = option(0.05, "share held out where the set has no test split", ge=0, lt=1)
    split_seed: int = option(42, "seed of that split")
    append_eos: bool = option(True, "one EOS after every row of text")
    drop_unusable: bool = option(False, "drop rows without messages or with an empty turn, counted, and do not stop")
    rows: int | None = option(None, "use only the first rows of the shuffled train split", gt=0)
    stream: bool = option(False, "read its shards over the network while training, and store only one: the test rows")
    shuffle_rows: int = option(16_384, "rows of text shuffled together while a set is streamed", gt=0)
    licence: str | None = option(None, "licence as its card states it; shown when it is fetched")
    # for planning only, until the set is prepared and counted
    documents: int | None = option(None, "rows of the train split, about, for planning", gt=0, exclude=True)
    tokens: int | None = option(None, "tokens of the train split, about, for planning", gt=0, exclude=True)
    test_documents: int | None = option(None, "rows of its own test split, for planning", gt=0, exclude=True)
    target_share: float | None = option(
        None, "share of a conversation's tokens in its last answer, for planning", gt=0, le=1, exclude=True
    )

    @model_validator(mode="after")
    def one_source(self) -> DatasetEntry:
        if sum(x is not None for x in (self.hub, self.world, self.mix)) != 1:
            raise ValueError("needs exactly one of `hub`, `world` and `mix`")
        if self.hub and not (self.revision and REVISION.match(self.revision)):
            raise ValueError(
                f"revision = {self.revision!r} is not a pinned commit; allowed: 40 hexadecimal digits; "
                "look the commit up on the hub's page of the repository"
            )
        if self.stream and (self.hub is None or self.kind != "text" or self.test_split or self.rows):
            raise ValueError(
                "stream = true is for text from the hub that is used whole and has no test split of its own; "
                "leave out `test_split` and `rows`, or set stream to false"
            )
        return self


class RunEntry(Settings):
    """One training run; `init` names a model or another run, which is the edge of the graph."""

    like: str | None = option(None, "another run whose settings are taken where this entry has none")
    algorithm: AlgorithmName = option(
        "mdlm",
        "masked diffusion, the same block after block, masked LM, next-token prediction, or insertions, deletions and "
        "substitutions",
    )
    init: str = option(..., "model or run to start from")
    data: str = option(..., "dataset")
    recipe: str = option("corrected", "name of a recipe")
    length: int = option(512, "longest row, in tokens", gt=0)
    epochs: float | None = option(None, "passes over the data", gt=0)
    steps: int | None = option(None, "optimiser steps", gt=0)
    stop_after: int | None = option(None, "stop here although the schedule is laid out for all steps", gt=0)
    global_batch_size: int = option(512, "rows per optimiser step, whatever the number of devices", gt=0)
    micro_batch_size: int = option(64, "most rows per device and forward pass", gt=0)
    micro_batch_tokens: int | None = option(
        None, "most tokens per device and forward pass; not used where the denominator is `micro_batch`", gt=0
    )
    layout: Literal["packed", "padded"] = option("packed", "rows laid end to end, or padded to the longest")
    head_chunk: int | None = option(None, "targets whose logits are held at a time; none means all", gt=0)
    activation_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory")
    compile: bool = option(False, "torch.compile of the backbone")
    optimizer: OptimizerSettings = option(OptimizerSettings(), "optimiser and schedule")
    adapter: AdapterSettings | None = option(None, "train LoRA adapters only; none: all weights")
    seed: int = option(42, "seed of order and noise")
    mlm_share: float = option(0.3, "share of tokens masked by `mlm`", gt=0, lt=1)
    edits: EditSettings = option(EditSettings(), "starts and times of `edit_flows`")
    evaluations: int = option(10, "evaluations (and checkpoints) over the run", gt=0)
    eval_rows: int | None = option(None, "use only the first rows of the test split", gt=0)
    eval_draws: int = option(1, "noise draws per test row", gt=0)
    launch: Literal["cpu", "gpu", "ddp", "zero1", "zero2", "zero3", "fsdp"] = option("ddp", "file in config/accelerate")
    resources: Resources = option(Resources(), "what a cluster job asks for")

    @model_validator(mode="after")
    def one_budget(self) -> RunEntry:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` and `steps`")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.length:
            raise ValueError(too_few_tokens(self.micro_batch_tokens, self.length))
        if error := algorithm_named(self.algorithm).run_error(self):
            raise ValueError(error)
        check_adapter(self)
        quantized = self.adapter is not None and self.adapter.kind == "qlora"
        if fault := launch_fault(self.launch, self.optimizer.name, quantized=quantized):
            raise ValueError(fault)
        return self


def check_adapter(run: RunEntry | RunConfig) -> None:
    """Raise ValueError, one line, for an adapter with an optimiser that is not for it."""
    if run.adapter is not None and run.optimizer.name != "adamw":
        raise ValueError(
            f"optimizer.name = {run.optimizer.name!r} is not for adapters, whose matrices are thin and start at zero; "
            "allowed: adamw"
        )


def launch_fault(
    launch: str, optimizer: str, *, quantized: bool = False, parameters: Literal["fp32", "bf16"] = "fp32"
) -> str | None:
    """The line for a launch that cannot run an optimiser, quantized weights or bf16 master weights, or None."""
    if launch in ("cpu", "gpu", "ddp"):
        return None
    if optimizer == "muon":
        return (
            f"optimizer.name = 'muon' needs whole matrices, which launch = {launch!r} cuts into shards; allowed there: "
            "adamw; or launch with cpu or ddp"
        )
    if quantized:
        return f"adapter.kind = 'qlora' is not for launch = {launch!r}; allowed: cpu, ddp; or take kind: lora"
    if parameters == "bf16" and launch != "fsdp":
        return (
            f"recipe.parameters = 'bf16' is not for launch = {launch!r}, whose master weights are fp32; take a recipe "
            "with parameters: fp32, or launch with ddp or fsdp"
        )
    return None


def too_few_tokens(micro_batch_tokens: int, length: int) -> str:
    """The line for a token budget that the longest row does not fit."""
    return (
        f"micro_batch_tokens = {micro_batch_tokens} is smaller than the longest row, length = {length}; "
        f"allowed: {length} and up; raise it or lower length"
    )


class BenchmarkSize(Settings):
    """What a benchmark asks, about, for planning."""

    documents: int = option(..., "questions", gt=0)
    tasks: int = option(1, "tasks of the group that it is; `documents` of a benchmark counts for each of them", gt=0)
    choices: int = option(0, "answers scored per question; 0 means a free answer is generated", ge=0)
    prompt_tokens: int = option(..., "mean prompt, examples included", gt=0)
    answer_tokens: int = option(1, "mean length of a scored answer", gt=0)
    one_prompt: bool = option(True, "whether the answers of a question continue the same prompt")
    greedy: bool = option(False, "whether it is also asked if the answer is the greedy one")


class BenchmarkEntry(Settings):
    """One benchmark setting: an lm-eval task and what is reported of it."""

    label: str = option(..., "column head of the results table")
    task: str = option(..., "lm-eval task or group")
    tasks_from: Literal["stock", "miniature"] = option("stock", "lm-eval's own task files, or our miniatures")
    dataset: str | None = option(None, "dataset whose files a miniature reads")
    revision: str | None = option(None, "pinned commit of the task's dataset on the hub")
    shots: int = option(0, "examples in the prompt", ge=0)
    metric: str = option("acc", "headline metric, as lm-eval names it")
    filter: str = option("none", "filter of the headline metric")
    also: list[str] = option([], "further metrics to report")
    chance: float = option(0.0, "score of guessing, as a share", ge=0, le=1)
    reported_chance: float | None = option(
        None, "score of guessing on the benchmark of the published numbers, if this is a miniature of it", ge=0, le=1
    )
    documents: int | None = option(None, "score only the first documents of each task", gt=0)
    by_name: bool = option(False, "only for rows that name it in `benchmarks`, not for those that have all")
    generation: GenerateSettings = option(GenerateSettings(), "sampler of generative tasks")
    seed: int = option(1234, "seed of few-shot examples and scores")
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


class SpeedEntry(Settings):
    """Steps against time and quality, measured on one run."""

    checkpoint: str = option(..., "run")
    questions: str = option(
        ...,
        "jsonl or parquet file under a download: `<dataset>/<file>`, rows with question and answer, or with choices; "
        "`*` stands for several files",
    )
    prompt: str = option("{question}", "how a question is put; {question} stands for it")
    answer: str = option(r"(.*)", "regular expression whose first group, in a reference answer, is the answer sought")
    documents: int = option(64, "questions asked", gt=0)
    steps: list[int] = option(..., "numbers of steps to compare", min_length=2)
    generation: GenerateSettings = option(GenerateSettings(), "sampler")
    options: dict[str, dict[str, Any]] = option(
        DECODING_OPTIONS, "faster decoding to compare with the exact one: name -> what it changes of `generation`"
    )

    @model_validator(mode="after")
    def known_options(self) -> SpeedEntry:
        checked_options(self.options, self.generation)
        return self


class SampleEntry(Settings):
    """Conversations and the filmstrip shown in the report."""

    checkpoint: str = option(..., "run")
    conversations: list[list[str]] = option(..., "user turns of each conversation", min_length=1)
    film: str = option(..., "prompt of the filmstrip")
    generation: GenerateSettings = option(GenerateSettings(), "sampler")


class CurveEntry(Settings):
    """One curve of a figure."""

    run: str = option(..., "run")
    label: str = option(..., "name in the legend")


class ReportEntry(Settings):
    """What the report shows."""

    title: str = option(..., "title of the page")
    toy: bool = option(False, "say plainly that these are toy numbers")
    pretraining: list[CurveEntry] = option([], "encoders on Wikitext")
    openwebtext: list[CurveEntry] = option([], "pretraining on OpenWebText")
    ablation: list[CurveEntry] = option([], "the starts of the Alpaca ablation")
    chat: list[CurveEntry] = option([], "chat training")
    systems: list[str] = option([], "evaluations whose models are compared with each other")


class ReportedEntry(Settings):
    """A published row of numbers, in percent, with its source."""

    label: str = option(..., "row head")
    source: str = option(..., "where it was published")
    note: str = option("", "what a reader should know of it")
    scores: dict[str, float | int] = option(..., "benchmark name to percent")


class Project(Settings):
    """Everything one work directory holds: entries by name."""

    workdir: str = option(..., "where everything of this configuration is written")
    cache: Literal["none", "dvc"] = option("none", "who keeps data and weights: DVC, or nobody but the work directory")
    world_seed: int = option(0, "seed of the synthetic world")
    hardware: Literal[HARDWARE] = option("cpu", "what the plan assumes of a GPU job (`cpu`: of every job)")
    utilisation: float | None = option(None, "share of the hardware's peak that training reaches", gt=0, le=1)
    models: dict[str, ModelEntry] = option(..., "backbones")
    datasets: dict[str, DatasetEntry] = option(..., "datasets")
    recipes: dict[str, Recipe] = option(..., "training recipes")
    runs: dict[str, RunEntry] = option(..., "training runs")
    scorers: dict[str, Scorer] = option(..., "ways to score")
    benchmarks: dict[str, BenchmarkEntry] = option(..., "benchmarks")
    evaluations: dict[str, EvaluationEntry] = option(..., "rows of the results table")
    reported: dict[str, ReportedEntry] = option({}, "published rows")
    samples: dict[str, SampleEntry] = option({}, "conversations shown in the report")
    speed: dict[str, SpeedEntry] = option({}, "steps against time and quality")
    report: ReportEntry = option(..., "the report")

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


# --------------------------------------------------------------------------------------------------------------------
# Configs: what a job is told


class DownloadConfig(Settings):
    """What `dllm download` makes: one pinned model or dataset, or the synthetic world."""

    name: str
    what: Literal["model", "dataset"]
    model: ModelEntry | None = None
    dataset: DatasetEntry | None = None
    tokenizer_path: str | None = None


class DataPart(Settings):
    """One source of a prepared dataset."""

    name: str
    path: str
    entry: DatasetEntry


class PrepareConfig(Settings):
    """What `dllm prepare` makes: token files of one dataset for one tokenizer and length."""

    name: str
    parts: list[DataPart]
    model_path: str
    model: ModelEntry
    length: int
    split: Literal["disjoint", "overlapping"]
    rows: int | None = None


class RunConfig(Settings):
    """What `dllm train` is told, and nothing else."""

    name: str
    algorithm: AlgorithmName
    init: str
    init_path: str
    model: ModelEntry
    data: str
    data_path: str
    recipe_name: str
    recipe: Recipe
    length: int
    epochs: float | None
    steps: int | None
    stop_after: int | None
    global_batch_size: int
    micro_batch_size: int
    optimizer: OptimizerSettings
    seed: int
    mlm_share: float
    evaluations: int
    eval_rows: int | None
    eval_draws: int
    micro_batch_tokens: int | None = None
    layout: Literal["packed", "padded"] = "packed"
    head_chunk: int | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    edits: EditSettings = EditSettings()
    adapter: AdapterSettings | None = None

    @model_validator(mode="after")
    def what_the_algorithm_takes(self) -> RunConfig:
        check_adapter(self)
        if error := algorithm_named(self.algorithm).run_error(self):
            raise ValueError(error)
        if fault := algorithm_named(self.algorithm).recipe_error(self.recipe):
            raise ValueError(f"recipe {self.recipe_name!r} {fault}")
        return self


# --------------------------------------------------------------------------------------------------------------------
# Reading, merging, checking


class ConfigError(ValueError):
    """A mistake in a configuration: one line with file, key, value, what is allowed and the next step."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-4 is a number) and no duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict:
    """A mapping, refusing a key written twice (the later one would silently win); `<<` may be overridden."""
    written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    for key, _ in node.value:
        if written.count(key.value) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
    loader.flatten_mapping(node)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
# an integer must stay an integer although the float pattern above also matches it
_Loader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda pair: pair[0] != "tag:yaml.org,2002:int")
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError (one line) if it is missing, unreadable or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; check the path, or run the workflow from the repository root"
        ) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(f"{path}: cannot be read ({fault}); check its permissions and encoding") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(fault, 'problem', fault)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {type(content).__name__}, not a mapping; see docs/configuration.md")
    return content


def with_scalar(path: str | Path, location: tuple[str, ...], value: str) -> str:
    """The text of a YAML file with one text replaced where it stands: comments and layout stay as they are.

    Raises ConfigError if nothing is written at that location.
    """
    text = Path(path).read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in location:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((found for name, found in pairs if name.value == key), None)
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{path}: {'.'.join(location)} is not written there; correct it by hand")
    plain = yaml.load(value, Loader=_Loader) == value  # a commit of digits alone would be read as a number
    return text[: node.start_mark.index] + (value if plain else f"'{value}'") + text[node.end_mark.index :]


Model = TypeVar("Model", bound=BaseModel)


def read_config(path: str | Path, model: type[Model]) -> Model:
    """A job's config file as `model`. Raises ConfigError with file, key and value."""
    content = read_yaml(path)
    try:
        return model.model_validate(content)
    except ValidationError as fault:
        raise ConfigError(_describe(fault, model, content, lambda location: str(path))) from None


def digest(settings: BaseModel | dict) -> str:
    """Hexadecimal SHA-256 of a settings object's canonical JSON."""
    content = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The end of an error line: the nearest known name, or all of them."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    names = sorted(map(str, known))
    return f"Known: {', '.join(names[:12]) or 'none'}{', ...' if len(names) > 12 else ''}."


def load_project(config_directory: str | Path, *overlays: str | Path | dict) -> Project:
    """The merged and checked project: `config/*.yaml` with overlays on top, later ones over earlier ones.

    An overlay is a YAML file, or an already read mapping (called "overlay" in messages). In an overlay, null removes
    an entry, and `replaces` names the sections of which it keeps nothing that was there before.
    Raises ConfigError, one line naming file, key, value, what is allowed and the next step.
    """
    merged: dict[str, Any] = {}
    origins: dict[tuple, str] = {}
    for source in (*(Path(config_directory) / f"{stem}.yaml" for stem in CONFIG_FILES), *overlays):
        content, name = (source, "overlay") if isinstance(source, dict) else (read_yaml(source), str(source))
        content = _emptied(merged, content, name)
        _merge(merged, content, name, origins)

    def origin(location: tuple) -> str:
        for size in range(len(location), 0, -1):
            if location[:size] in origins:
                return origins[location[:size]]
        return name

    _inherit(merged, origin)
    try:
        project = Project.model_validate(merged)
    except ValidationError as fault:
        raise ConfigError(_describe(fault, Project, merged, origin)) from None
    _check_references(project, origin)
    return project


def _emptied(merged: dict[str, Any], content: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of an overlay without `replaces`, a list of sections, which are emptied in `merged`."""
    replaced = content.get("replaces", [])
    for section in replaced if isinstance(replaced, list) else [replaced]:
        if not isinstance(merged.get(section), dict):
            known = [name for name, value in merged.items() if isinstance(value, dict)]
            raise ConfigError(
                f"{source}: replaces = {section!r} is no section of the files before it. "
                f"{did_you_mean(section, known)} Write it as a list: replaces: [runs, evaluations]"
            )
        merged[section] = {}
    return {key: value for key, value in content.items() if key != "replaces"}


def _merge(base: dict, update: dict, source: str, origins: dict[tuple, str], path: tuple = ()) -> None:
    """Lay `update` over `base` in place, mapping by mapping, and note where each key came from."""
    for key, value in update.items():
        here = (*path, key)
        if value is None and path:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict) and key != "new":
            _merge(base[key], value, source, origins, here)
        else:
            base[key] = {} if isinstance(value, dict) else value
            if isinstance(value, dict):
                _merge(base[key], value, source, origins, here)
        origins[here] = source


def _inherit(merged: dict, origin) -> None:
    """Replace `like: other` in runs and recipes by the other entry's settings, where the entry has none."""
    for section in ("runs", "recipes"):
        entries = merged.get(section)
        if isinstance(entries, dict):
            merged[section] = {name: _resolved(section, entries, name, origin) for name in entries}


def _resolved(section: str, entries: dict, name: str, origin, chain: tuple = ()) -> Any:
    """An entry with everything it takes over from the entries it is like."""
    entry = entries[name]
    if not isinstance(entry, dict) or "like" not in entry:
        return entry
    other = entry["like"]
    where = f"{origin((section, name, 'like'))}: {section}.{name}.like = {other!r}"
    if other not in entries:
        raise ConfigError(f"{where} is no entry of {section}. {did_you_mean(other, list(entries))}")
    if other in chain:
        raise ConfigError(f"{where} goes round in a circle: {' -> '.join((*chain, name))}")
    parent = _resolved(section, entries, other, origin, (*chain, name))
    budget = {"steps", "epochs"} & entry.keys()
    inherited = {key: value for key, value in parent.items() if not (budget and key in ("steps", "epochs"))}
    return _overlaid(inherited, {key: value for key, value in entry.items() if key != "like"})


def _overlaid(base: dict, update: dict) -> dict:
    result = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _overlaid(result[key], value) if both else value
    return result


def _describe(fault: ValidationError, model: type[BaseModel], content: Any, origin) -> str:
    """The first fault of a validation as one line: file: key = value, what is wrong, what is allowed."""
    errors = fault.errors()
    # a misspelt key also leaves its right spelling missing: the misspelling says more
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = tuple(part for part in error["loc"])
    key = ".".join(str(part) for part in location)
    where = f"{origin(location)}: {key}" if key else origin(location)
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{where} is not a setting. {did_you_mean(str(location[-1]), known)}"
    if error["type"] == "missing":
        return f"{where} is missing; it is needed here"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} = {error['input']!r}: {message[0].lower() + message[1:]}"


def _fields_at(model: Any, location: tuple) -> list[str]:
    """Names of the settings allowed at a location of a settings model (best effort, for did-you-mean)."""
    for part in location:
        model = _field_type(model, part)
        if model is None:
            return []
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _field_type(model: Any, part: Any) -> Any:
    if isinstance(model, _InnerOf):
        return model.model
    if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
        return _unwrap(model.model_fields[part].annotation)
    return None


def _unwrap(annotation: Any) -> Any:
    """The settings model inside `dict[str, Model]`, `list[Model]` or `Model | None`."""
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return (
        _InnerOf(_unwrap(arguments[-1])) if _is_container(annotation) else _unwrap(arguments[0]) if arguments else None
    )


def _is_container(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) in (dict, list)


class _InnerOf:
    """A dict or list of settings: its keys are free, its values are `model`."""

    def __init__(self, model: Any):
        self.model = model


def _check_references(project: Project, origin) -> None:
    """Every name that an entry mentions exists; names are file names; `init` has no circle."""

    def fail(section: str, name: str, key: str, value: str, what: str, known: list[str]) -> None:
        path = (section, name, *key.split("."))
        raise ConfigError(f"{origin(path)}: {section}.{name}.{key} = {value!r} is {what}. {did_you_mean(value, known)}")

    for section in ("models", "datasets", "runs", "benchmarks", "evaluations"):
        for name in getattr(project, section):
            if not NAME.match(name):
                raise ConfigError(
                    f"{origin((section, name))}: {section}.{name} is not a usable name; allowed: lower-case letters, "
                    "digits, '.' and '-', because it becomes a file name"
                )
    starts = [*project.models, *project.runs]
    twice = sorted(set(project.models) & set(project.runs))
    if twice:
        raise ConfigError(
            f"{origin(('runs', twice[0]))}: {twice[0]!r} names both a model and a run, so `init: {twice[0]}` is "
            "ambiguous; rename one, or set models." + twice[0] + ": null in the overlay"
        )
    for name, entry in project.models.items():
        if entry.tokenizer and entry.tokenizer not in project.datasets:
            fail("models", name, "tokenizer", entry.tokenizer, "not a dataset", list(project.datasets))
    for name, entry in project.datasets.items():
        for part in entry.mix or []:
            if part not in project.datasets:
                fail("datasets", name, "mix", part, "not a dataset", list(project.datasets))
            if project.datasets[part].stream:
                raise ConfigError(
                    f"{origin(('datasets', name, 'mix'))}: datasets.{name}.mix = {part!r} is streamed, which a part of "
                    f"a mixture cannot be; set stream: false in the entry of {part!r}"
                )
    for name, entry in project.runs.items():
        if entry.init not in starts:
            fail("runs", name, "init", entry.init, "neither a model nor a run", starts)
        if entry.data not in project.datasets:
            fail("runs", name, "data", entry.data, "not a dataset", list(project.datasets))
        if project.datasets[entry.data].stream and entry.steps is None:
            raise ConfigError(
                f"{origin(('runs', name, 'epochs'))}: runs.{name}.epochs = {entry.epochs:g}, but {entry.data!r} is "
                "streamed: how many rows it has is not known beforehand; give `steps` in place of `epochs`"
            )
        if entry.recipe not in project.recipes:
            fail("runs", name, "recipe", entry.recipe, "not a recipe", list(project.recipes))
        if fault := algorithm_named(entry.algorithm).recipe_error(project.recipes[entry.recipe]):
            raise ConfigError(f"{origin(('runs', name, 'recipe'))}: runs.{name}.recipe = {entry.recipe!r} {fault}")
        seen, at = [name], entry.init
        while at in project.runs:
            if at in seen:
                raise ConfigError(
                    f"{origin(('runs', name, 'init'))}: runs.{name}.init goes round in a circle: "
                    f"{' -> '.join([*seen, at])}; start one of them from a model"
                )
            seen.append(at)
            at = project.runs[at].init
    for name, entry in project.benchmarks.items():
        if entry.dataset and entry.dataset not in project.datasets:
            fail("benchmarks", name, "dataset", entry.dataset, "not a dataset", list(project.datasets))
    for name, entry in project.evaluations.items():
        if entry.checkpoint not in starts:
            fail("evaluations", name, "checkpoint", entry.checkpoint, "neither a run nor a model", starts)
        if entry.scorer not in project.scorers:
            fail("evaluations", name, "scorer", entry.scorer, "not a scorer", list(project.scorers))
        for benchmark in entry.benchmarks or []:
            if benchmark not in project.benchmarks:
                fail("evaluations", name, "benchmarks", benchmark, "not a benchmark", list(project.benchmarks))
        for key in ("compare", "close_to"):
            row = getattr(entry, key)
            if row and row not in project.reported:
                fail("evaluations", name, key, row, "not a reported row", list(project.reported))
    for section in ("samples", "speed"):
        for name, entry in getattr(project, section).items():
            if entry.checkpoint not in project.runs:
                fail(section, name, "checkpoint", entry.checkpoint, "not a run", list(project.runs))
    for section in ("pretraining", "openwebtext", "ablation", "chat"):
        for curve in getattr(project.report, section):
            if curve.run not in project.runs:
                fail("report", section, "run", curve.run, "not a run", list(project.runs))
    for name in project.report.systems:
        if name not in project.evaluations:
            fail("report", "systems", "0", name, "not an evaluation", list(project.evaluations))
    for name, entry in project.evaluations.items():
        try:
            overlaid(GenerateSettings(), entry.generation)
        except ValueError as fault:
            where = origin(("evaluations", name, "generation"))
            raise ConfigError(f"{where}: evaluations.{name}.generation: {fault}") from None
    for name, entry in project.reported.items():
        for benchmark in entry.scores:
            if benchmark not in project.benchmarks:
                fail("reported", name, "scores", benchmark, "not a benchmark", list(project.benchmarks))


# --------------------------------------------------------------------------------------------------------------------
# From entries to configs


def prepared_name(project: Project, run: str) -> str:
    """Name of the token files a run reads: dataset, tokenizer, length (and the published split, where asked for)."""
    entry = project.runs[run]
    root = project.root_model(run)
    # a stand-in of a published family has that family's special tokens and template on top
    tokenizer = root if project.models[root].published else project.models[root].tokenizer or root
    leaky = "--overlapping" if _overlapping(project, entry) else ""
    return f"{entry.data}--{tokenizer}--{entry.length}{leaky}"


def _overlapping(project: Project, run: RunEntry) -> bool:
    """Whether a run reads the published split: it concerns instruction sets that come without a test split (F7)."""
    dataset = project.datasets[run.data]
    parts = [project.datasets[name] for name in dataset.mix or [run.data]]
    leaky = [part for part in parts if part.kind != "text" and part.test_split is None]
    return bool(leaky) and project.recipes[run.recipe].split == "overlapping"


def download_configs(project: Project) -> dict[str, DownloadConfig]:
    """What must be fetched (or made), by name: only what a run or an evaluation uses."""
    configs: dict[str, DownloadConfig] = {}

    def need_dataset(name: str) -> None:
        entry = project.datasets[name]
        for part in entry.mix or []:
            need_dataset(part)
        if entry.mix is None:
            configs[download_name(project, name)] = DownloadConfig(
                name=download_name(project, name), what="dataset", dataset=_download_entry(project, entry)
            )

    def need_model(name: str) -> None:
        entry = project.models[name]
        path = None
        if entry.tokenizer:
            need_dataset(entry.tokenizer)
            path = f"downloads/{download_name(project, entry.tokenizer)}"
        configs[name] = DownloadConfig(name=name, what="model", model=entry, tokenizer_path=path)

    for name, entry in project.runs.items():
        need_model(project.root_model(name))
        need_dataset(entry.data)
    for entry in project.evaluations.values():
        need_model(project.root_model(entry.checkpoint))
    for entry in project.benchmarks.values():
        if entry.dataset:
            need_dataset(entry.dataset)
    return configs


def download_name(project: Project, dataset: str) -> str:
    """Name of the download that brings a dataset; all parts of the synthetic world are one download."""
    return "pocket-world" if project.datasets[dataset].world else dataset


def _download_entry(project: Project, entry: DatasetEntry) -> DatasetEntry:
    return DatasetEntry(world="all", seed=project.world_seed, kind="world") if entry.world else entry


def prepare_configs(project: Project) -> dict[str, PrepareConfig]:
    """The token files that the runs read, by name."""
    configs = {}
    for run, entry in project.runs.items():
        root = project.root_model(run)
        dataset = project.datasets[entry.data]
        names = dataset.mix or [entry.data]
        parts = [
            DataPart(name=n, path=f"downloads/{download_name(project, n)}", entry=project.datasets[n]) for n in names
        ]
        name = prepared_name(project, run)
        if name in configs:  # models that share a tokenizer share its token files; the first one stands for all
            continue
        configs[name] = PrepareConfig(
            name=name,
            parts=parts,
            model_path=f"downloads/{root}",
            model=project.models[root],
            length=entry.length,
            split="overlapping" if _overlapping(project, entry) else "disjoint",
            rows=dataset.rows,
        )
    return configs


def run_configs(project: Project) -> dict[str, RunConfig]:
    """What each training run is told, by name."""
    configs = {}
    for name, entry in project.runs.items():
        init_path = f"runs/{entry.init}/model" if entry.init in project.runs else f"downloads/{entry.init}"
        data = prepared_name(project, name)
        taken = entry.model_dump(
            include=set(RunConfig.model_fields) - {"model", "recipe", "data"} & set(RunEntry.model_fields),
            exclude={"model", "recipe", "data", "optimizer", "edits", "adapter"},
        )
        configs[name] = RunConfig(
            **taken,
            name=name,
            init_path=init_path,
            model=project.models[project.root_model(name)],
            data=data,
            data_path=f"data/{data}",
            recipe_name=entry.recipe,
            recipe=project.recipes[entry.recipe],
            optimizer=entry.optimizer,
            edits=entry.edits,
            adapter=entry.adapter,
        )
    return configs


def write_when_changed(path: str | Path, settings: BaseModel | dict) -> Path:
    """Write a config as YAML, atomically and only if its content differs, and return its path."""
    path = Path(path)
    content = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=118)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return path
    write_atomically(path, text)
    return path


def schema() -> dict[str, Any]:
    """JSON schema of the merged configuration, for editors."""
    return Project.model_json_schema()
