"""Which estimator a target gets, and how many forward passes it takes. Without torch: planning reads it too."""

from __future__ import annotations

import math

from dllm.algorithms import resolved
from dllm.choices import ESTIMATORS
from dllm.config import LikelihoodSettings

ENUMERATION_LIMIT = 12
"""Longest target whose 2^L - 1 masks are enumerated."""

LATTICE = 3
"""Passes of `lattice` that are the same for every key: everything masked, and every second token, both ways."""

LEAST_LATTICE = LATTICE + 2
"""Passes of the smallest `lattice`: its error comes from two windows."""

SIZE_POWER = 1.5
"""Sizes of the windows of `lattice`: |S| / L = x^1.5, x evenly spread over (0, 1)."""


def estimator_for(length: int, settings: LikelihoodSettings) -> str:
    """The name of the estimator of a target; under `auto`, `enumerate` if all masks fit the budget, else `lattice`.

    Raises ValueError, one line, for an empty target, one too long to be enumerated, and a budget too small.
    """
    name, budget = _estimator(length, settings), settings.budget
    if length < 1:
        raise ValueError("a likelihood needs at least one target token, got none")
    if name == "enumerate" and length > ENUMERATION_LIMIT:
        raise ValueError(
            f"estimator = 'enumerate' takes targets of at most {ENUMERATION_LIMIT} tokens, got {length} "
            f"(2^{length} - 1 passes); use auto"
        )
    if name == "lattice" and length > 1 and budget < LEAST_LATTICE:
        raise ValueError(
            f"budget = {budget} is too small: lattice of a target of {length} tokens needs at least {LEAST_LATTICE} "
            "passes; raise it"
        )
    return name


def _estimator(length: int, settings: LikelihoodSettings) -> str:
    if settings.estimator != "auto":
        return settings.estimator
    return "enumerate" if length <= ENUMERATION_LIMIT and 2**length - 1 <= settings.budget else "lattice"


def likelihood_passes(length: int, settings: LikelihoodSettings) -> float:
    """Expected number of different inputs forwarded for a target of `length` tokens; never an error.

    Designs repeat masks of short targets, and equal inputs are forwarded once.
    """
    if length < 1:
        return 0.0
    passes = ESTIMATORS[_estimator(length, settings)].passes
    return float(settings.budget if passes is None else resolved(passes)(length, settings))


def enumeration_passes(length: int, settings: LikelihoodSettings) -> float:
    """Passes of `enumerate`: one per mask."""
    return float(2 ** min(length, ENUMERATION_LIMIT) - 1)


def mc_passes(length: int, settings: LikelihoodSettings) -> float:
    """Expected passes of `mc`, whose draws of short targets repeat each other."""
    return sum(_distinct(length, k, settings.mc_draws / length) for k in range(1, length + 1))


def lattice_passes(length: int, settings: LikelihoodSettings) -> float:
    """Expected passes of `lattice`, whose windows repeat each other and the fixed passes."""
    if length == 1:
        return 1.0
    # windows, of which some mask everything or half, as the fixed passes do; their sizes are |S| / L = x^SIZE_POWER
    share = [(k / length) ** (1 / SIZE_POWER) for k in range(length + 1)]
    draws = [max(0, settings.budget - LATTICE) * (high - low) for low, high in zip(share, share[1:], strict=False)]
    draws[length // 2 - 1] += 2
    draws[-1] = 1.0
    return sum(_distinct(length, k, number) for k, number in enumerate(draws, start=1))


def _distinct(length: int, k: int, draws: float) -> float:
    """Expected number of different sets among `draws` random sets of k of `length` tokens."""
    sets = math.comb(length, k)
    return 1.0 if sets == 1 else sets * -math.expm1(draws * math.log1p(-1 / sets))
