"""Passes of questions and of generated answers."""

import numpy
import pytest

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.planning.passes import generation_passes, question_passes
from dllm.sampling.plan import block_passes


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
