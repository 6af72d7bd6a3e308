"""From per-document scores to a value with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dllm.numbers import Z95, wilson_interval


def normal_interval(values: Sequence[float]) -> tuple[float, float | None, float | None, float | None]:
    """Mean, its standard error and the normal interval of real-valued scores; None where one document says nothing."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None, None, None
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, error, mean - Z95 * error, mean + Z95 * error


def summarise(
    values: Sequence, aggregate: Callable[[Sequence], float], doubts: Sequence[float] = ()
) -> dict[str, float | int | None]:
    """{value, standard_error, low, high, n} of one metric over its documents, each document counting once.

    aggregate is lm-eval's aggregation of the metric, known by its name: `mean` of 0/1 scores gives a Wilson interval,
    `mean` of other numbers a normal one, `perplexity` the exponential of the negated normal one (standard error by the
    delta method). For anything else (corpus metrics such as F1) only the value is known.
    doubts: the probabilities that 0/1 scores are wrong, of questions that a race did not decide. As independent errors
    of variance p (1 - p) each, they are added in quadrature to the standard error and to both sides of the interval.
    """
    n = len(values)
    if n == 0:
        raise ValueError("summarise: no scored document; check the task's split and `limit`")
    if aggregate.__name__ == "mean" and all(value in (0, 1) for value in values):
        successes = sum(int(value) for value in values)
        share, bounds = successes / n, wilson_interval(successes, n)
        spread = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
        if doubts:
            more = math.sqrt(math.fsum(p * (1 - p) for p in doubts)) / n
            below, above = (math.hypot(bound - share, Z95 * more) for bound in bounds)
            bounds = max(0.0, share - below), min(1.0, share + above)
            spread = None if spread is None else math.hypot(spread, more)
        return {"value": share, "standard_error": spread, "low": bounds[0], "high": bounds[1], "n": n}
    if aggregate.__name__ == "mean":
        mean, error, low, high = normal_interval([float(value) for value in values])
        return {"value": mean, "standard_error": error, "low": low, "high": high, "n": n}
    if aggregate.__name__ == "perplexity":
        mean, error, low, high = normal_interval([-float(value) for value in values])
        value = math.exp(mean)
        if error is None or low is None or high is None:
            return {"value": value, "standard_error": None, "low": None, "high": None, "n": n}
        return {"value": value, "standard_error": value * error, "low": math.exp(low), "high": math.exp(high), "n": n}
    return {"value": float(aggregate(values)), "standard_error": None, "low": None, "high": None, "n": n}
