"""The one door to a model: hidden states once, the LM head only where it is asked for.

This is the only place that shifts predictions: for every backbone, the logits returned for position i score token i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dllm.core.packing import Layout
from dllm.models.heads import head_logits, head_nll
from dllm.models.hidden import packed_hidden, padded_hidden
from dllm.models.kv_cache import KVCache
from dllm.models.packed_batch import PackedBatch
from dllm.models.self_tests import can_pack, can_shorten


@dataclass(frozen=True)
class Backbone:
    """A model, its tokenizer and the ids that diffusion needs.

    Rows are padded on the right: tokens [B, L]. What is computed of them is packed: the T positions of a layout (or of
    a part of one), one after another.
    """

    model: nn.Module
    tokenizer: Any
    family: Literal["encoder", "decoder"]
    prediction: Literal["in_place", "next"]
    """Whether the model scores token i at position i, or at position i - 1 (the first token then at its own)."""
    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    max_length: int
    sidecar: dict = field(default_factory=dict)
    new_tokens: tuple[int, int] = (0, 0)
    """Ids, from and before, of tokens that neither model nor tokenizer knew before loading."""
    edit_heads: nn.Module | None = None
    """`models.edit_heads.EditHeads` of a model trained with edit_flows; no submodule, so that it is saved as the stock
    model that it is."""
    compute: torch.dtype | None = None
    """The layers' matrix products, if not in the precision of their weights: hidden states and logits are then fp32.
    The LM head is not one of the layers: scores are as precise as their hidden states."""
    packable: bool | None = None
    """Whether the model's class can compute packed rows. None: it is tried out, once, here."""
    shortens: bool | None = None
    """Whether its last layer can be computed where it is read alone; likewise."""
    twins: tuple[str, str] | None = None
    """Names of two parts of the model that share their weights, of which an adapter names the first; None: it has no
    such parts, and its doors are those below. Its loader has then tested what it attends to."""

    def __post_init__(self) -> None:
        if self.packable is None:
            object.__setattr__(self, "packable", can_pack(self.model))
        if self.shortens is None:
            object.__setattr__(self, "shortens", self.packable and can_shorten(self.model))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def hidden(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        cache: KVCache | None = None,
        part: Layout | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [T, D] of the real tokens of `tokens` [B, L], at no cost for padding.

        part (`core.packing.part_of`): the result is of these positions only, in the part's order. With a cache, which
        keeps every layer's keys and values, nothing else is computed: they attend to the others as the cache holds
        them, and the rest of `tokens` is not read. Without one everything is computed and the part taken.
        read: the result is at these places [N] of that, in this order. On a CPU the last layer is computed for them
        alone: the same states, up to rounding, for less time.
        A class that cannot be packed takes the padded forward instead, whole, as if the cache were always fresh.

        Raises ValueError if tokens and layout disagree, for a part that the cache cannot complete, and for rows that
        attend block-causally if the class cannot be packed.
        """
        _check_shape(tokens, layout)
        part = part or layout
        if self.packable:
            computed = layout if cache is None else part
            short = self.shortens and tokens.device.type == "cpu" and computed is part and read is not None
            short = short and 0 < len(read) < part.tokens
            batch = PackedBatch(layout, computed, cache, read if short else None)
            hidden = packed_hidden(self.model, batch, compute=self.compute, input_ids=computed.pack(tokens)[None])
            hidden = hidden if computed is part else hidden.index_select(0, part.places_in(layout))
            return hidden if read is None or short else hidden.index_select(0, read)
        if layout.blocks is not None:
            raise ValueError(
                f"{type(self.model).__name__} computes attention in its own way, and block-causal attention needs "
                "a class that calls transformers' attention interface: take another architecture or algorithm"
            )
        attention = None
        if min(layout.lengths) < layout.width:
            attention = torch.arange(layout.width, device=tokens.device) < layout.cu_seqlens.diff()[:, None]
        hidden = part.pack(padded_hidden(self.model, attention, compute=self.compute, input_ids=tokens))
        return hidden if read is None else hidden.index_select(0, read)

    def hidden_at(
        self,
        tokens: Tensor,
        layout: Layout,
        row: Tensor,
        position: Tensor,
        *,
        cache: KVCache | None = None,
        part: Layout | None = None,
    ) -> Tensor:
        """`hidden` where it scores the tokens at `position` [N] of `row` [N] of `tokens` [B, L]: [N, D]."""
        read = self.read_at(part or layout, row, position)
        return self.hidden(tokens, layout, cache=cache, part=part, read=read)

    def nll(self, rows: Tensor, targets: Tensor) -> Tensor:
        """-log p [N], fp32 nats, of `targets` [N] under the logits of hidden states [N, D].

        Logits [N, V] that exceed a budget of memory exist a part at a time (`models.heads.head_nll`).
        """
        return head_nll(self.model, rows, targets)

    def head_logits(self, rows: Tensor) -> Tensor:
        """fp32 logits [N, V] that the LM head makes of hidden states [N, D]."""
        return head_logits(self.model, rows).float()

    def read_at(self, layout: Layout, row: Tensor, position: Tensor) -> Tensor:
        """Place [N] in the packed order of the hidden state that scores each token."""
        if self.prediction == "next" and layout.before is not None:
            return layout.before.index_select(0, layout.index(row, position))
        if self.prediction == "next":
            position = (position - 1).clamp(min=0)
        return layout.index(row, position)


def _check_shape(tokens: Tensor, layout: Layout) -> None:
    if tokens.shape != (layout.rows, layout.width):
        raise ValueError(f"tokens {list(tokens.shape)} are not the {layout.rows} rows x {layout.width} of the layout")


class TokenNLL(nn.Module):
    """A backbone as the module that is trained: `forward` returns the nll of targets at chosen positions.

    Wrappers such as DistributedDataParallel only see what goes through `forward`.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone, self.model = backbone, backbone.model

    def forward(self, tokens: Tensor, layout: Layout, row: Tensor, position: Tensor, targets: Tensor) -> Tensor:
        """-log p [N], fp32 nats, of `targets` [N] at `position` [N] of `row` [N] of `tokens` [B, L]."""
        return self.backbone.nll(self.backbone.hidden_at(tokens, layout, row, position), targets)
