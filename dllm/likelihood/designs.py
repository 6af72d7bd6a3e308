"""Likelihood designs: which tokens of a target to mask, pass by pass, and with what weight to count their nll.

The bound of masked diffusion with the time integrated out is, for a target of L tokens,

    NELBO = sum over k = 1..L of g_k,    g_k = E over |S| = k of [ (1/k) sum over i in S of nll_i(S) ],

nll_i(S) = -log p(x_i | the target with the set S masked). Every design below is linear in the nll and, but for the
published one (`mc`), has exactly this expectation; they differ in variance and passes. A fixed arrangement of masks and
weights whose positions are permuted at random is unbiased if, for each size k, the weights on masks of that size add up
to 1 (or do so on average over random sizes): that leaves the masks and the single weights free to be chosen for a small
variance.
Sources: Sahoo et al. 2024 (arXiv:2406.07524), eq. 10; Ou et al. 2024 (arXiv:2406.03736), the any-order form; Nie et al.
2025 (arXiv:2502.09992), algorithm 3, for `mc`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dllm.algorithms import resolved
from dllm.choices import ESTIMATORS
from dllm.config import LikelihoodSettings
from dllm.core.noise import keyed_uniform
from dllm.likelihood.policy import LATTICE, SIZE_POWER, estimator_for


@dataclass(frozen=True)
class Design:
    """S masked versions of a target of L tokens; the estimate is the sum of weight x nll over masked positions.

    masked [..., S, L] bool; weight [..., S, L] float64, 0 where not masked; leading dimensions are those of the keys.
    For the standard error, passes of one unit [S] are added up, and units are independent estimates of one quantity.
    With blend [..., S, L] the first passes are those of `lattice`, and the error comes from how far the others are from
    blend x the nll with everything masked + (1 - blend) x that with every second token masked.
    """

    masked: Tensor
    weight: Tensor
    unit: Tensor
    blend: Tensor | None = None

    def of(self, keys: Tensor) -> Design:
        """The designs of some of the keys, whose dimension is the first."""
        blend = None if self.blend is None else self.blend[keys]
        return Design(self.masked[keys], self.weight[keys], self.unit, blend)


def likelihood_design(length: int | Tensor, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """The design of `settings.estimator` for a target of `length` tokens; a pure function of its arguments.

    `lattice` also takes long [N], the lengths of targets of several tokens, one for each key [N].

    key: an integer, or long [...], one design each. Requests with the same key share their random numbers, position by
    position, also if their lengths differ (common random numbers), so that their differences are less noisy than their
    values. Raises ValueError for an empty target, or one the estimator does not take within `settings.budget`.
    """
    name = settings.estimator if isinstance(length, Tensor) else estimator_for(length, settings)
    design: Design = resolved(ESTIMATORS[name].design)(length, torch.as_tensor(key), settings)
    return design


def estimate(design: Design, nll: Tensor) -> tuple[Tensor, Tensor]:
    """The bound in nats [...] and its noise [..., E], float64, from nll [..., S, L] (read at masked positions only).

    The standard error is the length of the noise. Noise is linear in the nll: with a common design, the standard error
    of the difference of two bounds is the length of the difference of their noises.
    Independent units u of n have noise (c_u - mean) sqrt(n / (n - 1)). The windows of `lattice` ascend in size, evenly
    spaced, so that their error is better seen in successive differences, (c_w+1 - c_w) sqrt(n / (2 (n - 1))).
    Source: Wolter 2007, Introduction to Variance Estimation, 8.2 (systematic samples).
    """
    if design.blend is not None:
        nll = torch.where(design.masked, nll.double(), 0.0)
        nats = _sum((design.weight * nll).flatten(-2), -1)
        full, second = nll[..., :1, :], nll[..., 1:LATTICE, :].sum(-2, keepdim=True)
        window = _sum((design.weight * (nll - second - design.blend * (full - second)))[..., LATTICE:, :], -1)
        return nats, window.diff(dim=-1) * math.sqrt(window.shape[-1] / 2 / (window.shape[-1] - 1))
    rows = torch.where(design.masked, design.weight * nll.double(), 0.0).sum(-1)
    units = int(design.unit.max()) + 1
    unit = rows.new_zeros(*rows.shape[:-1], units).index_add(-1, design.unit, rows)
    return unit.sum(-1), (unit - unit.mean(-1, keepdim=True)) * math.sqrt(units / max(1, units - 1))


def enumerate_masks(length: int, key: Tensor, settings: LikelihoodSettings) -> Design:
    """All 2^L - 1 masks, without noise: weight 1 / (k C(L, k)) for each token of a mask of size k."""
    masked = (torch.arange(1, 2**length)[:, None] >> torch.arange(length)) & 1 == 1
    per_token = torch.tensor([0.0] + [1 / (k * math.comb(length, k)) for k in range(1, length + 1)]).double()
    weight = per_token[masked.sum(1)][:, None] * masked
    masked, weight = (x.expand(*key.shape, *x.shape) for x in (masked, weight))
    return Design(masked, weight, torch.zeros(2**length - 1, dtype=torch.long))


def lattice(length: int | Tensor, key: Tensor, settings: LikelihoodSettings) -> Design:
    """Random windows, each corrected by what two fixed versions of the target say about it.

    The fixed versions are everything masked, nll b_i, and every second token masked, both ways, nll a_i: 3 passes.
    In between, the nll is taken to be m_i(S) = a_i + f_i(S) (b_i - a_i), f_i(S) = u^1.5 x the masked share of the
    target's tokens next to i, u = (|S| - 1) / (L - 1). Its expectation is known exactly, as E f_i = u^2.5 for each
    size (of L > 1 tokens), so that only nll - m has to be sampled: for every model without bias, and with little noise
    where m is good. The other passes draw their sizes systematically, small ones more often (|S| / L = x^1.5, x evenly
    spaced behind a random offset), because few tokens are scored there; 8 windows at a time lie on one random circle,
    the golden ratio of it apart. The total weight of a window follows from its size, its spread over the window's
    tokens from kernel quadrature. The standard error is that of the windows' corrections, and cautious.

    length: or long [N], of several tokens each, one for each key [N]; designs are then padded to the longest.
    """
    if not isinstance(length, Tensor):
        if length == 1:
            return enumerate_masks(length, key, settings)
        one = lattice(torch.full((key.numel(),), length), key.reshape(-1), settings)
        assert one.blend is not None  # every target of several tokens has one
        masked, weight, blend = (x.view(*key.shape, *x.shape[1:]) for x in (one.masked, one.weight, one.blend))
        return Design(masked, weight, one.unit, blend=blend)
    count, most = settings.budget - LATTICE, int(length.max())
    positions, number = torch.arange(most), torch.arange(count)
    inside = positions < length[:, None]
    k, total = _systematic_sizes(length[:, None], count, key)
    long = length[:, None].double()
    circles = -(-count // _WINDOWS_PER_CIRCLE)
    start = ((number // circles) * (long / _GOLDEN)).floor().long() % length[:, None]
    rank = _ranks(key, circles, length)[:, number % circles]
    window = ((rank - start[..., None]) % length[:, None, None] < k[..., None]) & inside[:, None]
    each = _window_weights(window, total, length)

    share = (k - 1).double() / (long - 1)
    side = torch.nn.functional.pad(window.double(), (1, 1))
    beside = torch.nn.functional.pad(inside.double(), (1, 1))
    near = (side[..., :-2] + side[..., 2:]) / (beside[:, :-2] + beside[:, 2:]).clamp(min=1)[:, None]
    blend = share[..., None] ** _BLEND_POWER * near
    mean = _mean_blends(length)[:, None]
    of_full = mean - _sum(each * blend, 1)
    of_second = 1 - mean - _sum(each * (1 - blend), 1)

    fixed = torch.stack([positions >= 0, positions % 2 == 0, positions % 2 == 1]) & inside[:, None]
    masked = torch.cat([fixed, window], 1)
    weight = torch.cat([torch.stack([of_full, of_second, of_second], 1) * fixed, each], 1)
    blend = torch.nn.functional.pad(blend, (0, 0, LATTICE, 0))
    return Design(masked, weight, torch.arange(LATTICE + count), blend=blend)


def _systematic_sizes(length: Tensor, count: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending sizes k [..., S], k / L = x^`SIZE_POWER`, x evenly spaced behind a random offset; their total weights.

    A total is 1 / the expected number of windows of that size. length broadcasts with [..., S].
    """
    offset, long = keyed_uniform(key[..., None], torch.tensor(0), -1).double(), length.double()
    k = ((long * ((torch.arange(count) + offset) / count) ** SIZE_POWER).floor().long() + 1).minimum(length)
    return k, 1 / (count * ((k / long) ** (1 / SIZE_POWER) - ((k - 1) / long) ** (1 / SIZE_POWER)))


def _window_weights(windows: Tensor, totals: Tensor, lengths: Tensor) -> Tensor:
    """Weights [K, S, L] of windows [K, S, L], those of a window adding up to its total [K, S].

    Kernel quadrature, position by position, for what the fixed passes leave. The prior is that the nll of a position
    changes smoothly with what is revealed: covariance 1 + exp(-d / 8), d the number of tokens revealed in one window
    and not in the other. With K the covariance of the windows that mask a position, and z their covariance with the
    mean over all sizes and sets, the weights of least variance are K^-1 (z + lambda), lambda such that the totals come
    out. The prior touches the noise only, not the expectation.
    """
    count, most = windows.shape[1:]
    # with empty windows up to a multiple of four, every matrix begins at a multiple of 64 bytes: where it is in
    # memory, and so its batch, does not change its rounding
    more = -count % 4
    windows, totals = torch.nn.functional.pad(windows, (0, 0, 0, more)), torch.nn.functional.pad(totals, (0, more))
    weights = torch.zeros(windows.shape, dtype=torch.float64)
    mean = _padded([_window_means(length) for length in lengths.tolist()])
    identity = torch.eye(count + more, dtype=torch.float64)
    height = max(1, 2**18 // (most * len(identity) ** 2))  # of keys at a time: two megabytes, which a cache holds
    for low in range(0, len(windows), height):
        here = slice(low, low + height)
        some, inside = windows[here], torch.arange(most) < lengths[here, None]
        revealed = (~some & inside[:, None]).double()
        number = revealed.sum(-1)
        distance = number[..., None] + number[..., None, :] - 2 * revealed @ revealed.mT
        covariance = 1 + torch.exp(-distance / _SCALE) + 1e-3 * identity
        target = mean[here].gather(1, number.long().clamp(max=most - 1))
        row, position = inside.nonzero(as_tuple=True)
        member = some.mT[row, position].double()
        both = member[:, :, None] * member[:, None]  # [P, S, S]: of every position the windows it is in
        inverses = torch.linalg.inv(both * covariance[row] + torch.diag_embed(1 - member)) * both
        together = torch.zeros_like(covariance).index_add_(0, row, inverses) + torch.diag_embed(~some.any(-1) * 1.0)
        left = totals[here].index_add(0, row, (inverses * target[row, None]).sum(-1), alpha=-1)
        multiplier = (torch.linalg.inv(together) * left[:, None]).sum(-1)
        weights[here].mT[row, position] = (inverses * (target + multiplier)[row, None]).sum(-1)
    return weights[:, :count]


@lru_cache(maxsize=4096)
def _window_means(length: int) -> Tensor:
    """[L]: by how many others are revealed, r, the mean covariance of a window with a version drawn as in the bound.

    That one has each of the L - 1 others revealed with probability u, u uniform in (0, 1): the mean of exp(-d / 8) is
    the integral over u of (c + (1 - c) u)^r (1 - (1 - c) u)^(L - 1 - r), c = exp(-1 / 8): a polynomial, integrated
    exactly by Gauss and Legendre's rule.
    """
    matrix = torch.arange(1, length // 2 + 2, dtype=torch.float64)
    beside = matrix / (4 * matrix**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    u, share = (nodes + 1) / 2, vectors[0] ** 2
    c, r = math.exp(-1 / _SCALE), torch.arange(length).double()[:, None]
    mean: Tensor = 1 + ((c + (1 - c) * u) ** r * (1 - (1 - c) * u) ** (length - 1 - r)) @ share
    return mean


def _mean_blends(lengths: Tensor) -> Tensor:
    """[N]: E f of `lattice` over all sizes."""

    def mean(length: int) -> Tensor:
        return ((torch.arange(length).double() / (length - 1)) ** (_BLEND_POWER + 1)).mean()

    each, number = torch.unique(lengths, return_inverse=True)
    return torch.stack([mean(length) for length in each.tolist()])[number]


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _sum(values: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, its terms added one after another: zeros behind them do not change its rounding."""
    return values.cumsum(dim).select(dim, -1)


_SCALE = 8.0
_BLEND_POWER = 1.5
_GOLDEN = (1 + 5**0.5) / 2
_WINDOWS_PER_CIRCLE = 8


def mc(length: int, key: Tensor, settings: LikelihoodSettings) -> Design:
    """The published estimator: draws of a uniform mask of size k, weight L / k, k spread over a batch of b draws.

    k_j = round(k_0 + j L / b), wrapped to 1..L, k_0 uniform. As published, halves are rounded to the even number, which
    is a bias for some L (docs/algorithms.md). The standard error, which does not know of it, comes from the batches, or
    of a single one from its draws.
    Source: Nie et al. 2025, algorithm 3 and the authors' evaluation code. Raises ValueError unless mc_batch divides
    mc_draws.
    """
    draws, size = settings.mc_draws, settings.mc_batch
    if draws % size:
        raise ValueError(
            f"mc_draws = {draws} is not a multiple of mc_batch = {size}; e.g. {draws // size * size or size}"
        )
    batch = torch.arange(draws) // size
    first = (keyed_uniform(key[..., None], torch.arange(draws // size), -1) * length).floor() + 1
    k = torch.round(first[..., batch] + torch.arange(draws) % size * (length / size)).long()
    k = ((k - 1) % length + 1)[..., None]
    masked = _ranks(key, draws, length) < k
    unit = batch if draws > size else torch.arange(draws)
    return Design(masked, masked * (length / k.double() / draws), unit)


def _ranks(key: Tensor, count: int, length: int | Tensor) -> Tensor:
    """`count` random ranks of the positions, [..., count, L] long; those of a prefix are in the same order.

    length: or one [N] for each key [N]; what is behind it then has the last ranks.
    """
    positions = torch.arange(int(length.max()) if isinstance(length, Tensor) else length)
    noise = keyed_uniform(key[..., None, None], torch.arange(count)[:, None], positions)
    if isinstance(length, Tensor):
        noise = noise.masked_fill((positions >= length[:, None])[:, None], 2.0)
    return noise.argsort(-1).argsort(-1)
