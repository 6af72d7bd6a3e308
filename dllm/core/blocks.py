"""Blocks: semi-autoregressive order, and how many tokens a pass reveals.

A response is cut into blocks of equal size, counted from its start. The leftmost block with masks is active; what
stands right of it stays masked. All of this is arithmetic on counts that the host knows in advance, so it is done
there, in numpy, and the device is never asked. Source: Nie et al. 2025 (arXiv:2502.09992), section 2.4 and the
authors' sampler.

`BlockRows` says what a token sees where blocks are more than an order of decoding: where a model attends
block-causally. Source: Arriola et al. 2025 (arXiv:2503.09573), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy
from numpy import ndarray


@dataclass
class BlockPlan:
    """The blocks with masks of R rows, K at most, from left to right, and where each row stands in them.

    places: the masked positions of all rows, one after another; first [R, K]: where a block's begin in it; masks,
    passes [R, K]: how many a block has and in how many passes they are revealed; begin, end [R, K]: its positions;
    blocks [R]: how many a row has. Everything is int64.

    What changes: block [R], the active one; left, passes_left [R]: masks and passes left in it; step [R]: passes made.
    """

    places: ndarray
    first: ndarray
    masks: ndarray
    passes: ndarray
    begin: ndarray
    end: ndarray
    blocks: ndarray
    block: ndarray = field(init=False)
    left: ndarray = field(init=False)
    passes_left: ndarray = field(init=False)
    step: ndarray = field(init=False)

    def __post_init__(self):
        self.block = numpy.zeros_like(self.blocks)
        self.step = numpy.zeros_like(self.blocks)
        self.left, self.passes_left = self.masks[:, 0].copy(), self.passes[:, 0].copy()

    @property
    def open(self) -> ndarray:
        """[R] bool: rows with masks."""
        return self.left > 0

    def window(self, rows: ndarray) -> tuple[ndarray, ndarray]:
        """The originally masked positions of the active block of some rows [B]: [B, S], and how many each has [B].

        What stands behind a row's own is any position.
        """
        block = self.block[rows]
        masks = self.masks[rows, block]
        at = self.first[rows, block][:, None] + numpy.arange(masks.max())
        return self.places[numpy.minimum(at, len(self.places) - 1)], masks

    def counts(self, rows: ndarray) -> ndarray:
        """How many tokens the next pass reveals at least: [B]."""
        return transfer_counts(self.left[rows], self.passes_left[rows])

    def advance(self, rows: ndarray, revealed: ndarray) -> ndarray:
        """Note that a pass revealed so many tokens of some rows [B]; returns [B] bool: rows that ended their block."""
        self.step[rows] += 1
        self.left[rows] -= revealed
        self.passes_left[rows] -= 1
        ended = self.left[rows] == 0
        moving = rows[ended & (self.block[rows] + 1 < self.blocks[rows])]
        self.block[moving] += 1
        self.left[moving] = self.masks[moving, self.block[moving]]
        self.passes_left[moving] = self.passes[moving, self.block[moving]]
        return ended


def plan_blocks(masked: ndarray, start: ndarray, block_size: int, steps: int | None) -> BlockPlan:
    """The plan of rows with these masks [R, L] bool and first response positions [R]; see `block_passes`.

    Positions before `start` count as the first block.
    """
    row, place = masked.nonzero()
    number = numpy.maximum((place - start[row]) // block_size, 0)
    begins = numpy.ones(len(row), dtype=bool)
    begins[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    first = begins.nonzero()[0]
    owner = row[first]
    blocks = numpy.bincount(owner, minlength=len(masked))
    ordinal = numpy.arange(len(first)) - (blocks.cumsum() - blocks)[owner]

    def table(values: ndarray) -> ndarray:
        found = numpy.zeros((len(masked), max(1, blocks.max(initial=0))), dtype=numpy.int64)
        found[owner, ordinal] = values
        return found

    masks = table(numpy.diff(numpy.append(first, len(row))))
    left = start[owner] + number[first] * block_size
    return BlockPlan(
        places=place,
        first=table(first),
        masks=masks,
        passes=block_passes(masks, steps),
        begin=table(numpy.where(number[first] > 0, left, numpy.minimum(left, place[first]))),
        end=table(left + block_size),
        blocks=blocks,
    )


def block_passes(masks: ndarray, steps: int | None) -> ndarray:
    """How many passes each block gets, [R, K]: at most one per mask, 0 for a block without masks.

    `steps` is the total of a row, spread evenly over its blocks with masks, the first ones taking the remainder and
    what a short block cannot use; none means one token per pass. masks [R, K] counts.
    Raises ValueError if `steps` is smaller than a row's number of blocks.
    """
    if steps is None:
        return masks.copy()
    occupied = masks > 0
    blocks = occupied.sum(1, keepdims=True)
    if (blocks > steps).any():
        raise ValueError(
            f"steps = {steps} is less than the {int(blocks.max())} blocks of the canvas, each of which needs a pass. "
            "Take more steps or a larger block_size"
        )
    ordinal = occupied.cumsum(1) - 1
    share = steps // blocks.clip(1) + (ordinal < steps % blocks.clip(1))
    passes = numpy.minimum(share, masks)
    room = masks - passes
    unused = steps - passes.sum(1, keepdims=True)
    return passes + numpy.minimum((unused - (room.cumsum(1) - room)).clip(0), room)


def transfer_counts(masks: ndarray, passes: ndarray) -> ndarray:
    """How many of the remaining `masks` [B] a pass reveals when `passes` [B] are left: ceil(masks / passes).

    Over K passes of n masks this is n // K each, and one more in the first n % K (the quotas of Nie et al. 2025).
    """
    return -(-masks // passes.clip(1))


# ----------------------------------------------------------------------------------------------------------------------
# Block-causal attention


@dataclass(frozen=True)
class BlockRule:
    """How rows are cut into blocks of `size` tokens: from where the response begins, or from where the row begins.

    What stands before the first block (a prompt) is a block of its own, of any length.
    """

    size: int
    anchor: Literal["response", "row"] = "response"

    def starts(self, prompts: ndarray) -> ndarray:
        """Where the blocks are counted from, in rows with prompts of these lengths [B]: [B]."""
        return prompts if self.anchor == "response" else numpy.zeros_like(prompts)

    def begin(self, position: ndarray, start: ndarray) -> ndarray:
        """Where the block that holds `position` [...] begins, in rows whose blocks are counted from `start` [...]."""
        return numpy.where(position < start, 0, start + (position - start) // self.size * self.size)

    def end(self, position: ndarray, start: ndarray) -> ndarray:
        """Where that block ends, if the row is long enough."""
        return numpy.where(position < start, start, self.begin(position, start) + self.size)


@dataclass(frozen=True, eq=False)
class BlockRows:
    """B rows that attend block-causally; everything is int64 and on the host.

    Of each row the first `clean` [B] tokens, at positions 0, 1, ..., are clean. They are cut into blocks from `start`
    [B]; a clean token sees the clean tokens up to the end of its block. Behind them stand `spans` [B] spans, M in all:
    each is a block in some corrupted state, `count` [M] tokens at positions first, first + 1, ... (`first` [M]), and
    sees the clean tokens before `first` and itself; nothing else sees it.

    A row without spans is what is sampled. With one span per block, in which the block is corrupted, the clean and
    the corrupted half make the mask M_BC | M_OBC | M_BD of Arriola et al. 2025 (arXiv:2503.09573), section 3.1. Several
    spans may be different states of the same block.
    """

    rule: BlockRule
    start: ndarray
    clean: ndarray
    spans: ndarray
    first: ndarray
    count: ndarray

    @cached_property
    def lengths(self) -> ndarray:
        """Tokens of each row, spans included: [B]."""
        ends = numpy.concatenate([[0], self.count.cumsum()])[self.spans.cumsum()]
        return self.clean + numpy.diff(ends, prepend=0)

    def shape_of(self, row: int) -> tuple:
        """Equal for rows whose tokens see the same, if they are as many."""
        return int(self.start[row]), int(self.clean[row]), *(x.tobytes() for x in self.spans_of(row))

    def spans_of(self, row: int) -> tuple[ndarray, ndarray]:
        """`first` and `count` of a row's spans."""
        end = int(self.spans[: row + 1].sum())
        here = slice(end - int(self.spans[row]), end)
        return self.first[here], self.count[here]

    @cached_property
    def sight(self) -> TokenSight:
        """What each of the rows' T tokens sees."""
        row, slot, span = span_tokens(self.clean, self.lengths, self.count)
        spanned = span >= 0
        first = self.first[span[spanned]]
        position, limit = slot.copy(), self.rule.end(slot, self.start[row])
        position[spanned], limit[spanned] = first + _counting(self.count), first
        return TokenSight(row, slot, position, numpy.minimum(limit, self.clean[row]), span)

    @staticmethod
    def plain(rule: BlockRule, start: ndarray, lengths: ndarray) -> BlockRows:
        """Rows of clean tokens alone."""
        none = numpy.zeros(0, dtype=numpy.int64)
        return BlockRows(rule, start, lengths, numpy.zeros_like(lengths), none, none)

    @staticmethod
    def doubled(rule: BlockRule, prompts: ndarray, lengths: ndarray) -> BlockRows:
        """Rows of `lengths` [B] whose tokens from `prompts` [B] on are corrupted block by block, beside clean ones.

        No more is doubled than has to be: nothing sees the clean tokens of a row's last block, and a block without
        targets is never corrupted. A row without targets has its clean tokens only.
        """
        start = rule.starts(prompts)
        aim = prompts < lengths
        low = numpy.where(aim, rule.begin(prompts, start), lengths)
        last = numpy.where(aim, rule.begin(lengths - 1, start), lengths)
        spans = numpy.where(aim, (last - low) // rule.size + 1, 0)
        row = numpy.repeat(numpy.arange(len(lengths)), spans)
        first = low[row] + _counting(spans) * rule.size
        count = numpy.minimum(first + rule.size, lengths[row]) - first
        return BlockRows(rule, start, last, spans, first, count)


@dataclass(frozen=True, eq=False)
class TokenSight:
    """What T tokens see, all [T] int64: the clean tokens of their row before `limit`, and the tokens of their `span`.

    row; slot: place in the row; position: in the text; span: -1 for clean tokens.
    """

    row: ndarray
    slot: ndarray
    position: ndarray
    limit: ndarray
    span: ndarray

    def mask(self, queries: slice | ndarray, keys: slice | ndarray) -> ndarray:
        """[queries, keys] bool: whether one token sees another."""
        every = numpy.arange(len(self.row))
        return self.seen(every[queries][:, None], every[keys][None])

    def seen(self, query: ndarray, key: ndarray) -> ndarray:
        """Whether tokens see others, both given by their places among the T; bool, broadcast."""
        return sees(*((x[query], x[key]) for x in (self.row, self.position, self.limit, self.span)))


def span_tokens(clean: ndarray, lengths: ndarray, count: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Of the tokens of rows with `clean` of `lengths` [B] clean ones and then spans of `count` [M]: row, slot, span."""
    row, slot = numpy.repeat(numpy.arange(len(lengths)), lengths), _counting(lengths)
    span = numpy.full_like(slot, -1)
    span[slot >= clean[row]] = numpy.repeat(numpy.arange(len(count)), count)
    return row, slot, span


def sees(row, position, limit, span):
    """The rule of `BlockRows`; each argument is a pair, what queries and keys have of it, as arrays that broadcast."""
    same = row[0] == row[1]
    clean = (span[1] < 0) & (position[1] < limit[0])
    return same & (clean | ((span[1] >= 0) & (span[0] == span[1])))


def _counting(counts: ndarray) -> ndarray:
    """0, 1, ..., count - 1 for each of the counts, one after another."""
    return numpy.arange(counts.sum()) - numpy.repeat(counts.cumsum() - counts, counts)
