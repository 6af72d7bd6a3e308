"""Which estimator a target gets, and how many forward passes it takes. Without torch: planning reads it too."""

from __future__ import annotations

from dllm.config import LikelihoodSettings

ENUMERATION_LIMIT = 12
"""Longest target whose 2^L - 1 masks are enumerated."""

LEAST_COVER = 3
"""Passes of the smallest `cover`: everything masked, and two windows, whose difference is its error."""

ARRANGEMENT_LIMIT = 256
"""Most passes of one arrangement of `cover`."""

LATTICE = 3
"""Passes of `lattice` that are the same for every key: everything masked, and every second token, both ways."""

LEAST_LATTICE = LATTICE + 2
"""Passes of the smallest `lattice`: its error comes from two windows."""

LATTICE_SHARE = 0.75
"""`auto` takes `lattice` for budgets up to so many passes per token; with more, `cover` is less noisy."""

SIZE_POWER = 1.5
"""Sizes of the windows of `lattice`: |S| / L = x^1.5, x uniform."""


def estimator_for(length: int, settings: LikelihoodSettings) -> str:
    """The name of the estimator of a target; under `auto`, the exact or least noisy one within the budget of passes.

    All masks, `enumerate`, if they fit. Else `lattice` where the budget is at most 3/4 L, and `cover` otherwise
    (docs/lab-log.md has the measurements).
    Raises ValueError, one line, for an empty target, one too long to be enumerated, and a budget too small.
    """
    if length < 1:
        raise ValueError("a likelihood needs at least one target token, got none")
    name, budget = settings.estimator, settings.budget
    if name == "auto":
        name = "lattice" if LEAST_LATTICE <= budget <= LATTICE_SHARE * length else "cover"
        if length <= ENUMERATION_LIMIT and 2**length - 1 <= budget:
            name = "enumerate"
    if name == "enumerate" and length > ENUMERATION_LIMIT:
        raise ValueError(
            f"estimator = 'enumerate' takes targets of at most {ENUMERATION_LIMIT} tokens, got {length} "
            f"(2^{length} - 1 passes); use cover or auto"
        )
    least = {"cover": LEAST_COVER, "lattice": LEAST_LATTICE}.get(name, 1) if length > 1 else 1
    if budget < least:
        instead = "" if name == "cover" else f", or take cover, which needs {LEAST_COVER}"
        raise ValueError(
            f"budget = {budget} is too small: {name} of a target of {length} tokens needs at least {least} passes; "
            f"raise it{instead}"
        )
    return name
