"""Blocks: what a token sees where a model attends block-causally.

Source: Arriola et al. 2025 (arXiv:2503.09573), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy
from numpy import ndarray


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

    row; slot: place in the row; position: in the text; span: -1 for clean tokens. hidden [M + 1, P] bool: clean
    positions that a span, or with the last line a clean token, does not see although they are before the limit.
    """

    row: ndarray
    slot: ndarray
    position: ndarray
    limit: ndarray
    span: ndarray
    hidden: ndarray | None = None

    def mask(self, queries: slice | ndarray, keys: slice | ndarray) -> ndarray:
        """[queries, keys] bool: whether one token sees another."""
        every = numpy.arange(len(self.row))
        return self.seen(every[queries][:, None], every[keys][None])

    def seen(self, query: ndarray, key: ndarray) -> ndarray:
        """Whether tokens see others, both given by their places among the T; bool, broadcast."""
        seen = sees(*((x[query], x[key]) for x in (self.row, self.position, self.limit, self.span)))
        if self.hidden is None:
            return seen
        return seen & ~(self.hidden[self.span[query], self.position[key]] & (self.span[key] < 0))


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
