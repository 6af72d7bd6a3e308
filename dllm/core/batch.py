"""What a training step hands to an algorithm: rows of tokens, which of them may be masked, and their noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.core.noise import keyed_uniform

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


@dataclass(frozen=True)
class LossTerms:
    """What a batch gives.

    loss: the normalised objective (scalar, differentiable); nll: summed nats at masked tokens; masked: how many;
    rows [B]: each row's loss bound in nats, unnormalised.
    """

    loss: Tensor
    nll: Tensor
    masked: Tensor
    rows: Tensor


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
