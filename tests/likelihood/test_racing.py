"""Multiple choice in rounds."""

import numpy
import pytest

from dllm.config import LikelihoodSettings
from dllm.core.canvas import Score
from dllm.likelihood.racing import ERROR, Question, race
from dllm.likelihood.scorer import MaskedScorer
from tests.oracles import enumerated_nelbo, tabular_backbone

RACE = LikelihoodSettings(rounds=[8, 8, 16, 32])


def gaussian(nats, spread):
    """Estimates whose noise is normal: of variance spread^2 / passes, half of it common to the choices of a prompt."""

    def estimates(prompts, targets, settings, like):
        size, scale = settings.budget, spread / settings.budget**0.5
        values, noise = [], []
        for (request,), (name,) in zip(targets, like, strict=True):
            seeds = [abs(settings.seed) % 2**31, name]
            common = numpy.random.default_rng(seeds).normal(size=size)
            own = numpy.random.default_rng([*seeds, request]).normal(size=size)
            units = scale * (common + own) / 2**0.5 / size**0.5
            values.append(nats[request] + units.sum())
            noise.append((units - units.mean()) * (size / (size - 1)) ** 0.5)
        return numpy.array(values), numpy.array(noise), numpy.full(len(values), size)

    return estimates


def raced(nats, spread, settings=RACE, divisors=None):
    """Race of questions given as nats [Q, K]."""
    count, choices = nats.shape
    questions = [
        Question(range(q * choices, (q + 1) * choices), divisors or {"acc": [1.0] * choices}) for q in range(count)
    ]
    prompts, targets = [[q] for q in range(count) for _ in range(choices)], [[i] for i in range(count * choices)]
    return race(gaussian(nats.ravel(), spread), prompts, targets, questions, settings)


def test_a_race_loses_the_best_choice_as_rarely_as_it_says_and_saves_passes():
    nats = 30 + numpy.random.default_rng(0).normal(size=(1500, 4)) * 3
    scores, verdicts = raced(nats, spread=3.0)
    found = numpy.array([score.nats for score in scores]).reshape(nats.shape)
    wrong = found.argmin(1) != nats.argmin(1)
    decided = numpy.array([not verdict.doubt for verdict in verdicts])
    assert wrong[decided].mean() < ERROR + 3 * (ERROR / decided.sum()) ** 0.5
    assert 0.5 < decided.mean() < 1
    # the doubt of the others is the share that goes wrong, within the noise of some hundred questions
    doubt = numpy.array([verdict.doubt.get("acc", 0.0) for verdict in verdicts])[~decided]
    assert abs(wrong[~decided].mean() - doubt.mean()) < 4 * (doubt * (1 - doubt)).sum() ** 0.5 / len(doubt) + 0.02
    assert sum(score.passes for score in scores) < 0.6 * 64 * nats.size


def test_a_question_of_equal_choices_ends_undecided_at_the_cap():
    scores, (verdict,) = raced(numpy.full((1, 2), 5.0), spread=2.0)
    assert [score.passes for score in scores] == [64, 64]
    assert verdict.rounds == 4 and 0 < verdict.doubt["acc"] <= 0.5


def test_each_metric_decides_by_its_own_rule():
    """By nats the first choice wins, by nats a letter the second; the third is out under both after one round."""
    nats, divisors = numpy.array([[10.0, 20.0, 60.0]]), {"acc": [1.0] * 3, "acc_norm": [5.0, 40.0, 10.0]}
    scores, (verdict,) = raced(nats, 0.5, divisors=divisors)
    assert verdict.rounds == 1 and not verdict.doubt
    close = {"acc": [1.0] * 3, "acc_norm": [5.0, 10.01, 10.0]}
    scores, (verdict,) = raced(nats, 2.0, divisors=close)
    assert [score.passes for score in scores] == [64, 64, 8] and set(verdict.doubt) == {"acc_norm"}


PROMPTS = [[0, 1]] * 3 + [[2]] * 2 + [[3, 1], [0]]
LONG = [1, 1, 2, 3, 0, 1, 2]
TARGETS = [[0, 3, 3, 1, 2, 2], [1, 2, 0, 0, 1, 3], [0, 3, 3, 1, 2], [1], [2], LONG, LONG]
QUESTIONS = [[0, 1, 2], [3, 4], [5, 6]]


def asked(*choices):
    return [Question(each, {"acc": [1.0] * len(each)}) for each in choices]


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_question_alone_has_the_scores_that_it_has_beside_others(block_size):
    backbone, settings = tabular_backbone(seed=4), RACE.model_copy(update={"block_size": block_size})
    scores, verdicts = MaskedScorer().race(backbone, PROMPTS, TARGETS, asked(*QUESTIONS), settings)
    assert sum(score.passes for score in scores) == backbone.model.forwarded
    for choices, verdict in zip(QUESTIONS, verdicts, strict=True):
        own = asked(range(len(choices)))
        prompts, targets = [PROMPTS[i] for i in choices], [TARGETS[i] for i in choices]
        alone, (end,) = MaskedScorer().race(backbone, prompts, targets, own, settings)
        assert end == verdict
        for one, choice in zip(alone, choices, strict=True):
            assert (one.nats, one.standard_error) == (scores[choice].nats, scores[choice].standard_error)


def test_exact_choices_take_one_round_and_their_plain_scores():
    backbone = tabular_backbone(seed=4)
    scores, (verdict,) = MaskedScorer().race(backbone, PROMPTS[3:5], TARGETS[3:5], asked([0, 1]), RACE)
    assert scores == MaskedScorer().nelbo(backbone, PROMPTS[3:5], TARGETS[3:5], LikelihoodSettings())
    assert (verdict.rounds, verdict.doubt) == (1, {})


def test_a_close_choice_becomes_exact_once_a_round_takes_all_masks():
    backbone, target = tabular_backbone(seed=4), [0, 3, 3, 1, 2]
    settings = LikelihoodSettings(rounds=[8, 16, 32])
    scores, (verdict,) = MaskedScorer().race(backbone, [[0], [0]], [target, target], asked([0, 1]), settings)
    other = MaskedScorer().race(backbone, [[0], [0]], [target, target[:-1] + [0]], asked([0, 1]), settings)[0]
    for score in (*scores, other[0]):
        assert isinstance(score, Score)
        if score.standard_error == 0:
            assert score.nats == pytest.approx(enumerated_nelbo(backbone, [0], target), abs=1e-4)
    assert scores[0].nats == scores[1].nats and verdict.rounds == 1  # equal choices cannot be told apart


@pytest.mark.parametrize("change", [{"estimator": "mc"}, {"rounds": [8, 0]}])
def test_rounds_that_cannot_be_drawn_are_refused(change):
    with pytest.raises(ValueError, match="rounds = .* estimator auto or lattice; change them or leave them out"):
        LikelihoodSettings(**{"rounds": [8, 16], **change})
