"""Hybrid noise: its bound against the paper's formula, against chains of steps, and against known probabilities."""

import itertools

import numpy
import pytest
import torch

from dllm.core.hybrid import HybridNoise, divergences, spread_of
from tests.hybrid_oracles import IdealHybrid, marginal, paper_bound, paper_integrand, process_of, states, stepwise_bound
from tests.oracles import enumerated_nelbo, tabular_backbone
from tests.toys import ToyBackbone

SHARES = [0.0, 0.1, 0.5, 0.9, 1.0]
TARGET = [1, 0]


def both(log_p, target, seen, rho):
    """KL / alpha and IS [N] from log p [N, V]."""
    at_target, at_seen = (log_p.gather(1, token[:, None])[:, 0] for token in (target, seen))
    return divergences(at_target, at_seen, seen == target, spread_of(log_p, rho), rho)


def ours(backbone, process, level, target):
    """The integrand of the bound from the product's functions, over all states."""
    total = 0.0
    for z, probability in states(process, level, target, backbone.vocab_size):
        if probability == 0:
            continue
        logits = backbone.model.logits_of(torch.tensor([z]))[0].double()
        logits[:, process.mask_id] = -torch.inf
        seen, clean = torch.tensor(z), torch.tensor(target)
        levels = torch.full((len(z),), level, dtype=torch.float64)
        kl, other = both(logits.log_softmax(-1), clean, seen, process.odds(levels))
        of_kl, of_other = process.weights(levels, seen, clean)
        total += probability * float((of_kl * kl + of_other * other).sum())
    return total


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("level", [0.03, 0.5, 0.97])
def test_the_integrand_is_that_of_the_paper(share, level):
    backbone = tabular_backbone(2, seed=1)
    process = process_of(backbone, share)
    expected = paper_integrand(backbone, process, level, TARGET)
    assert ours(backbone, process, level, TARGET) == pytest.approx(expected, rel=1e-6)  # of a numerical derivative


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_bound_is_the_limit_of_chains_of_steps(share):
    """Their error is linear in the step to leading order, so that two chains give the limit to second order."""
    backbone = tabular_backbone(2, seed=1)
    process = process_of(backbone, share)
    few, many = (stepwise_bound(backbone, process, TARGET, steps) for steps in (32, 64))
    bound = paper_bound(backbone, process, TARGET)
    assert few > many and 2 * many - few == pytest.approx(bound, rel=1e-2)


def test_without_random_tokens_the_bound_is_that_of_masked_diffusion():
    backbone = tabular_backbone(3, seed=2)
    bound = paper_bound(backbone, process_of(backbone, 0.0), [2, 0, 1])
    assert bound == pytest.approx(enumerated_nelbo(backbone, [], [2, 0, 1]), rel=1e-6)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_bound_of_an_ideal_model_is_the_probability(share):
    """Its prediction of a token does not look at that token, which is what makes the bound tight."""
    vocab, mask = 5, 2
    rows = torch.tensor(list(itertools.product(range(2), repeat=2)))
    probability = torch.tensor([0.5, 0.05, 0.15, 0.3])
    process = HybridNoise(share, vocab - 1, mask)
    model = IdealHybrid(rows, probability, process, vocab)
    backbone = ToyBackbone(model, mask, 3, 4, vocab)
    x, weight = numpy.polynomial.legendre.leggauss(32)
    angle = (x + 1) * numpy.pi / 4
    for row, p in list(zip(rows.tolist(), probability.tolist(), strict=True))[1:3]:
        total = 0.0
        for a, w in zip(angle, weight, strict=True):
            model.level = float(numpy.sin(a) ** 2)
            total += w * numpy.pi / 4 * numpy.sin(2 * a) * ours(backbone, process, model.level, row)
        assert total == pytest.approx(-numpy.log(p), rel=4e-3)  # of the quadrature at the ends


@pytest.mark.parametrize("share", SHARES)
def test_corrupted_tokens_have_the_marginal_distribution(share):
    process, count = HybridNoise(share, 6, 3), 200_000
    torch.manual_seed(0)
    level = torch.full((count,), 0.6)
    place, draw = torch.rand(count, 1), torch.randint(-(2**62), 2**62, (count, 1))
    z = process.corrupted(torch.full((count, 1), 5), torch.ones(count, 1, dtype=torch.bool), level, place, draw)
    expected = torch.from_numpy(marginal(process, 0.6, 5, 7))
    found = torch.bincount(z[:, 0], minlength=7) / count
    assert (found - expected).abs().max() < 5 * (0.25 / count) ** 0.5


def test_divergences_keep_their_digits_in_single_precision():
    torch.manual_seed(0)
    log_p = (3 * torch.randn(64, 50)).log_softmax(-1)
    target, seen = torch.randint(50, (64,)), torch.randint(50, (64,))
    for rho in (0.0, 1e-9, 1e-4, 1.0, 1e3):
        odds = torch.full((64,), rho)
        if rho == 0:
            seen = target
        exact = both(log_p.double(), target, seen, odds.double())
        for value, expected in zip(both(log_p, target, seen, odds), exact, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=2e-4, atol=2e-6)
            assert (value > -2e-6).all()  # both are divergences
