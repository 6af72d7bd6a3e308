"""Keys and values kept between passes, so that a pass computes a part of each row and attends to the rest as stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm.core.packing import Layout


class KVCache:
    """Keys and values of every attention layer at every position of B rows, kept from one pass to the next.

    A pass writes what it computes at its own positions and reads the others as they were last written. It is exact for
    positions whose hidden states would not have changed, and an approximation for the rest: Wu et al. 2025
    (arXiv:2505.22618) keep the prefix (prefix cache) or prefix and suffix (dual cache) of the active block.
    Inference only.
    """

    def __init__(self) -> None:
        self.pools: list[list[Tensor]] = []
        """Per attention call of a pass: keys and values [B, L, heads, size]."""
        self.stored: list[int] = []
        """Per row: positions 0..stored-1 have been written."""

    @property
    def rows(self) -> int:
        """B."""
        return len(self.stored)

    def reorder(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; -1 means a new row, for which nothing is stored yet."""
        self.stored = [self.stored[row] if row >= 0 else 0 for row in rows]
        for pools in self.pools:
            index = torch.tensor([max(row, 0) for row in rows]).to(pools[0].device, non_blocking=True)
            pools[:] = [pool.index_select(0, index) for pool in pools]

    def start_pass(self, layout: Layout, part: Layout) -> None:
        """Take note of a pass that computes `part` of `layout`.

        Raises ValueError if the rows are not those stored, or a position is neither stored nor computed.
        """
        if not self.stored:
            self.stored = [0] * layout.rows
        if layout.rows != self.rows:
            raise ValueError(
                f"the cache holds {self.rows} rows, the pass has {layout.rows}; call reorder() with its rows"
            )
        ranges = zip(part.begins, part.lengths, layout.lengths, strict=True)
        stored = []
        for row, (first, count, length) in enumerate(ranges):
            known = self.stored[row]
            after = max(known, first + count) if count and first <= known else known
            if count and after < length:
                raise ValueError(
                    f"row {row}: positions {after}..{length - 1} are neither stored nor in this pass "
                    f"({first}..{first + count - 1}); compute the whole row once before a part of it"
                )
            stored.append(min(after, length) if count else known)
        self.stored = stored

    def update(self, call: int, layout: Layout, part: Layout, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [T, heads, size] at the part's positions; returns everything that is stored, [B, L, heads, size]."""
        if call == len(self.pools):
            self.pools.append([new.new_zeros(layout.rows, layout.width, *new.shape[1:]) for new in (key, value)])
        pools = self.pools[call]
        if pools[0].shape[1] != layout.width:
            pools[:] = [_resized(pool, layout.width) for pool in pools]
        for pool, new in zip(pools, (key, value), strict=True):
            pool.flatten(0, 1).index_copy_(0, part.flat, new.to(pool.dtype))
        return pools[0], pools[1]


def _resized(pool: Tensor, width: int) -> Tensor:
    wider = pool.new_zeros(len(pool), width, *pool.shape[2:])
    common = min(width, pool.shape[1])
    wider[:, :common] = pool[:, :common]
    return wider
