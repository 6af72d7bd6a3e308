"""Which token attends to which where rows attend block-causally.

`BlockRows` describes the rows, and `AttentionPattern` says of each of their tokens what it sees. Everything is numpy on
the host. Source: Arriola et al. 2025 (arXiv:2503.09573), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy
from numpy import ndarray


@dataclass(frozen=True)
class BlockRule:
    """How rows are cut into blocks of `size` tokens: from where the response begins, or from where the row begins.

    The tokens before the first block (a prompt) are a block of their own, of any length.
    """

    size: int
    anchor: Literal["response", "row"] = "response"

    def starts(self, prompts: ndarray) -> ndarray:
        """Where the blocks are counted from, in rows with prompts of these lengths [B]: [B]."""
        return prompts if self.anchor == "response" else numpy.zeros_like(prompts)

    def begin(self, position: ndarray | int, start: ndarray) -> ndarray:
        """Where the block that holds `position` [...] begins, in rows whose blocks are counted from `start` [...]."""
        return numpy.where(position < start, 0, start + (position - start) // self.size * self.size)

    def end(self, position: ndarray | int, start: ndarray) -> ndarray:
        """Where that block ends, if the row is long enough."""
        return numpy.where(position < start, start, self.begin(position, start) + self.size)


@dataclass(frozen=True, eq=False)
class BlockRows:
    """B rows that attend block-causally; everything is int64 and on the host.

    Of each row the first `clean` [B] tokens, at positions 0, 1, ..., are clean. They are cut into blocks from `start`
    [B]; a clean token sees the clean tokens up to the end of its block. Behind them are `spans` [B] spans, M in all. A
    span is a block in some corrupted state: `count` [M] tokens at positions first, first + 1, ... (`first` [M]). It
    sees the clean tokens before `first` and itself; nothing else sees it.

    Sampling uses rows without spans. With one span per block, in which the block is corrupted, the clean and
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
        lengths: ndarray = self.clean + numpy.diff(ends, prepend=0)
        return lengths

    def shape_of(self, row: int) -> tuple[int | bytes, ...]:
        """A key that is equal for rows of equal length whose tokens see the same."""
        return int(self.start[row]), int(self.clean[row]), *(x.tobytes() for x in self.spans_of(row))

    def spans_of(self, row: int) -> tuple[ndarray, ndarray]:
        """`first` and `count` of a row's spans."""
        end = int(self.spans[: row + 1].sum())
        here = slice(end - int(self.spans[row]), end)
        return self.first[here], self.count[here]

    @cached_property
    def pattern(self) -> AttentionPattern:
        """What each of the rows' T tokens sees."""
        row, slot = numpy.repeat(numpy.arange(len(self.lengths)), self.lengths), _counting(self.lengths)
        span = numpy.full_like(slot, -1)
        spanned = slot >= self.clean[row]
        span[spanned] = numpy.repeat(numpy.arange(len(self.count)), self.count)
        first = self.first[span[spanned]]
        position, key_end = slot.copy(), self.rule.end(slot, self.start[row])
        position[spanned], key_end[spanned] = first + _counting(self.count), first
        return AttentionPattern(row, slot, position, numpy.minimum(key_end, self.clean[row]), span)

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
        has_targets = prompts < lengths
        low = numpy.where(has_targets, rule.begin(prompts, start), lengths)
        last = numpy.where(has_targets, rule.begin(lengths - 1, start), lengths)
        spans = numpy.where(has_targets, (last - low) // rule.size + 1, 0)
        row = numpy.repeat(numpy.arange(len(lengths)), spans)
        first = low[row] + _counting(spans) * rule.size
        count = numpy.minimum(first + rule.size, lengths[row]) - first
        return BlockRows(rule, start, last, spans, first, count)


@dataclass(frozen=True, eq=False)
class AttentionPattern:
    """What T tokens see, all [T] int64: the clean tokens of their row before `key_end`, and the tokens of their `span`.

    row; slot: place in the row; position: in the text; span: -1 for clean tokens.
    """

    row: ndarray
    slot: ndarray
    position: ndarray
    key_end: ndarray
    span: ndarray

    def mask(self, queries: slice | ndarray, keys: slice | ndarray) -> ndarray:
        """[queries, keys] bool: whether one token sees another."""
        every = numpy.arange(len(self.row))
        return self.allowed(every[queries][:, None], every[keys][None])

    def allowed(self, query: ndarray, key: ndarray) -> ndarray:
        """Whether tokens see others, both given by their places among the T; bool, broadcast."""
        seen: ndarray = allowed(*((x[query], x[key]) for x in (self.row, self.position, self.key_end, self.span)))
        return seen


Pair = tuple[Any, Any]
"""Two arrays of numpy, or two tensors."""


def allowed(row: Pair, position: Pair, key_end: Pair, span: Pair) -> Any:
    """The rule of `BlockRows`; each argument is a pair, what queries and keys have of it, as arrays that broadcast."""
    same = row[0] == row[1]
    clean = (span[1] < 0) & (position[1] < key_end[0])
    return same & (clean | ((span[1] >= 0) & (span[0] == span[1])))


def _counting(counts: ndarray) -> ndarray:
    """0, 1, ..., count - 1 for each of the counts, one after another."""
    number: ndarray = numpy.arange(counts.sum()) - numpy.repeat(counts.cumsum() - counts, counts)
    return number
