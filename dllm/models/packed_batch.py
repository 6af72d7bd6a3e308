"""What a packed forward tells its attention layers, and which tokens a window or a block lets them see."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from dllm.core.packing import Layout, part_of
from dllm.models.kv_cache import KVCache

TILE = 16
"""Positions: a range of queries begins and ends at multiples of it, so that the next pass often has the same."""


class PackedBatch:
    """The positions that a packed forward computes, and what else they may see.

    layout: all positions of the rows; part: those of this pass (`layout` itself without a cache); calls: attention
    calls of this pass so far, which name a layer even where several share one module; read: places [N] at which alone
    the last hidden states are read, in this order (`models.last_layer`), or None. Not a dataclass, so that wrappers
    which rebuild the arguments of a forward leave it whole.
    """

    def __init__(self, layout: Layout, part: Layout, cache: KVCache | None = None, read: Tensor | None = None) -> None:
        self.layout, self.part, self.cache, self.read = layout, part, cache, read
        self.calls = 0
        if cache is not None:
            cache.start_pass(layout, part)

    @property
    def whole(self) -> Hashable:
        """What tells the layout from others among a part's plans; weak, for the part may be among its own."""
        return None if self.part is self.layout else ref(self.layout)

    def asking(self) -> tuple[PackedBatch, Tensor, Tensor]:
        """The last layer's queries: of each row the whole tiles that have all its places of `read`. On a CPU.

        Returned: the batch whose part they are; their places in this one's part; the places of `read` among them.
        """
        part, read = self.part, self.read
        row = torch.bucketize(read, part.cu_seqlens[1:], right=True)
        position = read - part.shift.index_select(0, row)
        ends = torch.full((2, part.rows), -part.width)
        ends.scatter_reduce_(1, row.expand(2, -1), torch.stack([-position, position + 1]), "amax")
        ranges = []
        for first, count, low, high in zip(part.begins, part.lengths, *ends.tolist(), strict=True):
            low, high = max(first, -low // TILE * TILE), min(first + count, -(-high // TILE) * TILE)
            ranges.append((low, high) if low < high else (first, first))
        key = ("asking", self.whole, *ranges)
        if key not in part.plans:
            queries = part_of(self.layout, *zip(*ranges, strict=True))
            part.plans[key] = queries, queries.places_in(part)
        queries, asking = part.plans[key]
        return PackedBatch(self.layout, queries), asking, queries.index(row, position)


@dataclass(frozen=True)
class Window:
    """How many positions a query sees to its left and right; None: all of its row."""

    left: int | None
    right: int | None


WHOLE_ROW = Window(None, None)


def planned(batch: PackedBatch, kernel: str, window: Window, make: Callable):
    """What `make(layout, part, window)` works out for a batch, once for all layers with the same window."""
    plans = batch.part.plans
    key = (kernel, window, batch.whole)
    if key not in plans:
        plans[key] = make(batch.layout, batch.part, window)
    return plans[key]


def in_window(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """Whether queries at some positions see keys at others as far as the window is concerned; bool, broadcast."""
    seen = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=query.device)
    if window.left is not None:
        seen = seen & (query - key <= window.left)
    if window.right is not None:
        seen = seen & (key - query <= window.right)
    return seen


def in_blocks(layout: Layout, query: Tensor, key: Tensor, window: Window) -> Tensor:
    """Whether queries [B, Q] see keys [B, K], given by their places in the packed order: [B, Q, K] bool (host)."""
    pattern = layout.blocks.pattern
    last = len(pattern.row) - 1
    places = query.clamp(max=last)[:, :, None].numpy(), key.clamp(max=last)[:, None].numpy()
    at_q, at_k = (torch.from_numpy(pattern.position[place]) for place in places)
    return torch.from_numpy(pattern.allowed(*places)) & in_window(at_q, at_k, window)
