"""Scoring with a model of hybrid noise: the bound of `core.hybrid`, by Monte Carlo over noised versions of the target.

A pass draws a noise level r, evenly spaced behind a random offset, and a version z of that level. The model does not
see r, so that its answer to z says what every level adds: an estimate is

    integral of q_r(z | x) S(z, r) dr  /  integral of q_r(z | x) dr,      S the sum over tokens in the bound,

whose mean over versions is the bound, and which is finite where S alone is not. Without random tokens it would be
(L + 1) / k times the nll of k masks. The standard error is that of systematic samples, from the differences of
neighbouring passes.
Sources: von Ruette et al. 2025 (arXiv:2503.04482); Wolter 2007, Introduction to Variance Estimation, 8.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from dllm.config import LikelihoodSettings
from dllm.core.hybrid import LEAST, MOST, HybridNoise, divergences
from dllm.core.noise import keyed_hash, keyed_uniform
from dllm.core.packing import layout_of
from dllm.likelihood.racing import Estimates
from dllm.likelihood.requests import Rows, prompt_hashes, row_lengths, token_batches
from dllm.likelihood.scorer import LikelihoodScorer, MaskedScorer, check_requests, forward_tokens
from dllm.likelihood.systematic import check_settings, greedy_matches, neighbour_noise
from dllm.models.backbone import Backbone
from dllm.models.hybrid_loss import text_log_p
from dllm.sampling.hybrid import HybridSampler, noise_of

_LEVEL, _PLACE, _TOKEN = range(3)

_GRID = 96
"""Levels of the integrals: Gauss and Legendre's, in the angle of r = sin^2."""

_BIN, _BINS = 0.1, 300
"""Width, in nats, and number of the bins of log p in which tokens are counted alike."""

_SCORED = 256
"""Most positions whose bins and levels are held at once."""


@dataclass(frozen=True)
class HybridScorer(LikelihoodScorer):
    """Scores of hybrid diffusion, from `settings.budget` passes each. A model trained without random tokens is scored
    as any masked one."""

    def estimates(
        self,
        backbone: Backbone,
        prompts: Rows,
        targets: Rows,
        settings: LikelihoodSettings,
        like: Rows | None = None,
        between: Callable[[], object] | None = None,
    ) -> Estimates:
        """See `LikelihoodScorer.estimates`; settings that concern masks are refused."""
        if noise_of(backbone).share == 0:
            return MaskedScorer().estimates(backbone, prompts, targets, settings, like, between)
        check_requests(backbone, prompts, targets)
        check_settings(
            settings,
            model="a model trained with random tokens (algorithm = 'hybrid'), whose bound has an estimator",
            bound="a bound of hybrid noise",
        )
        budget, keys = settings.budget, keyed_hash(settings.seed, prompt_hashes(like or prompts))
        lengths = row_lengths(prompts, targets)
        order = lengths.argsort(kind="stable")
        rows, draws = numpy.repeat(order, budget), numpy.tile(numpy.arange(budget), len(order))
        values = numpy.zeros((len(prompts), budget))
        for low, high in token_batches(lengths[rows], forward_tokens(backbone, settings)):
            some, draw = rows[low:high], torch.from_numpy(draws[low:high])
            tokens = [([*prompts[row], *targets[row]], len(prompts[row])) for row in some]
            values[some, draws[low:high]] = _bounds(backbone, tokens, keys[torch.from_numpy(some)], draw, budget)
            if between is not None:
                between()
        return values.mean(1), neighbour_noise(values), numpy.full(len(prompts), budget)

    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """See `LikelihoodScorer.greedy_match`: by the sampler at temperature 0."""
        if noise_of(backbone).share == 0:
            return MaskedScorer().greedy_match(backbone, prompts, targets, settings)
        check_requests(backbone, prompts, targets)
        ids = {"mask_id": backbone.mask_id, "seed": settings.seed}
        return greedy_matches(HybridSampler(), backbone, prompts, targets, **ids)


@torch.no_grad()
def _bounds(
    backbone: Backbone, rows: Sequence[tuple[list[int], int]], keys: Tensor, draw: Tensor, budget: int
) -> numpy.ndarray:
    """The estimates [B] of B passes, in nats.

    rows: tokens and where the target begins; keys, draw [B]: of the request, and the number of its pass.
    """
    process = noise_of(backbone)
    level = ((draw + keyed_uniform(keys, _LEVEL).double()) / budget).float().clamp(LEAST, MOST)
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=backbone.pad_id
    )
    start, length = (torch.tensor(each) for each in ([s for _, s in rows], [len(ids) for ids, _ in rows]))
    positions = torch.arange(tokens.shape[1])
    where = (positions >= start[:, None]) & (positions < length[:, None])
    inner = positions - start[:, None]  # targets of one prompt share their noise, position by position
    place = keyed_uniform(keys[:, None], draw[:, None], inner, _PLACE)
    random = keyed_hash(keys[:, None], draw[:, None], inner, _TOKEN)
    z = process.corrupted(tokens, where, level, place, random)
    row, position = where.nonzero(as_tuple=True)
    device = backbone.device
    layout = layout_of(length.tolist(), tokens.shape[1], device=device)
    hidden = backbone.hidden_at(z.to(device), layout, row.to(device), position.to(device))
    levels, widths = _grid()
    sums = torch.zeros(len(rows), _GRID, dtype=torch.float64)
    for part in torch.split(torch.arange(len(row)), _SCORED):
        at = row[part], position[part]
        log_p = text_log_p(backbone, backbone.head_logits(hidden[part])).cpu().double()
        sums.index_add_(0, at[0], _terms(process, log_p, tokens[at], z[at], levels))
    probability = _log_probability(process, tokens, z, where, levels)
    share = torch.softmax(probability + widths.log(), -1)
    return (share * sums).sum(-1).numpy()


def _grid() -> tuple[Tensor, Tensor]:
    """Levels and their widths [G], float64, of an integral over all levels."""
    x, weight = (torch.from_numpy(part) for part in numpy.polynomial.legendre.leggauss(_GRID))
    angle = (x + 1) * math.pi / 4
    return angle.sin() ** 2, weight * math.pi / 4 * (2 * angle).sin()


def _terms(process: HybridNoise, log_p: Tensor, target: Tensor, seen: Tensor, levels: Tensor) -> Tensor:
    """What each token adds to the bound at levels [G], in nats: [N, G] from log p [N, V] and tokens [N], float64."""
    rho = process.odds(levels)
    at_target, at_seen = (log_p.gather(1, token[:, None]) for token in (target, seen))
    # every token as the mean of its bin: the sum over tokens is right to about 1e-4 of itself
    bins = (-log_p / _BIN).clamp(0, _BINS - 1).long()
    count, mass = (
        torch.zeros(len(log_p), _BINS).double().scatter_add(1, bins, x) for x in (torch.ones_like(log_p), log_p.exp())
    )
    full = count.nonzero(as_tuple=True)
    each = count[full][:, None] * (mass[full] / count[full])[:, None].div(rho).log1p()
    spread = each.new_zeros(len(log_p), len(rho)).index_add_(0, full[0], each)
    kl, other = divergences(at_target, at_seen, (seen == target)[:, None], spread, rho)
    of_kl, of_other = process.weights(levels, seen[:, None], target[:, None])
    return of_kl * kl + of_other * other


def _log_probability(process: HybridNoise, x: Tensor, z: Tensor, where: Tensor, levels: Tensor) -> Tensor:
    """log q_r(z | x) [B, G] of rows [B, L] at levels [G], where `where` [B, L]."""
    alpha, masks, uniform = process.shares(levels)
    masked = z == process.mask_id
    states = (masked, (z != x) & ~masked, z == x)
    counts = torch.stack([(state & where).sum(1) for state in states], 1).double()
    each = torch.stack([masks.clamp(min=1e-300), uniform / process.tokens, alpha + uniform / process.tokens]).log()
    return counts @ each
