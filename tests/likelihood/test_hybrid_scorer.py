"""Scores of hybrid diffusion against the enumerated bound."""

import pytest
import torch

from dllm.config import LikelihoodSettings
from dllm.likelihood.hybrid import HybridScorer
from dllm.likelihood.racing import Question
from dllm.likelihood.scorer import MaskedScorer
from tests.hybrid_oracles import paper_bound, process_of
from tests.oracles import tabular_backbone


def scores(backbone, prompts, targets, **changes):
    return HybridScorer().nelbo(backbone, prompts, targets, LikelihoodSettings(**changes))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_estimate_is_unbiased_and_knows_its_error(share):
    backbone = tabular_backbone(2, seed=1, sidecar={"uniform_share": share})
    backbone.model.scale = 1.0  # probabilities of 1 to 3: few passes weigh much more than others
    expected = paper_bound(backbone, process_of(backbone, share), [1, 0])
    found = [scores(backbone, [[]], [[1, 0]], budget=128, seed=seed)[0] for seed in range(120)]
    nats = torch.tensor([score.nats for score in found])
    error = nats.std().item() / len(found) ** 0.5
    assert abs(nats.mean().item() - expected) < 4 * error and error < 0.05 * expected
    inside = sum(abs(score.nats - expected) < 2 * score.standard_error for score in found)
    assert inside > 0.9 * len(found)
    assert all(score.passes == 128 for score in found)


def test_a_score_does_not_depend_on_the_other_requests():
    backbone = tabular_backbone(3, sidecar={"uniform_share": 0.3})
    prompts, targets = [[0, 1], [2], [], [0, 1]], [[1, 2, 0], [1], [2, 2], [1, 1, 1, 1]]
    together = scores(backbone, prompts, targets, batch_tokens=64)
    for prompt, target, score in zip(prompts, targets, together, strict=True):
        (alone,) = scores(backbone, [prompt], [target])
        assert alone.nats == pytest.approx(score.nats, rel=1e-6)
        assert alone.standard_error == pytest.approx(score.standard_error, rel=1e-6)


def test_without_random_tokens_scores_are_those_of_masked_diffusion():
    backbone, settings = tabular_backbone(3, sidecar={"uniform_share": 0.0}), LikelihoodSettings()
    prompts, targets = [[0, 1], [2]], [[1, 2, 0], [1] * 9]
    assert HybridScorer().nelbo(backbone, prompts, targets, settings) == MaskedScorer().nelbo(
        backbone, prompts, targets, settings
    )
    ours, masked = (s.greedy_match(backbone, prompts, targets, settings) for s in (HybridScorer(), MaskedScorer()))
    assert ours == masked


def test_a_race_finds_the_best_choice():
    backbone = tabular_backbone(3, seed=5, sidecar={"uniform_share": 0.3})
    backbone.model.scale = 1.0
    targets = [[0, 1, 2], [2], [1, 1, 1, 0, 0]]  # a short target is the likeliest by far
    question = Question([0, 1, 2], {"acc": [1.0, 1.0, 1.0]})
    found, (verdict,) = HybridScorer().race(
        backbone, [[]] * 3, targets, [question], LikelihoodSettings(rounds=[50, 100])
    )
    assert min(range(3), key=lambda i: found[i].nats) == 1 and not verdict.doubt


@pytest.mark.parametrize(
    "changes,words",
    [({"estimator": "mc"}, "estimator = 'mc' means nothing"), ({"block_size": 4}, "block_size = 4 means nothing")],
)
def test_settings_that_concern_masks_are_refused_in_one_line(changes, words):
    backbone = tabular_backbone(3, sidecar={"uniform_share": 0.3})
    with pytest.raises(ValueError, match=words):
        scores(backbone, [[]], [[1]], **changes)
    with pytest.raises(ValueError, match="budget = 1 is too small"):
        scores(backbone, [[]], [[1]], budget=1)
