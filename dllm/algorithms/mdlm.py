"""Masked diffusion (MDLM): train on masked tokens weighted by the NELBO, sample by revealing masks.

Source: Sahoo et al. 2024 (arXiv:2406.07524); Nie et al. 2025 (arXiv:2502.09992) for fine-tuning and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.algorithms.base import Algorithm
from dllm.algorithms.denoising import denoise_masked
from dllm.algorithms.scoring import greedy_match_masked, nelbo_masked
from dllm.config import GenerateSettings, LikelihoodSettings, Recipe
from dllm.core.batch import Batch, LossTerms, Noise
from dllm.core.canvas import Canvas, Score
from dllm.core.corrupt import apply_mask, bernoulli, exact_count
from dllm.core.losses import nll_at, row_shares
from dllm.core.schedules import SCHEDULES


@dataclass(frozen=True)
class MDLM(Algorithm):
    """Masked diffusion with the switches of a recipe."""

    recipe: Recipe = Recipe()

    def training_loss(self, model, batch: Batch, noise: Noise, *, mask_id: int, denominator: float) -> LossTerms:
        """Weighted cross-entropy at masked targets over `denominator`, the LM head computed only there.

        model is a `models.forward.Scores`; denominator counts the global batch (`core.losses.denominator`).
        """
        targets = batch.maskable.sum(-1)
        if self.recipe.corruption == "exact":
            corrupted = exact_count(batch.maskable, noise.level, noise.place)
        else:
            t = self.recipe.time_floor + (1 - self.recipe.time_floor) * noise.level
            corrupted = bernoulli(batch.maskable, t, noise.place, SCHEDULES[self.recipe.schedule])
        weight = corrupted.weight if self.recipe.weight == "elbo" else (targets > 0).float()
        share = row_shares(weight, targets, self.recipe.normalisation)
        return masked_loss(model, batch, corrupted.masked, weight, share, mask_id, denominator)

    def denoise(
        self,
        backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        row_seeds: Tensor | None = None,
        finished: Callable[[Canvas], Tensor] | None = None,
    ) -> Iterator[Canvas]:
        """See `Algorithm.denoise`."""
        return denoise_masked(backbone, canvas, settings, row_seeds=row_seeds, finished=finished)

    def nelbo(self, backbone, prompts, targets, settings: LikelihoodSettings) -> list[Score]:
        """See `Algorithm.nelbo`."""
        return nelbo_masked(backbone, prompts, targets, settings)

    def greedy_match(self, backbone, prompts, targets, settings: LikelihoodSettings) -> list[bool]:
        """Whether decoding a canvas of the target's length, one token per pass by confidence, gives the target."""
        return greedy_match_masked(backbone, prompts, targets, settings)


def masked_loss(
    model, batch: Batch, masked: Tensor, weight: Tensor, share: Tensor, mask_id: int, denominator: float
) -> LossTerms:
    """Cross-entropy at `masked` [B, L], each row times `share` [B], summed and divided by `denominator`.

    weight [B] makes a row's nats its bound (`LossTerms.rows`). The LM head runs at masked positions only; equal to
    `core.losses.dense_masked_loss` (values and gradients).
    """
    logits = model(apply_mask(batch.tokens, masked, mask_id), batch.attention, masked)
    nll = nll_at(logits, batch.tokens[masked])
    row = masked.nonzero(as_tuple=True)[0]
    rows = torch.zeros_like(weight).index_add(0, row, nll.detach() * weight[row])
    return LossTerms((nll * share[row]).sum() / denominator, nll.detach().sum(), masked.sum(), rows)
