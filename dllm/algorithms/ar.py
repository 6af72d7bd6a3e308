"""Next-token prediction with a stock causal model: the autoregressive reference the report compares with.

Such a model is evaluated through lm-eval's own adapter, so it neither denoises nor has a diffusion bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm.algorithms.base import Algorithm
from dllm.config import Recipe
from dllm.core.batch import Batch, LossTerms, Noise
from dllm.core.losses import nll_at


@dataclass(frozen=True)
class AR(Algorithm):
    """Autoregressive training; `prediction` of its model is `next`."""

    recipe: Recipe = Recipe()

    def training_loss(self, model, batch: Batch, noise: Noise, *, mask_id: int, denominator: float) -> LossTerms:
        """Mean next-token cross-entropy at the targets (the first token of a row has no prediction)."""
        targets = batch.maskable.clone()
        targets[:, 0] = False
        logits = model(batch.tokens, batch.attention, targets)
        nll = nll_at(logits, batch.tokens[targets])
        predicted = targets.sum() / batch.maskable.sum()  # the denominator counts first tokens, too
        rows = torch.zeros(len(targets), device=nll.device).index_add(0, targets.nonzero()[:, 0], nll.detach())
        return LossTerms(nll.sum() / (denominator * predicted), nll.detach().sum(), targets.sum(), rows)

    def denoise(self, backbone, canvas, settings, *, row_seeds=None, finished=None):
        """Raises ValueError: an autoregressive model does not denoise."""
        raise ValueError("algorithm = 'ar' does not denoise; use the checkpoint with transformers' generate()")

    def nelbo(self, backbone, prompts, targets, settings):
        """Raises ValueError: its likelihood is exact and comes from lm-eval's own adapter."""
        raise ValueError("algorithm = 'ar' has no diffusion bound; evaluate it with kind: hf")

    def greedy_match(self, backbone, prompts, targets, settings):
        """Raises ValueError, as `nelbo`."""
        raise ValueError("algorithm = 'ar' has no diffusion bound; evaluate it with kind: hf")
