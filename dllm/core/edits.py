"""Edits: aligned rows, the state between two texts, and the insertions, deletions and substitutions still to be made.

Two texts x_0 and x_1 are aligned with blanks to columns (z_0, z_1). At time t a column has made its edit with
probability kappa(t); x_t is z_t without its blanks. Everything is ragged and flat: rows lie end to end, and an edit
names its anchor by place in x_t. Time runs from 0 (the start) to 1 (the text), as in the source.
Source: Havasi et al. 2025 (arXiv:2506.09018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm.core.batch import Inputs
from dllm.core.noise import keyed_hash, keyed_uniform
from dllm.core.packing import Layout, layout_of

BLANK = -1
"""No token: what a column holds before an insertion and after a deletion."""

INSERT, DELETE, SUBSTITUTE = 0, 1, 2
"""Kinds of edits, and the columns of a table of rates."""

_COUNT_STREAM, _CHOICE_STREAM, _SHARE_STREAM, _FAULT_STREAM, _TOKEN_STREAM, _EDIT_STREAM = range(6)

# --------------------------------------------------------------------------------------------------------------------
# Alignment


@dataclass(frozen=True)
class Columns:
    """Aligned rows, laid end to end: column c of row row[c] is z_0[c] at the start and z_1[c] at the end.

    z_0, z_1 [C] long, `BLANK` where that side has no token, never on both sides; row [C] long, ascending; given [C]
    bool: context, the same on both sides and never edited. Each of the B rows begins with a given column.
    """

    z_0: Tensor
    z_1: Tensor
    row: Tensor
    given: Tensor
    rows: int


Ragged = tuple[Tensor, Tensor]
"""Rows laid end to end: values [sum of lengths] long and lengths [S] long."""


def owners(lengths: Tensor) -> Tensor:
    """Which row each element of a ragged tensor belongs to: [sum of lengths] long."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def starts_of(lengths: Tensor) -> Tensor:
    """Where each row begins in a ragged tensor: [S] long."""
    return lengths.cumsum(0) - lengths


def align(source: Ragged, target: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """z_0, z_1 [C] and the pair [C] of a shortest edit of each source into its target, in C++ (rapidfuzz).

    Of several shortest edits it takes always the same one; a substitution counts as one edit, so it is preferred to a
    deletion with an insertion.
    """
    from rapidfuzz.distance import Levenshtein

    # one call per pair, nothing per token: the spans of equal, replaced, deleted and inserted tokens
    spans: list[tuple[int, ...]] = []
    sources = [part.tolist() for part in torch.split(source[0], source[1].tolist())]
    targets = [part.tolist() for part in torch.split(target[0], target[1].tolist())]
    for number, (before, after) in enumerate(zip(sources, targets, strict=True)):
        opcodes: list[Any] = Levenshtein.opcodes(before, after).as_list()
        spans += [(number, *opcode[1:]) for opcode in opcodes]
    pair, low_0, high_0, low_1, high_1 = torch.tensor(spans, dtype=torch.long).view(-1, 5).unbind(1)
    size_0, size_1 = high_0 - low_0, high_1 - low_1
    size = torch.maximum(size_0, size_1)
    span = owners(size)
    index = torch.arange(len(span)) - starts_of(size)[span]
    z_0 = _fill(source[0], index < size_0[span])
    z_1 = _fill(target[0], index < size_1[span])
    return z_0, z_1, pair[span]


def align_at_random(source: Ragged, target: Ragged, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z_0, z_1 [C] and the pair [C] of an alignment that ignores what the tokens are, drawn from `keys` [S].

    The longer side takes every column, the shorter one a uniform subset of them: as many substitutions as possible,
    and insertions or deletions for the rest. For starts that know nothing of their target (masks, noise).
    """
    size = torch.maximum(source[1], target[1])
    pair = owners(size)
    index = torch.arange(len(pair)) - starts_of(size)[pair]
    fewer = torch.minimum(source[1], target[1])[pair]
    chosen = rank_within(keyed_uniform(keys[pair], _CHOICE_STREAM, index), pair, size) < fewer
    z_0 = _fill(source[0], chosen | (source[1] == size)[pair])
    z_1 = _fill(target[0], chosen | (target[1] == size)[pair])
    return z_0, z_1, pair


def _fill(values: Tensor, where: Tensor) -> Tensor:
    """Values [sum of where], in order, at the true places of `where` [C]; blanks elsewhere."""
    return torch.full(where.shape, BLANK).masked_scatter(where, values)


def rank_within(noise: Tensor, group: Tensor, size: Tensor) -> Tensor:
    """The rank of each element [C] within its group, from 0; `group` [C] ascending, size [S]."""
    order = noise.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    rank = torch.arange(len(group)) - starts_of(size)[group]  # of the sorted elements, whose groups are the same
    return torch.empty_like(order).scatter_(0, order, rank)


# --------------------------------------------------------------------------------------------------------------------
# Starts


def mask_rows(keys: Tensor, most: int, mask_id: int) -> Ragged:
    """Rows of masks whose number, 1 to `most`, is drawn from keys [S]."""
    count = (keyed_uniform(keys, _COUNT_STREAM) * most).long() + 1
    return torch.full((int(count.sum()),), mask_id), count


def faulty_rows(target: Ragged, keys: Tensor, share: float) -> Ragged:
    """The target rows with faults: tokens left out, replaced, or followed by one too many, a third each.

    The share of faulty tokens of a row is uniform up to `share`; a wrong token is one of the row's own. keys [S].
    """
    tokens, lengths = target
    row = owners(lengths)
    first = starts_of(lengths)
    index = torch.arange(len(row)) - first[row]
    rate = keyed_uniform(keys, _SHARE_STREAM) * share
    u = keyed_uniform(keys[row], _FAULT_STREAM, index) / rate.clamp(min=1e-9)[row]
    wrong = tokens[first[row] + (keyed_uniform(keys[row], _TOKEN_STREAM, index) * lengths[row]).long()]
    change = torch.where(u < 1, (u * 3).long(), 3)  # 0 left out, 1 replaced, 2 one too many, 3 as it should be
    copies = torch.tensor([0, 1, 2, 1])[change]
    token = owners(copies)
    second = torch.arange(len(token)) > starts_of(copies)[token]
    kept = torch.where(change == 1, wrong, tokens)[token]
    return torch.where(second, wrong[token], kept), torch.zeros_like(lengths).index_add(0, row, copies)


# --------------------------------------------------------------------------------------------------------------------
# The state at time t, and the edits it still needs


@dataclass(frozen=True)
class Edits:
    """N edits of rows laid end to end: place [N] of the anchor, ascending; kind [N]; token [N] (`BLANK`: a deletion).

    An insertion is right of its anchor, the last token of x_t before it; several may share one and keep their
    order. A deletion or substitution concerns the anchor itself.
    """

    place: Tensor
    kind: Tensor
    token: Tensor


def state_at(columns: Columns, kappa: Tensor, keys: Tensor) -> Tensor:
    """z_t [C]: a column has become z_1 with probability kappa [B] of its row; the noise is keyed by `keys` [B]."""
    count = torch.bincount(columns.row, minlength=columns.rows)
    index = torch.arange(len(columns.row)) - starts_of(count)[columns.row]
    made = keyed_uniform(keys[columns.row], _EDIT_STREAM, index) < kappa[columns.row]
    return torch.where(made, columns.z_1, columns.z_0)


def strip(z: Tensor, row: Tensor, rows: int) -> Ragged:
    """The tokens of rows of columns z, row [C] without their blanks, and the rows' lengths [B]."""
    here = z != BLANK
    return z[here], torch.bincount(row[here], minlength=rows)


def outstanding(columns: Columns, z_t: Tensor) -> Edits:
    """The edits that lead from x_t to x_1, anchored at places of x_t."""
    todo = z_t != columns.z_1
    place = (z_t != BLANK).cumsum(0) - 1
    kind = torch.where(z_t == BLANK, INSERT, torch.where(columns.z_1 == BLANK, DELETE, SUBSTITUTE))
    return Edits(place[todo], kind[todo], columns.z_1[todo])


def open_gaps(given: Tensor, row: Tensor) -> Tensor:
    """Right of which columns [C] something may be inserted: those to be edited, and those in front of one.

    A row that is nothing but its first column is an empty text, and open.
    """
    same = row[1:] == row[:-1]
    edge = torch.ones_like(given[:1])
    alone = torch.cat([edge, ~same]) & torch.cat([~same, edge])
    before = torch.cat([~given[1:] & same, ~edge])
    return ~given | before | alone


# --------------------------------------------------------------------------------------------------------------------
# From a batch of texts to columns


@dataclass(frozen=True)
class Spans:
    """Runs of target tokens in rows [B, L], in row-major order: row, first position and count, each [S] long."""

    row: Tensor
    first: Tensor
    count: Tensor


def spans_of(target: Tensor) -> Spans:
    """The runs of true positions in `target` [B, L]."""
    edge = torch.nn.functional.pad(target, (1, 1)).int().diff(dim=1)
    row, first = (edge == 1).nonzero(as_tuple=True)
    return Spans(row, first, (edge == -1).nonzero(as_tuple=True)[1] - first)


def span_keys(keys: Tensor, spans: Spans) -> Tensor:
    """One noise key per span [S], from those of the rows [B]."""
    return keyed_hash(keys[spans.row], spans.first)


def merge(
    tokens: Tensor, given: Tensor, spans: Spans, aligned: Sequence[tuple[Tensor, Tensor, Tensor]], front: int
) -> Columns:
    """Columns of whole rows: `front`, then the given tokens [B, L] with the aligned spans in their places.

    aligned holds triples (z_0, z_1, span number), each [C], which together cover every span once.
    """
    rows, length = tokens.shape
    row, position = given.nonzero(as_tuple=True)
    fronts = torch.arange(rows)
    z_0, z_1, span = (torch.cat(part) for part in zip(*aligned, strict=True))
    order = torch.cat([fronts * (length + 1), row * (length + 1) + position + 1, _order(spans, length)[span]])
    sort = order.argsort(stable=True)
    context = torch.cat([torch.full((rows,), front), tokens[given]])
    return Columns(
        z_0=torch.cat([context, z_0])[sort],
        z_1=torch.cat([context, z_1])[sort],
        row=(order // (length + 1))[sort],
        given=(torch.arange(len(order)) < len(context))[sort],
        rows=rows,
    )


def _order(spans: Spans, length: int) -> Tensor:
    return spans.row * (length + 1) + spans.first + 1


def span_targets(tokens: Tensor, spans: Spans, which: Tensor) -> Ragged:
    """The tokens of the chosen spans, `which` [S] bool, of rows [B, L]."""
    count = spans.count[which]
    span = owners(count)
    first = (spans.row * tokens.shape[1] + spans.first)[which]
    index = torch.arange(len(span)) - starts_of(count)[span]
    return tokens.flatten()[first[span] + index], count


# --------------------------------------------------------------------------------------------------------------------
# What the loss needs


@dataclass(frozen=True, eq=False)
class EditInputs(Inputs):
    """Rows on their way from x_0 to x_1, and the edits they still need.

    tokens [B, L] long: x_t behind a front token; layout: its T tokens laid end to end; time [B]; insertable, editable
    [T] bool: where rates count; edits [T, 3]: outstanding insertions right of each token, deletions, substitutions.
    The LM head runs at U places: place [U] long, insert [U] bool; the N new tokens are targets [N], each with its
    distribution which [N] and its place slot [N] in [B, width] (width host integer). weight [B]: w(t); share [B]: what
    one nat of a row counts in the loss before the denominator.
    """

    tokens: Tensor
    layout: Layout
    time: Tensor
    insertable: Tensor
    editable: Tensor
    edits: Tensor
    place: Tensor
    insert: Tensor
    which: Tensor
    targets: Tensor
    slot: Tensor
    weight: Tensor
    share: Tensor
    width: int


def edit_inputs(
    columns: Columns, z_t: Tensor, time: Tensor, weight: Tensor, share: Tensor, *, pad_id: int
) -> EditInputs:
    """The inputs for aligned rows in the state z_t [C] at time [B]; weight, share [B] as in `EditInputs`."""
    here = z_t != BLANK
    row = columns.row[here]
    layout = layout_of(torch.bincount(row, minlength=columns.rows).tolist())
    edits = outstanding(columns, z_t)
    table = torch.zeros(len(row), 3).index_put((edits.place, edits.kind), torch.ones(()), accumulate=True)
    named = edits.kind != DELETE
    spots, which = torch.unique(edits.place[named] * 2 + (edits.kind[named] == INSERT), return_inverse=True)
    of_row = row[edits.place[named]]
    count = torch.bincount(of_row, minlength=columns.rows)
    width = int(count.max())
    return EditInputs(
        tokens=layout.unpack(z_t[here], pad_id),
        layout=layout,
        time=time,
        insertable=open_gaps(columns.given, columns.row)[here],
        editable=~columns.given[here],
        edits=table,
        place=spots // 2,
        insert=spots % 2 == 1,
        which=which,
        targets=edits.token[named],
        slot=of_row * width + torch.arange(len(of_row)) - starts_of(count)[of_row],
        weight=weight,
        share=share,
        width=width,
    )
