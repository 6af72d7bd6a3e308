"""Sampling of hybrid noise: exact where theory says so, and without random tokens the masked sampler."""

import itertools

import pytest
import torch

from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for
from dllm.core.hybrid import HybridNoise
from dllm.sampling.hybrid import HybridSampler, _reverse
from dllm.sampling.sampler import MaskedSampler
from tests.hybrid_oracles import IdealHybrid, marginal
from tests.oracles import tabular_backbone
from tests.samplers import numbered_rows
from tests.toys import ToyBackbone

PROMPTS, COUNTS = [[0, 1, 2], [], [3, 3, 3, 3, 0, 1], [2]], [6, 9, 4, 1]
ROWS = torch.tensor(list(itertools.product(range(2), repeat=2)))
PROBABILITY = torch.tensor([0.5, 0.05, 0.15, 0.3])


def settings(**options):
    return GenerateSettings(**({"early_stop": False} | options))


def canvas_of(backbone, prompts=PROMPTS, counts=COUNTS):
    return canvas_for(prompts, counts, mask_id=backbone.mask_id, pad_id=backbone.pad_id)


def drained(backbone, canvas, options):
    *_, last = HybridSampler().denoise(backbone, canvas, options)
    return last


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("options", [settings(), settings(temperature=1.0, top_p=0.9, steps=5)], ids=["0", "1"])
def test_a_row_in_a_batch_equals_the_row_alone(share, options):
    backbone = tabular_backbone(seed=3, sidecar={"uniform_share": share})
    together = drained(backbone, canvas_of(backbone), options)
    assert together.done.all() and not together.masked.any() and (together.tokens != backbone.mask_id).all()
    done = {row.number: row for row in HybridSampler().complete(backbone, canvas_of(backbone), options)}
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        alone = drained(backbone, canvas_of(backbone, [prompt], [count]), options)
        assert alone.responses()[0] == together.responses()[row] == done[row].tokens
        assert alone.nfe == done[row].passes == (options.steps or count)


@pytest.mark.parametrize("rule", ["confidence", "random"])
def test_without_random_tokens_it_is_the_masked_sampler_token_for_token(rule):
    backbone = tabular_backbone(seed=3, sidecar={"uniform_share": 0.0})
    options = GenerateSettings(temperature=1.0, steps=6, block_size=4, reveal_rule=rule)
    frames = HybridSampler().denoise(backbone, canvas_of(backbone), options)
    expected = MaskedSampler().denoise(backbone, canvas_of(backbone), options)
    for ours, masked in zip(frames, expected, strict=True):
        assert torch.equal(ours.tokens, masked.tokens)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_reverse_step_undoes_a_forward_step(share):
    """The exact posterior: tokens of level r, taken to level s by it, have the distribution of level s."""
    process, vocab, count, x = HybridNoise(share, 4, 2), 5, 200_000, 3
    torch.manual_seed(0)
    z = torch.multinomial(torch.from_numpy(marginal(process, 0.7, x, vocab)), count, replacement=True)
    x_hat = torch.nn.functional.one_hot(torch.tensor(x), vocab).float().expand(count, -1)
    levels = (torch.full((count,), level) for level in (0.7, 0.4))
    found = _reverse(process, z, x_hat, *levels, torch.rand(count), torch.rand(count))
    share_of = torch.bincount(found, minlength=vocab) / count
    assert (share_of - torch.from_numpy(marginal(process, 0.4, x, vocab))).abs().max() < 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_samples_of_independent_tokens_are_exact_with_any_number_of_passes(share):
    """All that a pass leaves out is how tokens hang together."""
    independent = torch.outer(torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.8])).flatten()
    for steps in (1, 3):
        found = frequencies(share, independent, steps, 20_000)
        assert (found - independent).abs().max() < 4 * (0.25 / 20_000) ** 0.5


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_samples_of_an_ideal_model_approach_its_texts_with_the_passes(share):
    """The error of passes that take tokens one by one falls with their number: theory says linearly."""
    few, many = ((frequencies(share, PROBABILITY, steps, 10_000) - PROBABILITY).abs().max() for steps in (2, 40))
    assert many < 4 * (0.25 / 10_000) ** 0.5 < few


def frequencies(share, probability, steps, count):
    """How often each text of two tokens is sampled from its ideal model, which is told the level of each pass."""
    vocab, mask = 5, 2
    model = IdealHybrid(ROWS, probability, HybridNoise(share, vocab - 1, mask), vocab)
    backbone = ToyBackbone(model, mask, 3, 4, vocab, sidecar={"uniform_share": share})
    canvas = canvas_of(backbone, [[]] * count, [2] * count)
    with numbered_rows():
        frames = HybridSampler().denoise(backbone, canvas, settings(temperature=1.0, steps=steps))
        for step in range(steps + 1):
            model.level = min(1 - max(step - 1, 0) / steps, 1 - 1e-6)
            last = next(frames)
    number = (last.tokens * torch.tensor([2, 1])).sum(1)
    assert (last.tokens < 2).all()
    return torch.bincount(number, minlength=4) / count


def test_a_wrong_token_is_replaced_by_a_model_that_knows():
    """Of the two texts 00 and 11, whichever a row begins with, half noise becomes one of them."""
    process, vocab = HybridNoise(0.5, 4, 2), 5
    model = IdealHybrid(torch.tensor([[0, 0], [1, 1]]), torch.tensor([0.5, 0.5]), process, vocab)
    model.level = 0.3
    z = torch.tensor([[0, 1], [1, 0], [0, 0]]).repeat(400, 1)
    x_hat = model.logits_of(z).softmax(-1).float()
    torch.manual_seed(0)
    level, lower = torch.full((2400,), 0.3), torch.zeros(2400)
    flat = (z.flatten(), x_hat.flatten(0, 1), level, lower, torch.rand(2400), torch.rand(2400))
    found = _reverse(process, *flat).view(-1, 2)
    changed = (found != z).any(1).view(400, 3).float().mean(0)
    assert changed[:2].min() > 0.5 and changed[2] < 0.2  # 2 / 17: even two equal tokens may both be noise


def test_a_row_at_temperature_0_stops_early_and_keeps_its_text():
    backbone = tabular_backbone(seed=3, sidecar={"uniform_share": 0.2})
    backbone.model.scale = 0.0  # every token is as likely: the first choice is always the same
    canvas = canvas_of(backbone, [[1, 2]], [6])
    whole, early = (drained(backbone, canvas, settings(steps=50, early_stop=early)) for early in (False, True))
    assert early.nfe < whole.nfe == 50 and torch.equal(whole.tokens, early.tokens) and early.done.all()


@pytest.mark.parametrize("changes", [{"reveal_rule": "random"}, {"reuse": "prefix"}, {"guidance": 1.0}])
def test_options_that_concern_masks_are_refused_in_one_line(changes):
    backbone = tabular_backbone(sidecar={"uniform_share": 0.2})
    with pytest.raises(ValueError, match="means nothing to algorithm = 'hybrid'"):
        drained(backbone, canvas_of(backbone), settings(**changes))
