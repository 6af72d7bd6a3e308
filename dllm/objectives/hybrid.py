"""Hybrid diffusion: tokens are masked or replaced by random ones, and the model learns to mend both.

The process and its bound are in `core.hybrid`. The model scores every target, also those that it sees as they are,
since any of them might be noise: a model so trained judges, and corrects, what it wrote. Where no token is replaced,
`uniform_share: 0`, this is masked diffusion, and every draw and loss is that of `objectives.mdlm`.
Source: von Ruette et al. 2025 (arXiv:2503.04482).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm.config import Recipe, RunConfig
from dllm.core.batch import Batch, Inputs, LossTerms, Noise
from dllm.core.corrupt import apply_mask, corrupted
from dllm.core.hybrid import LEAST, MOST, HybridNoise
from dllm.core.losses import row_shares
from dllm.core.noise import keyed_hash
from dllm.core.packing import Layout, layout_of
from dllm.models.backbone import Backbone
from dllm.models.hybrid_loss import HybridLoss
from dllm.objectives.objective import Objective
from dllm.schedules import SCHEDULES


@dataclass(frozen=True, eq=False)
class HybridInputs(Inputs):
    """Rows of noised tokens [B, L], their layout, and N targets.

    row, position, targets [N] long: where the clean tokens are predicted; rho, kl, other [N]: of their levels and
    states, rho and the weights of the two divergences in the bound (`core.hybrid`); share [B]: what one nat of a row's
    bound counts in the loss before the denominator.
    """

    tokens: Tensor
    layout: Layout
    row: Tensor
    position: Tensor
    targets: Tensor
    rho: Tensor
    kl: Tensor
    other: Tensor
    share: Tensor


@dataclass(frozen=True)
class Hybrid(Objective):
    """Hybrid diffusion; uniform_share: the largest share of random tokens; vocab_size: of the model, with its mask."""

    recipe: Recipe = Recipe()
    uniform_share: float = 0.2
    vocab_size: int = 2

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> HybridInputs:
        """The batch with noise at its targets; see `Objective.corrupt`.

        `corruption: exact` means exactly k masks where there are masks only; with random tokens, every target is drawn
        by itself at all levels, and `bernoulli` keeps away from the lowest (`time_floor`).
        """
        process = HybridNoise(self.uniform_share, self.vocab_size - 1, mask_id)
        if self.uniform_share == 0:
            only_masks = corrupted(batch.maskable, noise.level, noise.place, self.recipe)
            z, chosen = apply_mask(batch.tokens, only_masks.masked, mask_id), only_masks.masked
        else:
            floor = self.recipe.time_floor if self.recipe.corruption == "bernoulli" else 0.0
            t, schedule = floor + (1 - floor) * noise.level, SCHEDULES[self.recipe.schedule]
            level = schedule.mask_ratio(t).clamp(LEAST, MOST)
            draws = keyed_hash(noise.keys[:, None], torch.arange(noise.place.shape[1]))
            z, chosen = process.corrupted(batch.tokens, batch.maskable, level, noise.place, draws), batch.maskable
        row, position = chosen.nonzero(as_tuple=True)
        targets, seen = batch.tokens[row, position], z[row, position]
        if self.uniform_share == 0:
            rho, kl, other = torch.zeros(len(row)), only_masks.weight[row], torch.zeros(len(row))
        else:
            rho, (kl, other) = process.odds(level)[row], process.weights(level[row], seen, targets)
            speed = schedule.derivative(t).abs()[row]  # of the level
            kl, other = kl * speed, other * speed
        count = batch.maskable.sum(-1)
        layout = layout_of(batch.attention.sum(-1).tolist(), batch.tokens.shape[1])
        share = row_shares(torch.ones(len(count)), count, self.recipe.normalisation)
        return HybridInputs(z, layout, row, position, targets, rho, kl, other, share)

    def loss(self, model, inputs: HybridInputs, *, denominator: float) -> LossTerms:
        """The bound of `core.hybrid` at the drawn levels; model is what `trained_module` gives. See `Objective.loss`.

        In `LossTerms`, nll counts KL / alpha, which is the nll of a masked token where there are masks only.
        """
        kl, other = model(inputs.tokens, inputs.layout, inputs.row, inputs.position, inputs.targets, inputs.rho)
        nats = kl * inputs.kl + other * inputs.other
        place = inputs.row * inputs.tokens.shape[1] + inputs.position  # every place once
        bounds = nats.new_zeros(inputs.tokens.numel()).index_copy(0, place, nats).view_as(inputs.tokens).sum(-1)
        return LossTerms(
            loss=(bounds * inputs.share).sum() / denominator,
            nll=kl.detach().sum(),
            masked=len(inputs.targets),
            rows=bounds.detach(),
        )


def trained_module(config: RunConfig, backbone: Backbone) -> HybridLoss:
    """The module that is trained."""
    return HybridLoss(backbone)


def noted(config: RunConfig, scores: HybridLoss, weights: dict[str, Tensor], directory: Path) -> dict[str, Any]:
    """What the sidecar of a checkpoint says of its noise: sampling and scoring go by it."""
    return {"uniform_share": config.uniform_share}
