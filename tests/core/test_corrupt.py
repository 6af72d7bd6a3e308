"""Corruption and its noise."""

import pytest
import torch

from dllm.config import Recipe
from dllm.core.batch import evaluation_noise, row_noise
from dllm.core.corrupt import apply_mask, bernoulli, corrupted, exact_count
from dllm.schedules import SCHEDULES

LARGEST = 1 - 2**-24
"""The largest number below 1 that keyed noise holds."""


def random_rows(rows=300, length=40, seed=0):
    """Rows whose maskable positions lie anywhere, from none to all, with their noise."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, rows)[:, None]
    maskable = torch.rand(rows, length, generator=generator) < share
    return maskable, torch.rand(rows, generator=generator), torch.rand(rows, length, generator=generator)


def test_exactly_floor_of_u_n_plus_one_tokens_are_masked():
    maskable, u, noise = random_rows()
    n = maskable.sum(-1)
    corrupted = exact_count(maskable, u, noise)
    expected = torch.where(n > 0, (u.double() * n).floor().long() + 1, 0)
    assert torch.equal(corrupted.masked.sum(-1), expected)
    assert not (corrupted.masked & ~maskable).any()
    torch.testing.assert_close(corrupted.weight * expected, n.float())


@pytest.mark.parametrize("u", [0.0, LARGEST])
@pytest.mark.parametrize("n", [1, 2, 1000, 8191])
def test_the_ends_of_the_noise_mask_one_token_and_all(u, n):
    corrupted = exact_count(torch.ones(1, n, dtype=torch.bool), torch.tensor([u]), torch.rand(1, n))
    assert corrupted.masked.sum() == (1 if u == 0 else n)


def test_a_row_without_targets_stays_clean_with_weight_0():
    corrupted = exact_count(torch.zeros(2, 5, dtype=torch.bool), torch.tensor([0.0, 0.9]), torch.rand(2, 5))
    assert not corrupted.masked.any() and not corrupted.weight.any()


def test_equal_noise_still_masks_exactly_k():
    corrupted = exact_count(torch.ones(1, 6, dtype=torch.bool), torch.tensor([0.5]), torch.zeros(1, 6))
    assert corrupted.masked.sum() == 4


def test_every_subset_of_a_size_is_equally_likely():
    rows, maskable = 20_000, torch.tensor([False, True, True, True, True])
    noise = row_noise(3, 0, torch.arange(rows), 5)
    masked = exact_count(maskable.expand(rows, -1), torch.full((rows,), 0.3), noise.place).masked
    counts = torch.bincount((masked.long() << torch.arange(5)).sum(-1), minlength=32)
    counts = counts[counts > 0].double()
    assert len(counts) == 6  # two of four
    assert ((counts - rows / 6) ** 2 / (rows / 6)).sum() < 20.5  # chi squared, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", SCHEDULES)
def test_bernoulli_masks_each_target_with_the_mask_ratio(name):
    rows, t = 20_000, torch.tensor([0.1, 0.5, 0.9])
    maskable = torch.tensor([True, True, False, True])
    for time in t:
        noise = row_noise(0, 0, torch.arange(rows), 4)
        corrupted = bernoulli(maskable.expand(rows, -1), time.expand(rows), noise.place, SCHEDULES[name])
        ratio = SCHEDULES[name].mask_ratio(time).item()
        share = corrupted.masked.float().mean(0)
        assert not share[2]
        assert ((share[maskable] - ratio).abs() < 4 * (ratio * (1 - ratio) / rows) ** 0.5).all()
        torch.testing.assert_close(corrupted.weight, SCHEDULES[name].weight(time).expand(rows))


def test_at_time_1_bernoulli_masks_everything():
    maskable = torch.ones(3, 9, dtype=torch.bool)
    for schedule in SCHEDULES.values():
        assert bernoulli(maskable, torch.ones(3), torch.full((3, 9), LARGEST), schedule).masked.all()


def test_a_mask_replaces_tokens_where_it_says_and_nowhere_else():
    tokens, masked = torch.tensor([[4, 5, 6]]), torch.tensor([[True, False, True]])
    assert apply_mask(tokens, masked, 9).tolist() == [[9, 5, 9]]
    assert tokens.tolist() == [[4, 5, 6]]


@pytest.mark.parametrize("make", [row_noise, evaluation_noise])
def test_noise_depends_only_on_seed_epoch_and_sample(make):
    """U5: the same row among other rows, in another order and with other padding has the same noise."""
    ids = torch.tensor([7, 3, 10**9, 0])
    whole = make(1, 2, ids, 50)
    for order, length in (([2], 50), ([3, 1, 0], 20), ([1, 1, 2], 1)):
        part = make(1, 2, ids[order], length)
        assert torch.equal(part.level, whole.level[order])
        assert torch.equal(part.place, whole.place[order][:, :length])


def test_another_seed_epoch_or_sample_has_other_noise():
    one = row_noise(1, 2, torch.tensor([3]), 8)
    for other in (row_noise(2, 2, torch.tensor([3]), 8), row_noise(1, 3, torch.tensor([3]), 8),
                  row_noise(1, 2, torch.tensor([4]), 8)):  # fmt: skip
        assert one.level != other.level and not torch.equal(one.place, other.place)


@pytest.mark.parametrize("first", [0, 10**6, 10**9])
def test_the_levels_of_test_rows_are_spread_evenly(first):
    """In fp32 the levels of large sample ids would fall on a coarse grid."""
    level = evaluation_noise(0, 0, torch.arange(first, first + 1000), 1).level.sort().values
    assert (level - (torch.arange(1000) + 0.5) / 1000).abs().max() < 0.003
    assert level.min() >= 0 and level.max() < 1


def test_a_recipe_chooses_the_corruption():
    maskable, level = torch.ones(3, 8, dtype=torch.bool), torch.tensor([0.1, 0.5, 0.9])
    noise = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    found = corrupted(maskable, level, noise, Recipe())
    assert torch.equal(found.masked, exact_count(maskable, level, noise).masked)
    recipe = Recipe(corruption="bernoulli", schedule="cosine", time_floor=0.2)
    found, expected = (
        corrupted(maskable, level, noise, recipe),
        bernoulli(maskable, 0.2 + 0.8 * level, noise, SCHEDULES["cosine"]),
    )
    assert torch.equal(found.masked, expected.masked) and torch.equal(found.weight, expected.weight)
