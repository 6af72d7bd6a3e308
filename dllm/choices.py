"""Settings that choose a function by its name: the row of a name says where its function is. Imports none of them.

A new reveal rule, estimator, reward or kind of rows is a function and a row here; settings, command line, planning and
data read the tables.
`dllm.algorithms.resolved` makes the function of a name such as "package.module:function".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RevealRule:
    """Which masked positions are revealed first."""

    score: str | Callable[..., Any]
    """(logits [N, V], confidence [N], position noise [N] or None) -> score [N]; the highest are revealed first."""
    sure: str | Callable[..., Any] | None = None
    """For a rule that reveals all that are sure enough: (scores [B, S] from the highest, -inf behind the last; the
    setting of the rule's name in each row [B, 1]) -> how many are sure [B]; one is revealed even if this is 0."""
    noise: bool = False
    """Whether the score needs position noise."""


REVEAL_RULES: dict[str, RevealRule] = {
    "confidence": RevealRule("dllm.sampling.reveal:confidence_score"),
    "entropy": RevealRule("dllm.sampling.reveal:negative_entropy"),
    "margin": RevealRule("dllm.sampling.reveal:margin"),
    "random": RevealRule("dllm.sampling.reveal:noise_score", noise=True),
    "threshold": RevealRule("dllm.sampling.reveal:confidence_score", "dllm.sampling.reveal:above_threshold"),
    "factor": RevealRule("dllm.sampling.reveal:confidence_score", "dllm.sampling.reveal:within_factor"),
    "entropy_bound": RevealRule("dllm.sampling.reveal:negative_entropy", "dllm.sampling.reveal:within_entropy_bound"),
}


def parallel_rules() -> tuple[str, ...]:
    """The rules that reveal all positions that are sure enough."""
    return tuple(name for name, rule in REVEAL_RULES.items() if rule.sure is not None)


SURE_OF_PLACE: tuple[str, ...] = ("entropy", "margin", "entropy_bound", "random")
"""The rules whose choice of positions does not depend on the tokens that were drawn there."""


@dataclass(frozen=True)
class Remasking:
    """How many revealed tokens a pass masks again, and which; for the amounts see `sampling.revise`."""

    scaled: bool
    """The amount is a share of the most that leaves the masks on schedule, or else of the revealed tokens."""
    score: str | Callable[..., Any] = "dllm.sampling.revise:any_of_them"
    """(confidence when revealed [B, S], noise [B, S] in [0, 1)) -> score [B, S]; the highest are masked again."""
    held: bool = False
    """Only while most of a block is revealed and nothing more is, for half of its passes."""


REMASKING: dict[str, Remasking] = {
    "cap": Remasking(scaled=False),
    "rescale": Remasking(scaled=True),
    "confidence": Remasking(scaled=True, score="dllm.sampling.revise:unsure_ones"),
    "loop": Remasking(scaled=False, held=True),
    "least": Remasking(scaled=True, score="dllm.sampling.revise:least_sure"),
}


@dataclass(frozen=True)
class Estimator:
    """An estimator of the likelihood of a target."""

    design: str | Callable[..., Any]
    """(target length, key, `LikelihoodSettings`) -> `likelihood.designs.Design`."""
    passes: str | Callable[..., float] | None = None
    """(target length, `LikelihoodSettings`) -> expected forward passes of a target, without torch; None: the budget."""


ESTIMATORS: dict[str, Estimator] = {
    "enumerate": Estimator("dllm.likelihood.designs:enumerate_masks", "dllm.likelihood.policy:enumeration_passes"),
    "lattice": Estimator("dllm.likelihood.designs:lattice", "dllm.likelihood.policy:lattice_passes"),
    "mc": Estimator("dllm.likelihood.designs:mc", "dllm.likelihood.policy:mc_passes"),
}


ROW_KINDS: dict[str, str | Any] = {
    "preference": "dllm.data.kinds:PREFERENCES",
    "messages": "dllm.data.kinds:CHATS",
    "sharegpt": "dllm.data.kinds:SHAREGPT",
    "alpaca": "dllm.data.kinds:ALPACA",
    "pairs": "dllm.data.kinds:PAIRS",
    "text": "dllm.data.kinds:TEXT",
}
"""Ways to write the rows of a dataset, each a `data.kinds.Kind`; a row is of the first that fits."""


POLICY_LIKELIHOODS: dict[str, str | Callable[..., Any]] = {
    "sampled": "dllm.likelihood.answers:sampled",
    "bound": "dllm.likelihood.answers:bound",
    "d1": "dllm.likelihood.answers:d1",
}
"""Log-likelihoods of answers in reinforcement learning: (`likelihood.answers.Answers`, which of them, iteration,
`PolicySettings`) -> `likelihood.answers.Forwards`."""


@dataclass(frozen=True)
class Reward:
    """What an answer is worth."""

    score: str | Callable[..., float]
    """(prompt, answer, reference) -> a number, the larger the better."""
    reference: str | Callable[..., Any]
    """(prompt, reference) -> what is read of them. Raises ValueError for a reference that it cannot be used with."""


REWARDS: dict[str, Reward] = {
    name: Reward(f"dllm.evaluation.rewards:{score}", f"dllm.evaluation.rewards:{reference}")
    for name, score, reference in (
        ("number", "number", "reference_number"),
        ("math", "mathematics", "reference_mathematics"),
        ("countdown", "countdown", "reference_equation"),
        ("sudoku", "sudoku", "reference_grid"),
        ("code", "code", "reference_tests"),
        ("format", "form", "reference_form"),
        ("length", "length", "reference_length"),
    )
}

REWARD_NAMED = "dllm.evaluation.rewards:reward_named"
REWARD_OF = "dllm.evaluation.rewards:reward_of"
CHECK_REFERENCE = "dllm.evaluation.rewards:check_reference"
"""What finds a reward, gives that of an answer, and checks a reference: beside evaluation, whose parser and sandbox
they share."""
