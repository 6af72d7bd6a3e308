"""Noise schedules of absorbing-state diffusion: the share of tokens still clean at time t.

t runs from 0 (clean) to 1 (masked). A schedule is its kept share alpha(t); the NELBO weight follows from it,
w(t) = -alpha'(t) / (1 - alpha(t)) = d/dt log(1 - alpha(t)). The value of the NELBO does not depend on the schedule,
only the sampling noise of t does. Source: Sahoo et al. 2024 (arXiv:2406.07524), section 3; Shi et al. 2024
(arXiv:2406.04329), table 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """alpha(t), its derivative and its inverse; each maps a float tensor to a float tensor of the same shape."""

    alpha: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def mask_ratio(self, t: Tensor) -> Tensor:
        """Probability that a token is masked at time t, 1 - alpha(t); same shape as t."""
        return 1 - self.alpha(t)

    def weight(self, t: Tensor) -> Tensor:
        """NELBO weight w(t) = -alpha'(t) / (1 - alpha(t)); same shape as t, infinite at t = 0."""
        return -self.derivative(t) / self.mask_ratio(t)


def _power(p: float) -> Schedule:
    """alpha = 1 - t^p, so w = p / t."""
    return Schedule(
        alpha=lambda t: 1 - t**p,
        derivative=lambda t: -p * t ** (p - 1),
        inverse=lambda a: (1 - a) ** (1 / p),
    )


SCHEDULES: dict[str, Schedule] = {
    "linear": _power(1.0),
    "square": _power(2.0),
    "sqrt": _power(0.5),
    "cosine": Schedule(
        alpha=lambda t: 1 - (math.pi / 2 * (1 - t)).cos(),
        derivative=lambda t: -math.pi / 2 * (math.pi / 2 * (1 - t)).sin(),
        inverse=lambda a: 1 - (1 - a).acos() * 2 / math.pi,
    ),
}
