"""Attention over packed rows, as one function that every stock class calls through transformers' attention interface.

A packed forward sees its rows as one long sequence [1, T]. `dllm`, registered below, is told where each row begins
(`rows=`, which the classes pass down as a keyword) and lets each row attend to itself alone: fully, causally or within
a sliding window, exactly as the stock class means it. Without `rows` it is the stock `sdpa`, masks included, so a model
is switched once, when it is loaded, and plain forwards stay what they were; a recomputed layer (activation
checkpointing) finds its rows among its own arguments.

Three kernels give the same numbers:
- on the CPU one SDPA call per run of equal rows, without a copy, a mask or padding; a sliding window walks along the
  row in blocks, each with the keys it can reach. Measured, this beats padding rows into one call at every length.
- on CUDA in half precision the varlen FlashAttention of flash_attn or of torch;
- anywhere else one padded SDPA call with a mask.

Rows whose layout has `blocks` attend block-causally instead, whatever the stock class says of order; its windows stay.
The first and the last kernel know how; on CUDA in half precision FlexAttention does it, in tiles that hold something
to see, and FlashAttention where a row is only a few blocks.

`KeyValues` holds keys and values between passes, so that a pass can compute a part of each row and attend to the rest
as it was stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as once
from functools import partial

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dllm.core.blocks import TokenSight, sees
from dllm.core.packing import Layout

NAME = "dllm"
SHORTEST_BLOCK = 64
"""Queries per block of a sliding window, at least; below it the calls cost more than the masked scores they save."""


SHORTEST_GROUP = 128
"""Queries of block-causal rows that are taken together, at least, with a mask if they are several blocks; likewise."""

TILE = 128
"""Tokens per tile of FlexAttention."""


class KeyValues:
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

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; -1 stands for a new row, of which nothing is stored."""
        self.stored = [self.stored[row] if row >= 0 else 0 for row in rows]
        for pools in self.pools:
            index = torch.tensor([max(row, 0) for row in rows]).to(pools[0].device, non_blocking=True)
            pools[:] = [pool.index_select(0, index) for pool in pools]

    def begin(self, layout: Layout, part: Layout) -> None:
        """Take note of a pass that computes `part` of `layout`.

        Raises ValueError if the rows are not those stored, or a position is neither stored nor computed.
        """
        if not self.stored:
            self.stored = [0] * layout.rows
        if layout.rows != self.rows:
            raise ValueError(f"the cache holds {self.rows} rows, the pass has {layout.rows}; call keep() with its rows")
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


class Rows:
    """What a packed forward tells its attention layers: which positions it computes, and what else they may see.

    layout: all positions of the rows; part: those of this pass (`layout` itself without a cache); calls: attention
    calls of this pass so far, which name a layer even where several share one module; beside: keys and values of all
    positions, where a layer is given those of `part` alone. Not a dataclass, so that wrappers which rebuild the
    arguments of a forward leave it whole.
    """

    def __init__(self, layout: Layout, part: Layout, cache: KeyValues | None = None) -> None:
        self.layout, self.part, self.cache = layout, part, cache
        self.calls = 0
        self.beside: tuple[Tensor, Tensor] | None = None
        if cache is not None:
            cache.begin(layout, part)


class Probe(Rows):
    """Rows of which only keys and values are wanted: the attention call ends the forward by raising them."""


class KeysAndValues(Exception):
    """What a `Probe` found: keys and values [T, heads, size] as the layer's attention was given them."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("a probe ends the forward here")
        self.key, self.value = key, value


@dataclass(frozen=True)
class Reach:
    """How many positions a query sees to its left and right; none: all of its row."""

    left: int | None
    right: int | None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    rows: Rows | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, T, size] to [1, T, heads, size].

    Without `rows` the stock `sdpa`. Raises ValueError for what packed attention does not know.
    """
    if rows is None:
        stock = _stock_attention()
        options = {"is_causal": is_causal, "sliding_window": sliding_window}
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options, **kwargs)
    for name in ("position_bias", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention does not know {name}, which {type(module).__name__} asks for")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(rows, Probe):
        raise KeysAndValues(k, v)
    if rows.beside is not None:
        k, v = rows.beside
    where = q.device.type
    if torch.is_autocast_enabled(where):  # rotary embeddings and norms may have widened some of them
        q, k, v = (x.to(torch.get_autocast_dtype(where)) for x in (q, k, v))
    given = q.dtype
    if where == "cpu" and q.requires_grad and given in (torch.bfloat16, torch.float16):
        q, k, v = (x.float() for x in (q, k, v))  # the backward of SDPA in bf16 takes up to 2.6 times as long
    reach = _reach(module, is_causal, sliding_window)
    if rows.layout.blocks is not None and reach.right == 0:
        raise ValueError(
            f"{type(module).__name__} attends to the left only; block-causal attention needs a model that does not: "
            "load it with is_causal = False"
        )
    stored = None
    if rows.cache is not None:
        if k.requires_grad:
            raise ValueError("a cache of keys and values is for inference; compute under torch.no_grad()")
        stored = rows.cache.update(rows.calls, rows.layout, rows.part, k, v)
        rows.calls += 1
        if rows.part is rows.layout:
            stored = None  # everything is fresh: attend to it where it is
    choose_kernel = _kernel if rows.layout.blocks is None else partial(_block_kernel, rows)
    kernel = choose_kernel(q, dropout, reach, stored is not None)
    with torch.autocast(where, enabled=False):
        out = kernel(q, k, v, stored, rows, reach, {"dropout_p": dropout, "scale": scaling})
    return out[None].to(given), None


def _reach(module: nn.Module, is_causal: bool | None, sliding_window: int | None) -> Reach:
    """What the stock masks let a query see.

    A class says with `sliding_window` that a layer slides, but each in its own units; the masks are made from the
    config alone: |q - k| <= config.sliding_window, and q - k < config.sliding_window where causal.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if sliding_window is None:
        return Reach(None, 0 if causal else None)
    window = module.config.sliding_window
    return Reach(window - 1, 0) if causal else Reach(window, window)


def _kernel(q: Tensor, dropout: float, reach: Reach, cached: bool) -> Callable[..., Tensor]:
    if q.device.type == "cpu":
        return _by_row
    # the varlen kernels count a part's positions from the end of its keys: no keys may follow that a query could see
    aligned = not cached or reach.left is None or reach.right == 0
    return _flash if _fast(q) and aligned and _varlen(dropout > 0) is not None else _padded


def _block_kernel(rows: Rows, q: Tensor, dropout: float, reach: Reach, cached: bool) -> Callable[..., Tensor]:
    if q.device.type == "cpu":
        return _by_row
    if not _fast(q):
        return _padded
    if reach.left is None and not len(rows.layout.blocks.first) and _varlen(dropout > 0) is not None:
        return _flash_blocks
    return _flex if not cached and not dropout and _flex_attention() is not None else _padded


def _fast(q: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return q.device.type == "cuda" and half


# ----------------------------------------------------------------------------------------------------------------------
# Row by row


@dataclass(frozen=True)
class Block:
    """Queries low..high of each row of a run and the keys that they may see, in positions of the row."""

    queries: slice | None
    keys: slice | tuple[slice, slice] | None
    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Run:
    """Rows first..first + count - 1 in order, all with the same range of queries and number of keys."""

    first: int
    count: int
    queries: int
    keys: int
    blocks: tuple[Block, ...]


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _by_row(q: Tensor, k: Tensor, v: Tensor, stored, rows: Rows, reach: Reach, options: dict) -> Tensor:
    runs = _planned(rows, "runs", reach, _runs)
    queries = q.split([run.count * run.queries for run in runs])
    if stored is None:
        sizes = [run.count * run.keys for run in runs]
        keys, values = (
            [x.unflatten(0, (run.count, run.keys)) for x, run in zip(y.split(sizes), runs, strict=True)] for y in (k, v)
        )
    else:
        keys, values = ([y[run.first : run.first + run.count, : run.keys] for run in runs] for y in stored)
    options = options | {"enable_gqa": q.shape[1] != k.shape[1]}
    out = []
    for run, run_q, run_k, run_v in zip(runs, queries, keys, values, strict=True):
        run_q = run_q.unflatten(0, (run.count, run.queries)).transpose(1, 2)
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
    return scaled_dot_product_attention(q, k, v, attn_mask=block.mask, is_causal=block.causal, **options)


def _runs(layout: Layout, part: Layout, reach: Reach) -> list[Run]:
    runs: list[Run] = []
    known: dict = {}
    sight = None if layout.blocks is None else layout.blocks.sight
    for row, (first, count, length) in enumerate(zip(part.begins, part.lengths, layout.lengths, strict=True)):
        if not count:
            continue
        if sight is None:
            shape = (first, count, length)
            if shape not in known:
                known[shape] = _blocks(first, count, length, reach, known)
        else:
            shape = (first, count, length, *layout.blocks.shape_of(row))
            if shape not in known:
                known[shape] = _block_causal(layout, row, first, count, sight, reach, known)
        last = runs[-1] if runs else None
        if last and last.first + last.count == row and last.blocks is known[shape]:
            runs[-1] = Run(last.first, last.count + 1, count, length, last.blocks)
        else:
            runs.append(Run(row, 1, count, length, known[shape]))
    return runs


def _blocks(first: int, count: int, length: int, reach: Reach, masks: dict) -> tuple[Block, ...]:
    """How `count` queries from position `first` see a row's `length` keys."""
    if reach == Reach(None, 0) and count == length:
        return (Block(None, None, causal=True),)
    size = max(SHORTEST_BLOCK, reach.left or 0, reach.right or 0)
    if reach.left is None or count <= 3 * size:
        size = count
    blocks = []
    for low in range(first, first + count, size):
        high = min(low + size, first + count)
        start = 0 if reach.left is None else max(0, low - reach.left)
        end = length if reach.right is None else min(length, high + reach.right)
        blocks.append(
            Block(
                queries=None if size == count else slice(low - first, high - first),
                keys=None if end - start == length else slice(start, end),
                mask=_mask(high - low, end - start, low - start, reach, masks),
            )
        )
    return tuple(blocks)


def _block_causal(
    layout: Layout, row: int, first: int, count: int, sight: TokenSight, reach: Reach, masks: dict
) -> tuple[Block, ...]:
    """How `count` queries from place `first` of a row see its tokens: some blocks at a time, without a mask if one."""
    base = sum(layout.lengths[:row])
    here = slice(base, base + layout.lengths[row])
    position, limit, span = (x[here] for x in (sight.position, sight.limit, sight.span))
    clean, found, low, end = int(layout.blocks.clean[row]), [], first, first + count
    while low < end:
        high = _next_cut(low, end, clean, limit, span)
        stop = int(limit[low:high].max())
        if reach.right is not None:
            stop = min(stop, int(position[low:high].max()) + reach.right + 1)
        start = 0 if reach.left is None else min(stop, max(0, int(position[low:high].min()) - reach.left))
        keys, own = slice(start, stop), slice(low, high)
        if low >= clean:  # whole spans, also where only some of their tokens are among the queries
            ends = (
                numpy.searchsorted(span[clean:], span[low]),
                numpy.searchsorted(span[clean:], span[high - 1], "right"),
            )
            own = slice(*(clean + int(end) for end in ends))
            keys = (keys, own)
        about = (x[own].tobytes() for x in (position - start, limit - start, span - span[low]))
        about = ("sight", low - own.start, high - low, stop - start, low < clean, *about)  # what the mask depends on
        if about not in masks:
            masks[about] = _sight_mask(sight, base, slice(low, high), keys, reach)
        found.append(
            Block(
                queries=None if high - low == count else slice(low - first, high - first),
                keys=None if keys == slice(0, len(position)) else keys,
                mask=masks[about],
            )
        )
        low = high
    return tuple(found)


def _next_cut(low: int, end: int, clean: int, limit: numpy.ndarray, span: numpy.ndarray) -> int:
    """Where the queries from `low` on stop that are taken together: whole blocks, `SHORTEST_GROUP` tokens at least."""
    end = min(end, clean) if low < clean else end
    about = limit if low < clean else span
    high = min(low + SHORTEST_GROUP, end)
    while high < end and about[high] == about[high - 1]:
        high += 1
    return high


def _sight_mask(
    sight: TokenSight, base: int, queries: slice, keys: slice | tuple[slice, slice], reach: Reach
) -> Tensor | None:
    """[queries, keys] bool for places of a row that begins at `base`; None if all is seen."""
    parts = keys if isinstance(keys, tuple) else (keys,)
    at_k = base + numpy.concatenate([numpy.arange(part.start, part.stop) for part in parts])
    at_q = slice(base + queries.start, base + queries.stop)
    seen = torch.from_numpy(sight.mask(at_q, at_k))
    if reach != Reach(None, None):
        position = (torch.from_numpy(x) for x in (sight.position[at_q][:, None], sight.position[at_k][None]))
        seen &= _seen(*position, reach)
    return None if seen.all() else seen


def _mask(queries: int, keys: int, ahead: int, reach: Reach, masks: dict) -> Tensor | None:
    """[queries, keys] bool, the first query standing `ahead` keys behind the first key; None if all is seen."""
    all_left = reach.left is None or ahead + queries - 1 <= reach.left
    all_right = reach.right is None or keys - 1 - ahead <= reach.right
    if all_left and all_right:
        return None
    shape = ("mask", queries, keys, ahead)
    if shape not in masks:
        masks[shape] = _seen(torch.arange(queries)[:, None] + ahead, torch.arange(keys), reach)
    return masks[shape]


def block_seen(layout: Layout, query: Tensor, key: Tensor, reach: Reach) -> Tensor:
    """Whether queries [B, Q] see keys [B, K], given by their places in the packed order: [B, Q, K] bool (host)."""
    sight = layout.blocks.sight
    last = len(sight.row) - 1
    places = query.clamp(max=last)[:, :, None].numpy(), key.clamp(max=last)[:, None].numpy()
    near = _seen(*(torch.from_numpy(sight.position[place]) for place in places), reach)
    return torch.from_numpy(sight.seen(*places)) & near


def _seen(query: Tensor, key: Tensor, reach: Reach) -> Tensor:
    """Whether a query at one position sees a key at another, bool, broadcast."""
    seen = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=query.device)
    if reach.left is not None:
        seen = seen & (query - key <= reach.left)
    if reach.right is not None:
        seen = seen & (key - query <= reach.right)
    return seen


def _planned(rows: Rows, kernel: str, reach: Reach, make: Callable):
    """What `make` works out for these rows, once for all layers with the same reach."""
    plans = rows.part.plans
    about = (kernel, reach, rows.layout if rows.part is not rows.layout else None)
    if about not in plans:
        plans[about] = make(rows.layout, rows.part, reach)
    return plans[about]


# ----------------------------------------------------------------------------------------------------------------------
# Padded


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _padded(q: Tensor, k: Tensor, v: Tensor, stored, rows: Rows, reach: Reach, options: dict) -> Tensor:
    where_q, where_k, mask, back = _planned(rows, "padded", reach, _padding)
    count = rows.layout.rows
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


def _padding(layout: Layout, part: Layout, reach: Reach) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices that pad queries and keys, the mask [B, 1, queries, keys], and where each packed query went."""
    device = part.flat.device
    first, count, length = (torch.tensor(x)[:, None] for x in (part.begins, part.lengths, layout.lengths))
    queries, keys = max(part.lengths), max(layout.lengths)
    to_q, to_k = torch.arange(queries)[None], torch.arange(keys)[None]
    start_q, start_k = count.cumsum(0) - count, length.cumsum(0) - length
    where_q = (start_q + torch.minimum(to_q, (count - 1).clamp(min=0))).clamp(max=part.tokens - 1)
    where_k = (start_k + torch.minimum(to_k, (length - 1).clamp(min=0))).clamp(max=layout.tokens - 1)
    if layout.blocks is None:
        seen = _seen((first + to_q)[:, :, None], to_k[:, None], reach) & (to_k < length)[:, None]
    else:
        place_q, place_k = (first + to_q).minimum((length - 1).clamp(min=0)), to_k.minimum((length - 1).clamp(min=0))
        seen = block_seen(layout, start_k + place_q, start_k + place_k, reach) & (to_k < length)[:, None]
    seen |= (to_q >= count)[:, :, None]  # a query of padding sees everything: not a number would spread in the gradient
    place = _placed(part.lengths, queries)
    return tuple(x.to(device, non_blocking=True) for x in (where_q.flatten(), where_k.flatten(), seen[:, None], place))


def _placed(lengths: Sequence[int], width: int) -> Tensor:
    """[sum(lengths)] long: where the positions 0..length - 1 of each row stand among rows padded to `width`."""
    count, total = torch.tensor(lengths), sum(lengths)
    row = torch.repeat_interleave(torch.arange(len(lengths)), count, output_size=total)
    return row * width + torch.arange(total) - (count.cumsum(0) - count)[row]


# ----------------------------------------------------------------------------------------------------------------------
# Varlen FlashAttention


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _flash(q: Tensor, k: Tensor, v: Tensor, stored, rows: Rows, reach: Reach, options: dict) -> Tensor:
    part = rows.part
    cumulative, longest = part.offsets, max(part.lengths)
    if stored is not None:
        where, cumulative, longest = _planned(rows, "flash", reach, _stored_keys)
        k, v = (x.flatten(0, 1).index_select(0, where) for x in stored)
    window = (-1 if reach.left is None else reach.left, -1 if reach.right is None else reach.right)
    kernel = _varlen(options["dropout_p"] > 0)
    return kernel(q, k, v, part.offsets, cumulative, max(part.lengths), longest, window, options)


def _stored_keys(layout: Layout, part: Layout, reach: Reach) -> tuple[Tensor, Tensor, int]:
    """Which stored keys the rows see, where each row's begin, and the most of a row.

    Where nothing on the right is seen, the keys end with the part: the kernels align the two ends.
    """
    ends = layout.lengths
    if reach.right == 0:
        ends = [first + count for first, count in zip(part.begins, part.lengths, strict=True)]
    place = _placed(ends, layout.width)
    offsets = torch.tensor([0, *ends]).cumsum(0).int()
    device = part.flat.device
    return place.to(device, non_blocking=True), offsets.to(device, non_blocking=True), max(ends)


@torch.compiler.disable  # plans rows in Python: traced, it would be compiled anew for every batch
def _flash_blocks(q: Tensor, k: Tensor, v: Tensor, stored, rows: Rows, reach: Reach, options: dict) -> Tensor:
    """Rows of clean blocks, few of which are computed: each is a sequence of queries with its own copy of its keys."""
    k, v = (k, v) if stored is None else (x.flatten(0, 1) for x in stored)
    where, of_q, of_k, longest_q, longest_k = _planned(rows, "flash", reach, _blocks_as_sequences)
    k, v = (x.index_select(0, where) for x in (k, v))
    return _varlen(options["dropout_p"] > 0)(q, k, v, of_q, of_k, longest_q, longest_k, (-1, -1), options)


def _blocks_as_sequences(layout: Layout, part: Layout, reach: Reach) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Where the blocks' keys stand, one block after another, where each block's queries and keys begin, the most."""
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
    return lambda q, k, v, cu_q, cu_k, max_q, max_k, window, options: varlen_attn(
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
def _flex(q: Tensor, k: Tensor, v: Tensor, stored, rows: Rows, reach: Reach, options: dict) -> Tensor:
    """The whole batch as one sequence; tiles in which nothing is seen are left out."""
    mask = _planned(rows, "flex", reach, _block_mask)
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, mask.shape[-1] - len(x))) for x in (q, k, v))
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = _flex_attention()(q, k, v, block_mask=mask, scale=options["scale"], enable_gqa=grouped)
    return out[0].transpose(0, 1)[: rows.part.tokens]


def _block_mask(layout: Layout, part: Layout, reach: Reach):
    """A BlockMask over the packed tokens, padded to whole tiles; padding sees itself, in a row of its own."""
    from torch.nn.attention.flex_attention import create_block_mask

    sight, device = layout.blocks.sight, part.flat.device
    size = -(-len(sight.row) // TILE) * TILE
    fill = {"row": layout.rows, "position": 0, "limit": 1, "span": -1}
    about = [numpy.full(size, value) for value in fill.values()]
    for padded, name in zip(about, fill, strict=True):
        padded[: len(sight.row)] = getattr(sight, name)
    about = [torch.from_numpy(x).int().to(device, non_blocking=True) for x in about]

    def seen(batch, head, query, key):
        pairs = [(x[query], x[key]) for x in about]
        near = torch.ones_like(pairs[0][0], dtype=torch.bool)
        if reach.left is not None:
            near = near & (pairs[1][0] - pairs[1][1] <= reach.left)
        if reach.right is not None:
            near = near & (pairs[1][1] - pairs[1][0] <= reach.right)
        return sees(*pairs) & near

    return create_block_mask(seen, None, None, size, size, device=device)


@once
def _flex_attention() -> Callable[..., Tensor] | None:
    """Compiled FlexAttention, or None."""
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    return torch.compile(flex_attention, dynamic=True)


# ----------------------------------------------------------------------------------------------------------------------
# Registration


@once
def _stock_attention() -> Callable:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


@once
def register() -> str:
    """Make transformers know our attention; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def choose(model: nn.Module) -> bool:
    """Switch a stock model from `sdpa` to our attention, which equals it until rows are packed; False if it cannot.

    A class that computes attention by itself, or was loaded with another implementation, stays as it is.
    """
    current = model.config._attn_implementation
    if current == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(register())
    return model.config._attn_implementation == NAME
