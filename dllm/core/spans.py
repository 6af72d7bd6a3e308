"""Spans: versions of a few of a row's tokens, computed behind one clean copy of the row.

Every version of a masked text that is forwarded as a row of its own repeats what it has in common with the others. Here
the row is computed once, clean, and of each version only the tokens that are asked for: a span. Its tokens attend to
each other and to the clean row, except at the positions that they themselves stand for. What is not in the span keeps
the states of the clean row, so that this is a stand-in for the forward of the version, not the same
(`core.likelihood.multilevel` corrects what it gets wrong).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy
from numpy import ndarray

from dllm.core.blocks import TokenSight, span_tokens


@dataclass(frozen=True, eq=False)
class SpanRows:
    """B rows of clean tokens, each followed by its spans; everything is int64 and on the host.

    Of each row the first `clean` [B] tokens, at positions 0, 1, ..., are clean and see each other. Behind them stand
    `spans` [B] spans, M in all, of `count` [M] tokens at any positions of the row: `position` [sum of count], ascending
    within a span. A token of a span sees its span and the clean tokens at all other positions; nothing else sees it.
    """

    clean: ndarray
    spans: ndarray
    count: ndarray
    position: ndarray

    @cached_property
    def lengths(self) -> ndarray:
        """Tokens of each row, spans included: [B]."""
        return self.clean + numpy.diff(self._ends)

    def shape_of(self, row: int) -> tuple:
        """Equal for rows whose tokens see the same."""
        spans = slice(int(self.spans[:row].sum()), int(self.spans[: row + 1].sum()))
        tokens = slice(int(self._ends[row]), int(self._ends[row + 1]))
        return int(self.clean[row]), self.count[spans].tobytes(), self.position[tokens].tobytes()

    @cached_property
    def sight(self) -> TokenSight:
        """What each of the rows' T tokens sees."""
        row, slot, span = span_tokens(self.clean, self.lengths, self.count)
        spanned, position = span >= 0, slot.copy()
        position[spanned] = self.position
        hidden = numpy.zeros((len(self.count) + 1, int(self.clean.max())), dtype=bool)
        hidden[span[spanned], self.position] = True  # the last line is that of the clean tokens
        return TokenSight(row, slot, position, self.clean[row], span, hidden)

    @cached_property
    def _ends(self) -> ndarray:
        """Where the rows' tokens begin in `position`, and its length: [B + 1]."""
        ends = numpy.concatenate([[0], self.count.cumsum()])
        return ends[numpy.concatenate([[0], self.spans.cumsum()])]
