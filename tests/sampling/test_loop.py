"""Rows with settings of their own that come and go: each is what it is alone."""

import random

import pytest
import torch

from dllm.choices import REVEAL_RULES
from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for, infill_canvas
from dllm.sampling.sampler import MaskedSampler, block_sampler
from tests.oracles import tabular_backbone
from tests.stock import stock_backbone


def any_settings(rng, **fixed):
    """Settings that mean something to every row, drawn with some of each."""
    rule = rng.choice(list(REVEAL_RULES))
    drawn = {
        "reveal_rule": rule,
        **({rule: rng.choice([0.2, 0.5, 0.9])} if rule in ("threshold", "factor", "entropy_bound") else {}),
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.3]),
        "top_p": rng.choice([1.0, 0.8]),
        "steps": rng.choice([None, None, 6]),
        "block_size": rng.choice([3, 4, 16]),
        "seed": rng.randrange(5),
        "early_stop": rng.random() < 0.5,
        "ahead": rng.choice(["visible", "hidden"]),
        "guidance": rng.choice([0.0, 0.0, 0.0, 1.5]),
    }
    drawn |= rng.choice([{}, {}, {}, {"remask": "rescale", "remask_share": 0.4}, {"edit_threshold": 0.4}])
    if not drawn["guidance"]:
        drawn |= {"reuse": rng.choice(["none", "none", "prefix", "dual"])}
        drawn |= {"refresh": rng.choice([None, 1, 2])} if drawn["reuse"] != "none" else {}
    return GenerateSettings(**drawn | fixed)


def canvas_of(backbone, rng, text_tokens, shortest=1):
    """A canvas of one to three rows: prompts to be continued, or a row with holes.

    A prompt has a token at least where a model has rotary positions: it sees a row of masks only as equal everywhere,
    so that the rounding of a batch decides which of them is the surest.
    """
    ids = {"mask_id": backbone.mask_id, "pad_id": backbone.pad_id}

    def words(count):
        return [rng.choice(text_tokens) for _ in range(count)]

    if rng.random() < 0.2:
        return infill_canvas([[*words(2), backbone.mask_id, *words(1), backbone.mask_id, backbone.mask_id]], **ids)
    prompts = [words(rng.randint(shortest, 5)) for _ in range(rng.randint(1, 3))]
    return canvas_for(prompts, [rng.randint(1, 12) for _ in prompts], **ids)


def alone(sampler, backbone, canvas, settings, ended):
    """What each row of a canvas becomes without company."""
    for row in range(len(canvas.tokens)):
        (found,) = sampler.complete(backbone, canvas.taken(torch.tensor([row]), "cpu"), settings, ended=ended)
        yield found.tokens, found.passes, found.computed


def mixed(sampler, backbone, rng, requests, drop=()):
    """The rows of requests (canvas, settings, ended) that come at random times; those in `drop` go again."""
    loop = sampler.loop(backbone, 5, 120)
    waiting, numbers, found = list(enumerate(requests)), {}, {}
    while waiting or loop.busy:
        while waiting and (not loop.busy or rng.random() < 0.4):
            request, (canvas, settings, ended) = waiting.pop(0)
            numbers |= {number: (request, row) for row, number in enumerate(loop.add(canvas, settings, ended))}
        rows, done = loop.step()
        assert loop.running <= 5 and (rows is None or len(rows))
        for completion in done:
            assert numbers[completion.number] not in found, "a row is done once"
            found[numbers[completion.number]] = (completion.tokens, completion.passes, completion.computed)
        for number, (request, row) in numbers.items():
            if request in drop and (request, row) not in found and rng.random() < 0.2:
                loop.drop([number])
    return found


def ends_at_two(row):
    return 2 in row.response[: row.known]


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_any_settings_that_join_at_any_time_are_those_alone(seed):
    rng, backbone, sampler = random.Random(seed), tabular_backbone(seed=3), MaskedSampler()
    requests = []
    for _ in range(14):
        settings = any_settings(rng)
        requests.append((canvas_of(backbone, rng, range(4), shortest=0), settings, rng.choice([None, ends_at_two])))
    drop = set(rng.sample(range(14), 3))
    found = mixed(sampler, backbone, rng, requests, drop)
    for number, request in enumerate(requests):
        for row, expected in enumerate(alone(sampler, backbone, *request)):
            assert (
                found[number, row] == expected if number not in drop else found.get((number, row), expected) == expected
            )


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_rows_of_a_stock_model_with_any_settings_are_those_alone(kind, tmp_path):
    rng, backbone, sampler = random.Random(kind), stock_backbone(tmp_path, kind), MaskedSampler()
    requests = [(canvas_of(backbone, rng, range(6, 16)), any_settings(rng), None) for _ in range(8)]
    found = mixed(sampler, backbone, rng, requests)
    for number, request in enumerate(requests):
        for row, expected in enumerate(alone(sampler, backbone, *request)):
            assert found[number, row] == expected


def test_rows_of_a_model_of_blocks_with_any_settings_are_those_alone(tmp_path):
    rng, backbone, sampler = random.Random(0), stock_backbone(tmp_path, "llama"), block_sampler()
    requests = [
        (canvas_of(backbone, rng, range(6, 16)), any_settings(rng, reuse="none", refresh=None, ahead="auto"), None)
        for _ in range(8)
    ]
    found = mixed(sampler, backbone, rng, requests)
    for number, request in enumerate(requests):
        for row, expected in enumerate(alone(sampler, backbone, *request)):
            assert found[number, row] == expected


def one_row(backbone, tokens):
    return canvas_for([[1]], tokens, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def finished_in_order(loop):
    order = []
    while loop.busy:
        order += [completion.number for completion in loop.step()[1]]
    return order


def test_short_rows_that_come_later_are_done_before_a_long_one():
    backbone = tabular_backbone()
    options = GenerateSettings(early_stop=False)
    loop = MaskedSampler().loop(backbone, 2, 1000)
    (long,) = loop.add(one_row(backbone, 30), options)
    loop.step()
    short = [number for _ in range(4) for number in loop.add(one_row(backbone, 3), options)]
    assert finished_in_order(loop) == [*short, long]


def test_who_adds_many_rows_and_who_adds_one_are_served_in_turn():
    backbone = tabular_backbone()
    options = GenerateSettings(early_stop=False)
    loop = MaskedSampler().loop(backbone, 1, 1000)
    canvas = canvas_for([[1]] * 6, 2, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    many = list(loop.add(canvas, options))
    loop.step()
    (first,) = loop.add(one_row(backbone, 2), options)
    (second,) = loop.add(one_row(backbone, 2), options)
    assert finished_in_order(loop) == [many[0], many[1], first, second, *many[2:]]


def test_a_row_too_long_for_the_room_that_is_left_is_not_passed_over():
    backbone = tabular_backbone()
    options = GenerateSettings(early_stop=False)
    loop = MaskedSampler().loop(backbone, 8, 20)
    (running,) = loop.add(one_row(backbone, 9), options)
    loop.step()
    (long,) = loop.add(one_row(backbone, 15), options)
    (short,) = loop.add(one_row(backbone, 2), options)
    assert finished_in_order(loop) == [running, short, long]  # short and long ran together, long began first


def test_a_row_that_is_dropped_makes_room_at_once():
    backbone = tabular_backbone()
    options = GenerateSettings(early_stop=False)
    loop = MaskedSampler().loop(backbone, 1, 1000)
    (dropped,) = loop.add(one_row(backbone, 20), options)
    (waiting,) = loop.add(one_row(backbone, 20), options)
    (other,) = loop.add(one_row(backbone, 2), options)
    loop.step()
    loop.drop([dropped, waiting])
    assert (loop.running, loop.waiting) == (0, {other})
    assert finished_in_order(loop) == [other] and not loop.busy
