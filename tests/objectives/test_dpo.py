"""Preferences against what they are by definition, on a denoiser whose every canvas has parameters of its own."""

import dataclasses
import math

import pytest
import torch

from dllm.config import PreferenceSettings, Recipe
from dllm.core.policy import preference_margins
from dllm.likelihood.answers import bound, policy_inputs
from dllm.objectives.dpo import DPO
from dllm.objectives.grpo import SampledNLL, log_likelihoods
from tests.oracles import enumerated_nelbo
from tests.policies import MASK, PAD, answers_of, table_backbone

PROMPT = [0]


def inputs_of(responses, settings, *, draws: int = 1, epoch: int = 0):
    """A pair of answers to a prompt, as often as there are draws of its masks."""
    answers = dataclasses.replace(
        answers_of(PROMPT, responses * draws), groups=torch.arange(draws).repeat_interleave(2)
    )
    return policy_inputs(
        answers,
        bound(answers, epoch, settings),
        advantages=torch.tensor([1.0, -1.0]).repeat(draws),
        shares=torch.ones(2 * draws),
        mask_id=MASK,
        temperature=1.0,
    )


def values(backbone, inputs):
    with torch.no_grad():
        return log_likelihoods(SampledNLL(backbone), inputs)


def compared(inputs, start):
    return dataclasses.replace(inputs, reference=values(start, inputs))


def terms(backbone, inputs, settings, denominator=1.0):
    return DPO(Recipe(), settings).loss(SampledNLL(backbone), inputs, denominator=denominator)


def test_equal_weights_have_no_margin_and_lose_the_logarithm_of_two():
    settings = PreferenceSettings(beta=0.7)
    inputs = compared(inputs_of([[0, 1, 1], [1, 0, 1]], settings), table_backbone())
    found = terms(table_backbone(), inputs, settings)
    assert found.sums["reward_margin"] == 0 and found.sums["accuracy"] == 0.5 and found.masked == 1
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_answers_of_one_token_give_the_analytic_gradient():
    backbone, start = table_backbone(length=2, seed=0), table_backbone(length=2, seed=1)
    settings = PreferenceSettings(beta=0.7)
    inputs = compared(inputs_of([[1], [0]], settings), start)
    terms(backbone, inputs, settings).loss.backward()

    def log_p(model):
        logits = model.model.logits_of(torch.tensor([[0, MASK]])).detach()[0, 1]
        return logits.masked_fill(torch.arange(PAD + 1) == MASK, -torch.inf).log_softmax(-1)

    ours, theirs = log_p(backbone), log_p(start)
    margin = ours[1] - theirs[1] - (ours[0] - theirs[0])
    wrong = torch.sigmoid(-0.7 * margin)
    # the normalisations of the two answers cancel: what is left are their logits
    expected = torch.zeros(PAD + 1)
    expected[1], expected[0] = -0.7 * wrong, 0.7 * wrong
    rows = backbone.model.table.grad.flatten(0, 1)
    assert torch.allclose(rows[rows.abs().sum(-1) > 0], expected[None], atol=1e-6)


def test_the_gradient_is_that_of_the_two_bounds_weighed_by_how_wrong_the_pair_is():
    backbone, start = table_backbone(seed=0), table_backbone(seed=1)
    settings = PreferenceSettings(beta=0.3)
    inputs = compared(inputs_of([[0, 1, 1], [1, 0, 0]], settings), start)
    terms(backbone, inputs, settings).loss.backward()
    given, backbone.model.table.grad = backbone.model.table.grad.clone(), None
    wrong = torch.sigmoid(-0.3 * preference_margins(values(backbone, inputs), inputs))
    chosen, rejected = 3 * log_likelihoods(SampledNLL(backbone), inputs)  # per token, of three
    (-0.3 * wrong * (chosen - rejected)).sum().backward()
    assert torch.allclose(given, backbone.model.table.grad, atol=1e-6)


def test_margins_are_on_average_those_of_the_bounds_over_all_masks():
    backbone, start, draws = table_backbone(seed=0), table_backbone(seed=1), 400
    chosen, rejected, settings = [0, 1, 1], [1, 0, 1], PreferenceSettings()
    inputs = compared(inputs_of([chosen, rejected], settings, draws=draws), start)
    margins = preference_margins(values(backbone, inputs), inputs)
    exact = [[-enumerated_nelbo(model, PROMPT, y) for y in (chosen, rejected)] for model in (backbone, start)]
    expected = exact[0][0] - exact[1][0] - (exact[0][1] - exact[1][1])
    assert abs(margins.mean().item() - expected) < 4 * margins.std().item() / draws**0.5
    assert margins.std() > 0


def test_masks_that_model_and_start_share_take_most_of_the_noise_out_of_the_margin():
    start, backbone, settings, draws = table_backbone(length=6), table_backbone(length=6), PreferenceSettings(), 200
    with torch.no_grad():  # a few steps away from the start
        table = backbone.model.table
        table += 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
    inputs, others = (
        inputs_of([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0]], settings, draws=draws, epoch=epoch) for epoch in (0, 1)
    )
    shared = compared(inputs, start)
    apart = dataclasses.replace(inputs, reference=values(start, others))
    new = values(backbone, inputs)
    deviations = [preference_margins(new, given).std().item() for given in (shared, apart)]
    assert deviations[0] < 0.25 * deviations[1]
