"""The kernels of packed attention, and which of them a call takes: `kernel_for`.

All give the same numbers:
- on the CPU one SDPA call per run of equal rows (`kernel_by_row`);
- on CUDA in half precision the varlen FlashAttention of flash_attn or of torch;
- anywhere else one padded SDPA call with a mask.

The first and the last also know rows that attend block-causally. On CUDA in half precision such rows take
FlexAttention, in tiles that hold something to see, or FlashAttention where a row is only a few blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache as once

import numpy
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dllm.core.attention_pattern import allowed
from dllm.core.packing import Layout
from dllm.models.kernel_by_row import by_row
from dllm.models.packed_batch import PackedBatch, Window, in_blocks, in_window, planned

TILE = 128
"""Tokens per tile of FlexAttention."""


def kernel_for(batch: PackedBatch, q: Tensor, dropout: float, window: Window, *, stored: bool) -> Callable[..., Tensor]:
    """The kernel for queries [T, heads, size] of a batch; stored: whether the keys are those of a cache.

    It is called with q, k, v, the stored keys and values or None, batch, window, options of SDPA.
    """
    if q.device.type == "cpu":
        return by_row
    if not _fast(q):
        return _padded
    flash = _varlen(dropout > 0) is not None
    if batch.layout.blocks is None:
        # varlen kernels count a part's positions from the end of its keys: no keys may follow that a query could see
        aligned = not stored or window.left is None or window.right == 0
        return _flash if flash and aligned else _padded
    if flash and window.left is None and not len(batch.layout.blocks.first):
        return _flash_blocks
    return _flex if not stored and not dropout and _flex_attention() is not None else _padded


def _fast(q: Tensor) -> bool:
    """Whether FlashAttention and FlexAttention take such queries."""
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return q.device.type == "cuda" and half


# ----------------------------------------------------------------------------------------------------------------------
# Padded


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _padded(q: Tensor, k: Tensor, v: Tensor, stored, batch: PackedBatch, window: Window, options: dict) -> Tensor:
    where_q, where_k, mask, back = planned(batch, "padded", window, _padding)
    count = batch.layout.rows
    q = q.index_select(0, where_q).unflatten(0, (count, -1))
    if stored is None:
        k, v = (x.index_select(0, where_k).unflatten(0, (count, -1)) for x in (k, v))
    else:
        k, v = (x[:, : mask.shape[-1]] for x in stored)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if (groups := q.shape[1] // k.shape[1]) > 1:  # with a mask, grouped queries would leave the fast kernels
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, back)


def _padding(layout: Layout, part: Layout, window: Window) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices that pad queries and keys, the mask [B, 1, queries, keys], and where each packed query went."""
    device = part.flat.device
    first, count, length = (torch.tensor(x)[:, None] for x in (part.begins, part.lengths, layout.lengths))
    queries, keys = max(part.lengths), max(layout.lengths)
    to_q, to_k = torch.arange(queries)[None], torch.arange(keys)[None]
    start_q, start_k = count.cumsum(0) - count, length.cumsum(0) - length
    where_q = (start_q + torch.minimum(to_q, (count - 1).clamp(min=0))).clamp(max=part.tokens - 1)
    where_k = (start_k + torch.minimum(to_k, (length - 1).clamp(min=0))).clamp(max=layout.tokens - 1)
    if layout.blocks is None:
        seen = in_window((first + to_q)[:, :, None], to_k[:, None], window) & (to_k < length)[:, None]
    else:
        place_q, place_k = (first + to_q).minimum((length - 1).clamp(min=0)), to_k.minimum((length - 1).clamp(min=0))
        seen = in_blocks(layout, start_k + place_q, start_k + place_k, window) & (to_k < length)[:, None]
    seen |= (to_q >= count)[:, :, None]  # a query of padding sees everything: not a number would spread in the gradient
    place = _placed(part.lengths, queries)
    on_host = where_q.flatten(), where_k.flatten(), seen[:, None], place
    where_q, where_k, seen, place = (x.to(device, non_blocking=True) for x in on_host)
    return where_q, where_k, seen, place


def _placed(lengths: Sequence[int], width: int) -> Tensor:
    """[sum(lengths)] long: where the positions 0..length - 1 of each row are among rows padded to `width`."""
    count, total = torch.tensor(lengths), sum(lengths)
    row = torch.repeat_interleave(torch.arange(len(lengths)), count, output_size=total)
    return row * width + torch.arange(total) - (count.cumsum(0) - count)[row]


# ----------------------------------------------------------------------------------------------------------------------
# Varlen FlashAttention


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _flash(q: Tensor, k: Tensor, v: Tensor, stored, batch: PackedBatch, window: Window, options: dict) -> Tensor:
    part = batch.part
    cumulative, longest = part.cu_seqlens, max(part.lengths)
    if stored is not None:
        where, cumulative, longest = planned(batch, "flash", window, _stored_keys)
        k, v = (x.flatten(0, 1).index_select(0, where) for x in stored)
    sides = (-1 if window.left is None else window.left, -1 if window.right is None else window.right)
    kernel = _varlen(options["dropout_p"] > 0)
    return kernel(q, k, v, part.cu_seqlens, cumulative, max(part.lengths), longest, sides, options)


def _stored_keys(layout: Layout, part: Layout, window: Window) -> tuple[Tensor, Tensor, int]:
    """Which stored keys the rows see, where each row's begin, and the most of a row.

    Where nothing on the right is seen, the keys end with the part: the kernels align the two ends.
    """
    ends: Sequence[int] = layout.lengths
    if window.right == 0:
        ends = [first + count for first, count in zip(part.begins, part.lengths, strict=True)]
    place = _placed(ends, layout.width)
    cu_seqlens = torch.tensor([0, *ends]).cumsum(0).int()
    device = part.flat.device
    return place.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True), max(ends)


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _flash_blocks(q: Tensor, k: Tensor, v: Tensor, stored, batch: PackedBatch, window: Window, options: dict) -> Tensor:
    """Rows of clean blocks, few of which are computed: each is a sequence of queries with its own copy of its keys."""
    k, v = (k, v) if stored is None else (x.flatten(0, 1) for x in stored)
    where, of_q, of_k, longest_q, longest_k = planned(batch, "flash", window, _blocks_as_sequences)
    k, v = (x.index_select(0, where) for x in (k, v))
    return _varlen(options["dropout_p"] > 0)(q, k, v, of_q, of_k, longest_q, longest_k, (-1, -1), options)


def _blocks_as_sequences(layout: Layout, part: Layout, window: Window) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Where the blocks' keys are, one block after another, where each block's queries and keys begin, the most."""
    rule, start = layout.blocks.rule, layout.blocks.start
    packed, counts, places = 0, [], []
    for row, (first, count, length) in enumerate(zip(part.begins, part.lengths, layout.lengths, strict=True)):
        base, low, end = row * layout.width if part is not layout else packed, first, first + count
        packed += length
        while low < end:
            stop = min(length, int(rule.end(low, start[row])))
            counts.append((min(stop, end) - low, stop))
            places.append(torch.arange(base, base + stop))
            low = min(stop, end)
    of_q, of_k = (torch.tensor([0, *each]).cumsum(0).int() for each in zip(*counts, strict=True))
    where, of_q, of_k = (x.to(part.flat.device, non_blocking=True) for x in (torch.cat(places), of_q, of_k))
    return where, of_q, of_k, *(max(each) for each in zip(*counts, strict=True))


@once
def _varlen(dropout: bool) -> Callable[..., Tensor] | None:
    """A varlen FlashAttention kernel, or None; torch's own (2.10 and later) has no dropout."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return lambda q, k, v, cu_q, cu_k, max_q, max_k, window, options: flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, options["dropout_p"], options["scale"], window_size=window
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if dropout or not {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    # torch types a pair as a possible result, which is returned only if asked for
    return lambda q, k, v, cu_q, cu_k, max_q, max_k, window, options: varlen_attn(  # type: ignore[return-value]
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_q,
        cu_k,
        max_q,
        max_k,
        scale=options["scale"],
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )


# ----------------------------------------------------------------------------------------------------------------------
# FlexAttention


@torch.compiler.disable  # compiled by itself, so that a compiled backbone does not compile it for every batch
def _flex(q: Tensor, k: Tensor, v: Tensor, stored, batch: PackedBatch, window: Window, options: dict) -> Tensor:
    """The whole batch as one sequence; tiles in which nothing is seen are left out."""
    mask = planned(batch, "flex", window, _block_mask)
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, mask.shape[-1] - len(x))) for x in (q, k, v))
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = _flex_attention()(q, k, v, block_mask=mask, scale=options["scale"], enable_gqa=grouped)
    return out[0].transpose(0, 1)[: batch.part.tokens]


def _block_mask(layout: Layout, part: Layout, window: Window):
    """A BlockMask over the packed tokens, padded to whole tiles; padding sees itself, in a row of its own."""
    from torch.nn.attention.flex_attention import create_block_mask

    pattern, device = layout.blocks.pattern, part.flat.device
    size = -(-len(pattern.row) // TILE) * TILE
    fill = {"row": layout.rows, "position": 0, "key_end": 1, "span": -1}
    columns = [numpy.full(size, value) for value in fill.values()]
    for padded, name in zip(columns, fill, strict=True):
        padded[: len(pattern.row)] = getattr(pattern, name)
    about = [torch.from_numpy(x).int().to(device, non_blocking=True) for x in columns]

    def seen(batch, head, query, key):
        pairs = [(x[query], x[key]) for x in about]
        near = torch.ones_like(pairs[0][0], dtype=torch.bool)
        if window.left is not None:
            near = near & (pairs[1][0] - pairs[1][1] <= window.left)
        if window.right is not None:
            near = near & (pairs[1][1] - pairs[1][0] <= window.right)
        return allowed(*pairs) & near

    return create_block_mask(seen, None, None, size, size, device=device)


@once
def _flex_attention() -> Callable[..., Tensor] | None:
    """Compiled FlexAttention, or None."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    return torch.compile(flex_attention, dynamic=True)
