"""The bound of models that renoise, against every trajectory of a tiny DiffusionGemma and of a table."""

import math
from itertools import product
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import canvas_for
from dllm.likelihood.racing import Question
from dllm.likelihood.renoise import RenoisingScorer, token_divergences
from dllm.models.backbone import Backbone
from dllm.models.diffusion_gemma import Prefix
from dllm.sampling.renoise import RenoisingSampler
from tests.sampling.test_renoise import TEXT, VISION

WORDS, SIZE, STEPS = 4, 2, 3
PROMPT = [3, 1, 2]
STATES = list(product(range(WORDS), repeat=SIZE))


@pytest.fixture(scope="module")
def backbone():
    """A random model of four words, with canvases of two tokens and three passes: sixteen states."""
    torch.set_num_threads(1)
    ids = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), 0)
    config = DiffusionGemmaConfig(
        text_config=TEXT | ids | {"vocab_size": WORDS}, vision_config=VISION, canvas_length=SIZE
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():  # what is drawn predicts next to nothing
        model.model.decoder.norm.weight.mul_(8.0)
    model.generation_config.max_denoising_steps = STEPS
    return Backbone(
        model=model, tokenizer=SimpleNamespace(bos_token_id=0), family="decoder", prediction="in_place", mask_id=-1,
        eos_id=0, pad_id=0, vocab_size=WORDS, max_length=96, sidecar={"block_size": SIZE}, packable=False,
    )  # fmt: skip


def predictions(backbone, prompt, size) -> numpy.ndarray:
    """p(x_0 | x_t) [states, S, V] of all canvases."""
    states = torch.tensor(list(product(range(WORDS), repeat=size)))
    prefix = Prefix(backbone, len(states))
    prefix.read(prompt)
    return prefix.predict(states).double().softmax(-1).numpy()


def uniform(alpha: float) -> numpy.ndarray:
    """q [V, V] that keeps a token with probability alpha and else draws one uniformly."""
    return alpha * numpy.eye(WORDS) + (1 - alpha) / WORDS


def posterior(level: int) -> numpy.ndarray:
    """q(x_s = j | x_t = z, x_0 = x) as [x, z, j], by Bayes' rule."""
    alpha_t, alpha_s = 1 - level / STEPS, 1 - (level - 1) / STEPS
    joint = uniform(alpha_s)[:, None, :] * uniform(alpha_t / alpha_s).T[None]
    return joint / joint.sum(-1, keepdims=True)


def every_trajectory(p: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """-log p(x_0) and its bound of every state [states], from predictions [states, S, V]: sums over all states."""
    size = p.shape[1]
    states = list(product(range(WORDS), repeat=size))
    distribution, bound = numpy.full(len(states), 1 / len(states)), numpy.zeros(len(states))
    for level in range(STEPS, 0, -1):
        q = posterior(level)
        step = numpy.array(
            [[p[z, i] @ q[:, seen, :] for i, seen in enumerate(state)] for z, state in enumerate(states)]
        )
        move = numpy.array(
            [[math.prod(step[z, i, j] for i, j in enumerate(to)) for to in states] for z in range(len(p))]
        )
        distribution = distribution @ move
        noise = uniform(1 - level / STEPS)
        for x, clean in enumerate(states):
            for z, seen in enumerate(states):
                weight = math.prod(noise[a, b] for a, b in zip(clean, seen, strict=True))
                for i in range(size):
                    truth = q[clean[i], seen[i]]
                    known = truth > 0
                    bound[x] += weight * (truth[known] * numpy.log(truth[known] / step[z, i][known])).sum()
    return -numpy.log(distribution), bound


@pytest.mark.parametrize("level", range(1, STEPS + 1))
def test_the_divergence_of_a_pass_is_that_of_bayes_rule(level):
    generator = torch.Generator().manual_seed(level)
    seen, target = (torch.randint(WORDS, (40,), generator=generator) for _ in range(2))
    logits = 3 * torch.randn(40, WORDS, generator=generator)
    q, p = posterior(level), logits.double().softmax(-1).numpy()
    found = token_divergences(logits, seen, target, level, STEPS)
    for i in range(40):
        truth, model = q[target[i], seen[i]], p[i] @ q[:, seen[i], :]
        expected = (truth[truth > 0] * numpy.log(truth[truth > 0] / model[truth > 0])).sum()
        assert found[i].item() == pytest.approx(expected, abs=1e-9)


def test_with_the_true_posterior_the_mean_bound_is_the_entropy():
    """One token: the process of the true posterior draws from the data, and no term of the bound is lost."""
    data = numpy.array([0.5, 0.3, 0.15, 0.05])
    total = 0.0
    for level in range(1, STEPS + 1):
        noise = uniform(1 - level / STEPS)
        joint = data[:, None] * noise
        logits = torch.tensor(joint / joint.sum(0)).T.log()
        for x, z in product(range(WORDS), repeat=2):
            term = token_divergences(logits[z][None], torch.tensor([z]), torch.tensor([x]), level, STEPS).item()
            total += joint[x, z] * term
    assert total == pytest.approx(-(data * numpy.log(data)).sum(), abs=1e-9)


def test_the_score_is_the_enumerated_bound_and_that_is_above_the_likelihood(backbone):
    nll, bound = every_trajectory(predictions(backbone, PROMPT, SIZE))
    assert numpy.exp(-nll).sum() == pytest.approx(1) and nll.std() > 0.1, "a model with an opinion"
    assert (bound > nll).all() and (bound - nll).max() > 0.01
    for target in ((0, 1), (2, 2)):
        seeds = range(12)
        settings = [LikelihoodSettings(budget=48, seed=seed) for seed in seeds]
        scores = [RenoisingScorer().nelbo(backbone, [PROMPT], [list(target)], s)[0] for s in settings]
        values = numpy.array([score.nats for score in scores])
        stated = math.sqrt(sum(score.standard_error**2 for score in scores) / len(scores))
        exact = bound[STATES.index(target)]
        # four standard errors of a mean of twelve; a stated error may be cautious, and is no more than twice too small
        assert abs(values.mean() - exact) < 4 * stated / math.sqrt(len(scores))
        assert values.std(ddof=1) < 2 * stated
        assert {score.passes for score in scores} == {49}, "48 canvases, and the encoder's pass"


def test_a_longer_target_is_the_sum_of_its_canvases_each_given_those_before(backbone):
    _, first = every_trajectory(predictions(backbone, PROMPT, SIZE))
    _, second = every_trajectory(predictions(backbone, [*PROMPT, 2, 1], 1))
    score = RenoisingScorer().nelbo(backbone, [PROMPT], [[2, 1, 3]], LikelihoodSettings(budget=600, seed=3))[0]
    assert abs(score.nats - first[STATES.index((2, 1))] - second[3]) < 4 * score.standard_error
    assert score.passes == 2 * 601


def test_a_text_without_a_prompt_is_behind_a_start_token_in_all_its_canvases(backbone):
    settings, text = LikelihoodSettings(budget=10), [2, 1, 3]
    alone = RenoisingScorer().nelbo(backbone, [[]], [text], settings)[0].nats
    start = [backbone.tokenizer.bos_token_id]
    behind = RenoisingScorer().estimates(backbone, [start], [text], settings, [[]])[0]  # with the same random numbers
    assert alone == behind[0]


def test_a_score_depends_on_the_seed_and_not_on_the_other_requests_or_the_batches(backbone):
    settings = LikelihoodSettings(budget=10)
    prompts, targets = [PROMPT, [], [1]], [[0, 1], [2], [3, 3, 1]]
    together = RenoisingScorer().nelbo(backbone, prompts, targets, settings)
    for prompt, target, score in zip(prompts, targets, together, strict=True):
        few = settings.model_copy(update={"batch_tokens": 11})
        alone = RenoisingScorer().nelbo(backbone, [prompt], [target], few)[0]
        assert alone.nats == pytest.approx(score.nats, abs=1e-4) and alone.passes == score.passes
    other = settings.model_copy(update={"seed": 1})
    assert RenoisingScorer().nelbo(backbone, prompts, targets, other)[0].nats != together[0].nats


def test_choices_are_raced_and_greedy_matches_are_found(backbone):
    targets = [[a, b] for a, b in STATES[:4]]
    question = Question([0, 1, 2, 3], {"acc": [1.0] * 4})
    settings = LikelihoodSettings(budget=8, rounds=[8, 200])
    scores, (verdict,) = RenoisingScorer().race(backbone, [PROMPT] * 4, targets, [question], settings)
    assert len(scores) == 4 and 1 <= verdict.rounds <= 2
    canvas = canvas_for([PROMPT], 2, mask_id=-1, pad_id=0)
    greedy = GenerateSettings(max_new_tokens=2, early_stop=False)
    (row,) = RenoisingSampler().complete(backbone, canvas, greedy)
    wanted = [row.tokens, [(row.tokens[0] + 1) % WORDS, row.tokens[1]]]
    assert RenoisingScorer().greedy_match(backbone, [PROMPT] * 2, wanted, LikelihoodSettings()) == [True, False]


def test_what_means_nothing_to_it_is_one_line(backbone):
    for change, words in (
        ({"estimator": "mc"}, "estimator = 'mc' means nothing to a model of algorithm = 'renoise'"),
        ({"block_size": 4}, "block_size = 4 means nothing"),
        ({"budget": 1}, "budget = 1 is too small"),
    ):
        with pytest.raises(ValueError, match=words) as fault:
            RenoisingScorer().nelbo(backbone, [PROMPT], [[1]], LikelihoodSettings(**change))
        assert "\n" not in str(fault.value)
    with pytest.raises(ValueError, match="exceed the model's 96 positions"):
        RenoisingScorer().nelbo(backbone, [PROMPT], [[1] * 94], LikelihoodSettings())
