"""Next-token prediction with a stock causal model: the autoregressive reference the report compares with.

The loss's denominator counts the predicted tokens. Such a model is evaluated through lm-eval's own adapter, so it has
neither a sampler nor a scorer here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.config import Recipe
from dllm.core.batch import Batch, MaskedInputs, Noise, masked_inputs
from dllm.core.losses import row_shares
from dllm.objectives.objective import Objective


@dataclass(frozen=True)
class AR(Objective):
    """Autoregressive training; `prediction` of its model is `next`."""

    recipe: Recipe = Recipe()

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """The clean batch and its targets; the first token of a row has no prediction. See `Objective.corrupt`."""
        targets = batch.maskable.clone()
        targets[:, 0] = False
        weight = torch.ones_like(noise.level)
        share = row_shares(weight, targets.sum(-1), self.recipe.normalisation)
        return masked_inputs(batch, batch.tokens, targets, weight, share)

    def target_counts(self, targets: Tensor, prompts: Tensor) -> Tensor:
        """Every target but the first token of a row without a prompt."""
        return (targets - (prompts == 0).long()).clamp(min=0)
