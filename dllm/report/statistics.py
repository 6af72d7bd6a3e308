"""Estimates with their uncertainty: the little arithmetic behind tables and verdicts."""

from dataclasses import dataclass
from math import hypot, sqrt
from typing import Literal

import pandas as pd

Z95 = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""

_ROUNDING = 1e-9
"""A lower end of 1e-18 is zero, and so not above a chance level of zero."""

Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, in the same unit."""

    value: float
    standard_error: float = 0.0

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - Z95 * self.standard_error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + Z95 * self.standard_error

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference; standard errors combine as for independent numbers."""
        return Estimate(self.value - other.value, hypot(self.standard_error, other.standard_error))

    def __truediv__(self, scale: float) -> "Estimate":
        """The estimate in another unit."""
        return Estimate(self.value / scale, self.standard_error / abs(scale))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of n documents, both in 0..1. Source: Wilson 1927.

    Raises ValueError if n < 1 or the share lies outside 0..1.
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"wilson_interval: share {share} of {n} documents: want 0 <= share <= 1 and n >= 1.")
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def against_chance(low: float, high: float, chance: float | None) -> Literal["above", "below", "near", ""]:
    """Where an interval lies: above chance, below it, or across it (`near`); empty where no chance level is known."""
    if chance is None or pd.isna(chance):
        return ""
    if low > chance + _ROUNDING:
        return "above"
    return "below" if high < chance - _ROUNDING else "near"


def decide_below(estimate: Estimate, bound: float) -> Verdict:
    """`holds` if the estimate is at least 2 standard errors below the bound, `does not hold` if as far above."""
    if estimate.value + 2 * estimate.standard_error <= bound:
        return "holds"
    return "does not hold" if estimate.value - 2 * estimate.standard_error > bound else "undecided"


def decide_within(estimate: Estimate, margin: float) -> Verdict:
    """`holds` if estimate +- 2 standard errors lies inside +-margin, `does not hold` if wholly outside."""
    return decide_below(Estimate(abs(estimate.value), estimate.standard_error), margin)


def all_of(verdicts: list[Verdict]) -> Verdict:
    """One failure fails; otherwise one doubt leaves the whole undecided, and so does an empty list."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and all(verdict == "holds" for verdict in verdicts) else "undecided"
