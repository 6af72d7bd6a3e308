"""Masked diffusion (MDLM): train on masked tokens, weighted so that the loss bounds -log p.

One training step:

1. rows of clean tokens x_0, of which some may be masked (`data.collate`);
2. noise per row, keyed by (seed, epoch, sample id): how much of the row is masked, and which tokens
   (`core.batch.row_noise`);
3. x_t: the chosen tokens replaced by the mask token, and the weight of the row (`MDLM.corrupt`);
4. logits of the clean tokens at the masked positions alone, and their nll in nats (`models.backbone.TokenNLL`);
5. each nll times its row's share, summed over the micro-batch, divided by the denominator of the global batch
   (`Objective.loss`), and its gradient.

Steps 1 to 3 run on the host, ahead of the device. `docs/one_step.py` is these steps in forty lines.
Source: Sahoo et al. 2024 (arXiv:2406.07524); Nie et al. 2025 (arXiv:2502.09992) for fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.config import Recipe
from dllm.core.batch import Batch, MaskedInputs, Noise, masked_inputs
from dllm.core.corrupt import apply_mask, corrupted
from dllm.core.losses import row_shares
from dllm.objectives.objective import Objective


@dataclass(frozen=True)
class MDLM(Objective):
    """Masked diffusion with the switches of a recipe."""

    recipe: Recipe = Recipe()

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """The batch with some targets masked; see `Objective.corrupt`."""
        targets = batch.maskable.sum(-1)
        corruption = corrupted(batch.maskable, noise.level, noise.place, self.recipe)
        weight = corruption.weight if self.recipe.weight == "elbo" else (targets > 0).float()
        share = row_shares(weight, targets, self.recipe.normalisation)
        return masked_inputs(
            batch, apply_mask(batch.tokens, corruption.masked, mask_id), corruption.masked, weight, share
        )
