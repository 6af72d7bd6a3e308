"""How many forward passes a score or an answer takes: the policies of `core.likelihood` and of sampling, restated.

They are restated because the originals import torch, and planning must not. A test holds the two against each other.
"""

from __future__ import annotations

import math

from dllm.config import GenerateSettings, LikelihoodSettings

ENUMERATION_LIMIT = CHAIN_LIMIT = 12
"""Longest targets, in tokens, whose masks are enumerated and for which `auto` takes chains."""

ARRANGEMENT_LIMIT = 256
"""Most passes of one arrangement of `cover`."""

LEAST_LATTICE = 5
"""Passes of the smallest `lattice`, of which 3 are fixed."""

ENUMERATED = 5
"""Longest target of which `multilevel` computes all versions cheaply, whatever the budget."""

EXACT_SHARE = 0.18
"""Exact windows of `multilevel` for each version of its first level beyond three."""

NATS_PER_TOKEN = 4.0
"""Assumed of targets with all of their tokens masked, whose nll is not known before they are scored."""


def estimator(length: int, settings: LikelihoodSettings) -> str:
    """The estimator of a target, as `core.likelihood.estimator_for` names it; never an error."""
    settings = with_effort(length, settings)
    if settings.estimator != "auto":
        return settings.estimator
    if length == 1:
        return "exact"
    if length <= ENUMERATION_LIMIT and 2**length - 1 <= settings.budget:
        return "enumerate"
    if length <= CHAIN_LIMIT and 2 * length - 1 <= settings.budget < 4 * length:
        return "chain"
    return "lattice" if LEAST_LATTICE <= settings.budget <= 0.75 * length else "cover"


def with_effort(length: int, settings: LikelihoodSettings) -> LikelihoodSettings:
    """The settings with the budget that `effort` gives a target of `length` tokens, if it surprises as is usual."""
    if settings.effort is None or settings.estimator not in ("auto", "cover", "lattice", "multilevel"):
        return settings
    wanted = math.ceil(3 + settings.effort * math.sqrt(NATS_PER_TOKEN * length))
    budget = min(max(wanted, LEAST_LATTICE), settings.budget)
    return settings.model_copy(update={"budget": budget, "effort": None})


def likelihood_passes(length: int, settings: LikelihoodSettings, context: float = 0) -> float:
    """Expected number of different inputs forwarded for a target of `length` tokens, behind a context of so many.

    What is computed of less than a row counts by its tokens. Designs repeat masks of short targets, which are forwarded
    once: m masks of k out of L tokens are, on average, C (1 - (1 - 1/C)^m) different ones, C = binomial(L, k).
    """
    if length < 1:
        return 0.0
    settings, first = with_effort(length, settings), settings.effort is not None
    name = estimator(length, settings)
    if name == "multilevel":
        return _two_levels(length, context, settings, first)
    if name == "exact":
        return 1.0
    if name == "enumerate":
        return float(2 ** min(length, ENUMERATION_LIMIT) - 1)
    # the windows of a cover on one circle differ
    around = {k: math.ceil(length / k) if name == "cover" else 1 for k in range(1, length + 1)}
    return sum(_different(length, k, draws, around[k]) for k, draws in _masks(name, length, settings).items())


def _masks(name: str, length: int, settings: LikelihoodSettings) -> dict[int, float]:
    """How many masks of each size a design draws."""
    if name == "mc":
        return dict.fromkeys(range(1, length + 1), settings.mc_draws / length)
    if name == "chain":
        return dict.fromkeys(range(1, length + 1), 2 * max(1, settings.budget // max(1, 2 * length - 1)))
    if name == "lattice":
        drawn = _window_sizes(length, settings.budget - 3, 1.5)
        half = drawn.get(length // 2, 0.0) + 2  # every second token, both ways
        return drawn | {length // 2: half, length: 1.0} if length > 1 else {1: 1.0}
    return _cover_masks(length, settings.budget)


def _two_levels(length: int, context: float, settings: LikelihoodSettings, first: bool) -> float:
    """`multilevel`: exact windows, the clean row, spans; and the pass with everything masked, if it comes `first`."""
    count = max(2, round(EXACT_SHARE * (settings.budget - 3)))
    versions = 2**length - 1 if length <= ENUMERATION_LIMIT else math.inf
    if versions <= max(count, 3):
        return float(versions)
    windows = _window_sizes(length, count, 0.9)
    if length <= ENUMERATED or versions <= settings.budget:
        spans = length * 2.0 ** (length - 1)
    else:
        cheap = _masks("lattice", length, settings)
        cheap = {k: cheap.get(k, 0.0) + draws for k, draws in windows.items()}
        spans = sum(k * _different(length, k, draws) for k, draws in cheap.items())
    if first:
        windows[length] = 1.0  # which is this window, too
    exact = sum(min(draws, _different(length, k, draws, math.ceil(length / k))) for k, draws in windows.items())
    return exact + 1 + spans / (context + length)


def _window_sizes(length: int, count: int, power: float) -> dict[int, float]:
    """How many of `count` windows have each size k, k / L = x^power, x even."""
    shares = [(k / length) ** (1 / power) for k in range(length + 1)]
    return {k: count * (shares[k] - shares[k - 1]) for k in range(1, length + 1)}


def _cover_masks(length: int, budget: int) -> dict[int, float]:
    """`cover`: arrangements of windows of every size, as many of each as fit; or, where the budget does not hold them,
    of fewer sizes, all equally likely; and the pass with everything masked."""
    units = math.ceil(budget / ARRANGEMENT_LIMIT)
    left = max(1, (budget - 1) // units)
    if left < length - 1:
        return dict.fromkeys(range(1, length), units * left / length) | {length: 1.0}
    around = {k: math.ceil(length / k) for k in range(1, length)}
    most = {k: min(math.comb(length, k), 8 * around[k]) for k in around}
    counts, left = dict.fromkeys(around, 0), min(left, sum(most.values()))
    while left:
        for k in around:
            if left and counts[k] < most[k]:
                counts[k], left = counts[k] + 1, left - 1
    return {k: float(units * count) for k, count in counts.items()} | {length: 1.0}


def question_passes(
    choices: int, length: int, one_prompt: bool, settings: LikelihoodSettings, context: float = 0
) -> float:
    """Passes for all answers of a question: those of one prompt and length share the input with everything masked."""
    each = likelihood_passes(length, settings, context)
    shared = settings.estimator != "multilevel" or length <= 2 or settings.effort is not None
    return choices * each - (choices - 1 if one_prompt and choices > 1 and shared else 0)


def generation_passes(settings: GenerateSettings) -> int:
    """Most passes of an answer: one per token, or `steps`; an early end takes fewer, and so do parallel rules."""
    blocks = math.ceil(settings.max_new_tokens / settings.block_size)
    passes = min(settings.max_new_tokens, max(blocks, settings.steps or settings.max_new_tokens))
    return passes * (2 if settings.guidance else 1)


def _different(length: int, k: int, draws: float, together: int = 1) -> float:
    """Of masks drawn so many together, which differ, how many differ in all."""
    sets, together = math.comb(length, k), max(1, min(together, int(draws)))
    if sets <= together:
        return float(sets)
    return sets * -math.expm1(draws / together * math.log1p(-together / sets))
