"""Estimates with their uncertainty: the little arithmetic behind tables and verdicts."""

from dataclasses import dataclass
from math import hypot
from typing import Literal

import pandas as pd

from dllm.numbers import Z95

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
