"""What training asks of a model that renoises: how well it predicts a response from its noised canvases.

All canvases of a row are predicted at once. The encoder reads the clean row; a canvas attends to what the encoder has
read before it, in layers with a sliding window to the last of that, and to itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.core.renoise import step_divergence
from dllm.models.backbone import Backbone
from dllm.models.hybrid_loss import HEAD_LOGITS


class RenoiseLoss(nn.Module):
    """A backbone as the module that is trained: `forward` returns what the loss counts at every target.

    The vision tower is frozen: only text is trained. In training mode some rows are conditioned on a prediction of
    their own; in evaluation mode none is, since a bound knows the canvas only.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone, self.model = backbone, backbone.model
        self.size = backbone.sidecar["block_size"]
        model: Any = self.model
        for part in (model.model.encoder.vision_tower, model.model.encoder.embed_vision):
            part.requires_grad_(False)

    def forward(
        self,
        given: Tensor,
        start: Tensor,
        count: Tensor,
        seen: Tensor,
        conditioned: Tensor,
        row: Tensor,
        place: Tensor,
        targets: Tensor,
        level: Tensor,
        steps: int,
    ) -> tuple[Tensor, Tensor]:
        """Nats and nll [M], fp32, of the tokens `targets` [M] at `place` [M] of the responses of `row` [M].

        given [B, E]: clean rows, as far as any canvas needs them; start, count [B]: where in a row its response begins,
        and how many tokens it has; seen [B, T]: responses with noise; conditioned [B] bool: rows that are told their
        own first prediction. Nats are `steps` times the divergence of a step at `level` [M]
        (`core.renoise.step_divergence`), or the nll where steps is 0.
        """
        from transformers import DynamicCache

        read: Any = DynamicCache()  # without a config: every layer keeps all positions
        model: Any = self.model
        model.model.encoder(input_ids=given, past_key_values=read)
        inputs = {
            "decoder_input_ids": seen,
            "past_key_values": read,
            "decoder_position_ids": start[:, None] + torch.arange(seen.shape[1], device=seen.device),
            "decoder_attention_mask": self._patterns(given.shape[1], start, count, seen.shape[1]),
        }
        if self.training:
            with torch.no_grad():
                first = model(**inputs).logits
            inputs |= {"self_conditioning_logits": first, "self_conditioning_mask": conditioned}
        states = model.model.decoder(**inputs).last_hidden_state[row, place]
        parts = (states, seen[row, place], targets, level)
        height = max(1, HEAD_LOGITS // self.backbone.vocab_size)
        if len(states) <= height:
            return self._nats(*parts, steps)
        slices: list[Any] = [
            checkpoint(self._nats, *part, steps, use_reentrant=False)
            for part in zip(*(x.split(height) for x in parts), strict=True)
        ]
        nats, nll = zip(*slices, strict=True)
        return torch.cat(nats), torch.cat(nll)

    def _nats(self, states: Tensor, seen: Tensor, targets: Tensor, level: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        cap = model.final_logit_softcapping
        logits = cap * (model.lm_head(states).float() / cap).tanh()
        nll = nn.functional.cross_entropy(logits, targets, reduction="none")
        return (steps * step_divergence(logits, seen, targets, level, steps) if steps else nll), nll

    def _patterns(self, given: int, start: Tensor, count: Tensor, width: int) -> dict[str, Tensor]:
        """What each place of a response attends to, by the kind of a layer: [B, 1, T, E + T] bool."""
        model: Any = self.model
        place, before = torch.arange(width, device=start.device), torch.arange(given, device=start.device)
        canvas = place // self.size
        begins = (start[:, None] + canvas * self.size)[..., None]
        own = (canvas[:, None] == canvas) & (place < count[:, None, None])
        own = own | torch.eye(width, dtype=torch.bool, device=start.device)  # padding, too, attends to something
        every = before < begins
        near = every & (before > begins - model.config.get_text_config().sliding_window)
        kinds = {"full_attention": every, "sliding_attention": near}
        return {kind: torch.cat([visible, own], -1)[:, None] for kind, visible in kinds.items()}
