"""The algorithms: one row says where the parts of each are, and what the rest of the package has to know of it.

A new algorithm is a row here and one file. A part is imported when it is first used; `Algorithm.part` raises an error
for a part that the row does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

PARTS = {"objective": "objective", "sampler": "sampler", "scorer": "estimator of the likelihood"}
"""The three verbs of an algorithm (train, sample, score), as an error line calls what is not there."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm. Its parts are classes, or names such as "package.module:Class"; None: it has no such part.

    objective: an `objectives.objective.Objective`, called with the recipe and the settings in `takes`.
    sampler: a `sampling.sampler.Sampler`; scorer: a `likelihood.scorer.LikelihoodScorer`; both are called without
    arguments.
    """

    name: str
    label: str
    """How the report calls it."""
    objective: str | type | None
    sampler: str | type | None
    scorer: str | type | None

    instead: str = ""
    """What to do where a part is not there: the end of the error line."""
    takes: tuple[str, ...] = ()
    """Settings of the run that the objective takes beside the recipe; `max_length`, `vocab_size`, `passes` and `bos_id`
    are the model's."""
    module: str | type | None = None
    """Makes the module that is trained, where that is more than the model; see `objectives.edit_flows`."""
    save: str | type | None = None
    """Writes into a checkpoint what such a module has beyond the model."""

    also_as: tuple[str, ...] = ()
    """Other algorithms that a model trained with this one may be used with."""
    causal: bool = False
    """Trained as the stock causal model that it is: lm-eval's own adapter scores it, and one EOS ends a response."""
    blocks: Literal["any", "trained", "none"] = "any"
    """Which blocks a trained model has: those that are asked for, those it attends by, or none."""
    prefix_positions: int = 0
    """Positions of the model's context that a row takes beside its tokens."""
    predicted: float | str = 0.5
    """Share of the targets that a training step predicts, for planning; or the run's setting that says it."""

    starts: tuple[str, ...] = ()
    """Algorithms of the models that training may start from; none: any."""

    previews: float = 0.0
    """Forward passes of the targets without a gradient, before that of a training step, for planning."""

    recipe_allows: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Switches of a recipe -> the values that it may have."""

    def part(self, name: str) -> Any:
        """What makes the objective, the sampler or the scorer. Raises ValueError, one line, if there is none."""
        made_by = getattr(self, name)
        if made_by is None:
            end = f"; {self.instead}" if self.instead else ""
            raise ValueError(f"algorithm = {self.name!r} has no {PARTS[name]}{end}")
        return resolved(made_by)

    @property
    def has_likelihood(self) -> bool:
        """Whether its loss is a likelihood or a bound on it."""
        return self.causal or self.scorer is not None

    def predicted_share(self, run: Any) -> float:
        """Share of the targets that a training step of a run predicts."""
        return getattr(run, self.predicted) if isinstance(self.predicted, str) else self.predicted

    def recipe_error(self, recipe: Any) -> str | None:
        """The end of the line for a recipe that this algorithm does not train with, or None."""
        for key, allowed in self.recipe_allows.items():
            if (value := getattr(recipe, key)) not in allowed:
                values = ", ".join(f"`{value}`" for value in allowed)
                return f"has {key} = {value!r}; algorithm = {self.name!r} allows {values} only: take another recipe"
        return None


_ALL_TIMES = {"time_low": (0.0,), "time_high": (1.0,)}
_MASKED = ("mdlm", "mlm", "grpo", "dpo")
_BY_TOKEN = {"normalisation": ("token",)}

_ROWS = (
    Algorithm(
        "mdlm",
        "masks",
        objective="dllm.objectives.mdlm:MDLM",
        sampler="dllm.sampling.sampler:MaskedSampler",
        scorer="dllm.likelihood.scorer:MaskedScorer",
        also_as=("bd3lm", "mlm"),
        recipe_allows=_ALL_TIMES,
    ),
    # a model that has only seen clean blocks before its own cannot fill in a text as a whole
    Algorithm(
        "bd3lm",
        "blocks",
        objective="dllm.objectives.bd3lm:BD3LM",
        sampler="dllm.sampling.sampler:block_sampler",
        scorer="dllm.likelihood.scorer:block_scorer",
        blocks="trained",
    ),
    Algorithm(
        "hybrid",
        "masks and random tokens",
        objective="dllm.objectives.hybrid:Hybrid",
        sampler="dllm.sampling.hybrid:HybridSampler",
        scorer="dllm.likelihood.hybrid:HybridScorer",
        also_as=("mdlm",),
        takes=("uniform_share", "vocab_size"),
        module="dllm.objectives.hybrid:trained_module",
        save="dllm.objectives.hybrid:noted",
        blocks="none",
        predicted=1.0,
        recipe_allows=_ALL_TIMES | {"weight": ("elbo",)},
    ),
    Algorithm(
        "mlm",
        "masked LM",
        objective="dllm.objectives.mlm:MLM",
        sampler="dllm.sampling.sampler:MaskedSampler",
        scorer="dllm.likelihood.scorer:MaskedScorer",
        also_as=("mdlm", "bd3lm"),
        takes=("mlm_share",),
        predicted="mlm_share",
        recipe_allows=_BY_TOKEN | _ALL_TIMES,
    ),
    Algorithm(
        "ar",
        "next token",
        objective="dllm.objectives.ar:AR",
        sampler=None,
        scorer=None,
        instead="evaluate it with kind: hf, or use the checkpoint with transformers' generate()",
        causal=True,
        predicted=1.0,
        recipe_allows=_BY_TOKEN | _ALL_TIMES,
    ),
    # the sampler and the scorer are those of masks, which is what such a model was before and stays
    Algorithm(
        "grpo",
        "masks, by rewards",
        objective="dllm.objectives.grpo:GRPO",
        sampler="dllm.sampling.sampler:MaskedSampler",
        scorer="dllm.likelihood.scorer:MaskedScorer",
        also_as=("mdlm", "bd3lm", "mlm"),
        takes=("policy",),
        module="dllm.objectives.grpo:trained_module",
        predicted=1.0,
        starts=_MASKED,
        recipe_allows=_ALL_TIMES | {"denominator": ("global",)},
    ),
    Algorithm(
        "dpo",
        "masks, by preferences",
        objective="dllm.objectives.dpo:DPO",
        sampler="dllm.sampling.sampler:MaskedSampler",
        scorer="dllm.likelihood.scorer:MaskedScorer",
        also_as=("mdlm", "bd3lm", "mlm"),
        takes=("preferences",),
        module="dllm.objectives.grpo:trained_module",
        starts=_MASKED,
        recipe_allows=_ALL_TIMES | {"denominator": ("global",)},
    ),
    Algorithm(
        "edit_flows",
        "edits",
        objective="dllm.objectives.edit_flows:EditFlows",
        sampler="dllm.sampling.edits:EditSampler",
        scorer=None,
        instead="evaluate it on benchmarks that generate, or score with mdlm",
        takes=("edits", "max_length"),
        module="dllm.objectives.edit_flows:trained_module",
        save="dllm.objectives.edit_flows:save_heads",
        blocks="none",
        prefix_positions=1,
        # responses find their own length: EOS to a boundary would be edits that mean nothing
        recipe_allows=_BY_TOKEN | _ALL_TIMES | {"response_end": ("one",)},
    ),
    Algorithm(
        "renoise",
        "renoised canvases",
        objective="dllm.objectives.renoise:Renoise",
        sampler="dllm.sampling.renoise:RenoisingSampler",
        scorer="dllm.likelihood.renoise:RenoisingScorer",
        takes=("vocab_size", "passes", "bos_id"),
        module="dllm.objectives.renoise:trained_module",
        blocks="trained",
        predicted=1.0,
        previews=1.0,
        recipe_allows=_ALL_TIMES,
    ),
    Algorithm(
        "expand",
        "masks that grow and vanish",
        objective=None,
        sampler="dllm.sampling.expand:ExpandingSampler",
        scorer=None,
        instead="it is sampled only: its passes change the length of a text, whose likelihood is that of no canvas",
    ),
)

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}


def algorithm_named(name: str) -> Algorithm:
    """The row of an algorithm. Raises ValueError with the known names."""
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm = {name!r}; allowed: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def algorithm_for(trained: str, wanted: str | None) -> Algorithm:
    """The algorithm with which to use a model trained with one of them; wanted: another one (None: the same).

    Raises ValueError, one line, for an unknown algorithm, or one that the model cannot serve.
    """
    row = algorithm_named(wanted or trained)
    allowed = (trained, *(ALGORITHMS[trained].also_as if trained in ALGORITHMS else ()))
    if row.name not in allowed:
        raise ValueError(
            f"algorithm = {wanted!r} cannot use a model trained with {trained!r}; allowed: {', '.join(allowed)}; "
            f"leave it out, or train one with algorithm: {wanted}"
        )
    return row


def trained_blocks(trained: str | None) -> Literal["any", "trained", "none"]:
    """Which blocks a model has that was trained with an algorithm (None: nobody knows); see `Algorithm.blocks`."""
    return ALGORITHMS[trained].blocks if trained in ALGORITHMS else "any"


def trained_causally(trained: str | None) -> bool:
    """Whether a model was trained as the stock causal model that it is (None: nobody knows); see `Algorithm.causal`."""
    return trained in ALGORITHMS and ALGORITHMS[trained].causal


def resolved(part: Any) -> Any:
    """The object that a name such as "package.module:Class" names; anything else is returned unchanged."""
    if not isinstance(part, str):
        return part
    module, attribute = part.split(":")
    return getattr(import_module(module), attribute)
