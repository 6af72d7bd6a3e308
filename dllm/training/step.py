"""One optimiser step: micro-batches in, weights moved, its numbers left on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from dllm.objectives.objective import Objective
from dllm.training.engine import Engine
from dllm.training.pipeline import Part


@dataclass(frozen=True)
class StepNumbers:
    """What this process' share of a step gave: loss and summed nll (nats) on the device, the number of predicted
    tokens, the global batch's tokens on disk, and the gradient norm before clipping (of the whole step)."""

    loss: Tensor
    nll: Tensor
    masked: int
    tokens: int
    gradient_norm: Tensor


def training_step(engine: Engine, objective: Objective, parts: Iterable[Part], *, scale: float = 1.0) -> StepNumbers:
    """Train on the micro-batches of one step, of which there must be at least one and the last one marked so.

    scale: what the loss is multiplied by for the gradient (a wrapper that averages over processes wants their number
    where the denominator counts the global batch). The host never waits for the device.
    """
    loss = nll = 0.0
    masked = tokens = 0
    for part in parts:
        terms = engine.accumulate(objective, part, scale=scale)
        loss, nll = loss + terms.loss.detach(), nll + terms.nll
        masked, tokens = masked + terms.masked, part.tokens
    return StepNumbers(loss, nll, masked, tokens, engine.update())
