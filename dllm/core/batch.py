"""What a training step hands to an algorithm: rows of tokens, which of them may be masked, and their noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dllm.core.noise import keyed_hash, keyed_uniform
from dllm.core.packing import Layout, layout_of

GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio: i * GOLDEN mod 1 spreads evenly over [0, 1) for every prefix of i."""


@dataclass(frozen=True)
class Batch:
    """tokens [B, L] long; attention [B, L] bool (real tokens); maskable [B, L] bool (targets); sample_ids [B] long."""

    tokens: Tensor
    attention: Tensor
    maskable: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(*(x.to(device, non_blocking=True) for x in vars(self).values()))


@dataclass(frozen=True)
class Noise:
    """Uniform noise in [0, 1): level [B] decides how much of a row is masked, place [B, L] which tokens."""

    level: Tensor
    place: Tensor

    @property
    def keys(self) -> Tensor:
        """One key [B] per row, from its level and its first place: what else is random in a row is drawn from it."""
        return keyed_hash(*((value.double() * 2**24).long() for value in (self.level, self.place[:, 0])))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an algorithm makes of a batch on the host, and all that its loss needs on the device: a dataclass of it.

    Tensors and layouts among its fields are what is moved; numbers of the host stay as they are.
    """

    def to(self, device: torch.device | str) -> Self:
        """The same inputs on a device; the host does not wait for the copy if they are in pinned memory."""
        return self._with(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same inputs in page-locked memory: a copy from there to a CUDA device does not block."""
        return self._with(lambda value: value.pin_memory())

    def _with(self, change: Callable[[Any], Any]) -> Self:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(v) for name, v in parts.items() if isinstance(v, Tensor | Layout)})


@dataclass(frozen=True, eq=False)
class MaskedInputs(Inputs):
    """Rows whose cross-entropy is taken at N chosen tokens.

    tokens [B, L] long, as the model sees them; layout: the rows without their padding; row, position, targets [N]
    long: where the clean tokens `targets` are predicted, in row-major order; weight [B]: what makes a row's nats its
    bound; share [B]: what one nat of a row counts in the loss before the denominator.
    """

    tokens: Tensor
    layout: Layout
    row: Tensor
    position: Tensor
    targets: Tensor
    weight: Tensor
    share: Tensor

    def at_targets(self, values: Tensor) -> Tensor:
        """Weights or shares [B] as they count at the targets: [N]."""
        return values.index_select(0, self.row)


def masked_inputs(batch: Batch, tokens: Tensor, chosen: Tensor, weight: Tensor, share: Tensor) -> MaskedInputs:
    """The inputs that predict the clean tokens of a CPU batch wherever `chosen` [B, L] bool, seeing `tokens` [B, L].

    Padding may only be on the right.
    """
    row, position = chosen.nonzero(as_tuple=True)
    layout = layout_of(batch.attention.sum(-1).tolist(), batch.tokens.shape[1])
    return MaskedInputs(tokens, layout, row, position, batch.tokens[row, position], weight, share)


@dataclass(frozen=True)
class LossTerms:
    """What a batch gives.

    loss: the normalised objective (scalar, differentiable); nll: summed nats at the predicted tokens; masked: how many
    these are, a host integer; rows [B]: each row's loss bound in nats, unnormalised. Tensors stay on the device.
    sums: further sums over these tokens, whose means are logged by their names.
    """

    loss: Tensor
    nll: Tensor
    masked: int
    rows: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


class TargetInputs(Protocol):
    """Inputs whose loss is a weighted sum over N targets; the weights are those of rows, or of single targets."""

    tokens: Tensor
    row: Tensor
    position: Tensor
    weight: Tensor
    share: Tensor

    def at_targets(self, values: Tensor) -> Tensor:
        """`weight` or `share` as it counts at the targets: [N]."""


def weighted_terms(nll: Tensor, inputs: TargetInputs, denominator: float) -> LossTerms:
    """The terms of nats `nll` [N] at the chosen tokens: each times its share, summed, over `denominator`.

    Nothing makes the host wait, and every sum has a fixed order on every device (no atomic additions).
    """
    nats = nll.detach()
    place = inputs.row * inputs.tokens.shape[1] + inputs.position  # every place once
    bounds = nats.new_zeros(inputs.tokens.numel()).index_copy(0, place, nats * inputs.at_targets(inputs.weight))
    return LossTerms(
        loss=(nll * inputs.at_targets(inputs.share)).sum() / denominator,
        nll=nats.sum(),
        masked=len(nats),
        rows=bounds.view_as(inputs.tokens).sum(-1),
    )


def row_noise(seed: int, epoch: int, sample_ids: Tensor, length: int) -> Noise:
    """Noise of rows [B], a pure function of (seed, epoch, sample id): batches, ranks and resume do not change it."""
    positions = torch.arange(length, device=sample_ids.device)
    level = keyed_uniform(seed, epoch, sample_ids, -1)
    return Noise(level, keyed_uniform(seed, epoch, sample_ids[:, None], positions[None]))


def evaluation_noise(seed: int, draw: int, sample_ids: Tensor, length: int) -> Noise:
    """Fixed noise of test rows [B]: levels spread evenly over the rows, the same at every evaluation and run."""
    noise = row_noise(seed, draw, sample_ids, length)
    level = (sample_ids.double() * GOLDEN + draw * GOLDEN**2 + 0.5) % 1  # fp32 would coarsen with large ids
    return Noise(level.float().clamp(max=1 - 2**-24), noise.place)
