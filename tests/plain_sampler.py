"""The plain sampler: one row at a time, the logits of the whole canvas in every pass, Python loops, no early stop.

It says what the vectorised sampler must do, rule by rule, and is what it is measured against.
"""

from __future__ import annotations

import math

import torch

from dllm.config import GenerateSettings
from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from dllm.core.packing import layout_of


@torch.no_grad()
def plain_row(backbone, row: list[int], start: int, settings: GenerateSettings) -> tuple[list[int], int]:
    """A row with its mask tokens revealed, and the passes taken; blocks are counted from `start`."""
    row = list(row)
    mask = backbone.mask_id
    given = torch.tensor([token != mask for token in row])
    key = keyed_hash(settings.seed, token_hash(torch.tensor(row), given))
    hidden = settings.ahead == "hidden" or (
        settings.ahead == "auto" and backbone.sidecar.get("response_end") == "block"
    )
    hidden = hidden and given[row.index(mask) if mask in row else len(row) :].sum() == 0
    blocks: dict[int, list[int]] = {}
    for place in range(len(row)):
        if row[place] == mask:
            blocks.setdefault(max(0, (place - start) // settings.block_size), []).append(place)
    passes = 0
    for (block, places), steps in zip(blocks.items(), spread(blocks, settings.steps), strict=True):
        end = min(len(row), start + (block + 1) * settings.block_size) if hidden else len(row)
        while masked := [place for place in places if row[place] == mask]:
            logits = scores(backbone, row[:end], settings.guidance, given[:end])
            found = [candidate(logits[place], place, key, passes, settings) for place in masked]
            for token, place in chosen(found, math.ceil(len(masked) / max(1, steps)), settings):
                row[place] = token
            passes, steps = passes + 1, steps - 1
    return row, passes


def spread(blocks: dict[int, list[int]], steps: int | None) -> list[int]:
    """Passes per block: as even as possible, no more than its masks, what is left over to the first with room."""
    sizes = [len(places) for places in blocks.values()]
    if steps is None:
        return sizes
    found = [min(size, steps // len(sizes) + (i < steps % len(sizes))) for i, size in enumerate(sizes)]
    for i, size in enumerate(sizes):
        found[i] += min(size - found[i], steps - sum(found))
    return found


def scores(backbone, row: list[int], guidance: float, given: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of the whole row, the mask token impossible."""

    def logits(tokens):
        return backbone.head_logits(backbone.hidden(tokens[None], layout_of([len(tokens)])))

    tokens = torch.tensor(row)
    found = logits(tokens)
    if guidance:
        bare = logits(torch.where(given, backbone.mask_id, tokens))
        found = bare + (guidance + 1) * (found - bare)
    found = found.clone()
    found[:, backbone.mask_id] = -torch.inf
    return found


def candidate(logits: torch.Tensor, place: int, key: torch.Tensor, step: int, settings: GenerateSettings):
    """(score, -place, token, confidence, entropy) of one masked position."""
    p = logits.softmax(-1)
    if settings.temperature == 0:
        token = int(logits.argmax())
    else:
        noise = float(keyed_uniform(key, place, step, 0))
        token = draw((logits / settings.temperature).softmax(-1), noise, settings.top_p)
    confidence = float((logits[token] - logits.logsumexp(-1)).exp())
    entropy = -float(torch.special.xlogy(p, p).sum())
    top = p.topk(2).values
    score = {
        "entropy": -entropy,
        "entropy_bound": -entropy,
        "margin": float(top[0] - top[1]),
        "random": float(keyed_uniform(key, place, step, 1)),
    }.get(settings.reveal_rule, confidence)
    return score, -place, token, confidence, entropy


def draw(p: torch.Tensor, noise: float, top_p: float) -> int:
    """The token at which the cumulative probability, within the nucleus of mass `top_p`, passes the noise."""
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_p < 1:
        mass = 0.0
        for token in p.sort(descending=True, stable=True).indices.tolist():
            kept[token] = mass < top_p
            mass += float(p[token])
    p = p * kept
    below = p.cumsum(-1) <= noise * p.sum()
    return int(below.sum())


def chosen(found: list[tuple], count: int, settings: GenerateSettings) -> list[tuple[int, int]]:
    """(token, place) of what is revealed: `count`, or more under a rule that takes all that is sure enough."""
    ranked = sorted(found, reverse=True)
    if settings.reveal_rule == "threshold":
        count = max(count, sum(confidence >= settings.threshold for _, _, _, confidence, _ in ranked))
    if settings.reveal_rule == "factor":
        count = max(count, within_factor([confidence for _, _, _, confidence, _ in ranked], settings.factor))
    if settings.reveal_rule == "entropy_bound":
        count = max(count, within_bound([entropy for *_, entropy in ranked], settings.entropy_bound))
    return [(token, -place) for _, place, token, _, _ in ranked[:count]]


def within_factor(confidences: list[float], factor: float) -> int:
    """The largest n with c_r > 1 - factor / (r + 1) for r = 2 .. n; confidences falling."""
    count = 1
    for rank in range(2, len(confidences) + 1):
        if confidences[rank - 1] <= 1 - factor / (rank + 1):
            break
        count = rank
    return count


def within_bound(entropies: list[float], bound: float) -> int:
    """The largest n whose entropies, without the largest, sum to `bound` at most, but 1 at least."""
    count = 1
    for rank in range(2, len(entropies) + 1):
        if sum(entropies[:rank]) - max(entropies[:rank]) > bound:
            break
        count = rank
    return count
