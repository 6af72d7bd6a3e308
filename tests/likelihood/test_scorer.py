"""Scoring targets with a masked model."""

from dataclasses import replace

import pytest
import torch

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import canvas_for
from dllm.core.noise import keyed_uniform
from dllm.likelihood import requests, scorer
from dllm.likelihood.scorer import MaskedScorer
from dllm.sampling.sampler import MaskedSampler
from tests.oracles import enumerated_nelbo, markov_backbone, tabular_backbone

nelbo, greedy_match = MaskedScorer().nelbo, MaskedScorer().greedy_match
ESTIMATORS = ["enumerate", "lattice", "mc"]
PROMPTS = [[0, 1], [0, 1], [], [3, 2, 1, 0, 3], [0, 1], [2]]
TARGETS = [[1, 2, 3], [1, 2, 0], [0, 3, 3, 1, 2, 2], [1], [2, 2], [0, 1, 2, 3, 0, 1, 2, 3]]


@pytest.mark.parametrize("options", [{}, {"budget": 10_000}, {"estimator": "enumerate"}])
def test_short_targets_are_scored_exactly(options):
    backbone = tabular_backbone(seed=1)
    scores = nelbo(backbone, PROMPTS[:2] + PROMPTS[3:5], TARGETS[:2] + TARGETS[3:5], LikelihoodSettings(**options))
    for prompt, target, score in zip(PROMPTS[:2] + PROMPTS[3:5], TARGETS[:2] + TARGETS[3:5], scores, strict=True):
        assert score.nats == pytest.approx(enumerated_nelbo(backbone, prompt, target), abs=1e-4)  # fp32 logits
        assert score.standard_error == 0


@pytest.mark.parametrize("estimator", ["lattice", "mc"])
def test_scores_over_seeds_average_to_the_bound(estimator):
    backbone, prompt, target = tabular_backbone(seed=1), [0, 1], [1, 2, 3, 0, 2]
    # as many draws in a batch as tokens: the published rounding has no halves to round to even
    options = {"estimator": estimator, "budget": 9, "mc_draws": 5, "mc_batch": 5}
    nats = torch.tensor(
        [nelbo(backbone, [prompt], [target], LikelihoodSettings(seed=s, **options))[0].nats for s in range(300)]
    )
    assert abs(nats.mean() - enumerated_nelbo(backbone, prompt, target)) < 4 * nats.std() / 300**0.5


def test_an_ideal_denoiser_is_scored_without_noise_as_log_p():
    backbone = markov_backbone()
    prompts, targets = [[0, 1], [], [2]], [[2, 1, 0, 0, 1, 2, 2], [0, 2, 1, 1], [1, 1, 0, 2, 2, 0, 1, 0, 2]]
    scores = nelbo(backbone, prompts, targets, LikelihoodSettings(estimator="enumerate"))
    for prompt, target, score in zip(prompts, targets, scores, strict=True):
        log_p = backbone.model.log_probability(prompt + target) - backbone.model.log_probability(prompt)
        assert -score.nats == pytest.approx(log_p, abs=1e-5)  # fp32 log-softmax
        assert score.standard_error < 1e-5


def test_every_estimator_bounds_an_ideal_denoiser_by_log_p_on_average():
    backbone, target = markov_backbone(), [0, 2, 1, 1, 0, 2]
    for estimator in ESTIMATORS:
        options = LikelihoodSettings(estimator=estimator, mc_draws=960, mc_batch=96, budget=400)
        score = nelbo(backbone, [[]], [target], options)[0]
        assert abs(-score.nats - backbone.model.log_probability(target)) < 4 * score.standard_error + 1e-5


def test_four_choices_of_one_token_take_one_forward_row():
    backbone = tabular_backbone()
    scores = nelbo(backbone, [[1, 2]] * 4, [[0], [1], [2], [3]], LikelihoodSettings())
    assert backbone.model.forwarded == 1 and [s.passes for s in scores] == [1, 0, 0, 0]
    # the choices are the whole text vocabulary; the rest of the probability is on EOS and padding
    assert sum(torch.tensor(-s.nats).exp().item() for s in scores) < 1


def test_choices_of_equal_length_share_the_row_with_everything_masked():
    backbone = tabular_backbone()
    first, second = nelbo(backbone, [[1]] * 2, [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]], LikelihoodSettings(budget=11))
    assert 9 <= first.passes <= 11 and second.passes == first.passes - 1
    assert backbone.model.forwarded == first.passes + second.passes


def test_published_draws_of_a_single_token_take_one_forward_row():
    backbone = tabular_backbone()
    score = nelbo(backbone, [[1]], [[0]], LikelihoodSettings(estimator="mc"))[0]
    assert score.passes == backbone.model.forwarded == 1
    assert score.nats == pytest.approx(enumerated_nelbo(backbone, [1], [0]), abs=1e-5)


@pytest.mark.parametrize("estimator", ["auto", *ESTIMATORS])
def test_a_score_depends_neither_on_the_batch_nor_on_other_requests(estimator, monkeypatch):
    backbone, options = tabular_backbone(seed=4), LikelihoodSettings(estimator=estimator, mc_draws=32, budget=20)
    together = nelbo(backbone, PROMPTS, TARGETS, options)
    assert sum(s.passes for s in together) == backbone.model.forwarded
    monkeypatch.setattr(requests, "CHUNK_ROWS", 3)
    monkeypatch.setattr(scorer, "HEAD_LOGITS", 14)
    for batch_tokens in (1, 17, 100):
        scores = nelbo(backbone, PROMPTS, TARGETS, options.model_copy(update={"batch_tokens": batch_tokens}))
        assert scores == together
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        alone = nelbo(backbone, [prompt], [target], options)[0]
        assert (alone.nats, alone.standard_error) == (together[row].nats, together[row].standard_error)


def test_choices_of_a_question_share_their_noise_even_if_their_lengths_differ():
    """Choices that differ in their last words: scored with the same key, their difference varies less."""
    backbone, first = tabular_backbone(seed=4), [0, 3, 3, 1, 2, 2, 0]
    backbone.model.logits_of = smooth_model(backbone)
    pairs = {"equal": [*first[:-1], 1], "shorter": first[:-1]}
    settings = [LikelihoodSettings(budget=13, seed=seed) for seed in range(150)]
    nats = {name: [] for name in ("first", "equal", "shorter")}
    for setting in settings:
        found = nelbo(backbone, [[1]] * 3, [first, *pairs.values()], setting)
        for name, score in zip(nats, found, strict=True):
            nats[name].append(score.nats)
    nats = {name: torch.tensor(values) for name, values in nats.items()}
    shares = {"equal": 0.3, "shorter": 0.8}
    for name, share in shares.items():
        together = (nats["first"] - nats[name]).var()
        apart = (nats["first"] - nats[name].roll(1)).var()  # the other choice at another key
        assert together < share * apart


def smooth_model(backbone):
    """Logits that a revealed token changes by an amount of its own: similar targets have similar nll."""

    def hidden(tokens, attention=None):
        backbone.model.forwarded += len(tokens)
        position, kinds = torch.arange(tokens.shape[1]), torch.arange(backbone.vocab_size)
        effect = keyed_uniform(9, position[:, None, None], position[:, None], kinds) - 0.5  # of j on i, per token
        seen = ((tokens != backbone.mask_id) & (attention if attention is not None else True)).float()
        mixed = seen[:, :, None] * keyed_uniform(8, tokens)[:, :, None]
        return torch.tanh(torch.einsum("bjk,ijv->biv", mixed, effect)) * 6

    return hidden


@pytest.mark.parametrize("estimator", ["auto", "lattice", "mc"])
def test_a_score_in_blocks_is_the_sum_of_the_scores_of_its_blocks(estimator):
    backbone = tabular_backbone(seed=4)
    plain = LikelihoodSettings(estimator=estimator, budget=9, mc_draws=32)
    blocks = plain.model_copy(update={"block_size": 3})
    prompts, targets = [[0, 1], [0, 1], [2]], [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0], [1]]
    for score, prompt, target in zip(nelbo(backbone, prompts, targets, blocks), prompts, targets, strict=True):
        parts = [(prompt + target[:low], target[low : low + 3]) for low in range(0, len(target), 3)]
        exact = sum(enumerated_nelbo(backbone, *part) for part in parts)
        assert abs(score.nats - exact) <= 4 * score.standard_error + 1e-4
        assert (score.standard_error == 0) == (estimator == "auto" or len(target) == 1)


def test_blocks_of_one_token_are_the_chain_rule_from_left_to_right():
    backbone, target = markov_backbone(), [0, 2, 1, 1, 0, 2]
    score = nelbo(backbone, [[1]], [target], LikelihoodSettings(block_size=1))[0]
    log_p = backbone.model.log_probability([1, *target]) - backbone.model.log_probability([1])
    assert -score.nats == pytest.approx(log_p, abs=1e-5)  # fp32 log-softmax
    assert (score.passes, score.standard_error) == (6, 0)


def test_a_block_as_long_as_the_target_changes_nothing():
    backbone, plain = tabular_backbone(seed=4), LikelihoodSettings(budget=9)
    whole = nelbo(backbone, PROMPTS, TARGETS, plain)
    assert nelbo(backbone, PROMPTS, TARGETS, plain.model_copy(update={"block_size": 8})) == whole


def test_choices_that_begin_alike_share_the_passes_of_their_first_block():
    backbone = tabular_backbone()
    options = LikelihoodSettings(block_size=2)
    scores = nelbo(backbone, [[1]] * 2, [[0, 1, 2, 3], [0, 1, 3, 2]], options)
    assert [s.passes for s in scores] == [6, 2]  # of its last block only what is not everything masked


@pytest.mark.parametrize("name", ["auto", "lattice"])
def test_a_budget_too_small_is_one_line(name):
    with pytest.raises(ValueError, match="budget = 1 is too small: .* needs at least") as fault:
        nelbo(tabular_backbone(), [[1]], [[0, 1, 2, 3]], LikelihoodSettings(estimator=name, budget=1))
    assert "\n" not in str(fault.value)


def test_the_order_of_requests_is_the_order_of_scores():
    backbone, options = tabular_backbone(seed=4), LikelihoodSettings()
    forwards = nelbo(backbone, PROMPTS, TARGETS, options)
    backwards = nelbo(backbone, PROMPTS[::-1], TARGETS[::-1], options)[::-1]
    assert [s.nats for s in forwards] == [s.nats for s in backwards]
    assert nelbo(backbone, [], [], options) == []


def greedy(backbone, prompt, count):
    settings = GenerateSettings(block_size=count, early_stop=False)
    canvas = canvas_for([prompt], count, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    *_, last = MaskedSampler().denoise(backbone, canvas, settings)
    return last.responses()[0]


def test_a_target_matches_if_greedy_decoding_gives_it():
    backbone, options = tabular_backbone(seed=6), LikelihoodSettings(batch_tokens=40)
    counts = [1, 2, 5, 3, 1, 7]
    targets = [greedy(backbone, prompt, count) for prompt, count in zip(PROMPTS, counts, strict=True)]
    assert greedy_match(backbone, PROMPTS, targets, options) == [True] * 6
    for row in range(6):
        for place in range(counts[row]):
            other = [list(target) for target in targets]
            other[row][place] = (other[row][place] + 1) % 4
            assert greedy_match(backbone, PROMPTS, other, options) == [r != row for r in range(6)]


def test_a_row_that_differs_leaves_the_greedy_batch():
    backbone = tabular_backbone(seed=6)
    target = greedy(backbone, [1], 8)
    backbone.model.forwarded = 0
    assert greedy_match(backbone, [[1]], [[(t + 1) % 4 for t in target]], LikelihoodSettings()) == [False]
    assert backbone.model.forwarded == 1


@pytest.mark.parametrize("score", [nelbo, greedy_match])
def test_requests_that_cannot_be_scored_are_named(score):
    backbone, options = replace(tabular_backbone(), max_length=5), LikelihoodSettings()
    with pytest.raises(ValueError, match="request 1: the target is empty"):
        score(backbone, [[1], [1]], [[0], []], options)
    with pytest.raises(ValueError, match=r"request 0: prompt \(4 tokens\) and target \(2\) exceed the model's 5"):
        score(backbone, [[1] * 4], [[0, 1]], options)
    with pytest.raises(ValueError, match="request 0: the target holds the mask token"):
        score(backbone, [[1]], [[backbone.mask_id]], options)
    with pytest.raises(ValueError, match="2 prompts and 1 targets"):
        score(backbone, [[1], [2]], [[0]], options)
