"""Policy gradients against what they are by definition, on a denoiser whose every canvas has parameters of its own."""

import dataclasses

import pytest
import torch

from dllm.config import GenerateSettings, Recipe
from dllm.core.canvas import canvas_for
from dllm.core.policy import group_advantages, token_shares, weighed_advantages
from dllm.objectives.grpo import GRPO, SampledNLL
from dllm.objectives.grpo import log_likelihoods as of_module
from dllm.sampling.recorded import answer_ends, recorded
from dllm.sampling.sampler import MaskedSampler
from tests.oracles import enumerated_nelbo
from tests.policies import EOS, MASK, PAD, answers_of, inputs_of, policy_settings, table_backbone, trajectories

PROMPT = [0]
LIKELIHOODS = ("sampled", "bound", "d1")


def gradient(backbone, settings, inputs, denominator: float = 1.0):
    """The gradient of the surrogate with respect to the table."""
    backbone.model.table.grad = None
    GRPO(Recipe(), settings).loss(SampledNLL(backbone), inputs, denominator=denominator).loss.backward()
    return backbone.model.table.grad.clone()


def log_likelihoods(backbone, settings, inputs):
    return of_module(SampledNLL(backbone), inputs)


@pytest.mark.parametrize(("temperature", "steps"), [(1.0, 3), (0.7, 2)])
def test_sampled_is_the_probability_of_every_trajectory_of_the_sampler(temperature, steps):
    backbone = table_backbone()
    generation = {"steps": steps, "temperature": temperature}
    settings = policy_settings(generation=policy_settings().generation.model_copy(update=generation))
    per_pass = {3: 1, 2: 2}[steps]
    # with two passes, the first reveals two tokens
    every = list(trajectories(backbone, PROMPT, 3, temperature, per_pass))
    answers = answers_of(PROMPT, [tokens for tokens, _, _ in every], [drawn for _, drawn, _ in every])
    values = log_likelihoods(backbone, settings, inputs_of(answers, settings)).view(len(every), 3)
    p = torch.tensor([chance for _, _, chance in every], dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1.0)
    # fp32 logits of size 1
    assert torch.allclose(values.sum(-1).double().exp(), p, atol=1e-6)


def test_what_is_recorded_of_the_sampler_is_drawn_as_often_as_it_is_probable():
    backbone, draws = table_backbone(), 150
    settings = policy_settings().generation
    every = {(*t, *d): p for t, d, p in trajectories(backbone, PROMPT, 3, 1.0)}
    counts = dict.fromkeys(every, 0)
    canvas = canvas_for([PROMPT], 3, mask_id=MASK, pad_id=PAD)
    for seed in range(draws):
        drawn = recorded(MaskedSampler(), backbone, canvas, settings, [seed])
        counts[(*drawn.tokens[0, 1:].tolist(), *drawn.drawn[0, 1:].tolist())] += 1
    for key, p in every.items():
        # four standard errors of a share, over eight of them
        assert abs(counts[key] / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5


def test_rows_with_seeds_of_their_own_are_drawn_together_as_alone():
    backbone, settings = table_backbone(), policy_settings().generation
    prompts, seeds = [[0], [1], [0], [1]], [5, 5, 9, 9]
    ids = {"mask_id": MASK, "pad_id": PAD}
    together = recorded(MaskedSampler(), backbone, canvas_for(prompts, 3, **ids), settings, seeds)
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = recorded(MaskedSampler(), backbone, canvas_for([prompt], 3, **ids), settings, [seed])
        for name, part in vars(alone).items():
            assert torch.equal(part[0], vars(together)[name][number])
        (done,) = MaskedSampler().complete(
            backbone, canvas_for([prompt], 3, **ids), settings.model_copy(update={"seed": seed})
        )
        assert done.tokens == alone.tokens[0, 1:].tolist()


def test_bound_is_on_average_the_bound_of_the_answer_per_token():
    backbone, draws = table_backbone(), 400
    settings = policy_settings(likelihood="bound", passes=8)
    answers = answers_of(PROMPT, [[1, 0, 1]] * draws)
    answers = dataclasses.replace(answers, groups=torch.arange(draws))
    nats = -3 * log_likelihoods(backbone, settings, inputs_of(answers, settings)).detach()
    expected = enumerated_nelbo(backbone, PROMPT, [1, 0, 1])
    assert abs(nats.mean().item() - expected) < 4 * nats.std().item() / draws**0.5
    assert nats.std() > 0


def test_d1_masks_the_whole_answer_and_some_of_the_prompt():
    settings = policy_settings(likelihood="d1", passes=2000, p_mask_prompt=0.25)
    inputs = inputs_of(answers_of([0, 1], [[1, 0]]), settings)
    assert (inputs.tokens[:, 2:] == MASK).all()
    share = (inputs.tokens[:, :2] == MASK).float().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_an_answer_of_one_token_gives_the_analytic_policy_gradient(likelihood):
    backbone = table_backbone(length=2)
    settings = policy_settings(likelihood=likelihood, p_mask_prompt=0.0)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    responses = [[1], [0], [0], [1]]
    advantages = group_advantages(rewards, 1, "none")
    given = gradient(backbone, settings, inputs_of(answers_of(PROMPT, responses), settings, advantages.tolist()), 4.0)
    logits = (
        backbone.model.logits_of(torch.tensor([[0, MASK]]))
        .detach()[0, 1]
        .masked_fill(torch.arange(PAD + 1) == MASK, -torch.inf)
    )
    p = logits.softmax(-1)
    expected = torch.zeros_like(p)
    for (token,), advantage in zip(responses, advantages, strict=True):
        expected -= advantage / 4 * (torch.nn.functional.one_hot(torch.tensor(token), PAD + 1) - p)
    rows = given.flatten(0, 1)
    assert torch.allclose(rows[rows.abs().sum(-1) > 0], expected[None], atol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_with_a_ratio_of_one_the_surrogate_has_the_gradient_of_reinforce(likelihood):
    backbone = table_backbone()
    settings = policy_settings(likelihood=likelihood)
    advantages = [0.5, -0.25, 1.5]
    answers = answers_of(PROMPT, [[0, 1, 1], [1, 1, 0], [0, 0, 0]], [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
    inputs = inputs_of(answers, settings, advantages)
    given = gradient(backbone, settings, inputs)
    backbone.model.table.grad = None
    values = log_likelihoods(backbone, settings, inputs)
    (-(values.view(3, -1).mean(-1) * torch.tensor(advantages)).sum()).backward()
    assert torch.allclose(given, backbone.model.table.grad, atol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_without_advantage_there_is_no_gradient(likelihood):
    backbone = table_backbone()
    settings = policy_settings(likelihood=likelihood)
    inputs = inputs_of(answers_of(PROMPT, [[0, 1, 1], [1, 1, 0]]), settings, [0.0, 0.0])
    assert not gradient(backbone, settings, inputs).any()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_equal_weights_give_a_ratio_of_exactly_one(likelihood):
    backbone = table_backbone()
    settings = policy_settings(likelihood=likelihood, beta=0.5)
    inputs = inputs_of(answers_of(PROMPT, [[0, 1, 1], [1, 1, 0]]), settings, [1.0, -2.0])
    old = log_likelihoods(backbone, settings, inputs).detach()
    inputs = dataclasses.replace(inputs, old=old, reference=old)
    terms = GRPO(Recipe(), settings).loss(SampledNLL(backbone), inputs, denominator=2.0)
    assert terms.loss.item() == -(1.0 - 2.0) / 2 and terms.sums["clipped"] == 0 and terms.sums["kl"] == 0


def test_a_ratio_beyond_the_clip_has_no_gradient_where_it_would_grow_and_one_where_it_would_shrink():
    backbone, settings = table_backbone(length=2), policy_settings(epsilon=0.2)
    for advantage, moves in ((1.0, False), (-1.0, True)):
        inputs = inputs_of(answers_of(PROMPT, [[1]]), settings, [advantage])
        old = log_likelihoods(backbone, settings, inputs).detach() - 1.0
        inputs = dataclasses.replace(inputs, old=old)
        assert bool(gradient(backbone, settings, inputs).any()) is moves


def test_the_divergence_from_the_start_pulls_back_to_it():
    backbone, start = table_backbone(length=2, seed=0), table_backbone(length=2, seed=1)
    settings = policy_settings(beta=1.0)
    both = answers_of(PROMPT, [[0], [1]])
    optimizer = torch.optim.SGD([backbone.model.table], lr=1.0)
    with torch.no_grad():
        wanted = log_likelihoods(start, settings, inputs_of(both, settings)).exp()
    for _ in range(100):
        with torch.no_grad():
            p = log_likelihoods(backbone, settings, inputs_of(both, settings)).exp()
        inputs = inputs_of(both, settings, [0.0, 0.0])
        # the mean over answers, as often as they are drawn
        inputs = dataclasses.replace(inputs, reference=wanted.log(), share=p)
        optimizer.zero_grad()
        GRPO(Recipe(), settings).loss(SampledNLL(backbone), inputs, denominator=1.0).loss.backward()
        optimizer.step()
    assert torch.allclose(p, wanted, atol=1e-3)


def test_the_masks_of_the_bound_are_those_of_the_whole_group_and_change_with_the_iteration():
    settings = policy_settings(likelihood="bound", passes=9)
    answers = answers_of(PROMPT, [[0, 1, 1], [1, 1, 0]])
    first, again, later = (inputs_of(answers, settings, iteration=i) for i in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    masked = (first.tokens == MASK).view(2, -1, first.tokens.shape[1])
    assert torch.equal(masked[0], masked[1])
    assert first.tokens.shape != later.tokens.shape or not torch.equal(first.tokens, later.tokens)


def test_advantages_leave_out_what_has_no_reward():
    rewards = torch.tensor([1.0, float("nan"), 0.0, 2.0, 2.0, 2.0])
    assert group_advantages(rewards, 2, "none").tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]
    assert group_advantages(rewards, 2, "group").tolist() == pytest.approx([0.70701, 0, -0.70701, 0, 0, 0], abs=1e-4)


def test_every_kind_of_loss_weighs_tokens_as_it_says():
    tokens = torch.tensor([1, 4])
    kinds = (("grpo", [1, 0.25], 2), ("dapo", [1, 1], 5), ("dr_grpo", [0.1, 0.1], 2), ("wd1", [1, 1], 2))
    for kind, shares, denominator in kinds:
        given, divisor = token_shares(tokens, kind, 10)
        assert given.tolist() == pytest.approx(shares) and divisor == denominator


def test_weights_of_wd1_add_up_to_nothing_and_leave_out_what_has_no_reward():
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 0.0])
    known = torch.tensor([True, False, True, True, True, True])
    # of two answers that are 1 and -1: softmax is 1 / (1 + exp(-2)), and the two of a sign differ by tanh 1
    assert weighed_advantages(advantages, known, 2).tolist() == pytest.approx([3 * 0.761594, 0, -3 * 0.761594, 0, 0, 0])
    assert weighed_advantages(advantages, ~known, 2)[:3].tolist() == [0.0, 0.0, 0.0]


def test_wd1_has_the_analytic_gradient_of_its_two_terms_whatever_the_old_weights():
    backbone, settings = table_backbone(length=2), policy_settings(loss_type="wd1")
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0]), 1, "none")
    weights = weighed_advantages(advantages, torch.ones(3, dtype=torch.bool), 1)
    inputs = inputs_of(answers_of(PROMPT, [[1], [0], [0]]), settings, weights.tolist())
    given = gradient(backbone, settings, dataclasses.replace(inputs, old=torch.full((3,), -9.0)), 3.0)
    logits = backbone.model.logits_of(torch.tensor([[0, MASK]])).detach()[0, 1]
    p = logits.masked_fill(torch.arange(PAD + 1) == MASK, -torch.inf).softmax(-1)
    up, down = advantages.softmax(0), (-advantages).softmax(0)
    expected = torch.zeros_like(p)
    for token, more, less in zip((1, 0, 0), up, down, strict=True):
        expected -= (more - less) * (torch.nn.functional.one_hot(torch.tensor(token), PAD + 1) - p)
    rows = given.flatten(0, 1)
    assert torch.allclose(rows[rows.abs().sum(-1) > 0], expected[None], atol=1e-6)


def test_an_answer_counts_up_to_the_end_of_the_block_in_which_it_ends():
    rows = torch.tensor([[0, 1, 1, EOS, EOS, EOS, EOS], [0, 1, 1, 1, EOS, EOS, EOS], [0, 0, 1, 1, 1, 1, 1]])
    ends = answer_ends(rows, torch.tensor([1, 1, 2]), torch.tensor([7, 7, 7]), eos_id=EOS, block_size=3)
    assert ends.tolist() == [4, 7, 7]


def test_a_pass_saw_no_further_than_the_end_of_its_block():
    backbone = table_backbone(length=5, sidecar={"response_end": "block"})
    settings = GenerateSettings(max_new_tokens=4, block_size=2, temperature=1.0, early_stop=False)
    drawn = recorded(MaskedSampler(), backbone, canvas_for([PROMPT], 4, mask_id=MASK, pad_id=PAD), settings, [0])
    assert drawn.visible[0, 1:].tolist() == [3, 3, 5, 5] and sorted(drawn.drawn[0, 1:].tolist()) == [0, 1, 2, 3]


def test_in_blocks_sampled_is_still_the_probability_of_what_was_drawn():
    backbone = table_backbone(length=5, sidecar={"response_end": "block"})
    generation = GenerateSettings(
        max_new_tokens=4, block_size=2, temperature=1.0, early_stop=False, reveal_rule="entropy"
    )
    settings = policy_settings(generation=generation)
    drawn = recorded(MaskedSampler(), backbone, canvas_for([PROMPT], 4, mask_id=MASK, pad_id=PAD), generation, [0])
    response, passes = drawn.tokens[:, 1:].tolist(), drawn.drawn[:, 1:].tolist()
    answers = dataclasses.replace(answers_of(PROMPT, response, passes), visible=drawn.visible)
    values = log_likelihoods(backbone, settings, inputs_of(answers, settings))
    canvas, expected = [0, *[MASK] * 4], 0.0
    for number in range(4):
        place = 1 + passes[0].index(number)
        seen = torch.tensor([canvas[: 3 if place < 3 else 5]])
        logits = backbone.model.logits_of(seen)[0, place].detach()
        logits[MASK] = -torch.inf
        canvas[place] = response[0][place - 1]
        expected += logits.log_softmax(-1)[canvas[place]].item()
    assert values.sum().item() == pytest.approx(expected, abs=1e-5)
