"""Likelihood designs: which tokens of a target to mask, pass by pass, and with what weight to count their nll.

The bound of masked diffusion with the time integrated out is, for a target of L tokens,

    NELBO = sum over k = 1..L of g_k,    g_k = E over |S| = k of [ (1/k) sum over i in S of nll_i(S) ],

nll_i(S) = -log p(x_i | the target with the set S masked). Every design below is linear in the nll and has exactly this
expectation; they differ in variance and passes. Sources: Sahoo et al. 2024 (arXiv:2406.07524), eq. 10; Ou et al. 2024
(arXiv:2406.03736), the any-order form; Nie et al. 2025 (arXiv:2502.09992), algorithm 3, for `mc`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dllm.config import LikelihoodSettings
from dllm.core.noise import keyed_hash, keyed_uniform

ENUMERATION_LIMIT = 12
"""Longest target whose 2^L - 1 masks are enumerated."""


@dataclass(frozen=True)
class Design:
    """S masked versions of a target of L tokens; the estimate is the sum of weight x nll over scored positions.

    masked and scored [S, L] bool (scored within masked); weight [S, L] float64, 0 where not scored. For the standard
    error: rows of the same unit [S] are added up, and units of the same stratum [S] estimate the same quantity.
    """

    masked: Tensor
    scored: Tensor
    weight: Tensor
    unit: Tensor
    stratum: Tensor


def likelihood_design(length: int, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """The design of `settings.estimator` for a target of `length` tokens; a pure function of its arguments.

    Requests with the same key and length share their masks (common random numbers), so that their differences are less
    noisy than their values. Raises ValueError for an empty target, or one the estimator does not take.
    """
    if length < 1:
        raise ValueError("a likelihood needs at least one target token, got none")
    name = estimator_for(length, settings.budget) if settings.estimator == "auto" else settings.estimator
    return ESTIMATORS[name](length, key, settings)


def estimator_for(length: int, budget: int) -> str:
    """The policy `auto`: the exact, or else least noisy, estimator within `budget` passes.

    One token: `exact`. Up to three, or whenever all masks cost no more than the chains that fit: `enumerate`. Then
    `chain` while an order and its mirror (2L - 1 passes) fit; `cover` for longer targets.
    """
    if length == 1:
        return "exact"
    pair = 2 * length - 1
    if length <= 3 or (length <= ENUMERATION_LIMIT and 2**length - 1 <= budget // pair * pair):
        return "enumerate"
    return "chain" if pair <= budget else "cover"


def estimate(design: Design, nll: Tensor) -> tuple[float, float]:
    """The bound in nats and its standard error, from nll [S, L] (read at scored positions only).

    With units u of stratum h, n_h of them: variance = sum over h of n_h / (n_h - 1) sum over u (c_u - mean_h)^2. A
    stratum of one unit is deterministic and adds nothing.
    """
    rows = torch.where(design.scored, design.weight * nll.double(), 0.0).sum(-1)
    units = int(design.unit.max()) + 1
    unit = torch.zeros(units, dtype=torch.float64).index_add(0, design.unit, rows)
    stratum = torch.zeros(units, dtype=torch.long).index_copy(0, design.unit, design.stratum)
    n = torch.bincount(stratum).double().clamp(min=1)
    mean = torch.zeros_like(n).index_add(0, stratum, unit) / n
    spread = torch.zeros_like(n).index_add(0, stratum, (unit - mean[stratum]) ** 2)
    variance = (spread * n / (n - 1).clamp(min=1)).sum()
    return float(rows.sum()), float(variance.sqrt())


def exact(length: int, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """One token, one pass: NELBO = nll. Raises ValueError for longer targets."""
    if length > 1:
        raise ValueError(
            f"estimator = 'exact' takes targets of one token, got {length} tokens; "
            f"use enumerate (up to {ENUMERATION_LIMIT} tokens), chain, cover or auto"
        )
    return enumerate_masks(length, key, settings)


def enumerate_masks(length: int, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """All 2^L - 1 masks, without noise: weight 1 / (k C(L, k)) for each token of a mask of size k.

    Raises ValueError beyond `ENUMERATION_LIMIT` tokens.
    """
    if length > ENUMERATION_LIMIT:
        raise ValueError(
            f"estimator = 'enumerate' takes targets of at most {ENUMERATION_LIMIT} tokens, got {length} "
            f"(2^{length} - 1 passes); use chain, cover or auto"
        )
    masked = (torch.arange(1, 2**length)[:, None] >> torch.arange(length)) & 1 == 1
    per_token = torch.tensor([0.0] + [1 / (k * math.comb(length, k)) for k in range(1, length + 1)]).double()
    return _single_unit(masked, per_token[masked.sum(1)][:, None] * masked)


def chain(length: int, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """Any-order chain rule along random orders, each with its mirror: 2L - 1 passes a pair, one scored token each.

    For an order o: sum over j of nll_{o_j}({o_j, ..., o_L}). With k tokens left the masked set is uniform among those
    of size k and o_j uniform in it, so the expectation is the sum of g_k. The mirror balances what is revealed early
    and late. A self-consistent model gives every order the same value: no variance at all. As many pairs as the budget
    holds, at least one. The standard error comes from the pairs, or for a single pair is half the difference of its two
    orders, which is cautious where the two are negatively correlated.
    """
    pairs = max(1, settings.budget // max(1, 2 * length - 1))
    positions = torch.arange(length)
    rank = keyed_uniform(key, torch.arange(pairs)[:, None], positions).argsort(-1)
    rank = torch.stack([rank, length - 1 - rank], 1)[:, :, None]
    masked = (rank >= positions[:, None]).flatten(0, 2)
    scored = (rank == positions[:, None]).flatten(0, 2)
    order = torch.arange(2 * pairs).repeat_interleave(length)
    unit = order if pairs == 1 else order // 2
    return Design(masked, scored, scored.double() / (2 * pairs), unit, torch.zeros_like(unit))


def cover(length: int, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """Windows on a random circle: for a mask size k, ceil(L / k) windows of k tokens cover the target.

    g_k is the mean over positions of the mean nll over the windows that hold it, unbiased because, given a token's
    place, the rest of its window is uniform. All sizes k if the budget holds them, repeated as often as it does (the
    standard error comes from the repetitions; of one, from neighbouring sizes, which overstates it). Otherwise two
    independent halves of stratified sizes; see `_stratified_cover`.
    """
    complete = sum(math.ceil(length / k) for k in range(1, length + 1))
    repetitions = settings.budget // complete
    if repetitions == 0:
        return _stratified_cover(length, key, settings.budget)
    parts, unit, stratum = [], [], []
    for r in range(repetitions):
        circle = _circles(length, length, keyed_hash(key, r))
        for k in range(1, length + 1):
            parts.append(_windows(length, k, math.ceil(length / k))[:, circle[k - 1]] / repetitions)
            pair = min((k - 1) // 2, max(0, length // 2 - 1))  # of an odd number, the last three together
            unit += [r if repetitions > 1 else k - 1] * len(parts[-1])
            stratum += [0 if repetitions > 1 else pair] * len(parts[-1])
    weight = torch.cat(parts)
    return Design(weight > 0, weight > 0, weight, torch.tensor(unit), torch.tensor(stratum))


def mc(length: int, key: int | Tensor, settings: LikelihoodSettings) -> Design:
    """The published estimator: draws of a uniform mask of size k, weight L / k, k spread over a batch of b draws.

    k_j = round(k_0 + j L / b), wrapped to 1..L, k_0 uniform. Rounding to even makes k slightly non-uniform where L / b
    has halves, as published: a small bias, the only one in this file. The standard error comes from the batches, or
    of a single batch from its draws, which overstates it. Source: Nie et al. 2025 (arXiv:2502.09992), algorithm 3 and
    the authors' evaluation code. Raises ValueError unless mc_batch divides mc_draws.
    """
    draws, size = settings.mc_draws, settings.mc_batch
    if draws % size:
        raise ValueError(
            f"mc_draws = {draws} is not a multiple of mc_batch = {size}; e.g. {draws // size * size or size}"
        )
    batch = torch.arange(draws) // size
    first = (keyed_uniform(key, torch.arange(draws // size), 0) * length).floor() + 1
    k = torch.round(first[batch] + torch.arange(draws) % size * (length / size)).long()
    k = (k - 1) % length + 1
    rank = keyed_uniform(key, torch.arange(draws)[:, None], 1, torch.arange(length)).argsort(-1)
    masked = rank < k[:, None]
    unit = batch if draws > size else torch.arange(draws)
    return Design(masked, masked, masked * (length / k.double() / draws)[:, None], unit, torch.zeros_like(unit))


ESTIMATORS: dict[str, Callable[[int, int | Tensor, LikelihoodSettings], Design]] = {
    "exact": exact,
    "enumerate": enumerate_masks,
    "chain": chain,
    "cover": cover,
    "mc": mc,
}


def _stratified_cover(length: int, key: int | Tensor, budget: int) -> Design:
    """Two independent halves, each of K sizes k: one per stratum of (0, L], antithetic in neighbouring strata.

    A size counts L / K times. Small sizes get only some of their windows; the tokens left out are accounted for by a
    control variate, their nll with everything masked (one more pass, mean known): g_k is estimated by
    mean_i b_i + mean over scored (nll_i - b_i). At most `budget` passes, but at least three.
    """
    nodes, most = _cover_plan(length, max(1, (budget - 1) // 2))
    weights, units = [], []
    for half in range(2):
        shift = keyed_uniform(key, half, 0, torch.arange(nodes) // 2).double()
        shift = torch.where(torch.arange(nodes) % 2 == 0, shift, 1 - shift)
        sizes = ((torch.arange(nodes) + shift) * (length / nodes)).floor().long().clamp(max=length - 1) + 1
        circles = _circles(nodes, length, keyed_hash(key, half, 1))
        windows = [_windows(length, k, min(math.ceil(length / k), most)) for k in sizes.tolist()]
        part = torch.cat([weight[:, circle] for weight, circle in zip(windows, circles, strict=True)])
        part = part * (length / nodes / 2)
        control = 0.5 - part.sum(0, keepdim=True)
        weights += [part, control]
        units += [half] * (len(part) + 1)
    weight = torch.cat(weights)
    scored = weight.abs() > 1e-12
    unit = torch.tensor(units)
    masked = scored | _is_control(weights)
    used = scored.any(-1)
    return Design(masked[used], scored[used], weight[used], unit[used], torch.zeros_like(unit[used]))


def _is_control(weights: list[Tensor]) -> Tensor:
    """[S, 1] bool: the last row of each half, which masks everything."""
    return torch.cat([torch.full((len(w), 1), i % 2 == 1) for i, w in enumerate(weights)])


def _cover_plan(length: int, passes: int) -> tuple[int, int]:
    """How many sizes a half takes and the most windows of one size, so that it needs at most `passes` passes."""
    most = min(8, max(1, passes // 4))
    for nodes in range(min(length, passes), 1, -1):
        smallest = [node * length // nodes + 1 for node in range(nodes)]
        if sum(min(math.ceil(length / k), most) for k in smallest) <= passes:
            return nodes, most
    return 1, min(most, passes)


@lru_cache(maxsize=4096)
def _windows(length: int, k: int, count: int) -> Tensor:
    """Weights [count, L] of `count` of the ceil(L / k) windows: the mean over covered places of their mean nll."""
    starts = torch.arange(count) * length // math.ceil(length / k)
    places = (starts[:, None] + torch.arange(k)) % length
    covered = torch.zeros(count, length, dtype=torch.float64).scatter_(1, places, 1.0)
    times = covered.sum(0)
    return covered / times.clamp(min=1) / (times > 0).sum()


def _circles(count: int, length: int, key: int | Tensor) -> Tensor:
    """`count` random arrangements of the positions, [count, L] long."""
    return keyed_uniform(key, torch.arange(count)[:, None], torch.arange(length)).argsort(-1)


def _single_unit(masked: Tensor, weight: Tensor) -> Design:
    one = torch.zeros(len(masked), dtype=torch.long)
    return Design(masked, masked, weight, one, one)
