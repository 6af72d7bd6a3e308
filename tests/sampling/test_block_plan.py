"""Blocks and quotas: what the host knows of every row in advance."""

import numpy
import pytest

from dllm.sampling.plan import block_passes, plan_blocks


def planned(masked, start, block_size, steps=None):
    return plan_blocks(numpy.array(masked, dtype=bool), numpy.array(start), block_size, steps)


@pytest.mark.parametrize("n", range(1, 20))
@pytest.mark.parametrize("steps", range(1, 20))
def test_revealed_counts_sum_to_the_masks_and_are_the_published_quotas(n, steps):
    plan, counts = planned([[1] * n], [0], n, steps), []
    while plan.open.any():
        counts.append(int(plan.counts()[0]))
        plan.advance(numpy.array(counts[-1:]))
    quotas = [n // steps + (step < n % steps) for step in range(steps)]
    assert counts == [quota for quota in quotas if quota] and sum(counts) == n


def test_steps_are_spread_over_the_blocks_that_have_masks():
    masked = [[0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]]
    plan = planned(masked, [1, 0], 2)
    assert plan.blocks.tolist() == [3, 2] and plan.masks.tolist() == [[2, 2, 2], [2, 2, 0]]
    assert plan.begin.tolist() == [[1, 3, 5], [0, 8, 0]] and plan.end.tolist() == [[3, 5, 7], [2, 10, 0]]
    assert plan.passes.tolist() == [[2, 2, 2], [2, 2, 0]]
    assert planned(masked, [1, 0], 2, 4).passes.tolist() == [[2, 1, 1], [2, 2, 0]]
    assert planned(masked, [1, 0], 2, 3).passes.tolist() == [[1, 1, 1], [2, 1, 0]]


def test_a_mask_before_the_start_belongs_to_the_first_block():
    plan = planned([[1, 0, 1, 1, 1]], [2], 2)
    assert plan.masks.tolist() == [[3, 1]] and plan.begin.tolist() == [[0, 4]] and plan.end.tolist() == [[4, 6]]


@pytest.mark.parametrize("steps", range(3, 14))
def test_no_pass_is_lost_on_a_short_block(steps):
    passes = block_passes(numpy.array([[4, 4, 2]]), steps)
    assert passes.sum() == min(steps, 10) and (passes <= [4, 4, 2]).all() and passes.all()


def test_fewer_steps_than_blocks_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="steps = 3 is less than the 4 blocks"):
        planned([[1] * 8], [0], 2, 3)


def test_a_plan_follows_each_row_from_block_to_block():
    plan = planned([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6], [0, 1, 0, 2], 2)
    window, masks = plan.window()
    assert window[:3, :1].tolist() == [[0], [1], [0]] and masks.tolist() == [2, 2, 1, 0]
    assert plan.open.tolist() == [True, True, True, False] and plan.counts().tolist() == [1, 1, 1, 0]
    assert plan.advance(numpy.array([2, 1, 1, 0])).tolist() == [True, False, True, True]
    assert plan.block.tolist() == [1, 0, 0, 0] and plan.left.tolist() == [2, 1, 0, 0]
    assert plan.open.tolist() == [True, True, False, False] and plan.step.tolist() == [1, 1, 1, 1]
    assert plan.window()[0][0].tolist() == [2, 3]


def test_rows_without_any_mask_have_an_empty_plan():
    plan = planned([[0, 0, 0]], [1], 2)
    assert not plan.open.any() and plan.blocks.tolist() == [0]
