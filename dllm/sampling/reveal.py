"""Reveal: which token a masked position would take, and which positions are revealed first.

The two choices are separate: a token is drawn from p = softmax(logits / temperature) with one uniform number, a
position is chosen by a score of the untempered distribution. Fp32 is enough for both (no Gumbel noise in fp64).
Sources: Nie et al. 2025 (arXiv:2502.09992): confidence, random; Ye et al. 2025 (arXiv:2508.15487): entropy, margin;
Wu et al. 2025 (arXiv:2505.22618): threshold, factor; Ben-Hamu et al. 2025 (arXiv:2505.24857): entropy bound.
The table of the rules is `dllm.choices.REVEAL_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dllm.core.noise import keyed_uniform

_TOKEN_STREAM, _POSITION_STREAM = 0, 1

_BLOCK = 64
"""Tokens of which `most_probable` takes the largest number at a time."""


def token_noise(keys: Tensor, positions: Tensor, step: int | Tensor) -> Tensor:
    """The uniform numbers of the token draws: one per row key, position and pass of the row; the shapes broadcast."""
    return keyed_uniform(keys, positions, step, _TOKEN_STREAM)


def position_noise(keys: Tensor, positions: Tensor, step: int | Tensor) -> Tensor:
    """The uniform numbers of the rule `random`, independent of `token_noise`."""
    return keyed_uniform(keys, positions, step, _POSITION_STREAM)


def propose_tokens(
    logits: Tensor, noise: Tensor | None, *, temperature: float | Tensor = 1.0, top_p: float | Tensor = 1.0
) -> Tensor:
    """The token each position would take, [N] long.

    logits [N, V] fp32. Without noise the most probable one; otherwise token v with F(v - 1) <= noise < F(v), F the
    cumulative distribution of softmax(logits / temperature) within its nucleus of mass `top_p`; noise [N] in [0, 1).
    temperature, top_p: above 0, one number or one per position, [N, 1].
    """
    if noise is None:
        return most_probable(logits)
    p = torch.softmax(logits / temperature, -1)
    if isinstance(top_p, Tensor) or top_p < 1:
        p = nucleus(p, top_p)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1]
    # strictly below the total, or rounding could pick a last token of probability 0
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def most_probable(logits: Tensor) -> Tensor:
    """argmax [N] of logits [N, V], the first among equals.

    A CPU takes the index of a largest number one number after the other, and the largest number alone many at a time:
    so first the block that has it, then its place there. Of 50,000 tokens that is a fifth of the time.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    size = logits.shape[-1]
    whole = size - size % _BLOCK
    largest = logits[:, :whole].unflatten(-1, (whole // _BLOCK, _BLOCK)).amax(-1)
    if whole < size:
        largest = torch.cat([largest, logits[:, whole:].amax(-1, keepdim=True)], -1)
    tokens = largest.argmax(-1, keepdim=True) * _BLOCK + torch.arange(_BLOCK)
    tokens = tokens.clamp(max=size - 1)  # of a last block that is shorter
    place = logits.gather(-1, tokens).argmax(-1, keepdim=True)
    return tokens.gather(-1, place)[:, 0]


def nucleus(p: Tensor, top_p: float | Tensor) -> Tensor:
    """p [N, V] with everything outside the smallest set of mass `top_p` set to 0 (not renormalised)."""
    descending, order = p.sort(dim=-1, descending=True, stable=True)
    outside = descending.cumsum(-1) - descending >= top_p
    outside[:, 0] = False
    return p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)


def token_confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """softmax(logits)[token], the probability of each proposed token: [N] from logits [N, V] and tokens [N]."""
    return cross_entropy(logits, tokens, reduction="none").neg().exp()


def confidence_score(logits: Tensor, confidence: Tensor, noise: Tensor | None) -> Tensor:
    """The probability of the proposed token."""
    return confidence


def negative_entropy(logits: Tensor, confidence: Tensor, noise: Tensor | None) -> Tensor:
    """Minus the entropy of the distribution, in nats."""
    p = torch.softmax(logits, -1)
    return torch.special.xlogy(p, p).sum(-1)


def margin(logits: Tensor, confidence: Tensor, noise: Tensor | None) -> Tensor:
    """How much more probable the most probable token is than the second."""
    top = torch.softmax(logits, -1).topk(2, -1).values
    return top[:, 0] - top[:, 1]


def noise_score(logits: Tensor, confidence: Tensor, noise: Tensor | None) -> Tensor:
    """The position noise itself: a random order."""
    return noise


def above_threshold(ranked: Tensor, threshold: float | Tensor) -> Tensor:
    """How many scores [B, S] are at least the threshold."""
    return (ranked >= threshold).sum(-1)


def within_factor(ranked: Tensor, factor: float | Tensor) -> Tensor:
    """The number n of leading scores [B, S] that are above 1 - factor / (n + 1)."""
    rank = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
    sure = ranked > 1 - factor / (rank + 1)
    # the first is revealed whatever its confidence, so that it does not end the run of sure ones
    return (sure | (rank == 1)).long().cumprod(-1).sum(-1)


def within_entropy_bound(ranked: Tensor, bound: float | Tensor) -> Tensor:
    """How many leading positions have entropies that, without the largest, sum to at most the bound; ranked [B, S]."""
    entropy = -ranked
    return (entropy.cumsum(-1) - entropy.cummax(-1).values <= bound).sum(-1)


def choose_positions(
    score: Tensor, candidate: Tensor, count: Tensor, sure: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The `count` [B] best candidates of each row, [B, S] bool; among equals the leftmost.

    score [B, S] float; candidate [B, S] bool. A row with fewer candidates gives all of them. `sure` maps the scores in
    falling order, -inf behind the candidates, to a number [B] that is taken where it is the larger one.
    """
    ranked, order = score.masked_fill(~candidate, -torch.inf).sort(dim=-1, descending=True, stable=True)
    if sure is not None:
        count = torch.maximum(count, sure(ranked))
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return (rank < count[:, None]) & candidate
