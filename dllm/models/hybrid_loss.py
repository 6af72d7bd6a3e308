"""What the loss of hybrid noise asks of a model: divergences, for which every token's probability counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.core.hybrid import divergences, spread_of
from dllm.core.packing import Layout
from dllm.models.backbone import Backbone

HEAD_LOGITS = 2**25
"""Most logits held at once (128 MiB); with more, they are computed again in the backward pass."""


class HybridLoss(nn.Module):
    """A backbone as the module that is trained: `forward` returns the divergences at chosen positions."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone, self.model = backbone, backbone.model

    def forward(
        self, tokens: Tensor, layout: Layout, row: Tensor, position: Tensor, targets: Tensor, rho: Tensor
    ) -> tuple[Tensor, Tensor]:
        """KL / alpha and IS [N] (`core.hybrid.divergences`) of `targets` [N] at `position` [N] of `row` [N].

        tokens [B, L] are what the model sees; rho [N].
        """
        states = self.backbone.hidden_at(tokens, layout, row, position)
        seen = tokens[row, position]
        height = max(1, HEAD_LOGITS // self.backbone.vocab_size)
        if len(states) <= height:
            return self._divergences(states, targets, seen, rho)
        slices: list[Any] = [
            checkpoint(self._divergences, *part, use_reentrant=False)
            for part in zip(*(x.split(height) for x in (states, targets, seen, rho)), strict=True)
        ]
        kl, other = zip(*slices, strict=True)
        return torch.cat(kl), torch.cat(other)

    def _divergences(self, states: Tensor, targets: Tensor, seen: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        log_p = text_log_p(self.backbone, self.backbone.head_logits(states))
        at_target, at_seen = (log_p.gather(1, token[:, None])[:, 0] for token in (targets, seen))
        return divergences(at_target, at_seen, seen == targets, spread_of(log_p, rho), rho)


def text_log_p(backbone: Backbone, logits: Tensor) -> Tensor:
    """log p [N, V] of clean tokens from logits [N, V]: that of the mask token is -inf."""
    mask = torch.tensor([backbone.mask_id], device=logits.device)
    return logits.index_fill(1, mask, -torch.inf).log_softmax(-1)
