"""Next-token prediction with a stock causal model: the autoregressive reference the report compares with.

Such a model is evaluated through lm-eval's own adapter, so it neither denoises nor has a diffusion bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.algorithms.base import Algorithm
from dllm.config import Recipe
from dllm.core.batch import Batch, LossTerms, MaskedInputs, Noise, masked_inputs, weighted_terms
from dllm.core.losses import row_shares


@dataclass(frozen=True)
class AR(Algorithm):
    """Autoregressive training; `prediction` of its model is `next`."""

    recipe: Recipe = Recipe()

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """The clean batch and its targets; the first token of a row has no prediction. See `Algorithm.corrupt`."""
        targets = batch.maskable.clone()
        targets[:, 0] = False
        weight = torch.ones_like(noise.level)
        share = row_shares(weight, targets.sum(-1), self.recipe.normalisation)
        return masked_inputs(batch, batch.tokens, targets, weight, share)

    def loss(self, model, inputs: MaskedInputs, *, denominator: float) -> LossTerms:
        """Next-token cross-entropy over `denominator`, which counts the predicted tokens. See `Algorithm.loss`."""
        nll = model(inputs.tokens, inputs.layout, inputs.row, inputs.position, inputs.targets)
        return weighted_terms(nll, inputs, denominator)

    def counted(self, targets: Tensor, prompts: Tensor) -> Tensor:
        """Every target but the first token of a row without a prompt."""
        return (targets - (prompts == 0).long()).clamp(min=0)

    def denoise(self, backbone, canvas, settings, *, finished=None):
        """Raises ValueError: an autoregressive model does not denoise."""
        raise ValueError("algorithm = 'ar' does not denoise; use the checkpoint with transformers' generate()")

    def nelbo(self, backbone, prompts, targets, settings):
        """Raises ValueError: its likelihood is exact and comes from lm-eval's own adapter."""
        raise ValueError("algorithm = 'ar' has no diffusion bound; evaluate it with kind: hf")

    def greedy_match(self, backbone, prompts, targets, settings):
        """Raises ValueError, as `nelbo`."""
        raise ValueError("algorithm = 'ar' has no diffusion bound; evaluate it with kind: hf")
