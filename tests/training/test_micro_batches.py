"""The input pipeline: which rows a step takes, how they are laid out, and a thread that changes nothing."""

import itertools
import sys
import threading
import time

import numpy
import pytest
import torch

from dllm.config import Recipe
from dllm.data.collate import ResponseEnd, collate, epoch_batches, row_widths
from dllm.data.tokens import TokenRows
from dllm.objectives.ar import AR
from dllm.objectives.mdlm import MDLM
from dllm.training.micro_batches import (
    Limits,
    Prefetcher,
    TrainingSplit,
    balance_rows,
    cut_rows,
    evaluated_rows,
    evaluation_micro_batches,
    even_cut,
    greedy_cut,
    micro_batches,
)
from tests.training.conftest import run_config

LENGTHS = numpy.clip(numpy.random.default_rng(0).lognormal(3, 0.7, 96), 2, 90).astype(int)
LIMITS = [Limits(96), Limits(7), Limits(96, 150), Limits(5, 200), Limits(3, 91)]


def split_of(prompts=1, objective=None):
    offsets = numpy.concatenate([[0], numpy.cumsum(LENGTHS)])
    tokens = numpy.random.default_rng(1).integers(5, 20, offsets[-1]).astype(numpy.uint16)
    rows = TokenRows(tokens, offsets, numpy.full(len(LENGTHS), prompts, dtype=numpy.int32))
    end = ResponseEnd("block", 1, block_size=4, extra_blocks=1, seed=1, longest=96) if prompts else None
    return TrainingSplit(rows, objective or MDLM(), end, pad_id=0, mask_id=2)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("limits", LIMITS)
def test_every_row_stands_in_one_micro_batch_of_one_rank_and_within_the_limits(limits, ranks):
    found = [cut_rows(LENGTHS, limits, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(parts) for parts in found}) == 1, "ranks have equally many micro-batches"
    parts = [part for parts in found for part in parts]
    assert sorted(numpy.concatenate(parts)) == list(range(len(LENGTHS)))
    for part in parts:
        assert 0 < len(part) <= limits.rows
        assert sum(LENGTHS[part]) <= (limits.tokens or 10**9)
        assert (numpy.diff(LENGTHS[part]) <= 0).all(), "rows of like length stand together, the longest first"


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 5, 96])
def test_ranks_evaluate_every_row_once_in_equally_many_forward_passes(rows, ranks):
    config, split = run_config(length=96, micro_batch_size=7, eval_draws=2), split_of()
    test = split.ended(numpy.arange(rows))
    found = [list(evaluation_micro_batches(split, config, test, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(parts) for parts in found}) == 1, "a rank that waits for others in a forward pass would hang"
    counted = numpy.concatenate([part.numbers for parts in found for part in parts if part.counts])
    assert sorted(counted) == sorted(2 * list(range(rows)))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_hold_nearly_the_same_number_of_tokens(ranks):
    load = LENGTHS[balance_rows(LENGTHS, ranks)].sum(1)
    in_order = LENGTHS.reshape(ranks, -1).sum(1)
    assert load.max() / load.mean() < 1.02 < in_order.max() / in_order.mean()
    # neighbours in length take turns: no two ranks are further apart than the longest row is from the shortest
    assert load.max() - load.min() <= LENGTHS.max() - LENGTHS.min()


@pytest.mark.parametrize("limits", LIMITS)
def test_no_cut_has_fewer_micro_batches_and_an_even_one_is_no_larger(limits):
    lengths = numpy.sort(LENGTHS[:8])[::-1]
    fewest = len(greedy_cut(lengths, limits)) - 1
    possible = {}
    for choice in range(1 << (len(lengths) - 1)):  # every set of places to cut at
        bounds = [0, *(i + 1 for i in range(len(lengths) - 1) if choice >> i & 1), len(lengths)]
        parts = [lengths[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        if all(len(p) <= limits.rows and sum(p) <= (limits.tokens or 10**9) for p in parts):
            largest = max(sum(p) for p in parts)
            possible[len(parts)] = min(largest, possible.get(len(parts), 10**9))
    assert fewest == min(possible)
    for parts in range(fewest, len(lengths) + 1):
        bounds = even_cut(lengths, parts, limits)
        assert bounds[0] == 0 and bounds[-1] == len(lengths) and len(bounds) == parts + 1
        largest = max(sum(lengths[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
        assert largest <= min(v for k, v in possible.items() if k <= parts)


def test_a_row_beyond_the_limit_is_named_in_one_line():
    with pytest.raises(ValueError, match="micro_batch_tokens = 20 is smaller than a row of 30 tokens") as caught:
        greedy_cut(numpy.array([30, 4]), Limits(8, 20))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="9 rows do not divide by 2 processes"):
        balance_rows(LENGTHS[:9], 2)


def contents(parts):
    """What the steps' micro-batches hold by sample, whatever the layout: {(step, row): (tokens, targets, share)}."""
    found, step = {}, 0
    for part in parts:
        x = part.inputs
        for index, number in enumerate(part.numbers):
            length, of_row = x.layout.lengths[index], x.row == index
            found[step, int(number)] = (
                x.tokens[index, :length].tolist(), x.position[of_row].tolist(), x.targets[of_row].tolist(),
                x.weight[index].item(), x.share[index].item(), part.denominator,
            )  # fmt: skip
        step += part.last
    return found


@pytest.mark.parametrize("prompts", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}, {"micro_batch_tokens": 130}])
def test_the_layout_changes_neither_the_rows_of_a_step_nor_their_noise(prompts, changes):
    base = contents(micro_batches(split_of(prompts), run_config(length=96, micro_batch_size=99), first=0, last=20))
    config = run_config(length=96, **{"micro_batch_size": 99} | changes)
    for ranks in (1, 2, 4):
        split = {}
        for rank in range(ranks):
            split |= contents(micro_batches(split_of(prompts), config, first=0, last=20, rank=rank, ranks=ranks))
        assert split == base


def test_the_rows_of_a_step_are_those_of_the_epoch_order():
    config, data = run_config(length=96), split_of()
    found = contents(micro_batches(data, config, first=0, last=14))
    order = [epoch_batches(row_widths(data.rows, data.end), 8, config.seed, e, grouped=True) for e in (0, 1)]
    for step in range(14):
        epoch, position = divmod(step, 12)
        assert {number for s, number in found if s == step} == set(order[epoch][position])


def test_a_resumed_pipeline_goes_on_where_it_was():
    config = run_config(length=96, micro_batch_tokens=120)
    whole = contents(micro_batches(split_of(), config, first=0, last=20))
    later = contents(micro_batches(split_of(), config, first=13, last=20))
    assert later == {(step - 13, number): row for (step, number), row in whole.items() if step >= 13}


def test_the_published_denominator_keeps_the_published_split():
    """Fault F5: the loss depends on the micro-batches, which stay the rows in their order, by number of rows."""
    recipe = {"denominator": "micro_batch", "normalisation": "token"}
    config, data = run_config(length=96, micro_batch_size=3, micro_batch_tokens=96, recipe=recipe), split_of()
    batch = epoch_batches(row_widths(data.rows, data.end), 8, config.seed, 0, grouped=True)[0]
    for rank in range(2):
        parts = list(micro_batches(data, config, first=0, last=1, rank=rank, ranks=2))
        mine = batch[rank * 4 : rank * 4 + 4]
        assert [p.numbers.tolist() for p in parts] == [mine[:3].tolist(), mine[3:].tolist()]
        for part in parts:
            assert part.denominator == data.ended(part.numbers).targets.sum()


def test_text_without_prompts_has_one_prediction_less_per_row_for_ar():
    counted = split_of(0, AR(Recipe())).ended(numpy.arange(5)).targets
    assert counted.tolist() == (LENGTHS[:5] - 1).tolist()
    with_prompts = split_of(1, AR(Recipe()))
    rows = with_prompts.ended(numpy.arange(5))
    assert rows.targets.tolist() == (rows.lengths - 1).tolist()
    for part in micro_batches(split_of(0, AR(Recipe())), run_config(length=96), first=0, last=3):
        assert part.denominator == len(part.inputs.targets)  # one micro-batch per step: exactly what is predicted


@pytest.mark.parametrize("rows", [1, 7, 10, 53])
def test_the_rows_of_an_evaluation_are_the_first_ones_and_at_the_end_spread_over_the_split(rows):
    some = run_config(eval_rows=4, test_rows=10)
    assert evaluated_rows(some, rows, final=False).tolist() == list(range(min(rows, 4)))
    for config, final in ((some, True), (run_config(test_rows=10), False)):
        found = evaluated_rows(config, rows, final=final)
        assert len(found) == len(set(found)) == min(rows, 10) and found[0] == 0 and found[-1] < rows
        assert rows < 20 or (abs(numpy.diff(found, append=rows) - rows / 10) < 1).all()
    assert evaluated_rows(run_config(eval_rows=4), rows, final=True).tolist() == list(range(rows))


@pytest.mark.parametrize("longest", [None, 9])
@pytest.mark.parametrize("kind", ["fill", "block", "one", None])
def test_the_targets_counted_are_the_targets_of_the_batch(kind, longest):
    data = split_of(2 if kind else 0)
    end = kind and ResponseEnd(kind, 1, block_size=3, extra_blocks=2, seed=5, longest=longest)
    data = TrainingSplit(data.rows, data.objective, end, pad_id=0, mask_id=2)
    for epoch in range(3):
        rows = data.ended(numpy.random.default_rng(epoch).permutation(len(LENGTHS))[:10], epoch)
        batch = collate(data.rows, rows.numbers, rows.lengths, pad_id=0, end=end)
        assert rows.targets.tolist() == batch.maskable.sum(-1).tolist()
        assert rows.lengths.tolist() == batch.attention.sum(-1).tolist()


@pytest.mark.parametrize("draw_seed", [None, 7])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 5}, {"micro_batch_tokens": 200}])
def test_an_evaluation_takes_every_row_once_per_draw_on_any_number_of_ranks(changes, draw_seed):
    config = run_config(length=96, eval_draws=2, **changes)
    numbers = numpy.arange(50)
    data, found = split_of(), []
    rows = data.ended(numbers)
    for rank in range(3):
        parts = list(evaluation_micro_batches(data, config, rows, draw_seed=draw_seed, rank=rank, ranks=3))
        found.append([(n, tuple(p.inputs.tokens[i].tolist())) for p in parts for i, n in enumerate(p.numbers)])
    assert sorted(n for part in found for n, _ in part) == sorted([*range(50), *range(50)])
    alone = evaluation_micro_batches(data, run_config(length=96, eval_draws=2, micro_batch_size=1), rows)
    tokens = {(n, tuple(row[:n_tokens])) for p in alone for n, row, n_tokens in
              zip(p.numbers, p.inputs.tokens.tolist(), p.inputs.layout.lengths, strict=True)}  # fmt: skip
    lengths = rows.lengths
    split = {(n, row[: lengths[n]]) for part in found for n, row in part}
    assert (split == tokens) == (draw_seed is None)


def test_the_thread_changes_nothing_and_draws_nothing():
    config = run_config(length=96, micro_batch_tokens=120)
    plain = contents(micro_batches(split_of(), config, first=0, last=12))
    before = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    with Prefetcher(micro_batches(split_of(), config, first=0, last=12)) as parts:
        assert contents(parts) == plain
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == numpy.random.get_state()[1].tolist()


def input_threads():
    return [thread for thread in threading.enumerate() if thread.name == "dllm-input"]


def test_what_goes_wrong_in_the_thread_is_raised_where_the_part_is_asked_for():
    def parts():
        yield from range(3)
        raise ValueError("row 3: damaged; prepare the data again")

    with pytest.raises(ValueError, match="row 3: damaged"), Prefetcher(parts()) as made:
        assert [next(made) for _ in range(3)] == [0, 1, 2]
        next(made)
    with Prefetcher(parts()) as made:
        for _ in range(2):  # nor does asking again wait for ever
            with pytest.raises(ValueError, match="row 3"):
                list(made)
    assert not input_threads()


@pytest.mark.parametrize("fault", [None, KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_its_block_whatever_ends_it(fault):
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    try:
        with Prefetcher(endless(), ahead=3) as parts:
            assert [next(parts), next(parts)] == [0, 1]
            if fault:
                raise fault
    except (KeyboardInterrupt, ValueError) as caught:
        assert type(caught) is fault
    assert not input_threads()
    assert len(made) <= 2 + 3 + 1  # taken, waiting, and one in the hand


def test_an_interrupt_at_any_moment_of_asking_leaves_no_thread_that_waits():
    """Ctrl-C comes between any two instructions: here at each of those that asking for a part takes, one after another.

    In a thread of its own: where the block does not end, the test does.
    """

    def asked(moment: int) -> bool:
        """Whether asking takes so many instructions."""
        left = moment

        def step(frame, event, argument):
            nonlocal left
            frame.f_trace_opcodes = True
            if event == "opcode" and frame.f_code is not tracing.__code__:
                left -= 1
                if not left:
                    raise KeyboardInterrupt
            return step

        def tracing(parts):
            sys.settrace(step)
            try:
                next(parts)
            finally:
                sys.settrace(None)

        try:
            with Prefetcher(itertools.count(), ahead=1) as parts:
                time.sleep(0.001 * (moment % 2))  # there is a part already, or not yet
                tracing(parts)
        except KeyboardInterrupt:
            pass
        return left <= 0

    def all_of_them():
        ended.extend(itertools.takewhile(asked, itertools.count(1)))

    ended: list[int] = []
    thread = threading.Thread(target=all_of_them, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), f"interrupted at instruction {len(ended) + 1}, the block does not end"
    assert len(ended) > 10 and not input_threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned_inputs_reach_the_device_without_waiting():
    with Prefetcher(micro_batches(split_of(), run_config(length=96), first=0, last=2), pin=True) as parts:
        for part in parts:
            assert part.inputs.tokens.is_pinned() and part.inputs.layout.flat.is_pinned()
            moved = part.inputs.to("cuda")
            assert moved.layout.flat.is_cuda and torch.equal(moved.tokens.cpu(), part.inputs.tokens)
