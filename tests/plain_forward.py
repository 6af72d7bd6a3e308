"""The plain forward: padded rows, as the stock class runs them, and logits at any of their positions.

What is packed, cut into parts, cached or masked by blocks is measured against this.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dllm.core.packing import Layout
from dllm.models.backbone import Backbone
from dllm.models.heads import head_logits
from dllm.models.hidden import first_position, last_hidden, padded_hidden

_doors: WeakKeyDictionary[nn.Module, Backbone] = WeakKeyDictionary()


def door(model: nn.Module, prediction: str = "in_place") -> Backbone:
    """A stock model without a tokenizer as a backbone; whether it can be packed is tried out once per model."""
    if model not in _doors:
        ids = {"mask_id": 4, "eos_id": 0, "pad_id": 0, "vocab_size": model.config.vocab_size, "max_length": 128}
        _doors[model] = Backbone(model=model, tokenizer=None, family="encoder", prediction="in_place", **ids)
    return replace(_doors[model], prediction=prediction)


def hidden_states(model: nn.Module, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
    """Last hidden states [B, L, D] of padded tokens [B, L]; attention [B, L] bool marks real ones (None: all)."""
    mask = None if attention is None or bool(attention.all()) else attention
    return padded_hidden(model, mask, input_ids=tokens)


def logits_at(model: nn.Module, hidden: Tensor, where: Tensor, prediction: str = "in_place") -> Tensor:
    """fp32 logits [N, V] for the positions marked in `where` [B, L], in row-major order.

    prediction: `in_place` reads position i, `next` reads position i - 1 (the first position reads itself).
    """
    row, position = where.nonzero(as_tuple=True)
    if prediction == "next":
        position = (position - 1).clamp(min=0)
    return head_logits(model, hidden[row, position]).float()


def packed_logits(backbone: Backbone, hidden: Tensor, layout: Layout, row: Tensor, position: Tensor) -> Tensor:
    """fp32 logits [N, V] that score the tokens at `position` [N] of `row` [N], from packed hidden states [T, D]."""
    return backbone.head_logits(hidden.index_select(0, backbone.read_at(layout, row, position)))


def plain_hidden(backbone: Backbone, tokens: Tensor, layout: Layout, *, cache=None, part=None, read=None) -> Tensor:
    """`Backbone.hidden` without packing, cache or parts, and with a whole last layer."""
    if layout.blocks is not None:
        hidden = block_hidden(backbone.model, tokens, layout)
    else:
        attention = torch.arange(layout.width, device=tokens.device) < layout.cu_seqlens.diff()[:, None]
        hidden = layout.pack(hidden_states(backbone.model, tokens, attention))
    hidden = hidden if part is None else hidden.index_select(0, part.places_in(layout))
    return hidden if read is None else hidden.index_select(0, read)


def block_hidden(model: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    """Last hidden states [T, D] of rows that attend block-causally, by the stock class with a mask of four dimensions.

    All L x L scores of each padded row are computed.
    """
    pattern, device = layout.blocks.pattern, tokens.device
    place = torch.arange(layout.width).expand(layout.rows, -1)
    length = torch.tensor(layout.lengths)[:, None]
    real, itself = (place < length)[:, None], torch.eye(layout.width, dtype=torch.bool)
    token = (length.cumsum(0) - length + place).clamp(max=layout.tokens - 1).numpy()
    seen = torch.from_numpy(pattern.allowed(token[:, :, None], token[:, None]))
    position = torch.from_numpy(pattern.position[token])
    distance = (position[:, :, None] - position[:, None]).abs()

    def mask(window: int | None) -> Tensor:
        near = seen if window is None else seen & (distance <= window)
        return ((near & real) | itself)[:, None].to(device)

    # a class whose layers are all of one kind takes one mask, and others a mask for each kind
    kinds, window = set(getattr(model.config, "layer_types", None) or ()), getattr(model.config, "sliding_window", None)
    masks = {kind: mask(None if kind == "full_attention" else window) for kind in kinds or {"all"}}
    (*_, last) = masks.values()
    hidden = last_hidden(
        model,
        None,
        input_ids=tokens,
        position_ids=layout.unpack(layout.positions) + first_position(model),
        attention_mask=masks if len(masks) > 1 else last,
    )
    return layout.pack(hidden)
