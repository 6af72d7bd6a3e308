"""Order of an epoch, ends of responses, padding."""

import numpy
import pytest
import torch

from dllm.data.collate import ResponseEnd, collate, ended_lengths, epoch_batches, row_widths
from dllm.data.tokens import TokenRows

EOS, PAD = 1, 0
PROMPTS = [2, 1, 3]
ROWS = [[11, 12, 13], [21, 22, 23, 24, 25, 26], [31, 32, 33, 34]]
"""Responses of 1, 5 and 1 tokens."""


def token_rows(rows=ROWS, prompts=PROMPTS):
    offsets = numpy.concatenate([[0], numpy.cumsum([len(row) for row in rows])])
    return TokenRows(numpy.concatenate(rows).astype(numpy.uint16), offsets, numpy.asarray(prompts, dtype=numpy.int32))


def batch_of(rows, numbers, end, epoch=0, among=None):
    """The rows `numbers` as a batch, with the ends that they have among the rows of a global batch."""
    among = numbers if among is None else numpy.asarray(among)
    ended = dict(zip(among, ended_lengths(rows, among, end, epoch), strict=True))
    return collate(rows, numbers, numpy.array([ended[number] for number in numbers]), pad_id=PAD, end=end)


def collated(numbers, end, **options):
    batch = batch_of(token_rows(), numpy.array(numbers), end, **options)
    return [row[real].tolist() for row, real in zip(batch.tokens, batch.attention, strict=True)], batch


def test_text_is_padded_to_the_longest_row_and_all_of_it_may_be_masked():
    rows, batch = collated([2, 1], None)
    assert batch.tokens.tolist() == [[31, 32, 33, 34, PAD, PAD], ROWS[1]]
    assert rows == [ROWS[2], ROWS[1]]
    assert torch.equal(batch.maskable, batch.attention) and batch.sample_ids.tolist() == [2, 1]
    assert batch.tokens.dtype == torch.long and batch.attention.dtype == batch.maskable.dtype == torch.bool


def test_fill_ends_every_response_at_the_longest_row():
    rows, batch = collated([0, 1, 2], ResponseEnd("fill", EOS))
    assert rows == [[11, 12, 13, EOS, EOS, EOS], ROWS[1], [31, 32, 33, 34, EOS, EOS]]
    assert batch.maskable.long().tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch.attention.all()


def test_fill_reaches_to_the_longest_row_of_the_global_batch():
    rows, _ = collated([0, 2], ResponseEnd("fill", EOS), among=[0, 1, 2])
    assert rows == [[11, 12, 13, EOS, EOS, EOS], [31, 32, 33, 34, EOS, EOS]]


def test_block_ends_every_response_at_a_block_boundary_with_at_least_one_end():
    rows, batch = collated([0, 1, 2], ResponseEnd("block", EOS, block_size=2))
    # responses of 1, 5 and 1 tokens become 2, 6 and 2
    assert rows == [[11, 12, 13, EOS], [*ROWS[1], EOS], [31, 32, 33, 34, EOS]]
    assert batch.tokens[0].tolist() == [11, 12, 13, EOS, PAD, PAD, PAD]
    rows, _ = collated([1], ResponseEnd("block", EOS, block_size=5))
    assert rows == [[*ROWS[1], EOS, EOS, EOS, EOS, EOS]], "a full block is followed by a block of ends"


def test_one_ends_every_response_with_one_end():
    rows, batch = collated([0, 1, 2], ResponseEnd("one", EOS))
    assert rows == [[*row, EOS] for row in ROWS]
    assert batch.maskable.sum(-1).tolist() == [2, 6, 2]


@pytest.mark.parametrize("kind", ["fill", "block", "one"])
def test_no_row_grows_beyond_the_longest_allowed_and_none_is_cut(kind):
    end = ResponseEnd(kind, EOS, block_size=4, extra_blocks=3, longest=6)
    rows, _ = collated([0, 1, 2], end, epoch=3)
    assert rows[1] == ROWS[1], "a response that fills the length is not taught to end there"
    assert all(len(row) <= 6 for row in rows) and all(row[-1] == EOS for row in (rows[0], rows[2]))
    assert collated([1], ResponseEnd(kind, EOS, longest=4))[0] == [ROWS[1]]


def test_extra_blocks_depend_on_seed_epoch_and_sample_only():
    rows = token_rows([[7, 8]] * 300, [1] * 300)
    numbers = numpy.arange(300)

    def blocks(numbers, seed=0, epoch=0):
        end = ResponseEnd("block", EOS, block_size=4, extra_blocks=2, seed=seed)
        return ((ended_lengths(rows, numbers, end, epoch) - 1) // 4 - 1).tolist()

    whole = blocks(numbers)
    assert [whole.count(extra) > 70 for extra in (0, 1, 2)] == [True] * 3 and set(whole) == {0, 1, 2}
    order = numpy.array([299, 3, 3, 150])
    assert blocks(order) == [whole[i] for i in order]
    assert blocks(numbers, seed=1) != whole != blocks(numbers, epoch=1)


@pytest.mark.parametrize("kind", ["block", "one", None])
def test_rows_are_grouped_by_their_length_with_the_end(kind):
    rows, end = token_rows(), kind and ResponseEnd(kind, EOS, block_size=4, extra_blocks=3)
    plain = kind and ResponseEnd(kind, EOS, block_size=4)
    batch = batch_of(rows, numpy.arange(3), plain)
    assert row_widths(rows, end).tolist() == batch.attention.sum(-1).tolist()


def test_the_last_row_of_the_file_can_be_padded():
    rows, _ = collated([2, 2], ResponseEnd("block", EOS, block_size=32))
    assert rows == [[*ROWS[2], *[EOS] * 31]] * 2


LENGTHS = numpy.random.default_rng(0).integers(1, 200, 1000)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_takes_every_row_at_most_once_and_as_many_as_fill_batches(grouped):
    batches = epoch_batches(LENGTHS, 64, 3, 0, grouped=grouped)
    assert batches.shape == (1000 // 64, 64) and len(numpy.unique(batches)) == batches.size
    assert sorted(epoch_batches(LENGTHS, 50, 3, 0, grouped=grouped).ravel()) == list(range(1000))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(grouped):
    one, same, epoch, seed = (
        epoch_batches(LENGTHS, 16, s, e, grouped=grouped) for s, e in [(1, 2), (1, 2), (1, 3), (2, 2)]
    )
    assert numpy.array_equal(one, same) and not numpy.array_equal(one, epoch) and not numpy.array_equal(one, seed)


def test_the_rows_left_over_are_others_in_another_epoch():
    left = [set(range(1000)) - set(epoch_batches(LENGTHS, 64, 0, e, grouped=True).ravel()) for e in range(3)]
    assert all(len(rows) == 1000 % 64 for rows in left) and len(left[0] & left[1] & left[2]) < 5


def test_grouping_by_length_takes_away_most_of_the_padding():
    def padding(batches):
        return (LENGTHS[batches].max(-1, keepdims=True) - LENGTHS[batches]).sum()

    plain, grouped = (padding(epoch_batches(LENGTHS, 16, 0, 0, grouped=g)) for g in (False, True))
    assert grouped < 0.1 * plain


def test_grouped_batches_do_not_come_in_order_of_length():
    means = LENGTHS[epoch_batches(LENGTHS, 16, 0, 0, grouped=True)].mean(-1)
    assert abs(numpy.corrcoef(means, numpy.arange(len(means)))[0, 1]) < 0.5


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_set_smaller_than_a_batch_is_repeated_to_fill_it(size):
    batches = epoch_batches(numpy.ones(size, dtype=int), 8, 0, 0, grouped=True)
    assert batches.shape == (1, 8) and set(batches.ravel()) == set(range(size))
    assert numpy.bincount(batches.ravel()).max() == -(-8 // size)
