"""How many forward passes a score or an answer takes: the policies of `core.likelihood` and of sampling, restated.

They are restated because the originals import torch, and planning must not. A test holds the two against each other.
"""

from __future__ import annotations

import itertools
import math

from dllm.config import GenerateSettings, LikelihoodSettings

ENUMERATION_LIMIT = CHAIN_LIMIT = 12
"""Longest targets, in tokens, whose masks are enumerated and for which `auto` takes chains."""


def estimator(length: int, settings: LikelihoodSettings) -> str:
    """The estimator of a target, as `core.likelihood.estimator_for` names it; never an error."""
    if settings.estimator != "auto":
        return settings.estimator
    if length == 1:
        return "exact"
    if length <= ENUMERATION_LIMIT and 2**length - 1 <= settings.budget:
        return "enumerate"
    return "chain" if length <= CHAIN_LIMIT and 2 * length - 1 <= settings.budget < 4 * length else "cover"


def likelihood_passes(length: int, settings: LikelihoodSettings) -> float:
    """Expected number of different inputs forwarded for a target of `length` tokens.

    Designs repeat masks of short targets, which are forwarded once: m masks of k out of L tokens are, on average,
    C (1 - (1 - 1/C)^m) different ones, C = binomial(L, k).
    """
    if length < 1:
        return 0.0
    name = estimator(length, settings)
    if name == "exact":
        return 1.0
    if name == "enumerate":
        return float(2 ** min(length, ENUMERATION_LIMIT) - 1)
    return sum(_different(length, k, draws) for k, draws in _masks(name, length, settings).items())


def _masks(name: str, length: int, settings: LikelihoodSettings) -> dict[int, float]:
    """How many masks of each size a design draws."""
    if name == "mc":
        return dict.fromkeys(range(1, length + 1), settings.mc_draws / length)
    if name == "chain":
        return dict.fromkeys(range(1, length + 1), 2 * max(1, settings.budget // max(1, 2 * length - 1)))
    return _cover_masks(length, settings.budget)


def _cover_masks(length: int, budget: int) -> dict[int, float]:
    """`cover`: two or more arrangements, each of windows of every size, the small sizes of more; or, where the budget
    does not hold them, of fewer sizes, all equally likely; and the pass with everything masked."""
    around = {k: math.ceil(length / k) for k in range(1, length)}
    complete = sum(around.values())
    if not complete:
        return {length: 1.0}
    units = max(2, (budget - 1) // complete)
    share = min(complete, max(1, (budget - 1) // units))
    if share < length - 1:
        return dict.fromkeys(around, units * share / length) | {length: 1.0}
    counts, left = dict.fromkeys(around, 1), share - (length - 1)
    for k in itertools.cycle(around):
        if not left:
            break
        if counts[k] < around[k]:
            counts[k], left = counts[k] + 1, left - 1
    return {k: float(units * n) for k, n in counts.items()} | {length: 1.0}


def question_passes(choices: int, length: int, one_prompt: bool, settings: LikelihoodSettings) -> float:
    """Passes for all answers of a question: those of one prompt and length share the input with everything masked."""
    each = likelihood_passes(length, settings)
    return choices * each - (choices - 1 if one_prompt and choices > 1 else 0)


def generation_passes(settings: GenerateSettings) -> int:
    """Most passes of an answer: one per token, or `steps`; an early end takes fewer, and so do parallel rules."""
    blocks = math.ceil(settings.max_new_tokens / settings.block_size)
    passes = min(settings.max_new_tokens, max(blocks, settings.steps or settings.max_new_tokens))
    return passes * (2 if settings.guidance else 1)


def _different(length: int, k: int, draws: float) -> float:
    sets = math.comb(length, k)
    return sets * -math.expm1(draws * math.log1p(-1 / sets)) if sets > 1 else 1.0
