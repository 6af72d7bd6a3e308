"""Rows of token files become batches: order of an epoch, ends of responses, padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy
import torch

from dllm.core.batch import Batch
from dllm.core.noise import keyed_uniform
from dllm.data.tokens import TokenRows

WINDOW = 32
"""Rows are grouped by length within a window of this many batches, which keeps a batch's padding small and its
content random."""


@dataclass(frozen=True)
class ResponseEnd:
    """How a response ends: `fill` with EOS to the batch's longest row, to the `block` boundary, or with `one` EOS.

    No row grows beyond `longest` tokens (None: no limit), so that a response clipped there is not taught to end.
    """

    kind: Literal["fill", "block", "one"]
    eos_id: int
    block_size: int = 32
    extra_blocks: int = 0
    seed: int = 0
    longest: int | None = None


def epoch_batches(lengths: numpy.ndarray, batch_size: int, seed: int, epoch: int, *, grouped: bool) -> numpy.ndarray:
    """Row numbers [batches, batch_size] of one epoch, a pure function of (seed, epoch).

    A shuffled order; where `grouped`, rows of similar length share a batch. The rows left over when the batches are
    full sit this epoch out (others the next); a set smaller than one batch is repeated to fill it.
    """
    random = numpy.random.Generator(numpy.random.Philox(key=[seed, epoch]))
    order = random.permutation(len(lengths))
    if len(order) < batch_size:
        order = numpy.resize(order, batch_size)
    order = order[: len(order) // batch_size * batch_size]
    if not grouped:
        return order.reshape(-1, batch_size)
    size = WINDOW * batch_size
    windows = [order[start : start + size] for start in range(0, len(order), size)]
    order = numpy.concatenate([w[numpy.argsort(lengths[w], kind="stable")] for w in windows])
    batches = order.reshape(-1, batch_size)
    return batches[random.permutation(len(batches))]


def row_widths(rows: TokenRows, end: ResponseEnd | None) -> numpy.ndarray:
    """About how long each row will be in a batch, [N]: what rows are grouped by."""
    if end is None or end.kind == "fill":
        return rows.lengths
    return ended_lengths(rows, numpy.arange(len(rows)), replace(end, extra_blocks=0), 0)


def ended_lengths(rows: TokenRows, numbers: numpy.ndarray, end: ResponseEnd | None, epoch: int) -> numpy.ndarray:
    """How many tokens each of the rows has in a batch of these, [B]: with the EOS tokens that end its response.

    end is None for text, which ends as it stands. With `end.kind == "fill"` the longest of the rows decides, so that
    lengths are asked for a whole global batch and not for each of its micro-batches.
    """
    lengths = rows.lengths[numbers]
    if end is None:
        return lengths
    if end.kind == "fill":
        return numpy.full_like(lengths, lengths.max())
    ended = lengths + 1 if end.kind == "one" else _block_ends(lengths, rows.prompts[numbers], numbers, end, epoch)
    return ended if end.longest is None else numpy.maximum(lengths, numpy.minimum(ended, end.longest))


def collate(
    rows: TokenRows, numbers: numpy.ndarray, ended: numpy.ndarray, *, pad_id: int, end: ResponseEnd | None
) -> Batch:
    """The rows `numbers` as a batch, in which they have `ended` tokens each (`ended_lengths`), [B] both.

    end is None for text, of which every token is a target.
    """
    lengths = rows.lengths[numbers]
    place = numpy.arange(int(ended.max()))[None]
    real = place < lengths[:, None]
    index = numpy.minimum(rows.offsets[numbers][:, None] + place, len(rows.tokens) - 1)
    filler = pad_id if end is None else end.eos_id
    tokens = numpy.where(real, rows.tokens[index], filler).astype(numpy.int64)
    attention = place < ended[:, None]
    maskable = attention if end is None else attention & (place >= rows.prompts[numbers][:, None])
    tokens = numpy.where(attention, tokens, pad_id)
    ids = numbers if rows.ids is None else rows.ids[numbers]
    return Batch(*(torch.from_numpy(numpy.ascontiguousarray(x)) for x in (tokens, attention, maskable, ids)))


def _block_ends(
    lengths: numpy.ndarray, prompts: numpy.ndarray, numbers: numpy.ndarray, end: ResponseEnd, epoch: int
) -> numpy.ndarray:
    """Where each row's block with room for an EOS ends, plus the extra blocks drawn for it, [B]."""
    response = lengths - prompts + 1
    blocks = -(-response // end.block_size)
    if end.extra_blocks:
        draw = keyed_uniform(end.seed, epoch, torch.from_numpy(numbers), -2).numpy()
        blocks = blocks + (draw * (end.extra_blocks + 1)).astype(numpy.int64)
    return prompts + blocks * end.block_size
