"""Block-causal rows: who sees whom, against the rules spelled out token by token."""

import itertools

import numpy
import pytest
import torch

from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.core.batch import Noise
from dllm.core.corrupt import block_levels
from dllm.core.packing import block_layout


def array(*values):
    return numpy.array(values, dtype=numpy.int64)


def published_mask(n, size):
    """[x_t ; x_0] of Arriola et al. 2025: M_BD | M_OBC | M_BC, [2n, 2n]."""
    found = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for q, k in itertools.product(range(2 * n), repeat=2):
        q_clean, k_clean, q_block, k_block = q >= n, k >= n, q % n // size, k % n // size
        block_diagonal = q_block == k_block and q_clean == k_clean
        offset_block_causal = q_block > k_block and not q_clean and k_clean
        block_causal = q_block >= k_block and q_clean and k_clean
        found[q, k] = block_diagonal or offset_block_causal or block_causal
    return found


def mask_of(blocks):
    pattern = blocks.pattern
    return torch.from_numpy(pattern.mask(slice(None), slice(None))), pattern


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("n", [1, 4, 7, 10])
def test_a_doubled_row_has_the_published_mask_without_what_nobody_sees(n, size):
    mask, pattern = mask_of(BlockRows.doubled(BlockRule(size), array(0), array(n)))
    at = torch.from_numpy(numpy.where(pattern.span >= 0, pattern.position, pattern.position + n))
    assert torch.equal(mask, published_mask(n, size)[at][:, at])
    left_out = sorted(set(range(n, 2 * n)) - set(at.tolist()))
    assert left_out == list(range(n + (n - 1) // size * size, 2 * n))  # the clean tokens of the last block


@pytest.mark.parametrize("anchor", ["response", "row"])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_rows_with_prompts_see_what_the_rules_say(anchor, size):
    prompts, lengths = array(5, 0, 7, 3, 6), array(13, 6, 7, 4, 18)
    rule = BlockRule(size, anchor)
    blocks = BlockRows.doubled(rule, prompts, lengths)
    mask, pattern = mask_of(blocks)
    start = prompts if anchor == "response" else prompts * 0

    def block(token):
        place, first = pattern.position[token], start[pattern.row[token]]
        return -1 if place < first else (place - first) // size

    for q, k in itertools.product(range(len(pattern.row)), repeat=2):
        q_clean, k_clean = pattern.span[q] < 0, pattern.span[k] < 0
        seen = block(k) < block(q) if not q_clean else block(k) <= block(q)
        seen = seen if k_clean else not q_clean and block(k) == block(q)
        assert mask[q, k] == (seen and pattern.row[q] == pattern.row[k])
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        corrupted = pattern.position[(pattern.row == row) & (pattern.span >= 0)]
        assert set(range(prompt, length)) <= set(corrupted) and len(set(corrupted)) == len(corrupted)
        if prompt == length:
            assert not len(corrupted) and blocks.clean[row] == length


def test_sampled_rows_see_up_to_the_end_of_their_block():
    mask, _ = mask_of(BlockRows.plain(BlockRule(2), array(3), array(6)))
    expected = [[1, 1, 1, 0, 0, 0]] * 3 + [[1, 1, 1, 1, 1, 0]] * 2 + [[1, 1, 1, 1, 1, 1]]
    assert mask.int().tolist() == expected


def test_the_layout_knows_positions_and_the_token_before():
    blocks = BlockRows.doubled(BlockRule(2), array(1, 0), array(5, 3))
    layout = block_layout(blocks)
    assert layout.lengths == (3 + 4, 2 + 3) and layout.width == 7
    assert layout.positions.tolist() == [0, 1, 2, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    # the first token of a corrupted block follows the clean one before it; the first of a row itself
    assert layout.before.tolist() == [0, 0, 1, 0, 3, 2, 5, 7, 7, 9, 9, 8]
    assert layout.index(torch.tensor([0, 1]), torch.tensor([3, 4])).tolist() == [3, 11]
    rows = torch.arange(14).view(2, 7)
    assert torch.equal(layout.unpack(layout.pack(rows))[1, :5], rows[1, :5])


def test_block_times_are_spread_evenly_and_depend_on_their_row_alone():
    torch.manual_seed(0)
    noise = Noise(torch.rand(4000), torch.rand(4000, 3))
    blocks = torch.tensor([False, True, True, True, True]).expand(4000, -1)
    levels = block_levels(noise, blocks)
    there = levels[:, 1:]
    gaps = there.sort(-1).values.diff(dim=-1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.25), atol=1e-6, rtol=0)
    # each uniform: mean 1/2 with a standard error of 0.29 / sqrt(4000), and quarters with 0.43 / sqrt(4000)
    assert (there.mean(0) - 0.5).abs().max() < 4 * 0.29 / 4000**0.5
    shares = torch.stack([(there // 0.25 == quarter).float().mean(0) for quarter in range(4)])
    assert (shares - 0.25).abs().max() < 4 * 0.43 / 4000**0.5
    alone = block_levels(Noise(noise.level[7:8], noise.place[7:8]), blocks[7:8])
    wider = block_levels(noise, torch.nn.functional.pad(blocks, (0, 3)))
    assert torch.equal(alone[0], levels[7]) and torch.equal(wider[:, 1:5], there)
    one = torch.tensor([True]).expand(4000, -1)
    assert torch.equal(block_levels(noise, one)[:, 0], noise.level)
