"""Schedules: the share of tokens that are still clean, or of edits that have been made, at time t.

Masked diffusion: t runs from 0 (clean) to 1 (masked). A schedule is the kept share alpha(t); the NELBO weight follows
from it, w(t) = -alpha'(t) / (1 - alpha(t)) = d/dt log(1 - alpha(t)). The value of the NELBO does not depend on the
schedule, only the sampling noise of t does. Source: Sahoo et al. 2024 (arXiv:2406.07524), section 3; Shi et al. 2024
(arXiv:2406.04329), table 4.

Edits: t runs from 0 (the start) to 1 (the text). A schedule is the share kappa(t) of edits that have been made; an edit
that is still to be made has the rate w(t) = kappa'(t) / (1 - kappa(t)). Source: Havasi et al. 2025 (arXiv:2506.09018).

A new schedule is a row of a table here. This module imports no torch, since settings are checked against the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """alpha(t) or kappa(t), and its derivative; each maps a float tensor to a float tensor of the same shape."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]

    def mask_ratio(self, t: Tensor) -> Tensor:
        """Probability that a token is masked at time t, 1 - alpha(t); same shape as t."""
        return 1 - self.value(t)

    def weight(self, t: Tensor) -> Tensor:
        """w(t), same shape as t; infinite where alpha or kappa is 1: at t = 0 of alpha, at t = 1 of kappa."""
        return self.derivative(t).abs() / (1 - self.value(t))


def _falling(p: float) -> Schedule:
    """alpha = 1 - t^p, so w = p / t."""
    return Schedule(lambda t: 1 - t**p, lambda t: -p * t ** (p - 1))


def _rising(p: int) -> Schedule:
    """kappa = t^p."""
    return Schedule(lambda t: t**p, lambda t: p * t ** (p - 1))


SCHEDULES: dict[str, Schedule] = {
    "linear": _falling(1.0),
    "cosine": Schedule(
        lambda t: 1 - (math.pi / 2 * (1 - t)).cos(), lambda t: -math.pi / 2 * (math.pi / 2 * (1 - t)).sin()
    ),
    "square": _falling(2.0),
    "sqrt": _falling(0.5),
}
"""alpha(t) by name."""

KAPPAS: dict[str, Schedule] = {"cubic": _rising(3), "linear": _rising(1)}
"""kappa(t) by name."""
