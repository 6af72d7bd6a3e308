"""Passes of questions and of generated answers."""

import numpy
import pytest
from dllm.core.likelihood import estimator_for, likelihood_design

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.planning.passes import estimator, generation_passes, likelihood_passes, question_passes
from dllm.sampling.plan import block_passes

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 30, 48)


def forwarded(length: int, settings: LikelihoodSettings, keys: int = 8) -> float:
    """Mean number of different inputs of a design; a pass without a scored position is not made."""
    designs = [likelihood_design(length, key, settings) for key in range(keys)]
    return sum(len(d.masked[d.scored.any(-1)].unique(dim=0)) for d in designs) / keys


@pytest.mark.parametrize("budget", [3, 8, 16, 64, 200])
def test_the_policy_is_that_of_the_designs(budget):
    settings = LikelihoodSettings(budget=budget)
    assert [estimator(n, settings) for n in range(1, 200)] == [estimator_for(n, settings) for n in range(1, 200)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("budget", [16, 64])
def test_auto_takes_the_passes_of_its_design(length, budget):
    settings = LikelihoodSettings(budget=budget)
    exact = estimator(length, settings) in ("exact", "enumerate")
    # masks drawn at random coincide by chance: exact where none are drawn, within a sixth otherwise
    assert likelihood_passes(length, settings) == pytest.approx(
        forwarded(length, settings), rel=1e-9 if exact else 0.17
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["chain", "cover", "lattice", "mc"])
def test_every_estimator_takes_the_passes_of_its_design(length, name):
    settings = LikelihoodSettings(estimator=name, budget=100)
    assert likelihood_passes(length, settings) == pytest.approx(forwarded(length, settings), rel=0.17)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("budget", [9, 24, 100])
@pytest.mark.parametrize("context", [0, 30])
def test_two_levels_take_the_tokens_of_their_design(length, budget, context):
    settings, keys = LikelihoodSettings(estimator="multilevel", budget=budget), 12
    tokens = 0
    for key in range(keys):
        design = likelihood_design(length, key, settings)
        exact, cheap = (design.masked[which].unique(dim=0) for which in (~design.partial, design.partial))
        tokens += (len(exact) + (len(cheap) > 0)) * (context + length) + cheap.sum().item()
    expected = tokens / keys / (context + length)
    assert likelihood_passes(length, settings, context) == pytest.approx(expected, rel=0.17)
    with_effort = settings.model_copy(update={"effort": 1.0, "budget": 9})
    least = likelihood_passes(length, with_effort.model_copy(update={"effort": None, "budget": 5}), context)
    assert least <= likelihood_passes(length, with_effort, context) < 1.2 * least + 9


def test_answers_of_one_prompt_share_the_input_with_everything_masked():
    settings = LikelihoodSettings()
    assert question_passes(4, 1, True, settings) == 1
    assert question_passes(4, 1, False, settings) == 4
    assert question_passes(4, 3, True, settings) == 4 * 7 - 3


@pytest.mark.parametrize("steps", [None, 2, 5, 7, 40])
@pytest.mark.parametrize(("new", "block"), [(32, 16), (20, 16), (7, 32)])
def test_an_answer_takes_the_passes_that_the_sampler_lays_out(new, block, steps):
    settings = GenerateSettings(max_new_tokens=new, block_size=block, steps=steps)
    masks = numpy.array([[min(block, new - start) for start in range(0, new, block)]])
    laid_out = int(block_passes(masks, steps).sum())
    assert generation_passes(settings) == laid_out
    assert generation_passes(settings.model_copy(update={"guidance": 1.0})) == 2 * laid_out
