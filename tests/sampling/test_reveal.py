"""Reveal rules and the canvas they act on."""

import pytest
import torch

from dllm.algorithms import resolved
from dllm.choices import REVEAL_RULES, parallel_rules
from dllm.core.canvas import canvas_for, first_position, infill_canvas
from dllm.sampling.reveal import (
    choose_positions,
    most_probable,
    nucleus,
    propose_tokens,
    token_confidence,
)
from tests.plain_sampler import within_bound, within_factor


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
    for name in sorted(set(REVEAL_RULES) - {"random"}):
        score = resolved(REVEAL_RULES[name].score)(logits, confidence, None)
        assert score[0] > score[1] and score.isfinite().all(), name


@pytest.mark.parametrize("size", [5, 64, 100, 1024])
def test_the_most_probable_token_is_the_first_of_the_largest(size):
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randint(0, 3 * size, (300, size), generator=generator).float()
    drawn[:100] = torch.randint(0, 3, (100, size), generator=generator)  # many are equal
    drawn[100:200, torch.randint(0, size, (size // 2,), generator=generator)] = -torch.inf
    drawn[-1] = -torch.inf
    drawn[-2, :-1], drawn[-3, 1:] = -torch.inf, -torch.inf
    plain = [max(range(size), key=lambda token: row[token]) for row in drawn.tolist()]
    assert most_probable(drawn).tolist() == plain
    assert most_probable(drawn[:0]).tolist() == []


@pytest.mark.parametrize("number", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("rule", parallel_rules())
def test_sure_positions_are_counted_as_by_the_plain_rule(rule, number):
    generator = torch.Generator().manual_seed(0)
    # near 1 in some rows and near 0 in others, so that there are short and long runs of sure positions
    size = torch.rand(200, 12, generator=generator) ** torch.tensor([0.05, 0.3, 1.0, 4.0]).repeat(50)[:, None]
    sizes = torch.randint(1, 13, (200, 1), generator=generator)
    behind = torch.arange(12) >= sizes
    score = -size if rule == "entropy_bound" else size
    ranked = score.masked_fill(behind, -torch.inf).sort(-1, descending=True).values
    found = resolved(REVEAL_RULES[rule].sure)(ranked, number).clamp(min=1).tolist()
    plain = {
        "threshold": lambda row: max(1, sum(value >= number for value in row)),
        "factor": lambda row: within_factor(row, number),
        "entropy_bound": lambda row: within_bound([-value for value in row], number),
    }[rule]
    rows = [row[:n] for row, (n,) in zip(ranked.tolist(), sizes.tolist(), strict=True)]
    assert found == [plain(row) for row in rows]
    assert len(set(found)) > 2


def test_what_is_sure_is_revealed_beyond_the_quota_and_one_is_revealed_in_any_case():
    score = torch.tensor([[0.95, 0.2, 0.97, 0.9], [0.1, 0.3, 0.2, 0.0]])
    candidate = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    chosen = choose_positions(score, candidate, torch.tensor([1, 1]), lambda ranked: (ranked >= 0.9).sum(-1))
    assert chosen.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]


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


def test_a_mask_inside_a_prompt_is_given_and_one_to_infill_is_not():
    canvas = canvas_for([[1, 9, 3]], 2, mask_id=9, pad_id=0)
    assert canvas.masked.tolist() == [[False, False, False, True, True]] and canvas.start.tolist() == [3]
    assert infill_canvas([[1, 9, 3, 9, 9]], mask_id=9, pad_id=0).masked.tolist() == [[False, True, False, True, True]]
