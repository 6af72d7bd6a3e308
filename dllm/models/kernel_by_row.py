"""Packed attention on a CPU: one SDPA call per run of equal rows, without a copy, a mask or padding.

A sliding window walks along the row in blocks, each with the keys that it can reach. Measured, this beats padding rows
into one call at every length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dllm.core.attention_pattern import AttentionPattern
from dllm.core.packing import Layout
from dllm.models.packed_batch import WHOLE_ROW, PackedBatch, Window, in_window, planned

SHORTEST_BLOCK = 64
"""Queries per block of a sliding window, at least; below it the calls cost more than the masked scores they save."""

SHORTEST_GROUP = 128
"""Queries of block-causal rows that are taken together, at least, with a mask if they are several blocks; likewise."""


@dataclass(frozen=True)
class Block:
    """Queries low..high of each row of a run and the keys that they may see, in positions of the row."""

    queries: slice | None
    keys: slice | tuple[slice, slice] | None
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Run:
    """Rows first..first + count - 1 in order, all with the same range of queries and number of keys.

    begin: place of their first token in the packed order of the layout.
    """

    first: int
    count: int
    queries: int
    keys: int
    begin: int
    blocks: tuple[Block, ...]


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def by_row(q: Tensor, k: Tensor, v: Tensor, stored, batch: PackedBatch, window: Window, options: dict) -> Tensor:
    runs = planned(batch, "runs", window, _runs)
    queries = q.split([run.count * run.queries for run in runs])
    if stored is None:
        keys, values = (
            [y.narrow(0, run.begin, run.count * run.keys).view(run.count, run.keys, *y.shape[1:]) for run in runs]
            for y in (k, v)
        )
    else:
        keys, values = ([y[run.first : run.first + run.count, : run.keys] for run in runs] for y in stored)
    options = options | {"enable_gqa": q.shape[1] != k.shape[1]}
    out = []
    for run, run_q, run_k, run_v in zip(runs, queries, keys, values, strict=True):
        run_q = run_q.view(run.count, run.queries, *run_q.shape[1:]).transpose(1, 2)
        run_k, run_v = run_k.transpose(1, 2), run_v.transpose(1, 2)
        seen = [_block(run_q, run_k, run_v, block, options) for block in run.blocks]
        whole = seen[0] if len(seen) == 1 else torch.cat(seen, 2)
        out.append(whole.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _block(q: Tensor, k: Tensor, v: Tensor, block: Block, options: dict) -> Tensor:
    if block.queries is not None:
        q = q[:, :, block.queries]
    if isinstance(block.keys, tuple):
        k, v = (torch.cat([x[:, :, keys] for keys in block.keys], 2) for x in (k, v))
    elif block.keys is not None:
        k, v = k[:, :, block.keys], v[:, :, block.keys]
    mask = block.mask if block.mask is None else block.mask.to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=block.causal, **options)


def _runs(layout: Layout, part: Layout, window: Window) -> list[Run]:
    """The rows of a part as runs of equal ones."""
    runs: list[Run] = []
    known: dict = {}
    pattern = None if layout.blocks is None else layout.blocks.pattern
    begins = accumulate(layout.lengths, initial=0)
    ranges = zip(part.begins, part.lengths, layout.lengths, begins, strict=False)
    for row, (first, count, length, begin) in enumerate(ranges):
        if not count:
            continue
        if pattern is None:
            shape: tuple[int | bytes, ...] = (first, count, length)
            if shape not in known:
                known[shape] = _blocks(first, count, length, window, known)
        else:
            shape = (first, count, length, *layout.blocks.shape_of(row))
            if shape not in known:
                known[shape] = _block_causal(layout, row, first, count, pattern, window, known)
        last = runs[-1] if runs else None
        if last and last.first + last.count == row and last.blocks is known[shape]:
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(Run(row, 1, count, length, begin, known[shape]))
    return runs


def _blocks(first: int, count: int, length: int, window: Window, masks: dict) -> tuple[Block, ...]:
    """How `count` queries from position `first` see a row's `length` keys."""
    if window == Window(None, 0) and count == length:
        return (Block(None, None, causal=True),)
    size = max(SHORTEST_BLOCK, window.left or 0, window.right or 0)
    if window.left is None or count <= 3 * size:
        size = count
    blocks = []
    for low in range(first, first + count, size):
        high = min(low + size, first + count)
        start = 0 if window.left is None else max(0, low - window.left)
        end = length if window.right is None else min(length, high + window.right)
        blocks.append(
            Block(
                queries=None if size == count else slice(low - first, high - first),
                keys=None if end - start == length else slice(start, end),
                mask=_mask(high - low, end - start, low - start, window, masks),
            )
        )
    return tuple(blocks)


def _block_causal(
    layout: Layout, row: int, first: int, count: int, pattern: AttentionPattern, window: Window, masks: dict
) -> tuple[Block, ...]:
    """How `count` queries from place `first` of a row see its tokens: some blocks at a time, without a mask if one."""
    base = sum(layout.lengths[:row])
    here = slice(base, base + layout.lengths[row])
    position, key_end, span = (x[here] for x in (pattern.position, pattern.key_end, pattern.span))
    clean, blocks, low, end = int(layout.blocks.clean[row]), [], first, first + count
    while low < end:
        high = _next_cut(low, end, clean, key_end, span)
        stop = int(key_end[low:high].max())
        if window.right is not None:
            stop = min(stop, int(position[low:high].max()) + window.right + 1)
        start = 0 if window.left is None else min(stop, max(0, int(position[low:high].min()) - window.left))
        keys: slice | tuple[slice, slice] = slice(start, stop)
        own = slice(low, high)
        if low >= clean:  # whole spans, also where only some of their tokens are among the queries
            ends = (
                numpy.searchsorted(span[clean:], span[low]),
                numpy.searchsorted(span[clean:], span[high - 1], "right"),
            )
            own = slice(*(clean + int(end) for end in ends))
            keys = (slice(start, stop), own)
        read = (x[own].tobytes() for x in (position - start, key_end - start, span - span[low]))
        about = ("pattern", low - own.start, high - low, stop - start, low < clean, *read)  # what the mask depends on
        if about not in masks:
            masks[about] = _pattern_mask(pattern, base, slice(low, high), keys, window)
        blocks.append(
            Block(
                queries=None if high - low == count else slice(low - first, high - first),
                keys=None if keys == slice(0, len(position)) else keys,
                mask=masks[about],
            )
        )
        low = high
    return tuple(blocks)


def _next_cut(low: int, end: int, clean: int, key_end: numpy.ndarray, span: numpy.ndarray) -> int:
    """Where the queries from `low` on stop that are taken together: whole blocks, `SHORTEST_GROUP` tokens at least."""
    end = min(end, clean) if low < clean else end
    about = key_end if low < clean else span
    high = min(low + SHORTEST_GROUP, end)
    while high < end and about[high] == about[high - 1]:
        high += 1
    return high


def _pattern_mask(
    pattern: AttentionPattern, base: int, queries: slice, keys: slice | tuple[slice, slice], window: Window
) -> Tensor | None:
    """[queries, keys], added to scores, for places of a row that begins at `base`; None if all is seen."""
    parts = keys if isinstance(keys, tuple) else (keys,)
    at_k = base + numpy.concatenate([numpy.arange(part.start, part.stop) for part in parts])
    at_q = slice(base + queries.start, base + queries.stop)
    seen = torch.from_numpy(pattern.mask(at_q, at_k))
    if window != WHOLE_ROW:
        of_q, of_k = pattern.position[at_q][:, None], pattern.position[at_k][None]
        seen &= in_window(torch.from_numpy(of_q), torch.from_numpy(of_k), window)
    return None if seen.all() else _added(seen)


def _mask(queries: int, keys: int, ahead: int, window: Window, masks: dict) -> Tensor | None:
    """[queries, keys], added to scores; the first query stands `ahead` keys behind the first key. None: all is seen."""
    all_left = window.left is None or ahead + queries - 1 <= window.left
    all_right = window.right is None or keys - 1 - ahead <= window.right
    if all_left and all_right:
        return None
    shape = ("mask", queries, keys, ahead)
    if shape not in masks:
        masks[shape] = _added(in_window(torch.arange(queries)[:, None] + ahead, torch.arange(keys), window))
    return masks[shape]


def _added(seen: Tensor) -> Tensor:
    """0 where `seen` and -inf elsewhere, fp32: what SDPA would make of it in every call."""
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
