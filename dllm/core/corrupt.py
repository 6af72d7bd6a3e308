"""Corruption: which tokens of a row are masked, and with what weight they count.

The noise is an argument, keyed by (seed, epoch, sample id) in `core.noise`, so that batch size, packing, world size
and resume do not change it. Source: Sahoo et al. 2024 (arXiv:2406.07524), eq. 10; the exact-count form integrates
the time out: NELBO = sum over k of E[mean nll at k masked tokens], which needs no floor on t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.config import Recipe
from dllm.core.batch import Noise
from dllm.core.noise import keyed_uniform
from dllm.schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class Corruption:
    """masked [B, L] bool and the row weights [B] that make the summed nll at masked tokens an unbiased NELBO."""

    masked: Tensor
    weight: Tensor


def corrupted(maskable: Tensor, level: Tensor, noise: Tensor, recipe: Recipe) -> Corruption:
    """Mask tokens as a recipe says, `exact` or `bernoulli`.

    maskable [B, L] bool; level [B], which decides how many, and noise [B, L], which decides which, in [0, 1).
    """
    if recipe.corruption == "exact":
        return exact_count(maskable, level, noise)
    t = recipe.time_floor + (1 - recipe.time_floor) * level
    return bernoulli(maskable, t, noise, SCHEDULES[recipe.schedule])


def exact_count(maskable: Tensor, u: Tensor, noise: Tensor) -> Corruption:
    """Mask exactly k = floor(u n) + 1 of a row's n maskable tokens, a uniform subset; weight n / k.

    maskable [B, L] bool; u [B] and noise [B, L] in [0, 1). Rows without maskable tokens stay clean with weight 0.
    Its expectation is the NELBO for every row length, with less variance than independent masking.
    """
    n = maskable.sum(-1)
    k = torch.minimum((u * n).long() + 1, n)
    order = noise.masked_fill(~maskable, 2.0).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(maskable.shape[-1]).to(order).expand_as(order))
    masked = (rank < k[:, None]) & maskable
    return Corruption(masked, torch.where(n > 0, n / k.clamp(min=1), torch.zeros_like(u)))


def bernoulli(maskable: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Corruption:
    """Mask each maskable token with probability 1 - alpha(t); weight w(t).

    maskable [B, L] bool; t [B] in (0, 1]; noise [B, L] in [0, 1).
    """
    masked = (noise < schedule.mask_ratio(t)[:, None]) & maskable
    return Corruption(masked, schedule.weight(t))


def apply_mask(x_0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x_t: the clean tokens [B, L] with `mask_id` wherever `masked` [B, L]."""
    return torch.where(masked, mask_id, x_0)


def block_levels(noise: Noise, blocks: Tensor) -> Tensor:
    """A level in [0, 1) for each block of a row, [B, K]; blocks [B, K] bool: those that have targets.

    Each is uniform over the draws of the row's own level. Together they are spread evenly, in a random order that the
    row's noise decides, (level + rank / blocks) mod 1: a bound that adds up over blocks stays unbiased however they are
    coupled. With one block it is the row's level.
    Source: Arriola et al. 2025 (arXiv:2503.09573), whose training code spreads them over batch and blocks.
    """
    draw = keyed_uniform(noise.keys[:, None], torch.arange(blocks.shape[1])).masked_fill(~blocks, 2.0)
    rank = draw.argsort(dim=-1, stable=True).argsort(-1)
    level = (noise.level.double()[:, None] + rank / blocks.sum(-1, keepdim=True).clamp(min=1)) % 1
    return level.float().clamp(max=1 - 2**-24)
