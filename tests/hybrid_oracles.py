"""Hybrid noise by its definitions, slowly: enumerated bounds, and ideal models of known texts."""

from __future__ import annotations

import itertools

import numpy
import torch
from torch import Tensor, nn

from dllm.core.hybrid import HybridNoise
from tests.toys import ToyBackbone


def process_of(backbone: ToyBackbone, share: float) -> HybridNoise:
    return HybridNoise(share, backbone.vocab_size - 1, backbone.mask_id)


def marginal(process: HybridNoise, level: float, x: int, vocab: int) -> numpy.ndarray:
    """q_r(. | x) [V], float64; x = -1: without its alpha, the noise alone."""
    alpha, masks, uniform = (float(v) for v in process.shares(torch.tensor(level, dtype=torch.float64)))
    q = numpy.full(vocab, uniform / (vocab - 1))
    q[process.mask_id] = masks
    if x >= 0:
        q[x] += alpha
    return q


def alpha_of(process: HybridNoise, level: float) -> float:
    return float(process.shares(torch.tensor(level, dtype=torch.float64))[0])


def predicted(backbone: ToyBackbone, process: HybridNoise, level: float, z: tuple[int, ...]) -> numpy.ndarray:
    """q_r(. | x_hat(z)) [L, V]: what the model's distribution becomes under noise."""
    logits = backbone.model.logits_of(torch.tensor([z]))[0].double()
    logits[:, process.mask_id] = -torch.inf
    vocab = backbone.vocab_size
    return alpha_of(process, level) * logits.softmax(-1).numpy() + marginal(process, level, -1, vocab)


def states(process: HybridNoise, level: float, target: list[int], vocab: int):
    """Every noised version of a target, with its probability."""
    each = [marginal(process, level, x, vocab) for x in target]
    for z in itertools.product(range(vocab), repeat=len(target)):
        yield z, float(numpy.prod([q[token] for q, token in zip(each, z, strict=True)]))


def paper_integrand(backbone: ToyBackbone, process: HybridNoise, level: float, target: list[int]) -> float:
    """E of the bound's terms at a level, as theorem 3.1 has them, rates by numerical differentiation."""
    vocab, h = backbone.vocab_size, 1e-6
    noise = lambda r: marginal(process, r, -1, vocab)  # noqa: E731
    slope = (noise(level + h) - noise(level - h)) / (2 * h)
    alpha_slope = (alpha_of(process, level + h) - alpha_of(process, level - h)) / (2 * h)
    rate = slope - alpha_slope / alpha_of(process, level) * noise(level)
    total = 0.0
    for z, probability in states(process, level, target, vocab):
        if probability == 0:
            continue
        model = predicted(backbone, process, level, z)
        for i, x in enumerate(target):
            q = marginal(process, level, x, vocab)
            some = q > 0
            kl = float((q[some] * numpy.log(q[some] / model[i][some])).sum())
            y = q[z[i]] / model[i][z[i]]
            total += probability * rate[z[i]] / q[z[i]] * (kl + y - numpy.log(y) - 1)
    return total


def paper_bound(backbone: ToyBackbone, process: HybridNoise, target: list[int], nodes: int = 24) -> float:
    """The bound by Gauss and Legendre's rule in the angle of r = sin^2: what is like a root at both ends is smooth."""
    x, weight = numpy.polynomial.legendre.leggauss(nodes)
    angle = (x + 1) * numpy.pi / 4
    levels = numpy.sin(angle) ** 2
    values = [paper_integrand(backbone, process, float(r), target) for r in levels]
    return float((weight * numpy.pi / 4 * numpy.sin(2 * angle) * values).sum())


def stepwise_bound(backbone: ToyBackbone, process: HybridNoise, target: list[int], steps: int) -> float:
    """The bound of a chain of so many steps: KL of its reverse steps, which knows no rate and no weight."""
    vocab, total = backbone.vocab_size, 0.0
    for step in range(steps):
        r, s = (step + 1) / steps, step / steps
        kept = alpha_of(process, r) / alpha_of(process, s)
        into = marginal(process, r, -1, vocab) - kept * marginal(process, s, -1, vocab)
        for z, probability in states(process, r, target, vocab):
            if probability == 0:
                continue
            model_s = predicted(backbone, process, s, z)
            for i, x in enumerate(target):
                jump = into[z[i]] + kept * (numpy.arange(vocab) == z[i])  # q_r|s(z | v) for each v
                true, guess = jump * marginal(process, s, x, vocab), jump * model_s[i]
                true, guess = true / true.sum(), guess / guess.sum()
                some = true > 0
                total += probability * float((true[some] * numpy.log(true[some] / guess[some])).sum())
    return total


class IdealHybrid(nn.Module):
    """p(x_i | all z but z_i) of a known distribution of whole rows, at the level that it is told.

    rows [R, L] long with probabilities [R]; tokens beside text have no chance.
    """

    def __init__(self, rows: Tensor, probability: Tensor, process: HybridNoise, vocab: int):
        super().__init__()
        self.rows, self.probability, self.process, self.vocab = rows, probability.double(), process, vocab
        self.level = 0.5

    def logits_of(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        table = torch.stack(
            [torch.from_numpy(marginal(self.process, self.level, x, self.vocab)) for x in range(self.vocab)]
        )
        each = table[self.rows[:, :, None], tokens.T[None]]  # q(z_i | x_i): [R, L, B]
        result = torch.full((len(tokens), tokens.shape[1], self.vocab), -1e4, dtype=torch.float64)
        for i in range(tokens.shape[1]):
            others = each[:, [j for j in range(tokens.shape[1]) if j != i]].prod(1) * self.probability[:, None]
            mass = torch.zeros(self.vocab, len(tokens), dtype=torch.float64).index_add(0, self.rows[:, i], others)
            result[:, i] = (mass / mass.sum(0)).T.log().clamp(min=-1e4)
        return result
