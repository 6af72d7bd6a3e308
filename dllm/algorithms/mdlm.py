"""Masked diffusion (MDLM): train on masked tokens weighted by the NELBO, sample by revealing masks.

Source: Sahoo et al. 2024 (arXiv:2406.07524); Nie et al. 2025 (arXiv:2502.09992) for fine-tuning and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from dllm.algorithms.base import Algorithm
from dllm.algorithms.denoising import complete_masked, denoise_masked
from dllm.algorithms.scoring import greedy_match_masked, nelbo_masked
from dllm.config import GenerateSettings, LikelihoodSettings, Recipe
from dllm.core.batch import Batch, LossTerms, MaskedInputs, Noise, masked_inputs, weighted_terms
from dllm.core.canvas import Canvas, Completion, Score
from dllm.core.corrupt import apply_mask, corrupted
from dllm.core.losses import row_shares


@dataclass(frozen=True)
class MDLM(Algorithm):
    """Masked diffusion with the switches of a recipe."""

    recipe: Recipe = Recipe()

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """The batch with some targets masked; see `Algorithm.corrupt`."""
        targets = batch.maskable.sum(-1)
        found = corrupted(batch.maskable, noise.level, noise.place, self.recipe)
        weight = found.weight if self.recipe.weight == "elbo" else (targets > 0).float()
        share = row_shares(weight, targets, self.recipe.normalisation)
        return masked_inputs(batch, apply_mask(batch.tokens, found.masked, mask_id), found.masked, weight, share)

    def loss(self, model, inputs: MaskedInputs, *, denominator: float) -> LossTerms:
        """Weighted cross-entropy at masked tokens over `denominator`; see `Algorithm.loss`."""
        return masked_loss(model, inputs, denominator=denominator)

    def denoise(
        self,
        backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        finished: Callable[[Canvas], Tensor] | None = None,
    ) -> Iterator[Canvas]:
        """See `Algorithm.denoise`."""
        return denoise_masked(backbone, canvas, settings, finished=finished)

    def complete(
        self,
        backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        ended: Callable[[list[int], int], bool] | None = None,
    ) -> Iterator[Completion]:
        """See `Algorithm.complete`; finished rows make room for waiting ones."""
        return complete_masked(backbone, canvas, settings, ended=ended)

    def nelbo(self, backbone, prompts, targets, settings: LikelihoodSettings) -> list[Score]:
        """See `Algorithm.nelbo`."""
        return nelbo_masked(backbone, prompts, targets, settings)

    def greedy_match(self, backbone, prompts, targets, settings: LikelihoodSettings) -> list[bool]:
        """Whether decoding a canvas of the target's length, one token per pass by confidence, gives the target."""
        return greedy_match_masked(backbone, prompts, targets, settings)


def masked_loss(model, inputs: MaskedInputs, *, denominator: float) -> LossTerms:
    """Cross-entropy at the chosen tokens, each row times its share, summed and divided by `denominator`.

    The LM head runs at these tokens only; equal to `core.losses.dense_masked_loss` (values and gradients).
    """
    nll = model(inputs.tokens, inputs.layout, inputs.row, inputs.position, inputs.targets)
    return weighted_terms(nll, inputs, denominator)
