"""Edits: alignments, the state between two texts, and the edits that lead from one to the other."""

import math
import random

import pytest
import torch

from dllm.core.edits import (
    BLANK,
    INSERT,
    Columns,
    align,
    align_at_random,
    faulty_rows,
    mask_rows,
    merge,
    open_gaps,
    outstanding,
    owners,
    span_keys,
    span_targets,
    spans_of,
    starts_of,
    state_at,
    strip,
)
from dllm.core.noise import keyed_hash
from dllm.schedules import KAPPAS

FRONT = 99


def ragged(rows):
    """Lists of tokens laid end to end."""
    values = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return values, torch.tensor([len(row) for row in rows], dtype=torch.long)


def plain_distance(before: list[int], after: list[int]) -> int:
    """Edit distance, row by row of the textbook table."""
    above = list(range(len(after) + 1))
    for i, old in enumerate(before, 1):
        row = [i]
        for j, new in enumerate(after, 1):
            row.append(min(above[j - 1] + (old != new), above[j] + 1, row[j - 1] + 1))
        above = row
    return above[-1]


def plain_apply(tokens: list[int], edits: list[tuple[int, int, int]]) -> list[int]:
    """All edits (place, kind, token) of one row at once, token by token."""
    result = []
    for place, token in enumerate(tokens):
        here = [(kind, new) for at, kind, new in edits if at == place]
        changed = [new for kind, new in here if kind != INSERT]
        result += [new for new in changed or [token] if new != BLANK]
        result += [new for kind, new in here if kind == INSERT]
    return result


def random_rows(count: int, seed: int, longest: int = 9, symbols: int = 4) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(symbols) for _ in range(draw.randrange(longest + 1))] for _ in range(count)]


def split(values: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    return [part.tolist() for part in values.split(lengths.tolist())]


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    return keyed_hash(seed, torch.arange(count))


def whole_rows(z_0, z_1, pair, rows: int) -> Columns:
    """Columns of rows that are nothing but one aligned pair behind a front token."""
    order = torch.cat([torch.arange(rows), pair]).argsort(stable=True)
    front = torch.full((rows,), FRONT)
    given = (torch.arange(len(order)) < rows)[order]
    return Columns(
        torch.cat([front, z_0])[order], torch.cat([front, z_1])[order], torch.sort(order.new_tensor(
            [*range(rows), *pair.tolist()])).values, given, rows,
    )  # fmt: skip


ALIGNMENTS = {
    "shortest": lambda source, target, keys: align(source, target),
    "random": align_at_random,
}


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_an_alignment_strips_back_to_both_texts_and_has_no_two_blanks(kind):
    sources, targets = random_rows(3000, 1), random_rows(3000, 2)
    z_0, z_1, pair = ALIGNMENTS[kind](ragged(sources), ragged(targets), keys_of(3000))
    assert not ((z_0 == BLANK) & (z_1 == BLANK)).any()
    assert (pair.diff() >= 0).all()
    assert split(*strip(z_0, pair, 3000)) == sources
    assert split(*strip(z_1, pair, 3000)) == targets


def test_a_shortest_alignment_has_as_many_edits_as_the_textbook_table_says():
    sources, targets = random_rows(600, 3), random_rows(600, 4)
    z_0, z_1, pair = align(ragged(sources), ragged(targets))
    edits = torch.zeros(600, dtype=torch.long).index_add(0, pair, (z_0 != z_1).long())
    assert edits.tolist() == [plain_distance(a, b) for a, b in zip(sources, targets, strict=True)]


def test_a_shortest_alignment_substitutes_rather_than_deletes_and_inserts():
    z_0, z_1, _ = align(ragged([[0, 0, 0, 0]]), ragged([[1, 1, 1, 1]]))
    assert z_0.tolist() == [0, 0, 0, 0] and z_1.tolist() == [1, 1, 1, 1]


def test_token_ids_of_any_size_are_told_apart():
    sources, targets = [[2**40, 7, 262143]], [[7, 2**40]]
    z_0, z_1, pair = align(ragged(sources), ragged(targets))
    assert split(*strip(z_0, pair, 1)) == sources and split(*strip(z_1, pair, 1)) == targets


def test_a_random_alignment_uses_every_subset_of_the_longer_side_alike():
    count = 6000
    z_0, z_1, pair = align_at_random(ragged([[5, 6]] * count), ragged([[0, 1, 2, 3]] * count), keys_of(count))
    assert len(z_0) == 4 * count and (z_1 != BLANK).all()
    _, seen = torch.unique((z_0.view(count, 4) != BLANK).long() @ torch.tensor([1, 2, 4, 8]), return_counts=True)
    expected = count / 6
    assert len(seen) == 6
    assert (seen - expected).abs().max() < 5 * math.sqrt(expected)  # 5 standard deviations of a Poisson number


def test_alignments_and_states_of_a_row_do_not_depend_on_the_other_rows():
    sources, targets, keys = random_rows(40, 5), random_rows(40, 6), keys_of(40)
    z_0, z_1, pair = align_at_random(ragged(sources), ragged(targets), keys)
    columns = whole_rows(z_0, z_1, pair, 40)
    z_t = state_at(columns, torch.linspace(0, 1, 40), keys)
    for row in (0, 17, 39):
        alone = align_at_random(ragged(sources[row : row + 1]), ragged(targets[row : row + 1]), keys[row : row + 1])
        assert torch.equal(alone[0], z_0[pair == row]) and torch.equal(alone[1], z_1[pair == row])
        one = whole_rows(*alone, 1)
        state = state_at(one, torch.linspace(0, 1, 40)[row : row + 1], keys[row : row + 1])
        assert torch.equal(state, z_t[columns.row == row])


@pytest.mark.parametrize("kind", ALIGNMENTS)
@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.8, 1.0])
def test_the_outstanding_edits_applied_to_x_t_give_x_1(kind, kappa):
    rows = 2000
    sources, targets = random_rows(rows, 7), random_rows(rows, 8)
    columns = whole_rows(*ALIGNMENTS[kind](ragged(sources), ragged(targets), keys_of(rows)), rows)
    z_t = state_at(columns, torch.full((rows,), kappa), keys_of(rows, 1))
    tokens, lengths = strip(z_t, columns.row, rows)
    edits = outstanding(columns, z_t)
    assert (edits.place.diff() >= 0).all()
    first = starts_of(lengths)
    row = owners(lengths)[edits.place].tolist()
    flat = list(zip(edits.place.tolist(), edits.kind.tolist(), edits.token.tolist(), strict=True))
    each = [[] for _ in range(rows)]
    for number, (place, edit, token) in zip(row, flat, strict=True):
        each[number].append((place - int(first[number]), edit, token))
    found = [plain_apply(text, edits) for text, edits in zip(split(tokens, lengths), each, strict=True)]
    assert found == [[FRONT, *target] for target in targets]
    if kappa == 0:
        assert split(tokens, lengths) == [[FRONT, *source] for source in sources]
    if kappa == 1:
        assert not len(edits.place)


def test_several_insertions_share_the_token_to_their_left_as_anchor():
    columns = whole_rows(*align(ragged([[1, 5]]), ragged([[1, 2, 3, 5, 4]])), 1)
    edits = outstanding(columns, columns.z_0)
    assert edits.place.tolist() == [1, 1, 2]
    assert edits.kind.tolist() == [INSERT] * 3 and edits.token.tolist() == [2, 3, 4]


@pytest.mark.parametrize("blanks_first", [False, True])
def test_where_a_blank_stands_beside_a_deleted_token_changes_no_edit(blanks_first):
    """Two columns, one of them emptied: the anchor of an insertion is the last token of x_t to its left."""
    z_0 = [FRONT, 1, BLANK, 7] if blanks_first else [FRONT, 1, 7, BLANK]
    z_1 = [FRONT, 1, 2, BLANK] if blanks_first else [FRONT, 1, BLANK, 2]
    z_t = [FRONT, 1, BLANK, BLANK]  # 7 is deleted already, 2 is still to come
    columns = Columns(
        torch.tensor(z_0), torch.tensor(z_1), torch.zeros(4).long(), torch.tensor([True, *[False] * 3]), 1
    )
    edits = outstanding(columns, torch.tensor(z_t))
    assert (edits.place.tolist(), edits.kind.tolist(), edits.token.tolist()) == ([1], [INSERT], [2])


@pytest.mark.parametrize("name", KAPPAS)
def test_the_schedules_run_from_0_to_1_with_their_derivative_and_inverse(name):
    kappa = KAPPAS[name]
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kappa.value(t).sum(), t)
    torch.testing.assert_close(kappa.derivative(t), slope)
    torch.testing.assert_close(kappa.weight(t), slope / (1 - kappa.value(t)))
    assert kappa.value(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_the_cubic_schedule_is_the_papers():
    assert KAPPAS["cubic"].value(torch.tensor(0.5)).item() == 0.125


def test_spans_are_the_runs_of_targets():
    target = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    spans = spans_of(target)
    assert spans.row.tolist() == [0, 0, 2]
    assert spans.first.tolist() == [1, 4, 0]
    assert spans.count.tolist() == [2, 1, 5]
    tokens = torch.arange(15).view(3, 5)
    assert split(*span_targets(tokens, spans, torch.ones(3).bool())) == [[1, 2], [4], [10, 11, 12, 13, 14]]
    assert split(*span_targets(tokens, spans, torch.tensor([False, True, False]))) == [[4]]


def test_merged_rows_hold_the_context_and_the_spans_in_their_places():
    tokens = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]])
    target = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]]).bool()
    given = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    spans = spans_of(target)
    z_0 = ragged([[5, 6, 7], [], [8]])
    z_0, z_1, span = align(z_0, span_targets(tokens, spans, torch.ones(3).bool()))
    which = span == 1
    parts = [(z_0[which], z_1[which], span[which]), (z_0[~which], z_1[~which], span[~which])]  # in any order
    columns = merge(tokens, given, spans, parts, FRONT)
    assert split(*strip(columns.z_0, columns.row, 2)) == [[FRONT, 10, 5, 6, 7, 13], [FRONT, 8]]
    assert split(*strip(columns.z_1, columns.row, 2)) == [[FRONT, 10, 11, 12, 13, 14], [FRONT, 20, 21, 22]]
    assert columns.z_0[columns.given].tolist() == [FRONT, 10, 13, FRONT]
    gaps = open_gaps(columns.given, columns.row)
    assert gaps[columns.given].tolist() == [False, True, True, True]  # not between the front token and the prompt
    assert gaps[~columns.given].all()


def test_mask_rows_have_between_one_and_the_most_masks():
    tokens, count = mask_rows(keys_of(4000), 7, 50)
    assert (tokens == 50).all() and len(tokens) == count.sum()
    shares = torch.bincount(count, minlength=8) / 4000
    assert shares[0] == 0 and (shares[1:] - 1 / 7).abs().max() < 0.03  # more than 5 standard deviations


def test_faulty_rows_have_faults_of_each_kind_up_to_their_share():
    rows = [list(range(40)) for _ in range(800)]
    faulty = split(*faulty_rows(ragged(rows), keys_of(800), 0.5))
    z_0, z_1, pair = align(ragged(faulty), ragged(rows))
    kinds = [(z_0 == BLANK).sum(), (z_1 == BLANK).sum(), ((z_0 != z_1) & (z_0 != BLANK) & (z_1 != BLANK)).sum()]
    share = torch.tensor(kinds) / (40 * 800)
    assert (share > 0.05).all() and (share < 0.12).all()  # a third of a quarter each, less what cancels out
    per_row = torch.bincount(pair[z_0 != z_1], minlength=800) / 40
    assert per_row.max() < 0.75 and per_row.min() < 0.05
    assert {token for row in faulty for token in row} <= set(range(40))


def test_a_share_of_nearly_no_faults_leaves_the_rows_as_they_are():
    rows = random_rows(200, 10)
    assert split(*faulty_rows(ragged(rows), keys_of(200), 1e-9)) == rows


def test_spans_of_one_row_draw_different_noise():
    spans = spans_of(torch.tensor([[True, False, True]]))
    assert len(span_keys(keys_of(1), spans).unique()) == 2


def test_owners_names_the_row_of_each_element():
    assert owners(torch.tensor([2, 0, 1])).tolist() == [0, 0, 2]
