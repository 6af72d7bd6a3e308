"""Settings that the package's functions take, and what every settings class is made of."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dllm.algorithms import ALGORITHMS, algorithm_named
from dllm.choices import ESTIMATORS, REMASKING, REVEAL_RULES, ROW_KINDS
from dllm.families import FAMILIES, OWN_CLASS
from dllm.schedules import KAPPAS, SCHEDULES

LARGEST = 2**53
"""No number of any setting is larger; where less makes sense, the setting says so."""

MANY = 10**6
"""Most tokens of a row, passes, draws: far above any use, far below what overflows."""

LARGEST_SEED = 2**32 - 1
"""The largest seed that every generator of random numbers takes."""


class Settings(BaseModel):
    """A frozen, strict settings object: unknown keys, wrong types, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def numbers_that_can_be_computed_with(self) -> Settings:
        for name in type(self).model_fields:
            for number in _numbers(getattr(self, name)):
                if abs(number) > LARGEST:
                    raise ValueError(f"{name} = {number}: input should be at most {LARGEST} in size")
        return self


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a value of plain data."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part)


AlgorithmName = Annotated[
    str,
    AfterValidator(lambda name: algorithm_named(name).name),
    WithJsonSchema({"enum": list(ALGORITHMS), "type": "string"}),
]
"""The name of a row in the table of algorithms."""


def known(table: Iterable[str], *more: str) -> Callable[[str], str]:
    """A check that a name is in a table, or one of `more`; its error reads like that of a Literal."""

    def check(name: str) -> str:
        *names, last = (repr(one) for one in (*more, *table))
        if repr(name) not in (*names, last):
            allowed = f"{', '.join(names)} or {last}" if names else last
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": allowed})
        return name

    return check


def names_schema(table: Iterable[str], *more: str) -> WithJsonSchema:
    """The JSON schema of a name in a table."""
    return WithJsonSchema({"enum": [*more, *table], "type": "string"})


RevealRuleName = Annotated[str, AfterValidator(known(REVEAL_RULES)), names_schema(REVEAL_RULES)]
RemaskingName = Annotated[str, AfterValidator(known(REMASKING, "none")), names_schema(REMASKING, "none")]
EstimatorName = Annotated[str, AfterValidator(known(ESTIMATORS, "auto")), names_schema(ESTIMATORS, "auto")]
ScheduleName = Annotated[str, AfterValidator(known(SCHEDULES)), names_schema(SCHEDULES)]
FamilyName = Annotated[str, AfterValidator(known(FAMILIES | OWN_CLASS)), names_schema(FAMILIES | OWN_CLASS)]
READ_OTHERWISE = ("auto", "benchmark", "world")
"""Kinds of datasets whose rows are not read by a function of their own."""

RowKindName = Annotated[
    str, AfterValidator(known(ROW_KINDS, *READ_OTHERWISE)), names_schema(ROW_KINDS, *READ_OTHERWISE)
]
KappaName = Annotated[str, AfterValidator(known(KAPPAS)), names_schema(KAPPAS)]


def option(default: Any = ..., text: str = "", **limits: Any) -> Any:
    """A field with one line of help; `limits` are pydantic's (ge, gt, le, lt)."""
    return Field(default, description=text, **limits)


def is_none(value: object) -> bool:
    """Whether a setting is left out of the files of jobs (`exclude_if`), so that those of older projects stay as they
    are."""
    return value is None


def left_at(default: object) -> Callable[[object], bool]:
    """As `is_none`, of a setting that came later and whose default changes nothing."""
    return lambda value: value == default


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known name, or all of them."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), names, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(names[:12]) or 'none'}{', ...' if len(names) > 12 else ''}."


def message_of(error: Mapping[str, Any]) -> str:
    """What pydantic says of one error, without its prefix."""
    return str(error["msg"]).removeprefix("Value error, ")


def lower_first(text: str) -> str:
    """A sentence as it continues another one."""
    return text[:1].lower() + text[1:]


class EditSampling(Settings):
    """How Edit Flows samples, beside the steps, temperature, top_p, guidance, seed and length of GenerateSettings."""

    masks: Literal["auto", "drop", "keep"] = option(
        "auto",
        "the canvas's masks at the start: `drop` removes them, `keep` edits them; `auto` keeps them if the model was "
        "trained on masked starts",
    )
    reverse: float = option(0.0, "a corrector: each step goes further by this share and back again", ge=0, le=100)
    finish: int = option(8, "most extra passes at the end, for edits that are probably still missing", ge=0, le=MANY)


class GenerateSettings(Settings):
    """How a canvas of masks becomes text."""

    max_new_tokens: int = option(128, "length of the canvas behind the prompt, in tokens", gt=0, le=MANY)
    steps: int | None = option(
        None, "forward passes for the whole canvas; none means one token per pass", gt=0, le=MANY
    )
    block_size: int = option(32, "tokens per block; the leftmost unfinished block is denoised first", gt=0, le=MANY)
    ahead: Literal["auto", "visible", "hidden"] = option(
        "auto",
        "whether the model sees the masks right of the active block; `auto` hides them from a model whose responses "
        "were trained to end at a block boundary",
    )
    reveal_rule: RevealRuleName = option(
        "confidence",
        "which masked positions are revealed first; the last three reveal all that are sure enough, in fewer passes",
    )
    threshold: float = option(0.9, "reveal every token of at least this probability (rule `threshold`)", ge=0, le=1)
    factor: float = option(
        1.0, "reveal the n surest if the n-th is above 1 - factor / (n + 1) (rule `factor`)", ge=1e-6, le=MANY
    )
    entropy_bound: float = option(
        0.1,
        "reveal the surest positions whose entropies without the largest sum to at most this, in nats (rule "
        "`entropy_bound`)",
        ge=0,
        le=MANY,
    )
    remask: RemaskingName = option(
        "none",
        "revealed tokens of the active block that each pass masks again (ReMDM): any (`cap`, `rescale`, `loop`), the "
        "less sure ones more often (`confidence`), or the least sure ones (`least`); `steps` may then exceed the masks",
        exclude_if=left_at("none"),
    )
    remask_share: float = option(
        0.1,
        "how many: of the revealed ones (`cap`, `loop`), or of the most that a pass can (the others)",
        ge=0,
        le=1,
        exclude_if=left_at(0.1),
    )
    edit_threshold: float | None = option(
        None,
        "replace a revealed token of the active block by another one of more than this probability; none: never",
        ge=0,
        le=1,
        exclude_if=is_none,
    )
    edit_passes: int = option(
        16, "most passes for such edits of a block without masks", ge=0, le=MANY, exclude_if=left_at(16)
    )
    temperature: float = option(0.0, "0 takes the most probable token; else at least 0.001", ge=0, le=100)
    top_p: float = option(1.0, "draw from the smallest set of tokens with this probability", ge=1e-6, le=1)
    guidance: float = option(0.0, "classifier-free guidance scale; 0 is off", ge=0, le=100)
    seed: int = option(
        0,
        "seed of the token draws; a row's draws depend on this and on its prompt only",
        ge=-LARGEST_SEED,
        le=LARGEST_SEED,
    )
    stop: list[str] = option([], "strings that end an answer")
    early_stop: bool = option(True, "stop a row when its end is revealed and nothing left of it is masked")
    batch_size: int = option(32, "most rows denoised together; it does not change a row's result", gt=0, le=MANY)
    batch_tokens: int = option(
        16384, "most tokens of the rows denoised together; it does not change a row's result", gt=0, le=2**31
    )
    reuse: Literal["none", "prefix", "dual"] = option(
        "none",
        "approximation: between refreshes keep what was computed left of the active block (`prefix`), or on both sides "
        "of it (`dual`)",
    )
    refresh: int | None = option(
        None, "passes from one refresh of `reuse` to the next; none: once per block", gt=0, le=MANY
    )
    edits: EditSampling = option(EditSampling(), "what concerns the algorithm `edit_flows` only")

    @field_validator("temperature")
    @classmethod
    def logits_divided_by_it_are_finite(cls, temperature: float) -> float:
        if 0 < temperature < 1e-3:
            raise ValueError("input should be 0, or between 0.001 and 100")
        return temperature

    @model_validator(mode="after")
    def one_kind_of_approximation(self) -> GenerateSettings:
        if self.reuse != "none" and self.guidance:
            raise ValueError(
                f"reuse = {self.reuse!r} does not go together with guidance = {self.guidance:g}; set one of them to "
                "its default (none, 0)"
            )
        if self.remask != "none" and self.edit_threshold is not None:
            raise ValueError(
                f"remask = {self.remask!r} does not go together with edit_threshold = {self.edit_threshold:g}; a token "
                "is masked again or replaced: leave one of them out"
            )
        if self.remask == "none" and self.remask_share != 0.1:
            raise ValueError(
                f"remask_share = {self.remask_share:g} needs a way to remask; set remask to {', '.join(REMASKING)}"
            )
        if self.edit_threshold is None and self.edit_passes != 16:
            raise ValueError(f"edit_passes = {self.edit_passes} needs edits; set edit_threshold, e.g. to 0.9")
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
    """A sampler with some settings changed. Raises ValueError, one line, for an unknown name or a wrong value."""
    try:
        return GenerateSettings.model_validate(generation.model_dump() | changes)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            raise ValueError(f"{name} is not a setting. {did_you_mean(name, GenerateSettings.model_fields)}") from None
        value = f"{name} = {problem['input']!r}: " if name else ""
        raise ValueError(value + lower_first(message_of(problem))) from None


def checked_options(options: dict[str, dict[str, Any]], generation: GenerateSettings) -> None:
    """Raise ValueError, one line that names the option, unless each is an overlay of the sampler."""
    for name, changes in options.items():
        try:
            overlaid(generation, changes)
        except ValueError as error:
            raise ValueError(f"options[{name!r}]: {error}") from None


class LikelihoodSettings(Settings):
    """How the negative log-likelihood bound of a target is estimated (all but `mc` have the same expectation)."""

    estimator: EstimatorName = option(
        "auto",
        "`auto` takes all masks (`enumerate`, exact) where they fit the budget, else `lattice`, an unbiased estimate; "
        "`mc` is the published Monte Carlo estimate, with its bias (docs/algorithms.md)",
    )
    budget: int = option(64, "most forward passes per target (or block of it) of `auto` and `lattice`", gt=0, le=MANY)
    rounds: list[int] | None = option(
        None,
        "multiple choice: most passes of a choice in each round; after a round only choices that may still be the best "
        "one get more; none: one round of `budget`",
        min_length=1,
    )
    block_size: int | None = option(
        None,
        "score a target in blocks of so many tokens, each given the clean text before it (the bound of a decoder that "
        "finishes block after block); none: as a whole",
        gt=0,
        le=MANY,
    )
    mc_draws: int = option(128, "draws of the `mc` estimator", gt=0, le=MANY)
    mc_batch: int = option(
        32, "draws per batch of the `mc` estimator; its mask counts are spread over a batch", gt=0, le=MANY
    )
    seed: int = option(0, "seed of masks and orders", ge=-LARGEST_SEED, le=LARGEST_SEED)
    batch_tokens: int = option(16384, "tokens per forward batch; it does not change a score", gt=0, le=2**31)

    @model_validator(mode="before")
    @classmethod
    def every_target_gets_the_budget(cls, given: Any) -> Any:
        if isinstance(given, dict) and "effort" in given:
            raise ValueError("effort is not a setting any more; use budget, the passes that every target gets")
        return given

    @model_validator(mode="after")
    def rounds_draw_anew(self) -> LikelihoodSettings:
        if self.rounds and (self.estimator not in ("auto", "lattice") or min(self.rounds) < 1):
            raise ValueError(
                f"rounds = {self.rounds} with estimator = {self.estimator!r}: rounds are numbers of passes from 1, of "
                "estimator auto or lattice; change them or leave them out"
            )
        return self


class EditSettings(Settings):
    """How Edit Flows is trained (arXiv:2506.09018): the starts it learns to edit, and when edits are made."""

    schedule: KappaName = option("cubic", "share of edits made by time t: t^3 or t")
    starts: list[Literal["empty", "masked", "noisy"]] = option(
        ["empty"], "what a text is edited from, drawn per sample: nothing, masks, or the text with faults", min_length=1
    )
    masks: int = option(32, "most masks of a masked start; their number is drawn from 1 up to it", gt=0, le=MANY)
    fault_share: float = option(0.5, "most faulty tokens of a noisy start, as a share", ge=1e-6, le=1)
    time_ceiling: float = option(0.999, "largest time; the weight of the loss is infinite at 1", ge=1e-3, lt=1)
    adapter_rank: int = option(64, "inner size of the adapters in front of the shared LM head", gt=0, le=2**16)


class AdapterSettings(Settings):
    """LoRA: small matrices trained beside frozen ones. A run writes them, and also the whole weights, both merged."""

    kind: Literal["lora", "qlora"] = option(
        "lora", "`qlora` holds the frozen matrices in four bits (with bitsandbytes, launched with cpu or ddp)"
    )
    rank: int = option(16, "inner size of an adapter", gt=0, le=2**16)
    alpha: int = option(32, "the output of an adapter is multiplied by alpha / rank", gt=0, le=MANY)
    dropout: float = option(0.0, "share of an adapter's inputs that are dropped in training", ge=0, lt=1)
    targets: list[str] | None = option(
        None,
        "linear layers that get one, by the ends of their names; none: all inside the model's layers",
        min_length=1,
    )


class OptimizerSettings(Settings):
    """The optimiser and its schedule: linear warm-up, then cosine to zero."""

    name: Literal["adamw", "muon"] = option("adamw", "`muon`: Muon for matrices inside layers, AdamW for the rest")
    learning_rate: float = option(1e-4, "peak learning rate (of AdamW)", ge=1e-12, le=100)
    matrix_learning_rate: float | None = option(
        None, "peak learning rate of Muon; none means `learning_rate`", ge=1e-12, le=100
    )
    betas: list[float] = option([0.9, 0.999], "AdamW's decay rates", min_length=2, max_length=2)
    epsilon: float = option(1e-8, "AdamW's epsilon", ge=1e-30, le=1)
    weight_decay: float = option(0.0, "decoupled weight decay", ge=0, le=100)
    clip: float = option(1.0, "gradient norm is clipped here", ge=1e-9, le=1e12)
    warmup_share: float = option(0.1, "share of the steps spent on linear warm-up", ge=0, le=1)

    @field_validator("betas")
    @classmethod
    def decay_rates(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each should be at least 0 and less than 1")
        return betas


class Recipe(Settings):
    """The switches between the published pipeline and ours (faults F1 to F7, docs/recipes.md)."""

    parameters: Literal["fp32", "bf16"] = option("fp32", "dtype of the master weights; bf16 loses small steps (F1)")
    autocast: Literal["bf16", "none"] = option("bf16", "dtype of the matrix products")
    schedule: ScheduleName = option("linear", "kept share alpha(t)")
    corruption: Literal["exact", "bernoulli"] = option("exact", "mask exactly k tokens, or each with probability t")
    time_floor: float = option(1e-3, "smallest diffusion time of `bernoulli`", ge=1e-12, lt=1)
    weight: Literal["elbo", "uniform"] = option("elbo", "weight of a row's loss")
    normalisation: Literal["token", "sequence", "batch"] = option("token", "what the summed loss is divided by")
    denominator: Literal["global", "micro_batch"] = option(
        "global", "whether the divisor is counted over the global batch or each micro-batch (F5)"
    )
    response_end: Literal["fill", "block", "one"] = option(
        "block", "EOS to the batch's longest row, to the block boundary, or a single EOS"
    )
    block_size: int = option(32, "tokens per block, of `bd3lm` and of `response_end: block`", gt=0, le=MANY)
    block_anchor: Literal["response", "row"] = option(
        "response", "where `bd3lm` counts its blocks from; the prompt is a block of its own, or cut up like the rest"
    )
    time_low: float = option(0.0, "least diffusion time that `bd3lm` trains on (clipped schedule)", ge=0, lt=1)
    time_high: float = option(1.0, "largest diffusion time that `bd3lm` trains on", gt=0, le=1)
    extra_blocks: int = option(0, "up to this many further blocks of EOS, drawn per sample and epoch", ge=0, le=MANY)
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
    """How a benchmark is scored: ours, or the published way (faults F2 to F4 and F11)."""

    likelihood: LikelihoodSettings = option(LikelihoodSettings(), "estimator of the likelihood")
    special_tokens: Literal["exact", "reference-v0", "reference-v0.1"] = option(
        "exact", "`exact`: no CLS/SEP, each side of the boundary on its own; the others repeat the published splits"
    )
    bf16_scores: bool = option(False, "cross-entropy in bf16, as published")
    fewshot_as_multiturn: bool = option(
        True, "examples of a prompt in the chat template as turns of the conversation, not all in one user turn (F11)"
    )
    precision: Literal["fp32", "mixed", "bf16"] = option(
        "fp32",
        "`mixed`: bf16 matrix products in the layers and their weights; LM head and scores in fp32 (of an "
        "autoregressive model, bf16 weights); `bf16`: bf16 weights",
    )


class Resources(Settings):
    """What a cluster job asks for; what is left out is predicted by `dllm plan`."""

    nodes: int = option(1, "machines", gt=0, le=MANY)
    gpus_per_node: int = option(0, "accelerators per machine", ge=0, le=MANY)
    cpus_per_task: int = option(1, "cores per process group", gt=0, le=MANY)
    memory_gib: int | None = option(None, "memory per machine; none means as predicted", gt=0, le=MANY)
    runtime_minutes: int | None = option(None, "time limit; none means as predicted", gt=0, le=MANY)
    disk_gib: int | None = option(None, "disk the job writes; none means as predicted", gt=0, le=MANY)
