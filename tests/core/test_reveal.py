"""Reveal rules, blocks and quotas, and the canvas they act on."""

import pytest
import torch

from dllm.core.blocks import block_index, block_passes, leftmost_block, transfer_counts
from dllm.core.canvas import canvas_for, first_position, infill_canvas
from dllm.core.reveal import REVEAL_RULES, choose_positions, nucleus, propose_tokens, token_confidence


@pytest.mark.parametrize("n", range(1, 20))
@pytest.mark.parametrize("steps", range(1, 20))
def test_revealed_counts_sum_to_the_masks_and_are_the_published_quotas(n, steps):
    left, counts = n, []
    for step in range(steps):
        counts.append(transfer_counts(torch.tensor([left]), torch.tensor([steps - step])).item())
        left -= counts[-1]
    assert counts == [n // steps + (step < n % steps) for step in range(steps)]
    assert sum(counts) == n


def test_steps_are_spread_over_the_blocks_that_have_masks():
    masked = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]]).bool()
    block = block_index(torch.tensor([1, 0]), 10, 2)
    assert block[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert leftmost_block(masked, block).tolist() == [0, 0]
    assert block_passes(masked, block, 4)[0, :4].tolist() == [2, 1, 1, 0]
    assert block_passes(masked, block, 3)[1, :5].tolist() == [2, 0, 0, 0, 1]
    assert block_passes(masked, block, None)[1, :5].tolist() == [2, 0, 0, 0, 2]


@pytest.mark.parametrize("steps", range(3, 14))
def test_no_pass_is_lost_on_a_short_block(steps):
    masked = torch.ones(1, 10, dtype=torch.bool)
    passes = block_passes(masked, block_index(torch.tensor([0]), 10, 4), steps)
    assert passes.sum() == min(steps, 10) and (passes[0, :3] <= torch.tensor([4, 4, 2])).all() and passes[0, :3].all()


def test_fewer_steps_than_blocks_is_an_error_that_says_so():
    masked = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="steps = 3 is less than the 4 blocks"):
        block_passes(masked, block_index(torch.tensor([0]), 8, 2), 3)


def test_the_best_candidates_are_chosen_and_among_equals_the_leftmost():
    score = torch.tensor([[0.5, 0.9, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2]])
    candidate = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    chosen = choose_positions(score, candidate, torch.tensor([1, 2]))
    assert chosen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert choose_positions(score, candidate, torch.tensor([9, 0])).sum(1).tolist() == [3, 0]


def test_rules_rank_a_sure_position_above_an_unsure_one():
    logits = torch.tensor([[9.0, 0.0, 0.0, -torch.inf], [1.0, 0.9, 0.8, -torch.inf]])
    confidence = token_confidence(logits, logits.argmax(-1))
    torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))
    for name in ("confidence", "entropy", "margin", "threshold"):
        score = REVEAL_RULES[name](logits, confidence, torch.zeros(2))
        assert score[0] > score[1] and score.isfinite().all(), name


def test_tokens_are_drawn_from_the_tempered_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 0.0])
    u = (torch.arange(10_000) + 0.5) / 10_000
    for temperature in (0.5, 1.0, 2.0):
        tokens = propose_tokens(logits.expand(10_000, -1), u, temperature=temperature)
        share = torch.bincount(tokens, minlength=5) / 10_000
        # a grid of n points misses a step of the distribution by at most 1 / n
        torch.testing.assert_close(share, (logits / temperature).softmax(-1), atol=2e-4, rtol=0)


def test_a_token_without_probability_is_never_drawn_at_the_ends_of_the_noise():
    logits = torch.tensor([[-torch.inf, 1.0, 1.3, 0.2, -torch.inf]])
    for u in (0.0, 1 - 2.0**-24):
        assert propose_tokens(logits, torch.tensor([u]), temperature=1.0).item() in (1, 2, 3)


def test_the_nucleus_is_the_smallest_set_of_the_given_mass():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    for top_p, kept in ((0.2, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert nucleus(p, top_p)[0].nonzero()[:, 0].tolist() == kept


def test_a_canvas_holds_ragged_rows():
    canvas = canvas_for([[1, 2, 3], [], [4]], [2, 1, 0], mask_id=9, pad_id=0)
    assert canvas.tokens.tolist() == [[1, 2, 3, 9, 9], [9, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    assert canvas.masked.sum(1).tolist() == [2, 1, 0] and canvas.done.tolist() == [False, False, True]
    assert canvas.valid.sum(1).tolist() == [5, 1, 1] and canvas.start.tolist() == [3, 0, 1]
    assert canvas.responses() == [[9, 9], [9], []]


def test_an_infill_canvas_with_the_masks_at_the_end_is_a_sampling_canvas():
    one = canvas_for([[1, 2], [3]], 3, mask_id=9, pad_id=0)
    other = infill_canvas([[1, 2, 9, 9, 9], [3, 9, 9, 9]], mask_id=9, pad_id=0)
    for name in ("tokens", "masked", "confidence", "start", "length", "done"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_first_position_of_an_empty_row_is_its_length():
    where = torch.tensor([[False, True, True], [False, False, False]])
    assert first_position(where).tolist() == [1, 3]
