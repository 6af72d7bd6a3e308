"""Masked language modelling at a fixed mask ratio: how the base encoders of the laptop configuration are trained.

Source: Devlin et al. 2019 (arXiv:1810.04805), with every chosen token masked and the higher ratio of Warner et al.
2024 (arXiv:2412.13663).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm.algorithms.base import Algorithm
from dllm.algorithms.mdlm import MDLM, masked_loss
from dllm.config import Recipe
from dllm.core.batch import Batch, LossTerms, MaskedInputs, Noise, masked_inputs
from dllm.core.corrupt import apply_mask, exact_count


@dataclass(frozen=True)
class MLM(Algorithm):
    """Masked LM; it samples and scores as masked diffusion does, although it was not trained for every mask ratio."""

    recipe: Recipe = Recipe()
    mask_share: float = 0.3

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """The batch with a share of each row's targets masked; see `Algorithm.corrupt`."""
        level = torch.full_like(noise.level, self.mask_share)
        chosen = exact_count(batch.maskable, level, noise.place)
        tokens = apply_mask(batch.tokens, chosen.masked, mask_id)
        return masked_inputs(batch, tokens, chosen.masked, chosen.weight, chosen.weight)

    def loss(self, model, inputs: MaskedInputs, *, denominator: float) -> LossTerms:
        """Mean cross-entropy at masked tokens per row; denominator counts the targets. See `Algorithm.loss`."""
        return masked_loss(model, inputs, denominator=denominator)

    def denoise(self, backbone, canvas, settings, *, finished=None):
        """See `MDLM.denoise`."""
        return MDLM(self.recipe).denoise(backbone, canvas, settings, finished=finished)

    def complete(self, backbone, canvas, settings, *, ended=None):
        """See `MDLM.complete`."""
        return MDLM(self.recipe).complete(backbone, canvas, settings, ended=ended)

    def nelbo(self, backbone, prompts, targets, settings):
        """See `MDLM.nelbo`."""
        return MDLM(self.recipe).nelbo(backbone, prompts, targets, settings)

    def greedy_match(self, backbone, prompts, targets, settings):
        """See `MDLM.greedy_match`."""
        return MDLM(self.recipe).greedy_match(backbone, prompts, targets, settings)
