"""Masked language modelling at a fixed mask ratio: how the base encoders of the laptop configuration are trained.

A model that it trained samples and is scored as masked diffusion, although it has not seen every mask ratio.
Source: Devlin et al. 2019 (arXiv:1810.04805), with every chosen token masked and the higher ratio of Warner et al.
2024 (arXiv:2412.13663).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm.config import Recipe
from dllm.core.batch import Batch, MaskedInputs, Noise, masked_inputs
from dllm.core.corrupt import apply_mask, exact_count
from dllm.objectives.objective import Objective


@dataclass(frozen=True)
class MLM(Objective):
    """Masked LM; mlm_share: the share of each row's targets that is masked."""

    recipe: Recipe = Recipe()
    mlm_share: float = 0.3

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """The batch with a share of each row's targets masked; see `Objective.corrupt`."""
        level = torch.full_like(noise.level, self.mlm_share)
        chosen = exact_count(batch.maskable, level, noise.place)
        tokens = apply_mask(batch.tokens, chosen.masked, mask_id)
        return masked_inputs(batch, tokens, chosen.masked, chosen.weight, chosen.weight)
