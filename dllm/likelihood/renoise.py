"""Scores of models that renoise (DiffusionGemma): the bound of ancestral sampling with uniform noise, in N passes.

The process whose likelihood is bounded starts from uniform tokens and takes N passes, from t = 1 to t = 0 in equal
steps. With alpha(t) = 1 - t, q(x_t | x_0) keeps a token with probability alpha(t) and else draws one of V uniformly. A
pass from t to s draws every token of x_s from

    p(x_s | x_t) = sum over x_0 of p(x_0 | x_t) q(x_s | x_t, x_0),

with p(x_0 | x_t) the model's prediction without self-conditioning: a pass knows its canvas only. Then

    -log p(x_0)  <=  sum over n = 1..N of  E over x_t of KL( q(x_s | x_t, x_0) || p(x_s | x_t) )

with t = n/N and s = (n - 1)/N. The term of n = 1 is -log p(x_0 | x_t); at t = 1 nothing is left, since q is uniform.
A canvas is as long as what is left of the target, and at most as long as the model's own; what is before it is given.
Source: Austin et al. 2021 (arXiv:2107.03006), eqs. 1 to 4, uniform transitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from dllm.config import LikelihoodSettings
from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from dllm.core.renoise import step_divergence
from dllm.likelihood.racing import Estimates
from dllm.likelihood.requests import Rows
from dllm.likelihood.scorer import LikelihoodScorer, check_requests
from dllm.likelihood.systematic import check_settings, greedy_matches, neighbour_noise
from dllm.models.backbone import Backbone
from dllm.models.diffusion_gemma import Prefix, process_steps
from dllm.sampling.renoise import NO_TOKEN, RenoisingSampler

_LEVEL, _PLACE, _TOKEN = range(3)

_HELD = 2**24
"""Most probabilities held at once, in float64."""


@dataclass(frozen=True)
class RenoisingScorer(LikelihoodScorer):
    """Bounds by Monte Carlo over noised canvases: levels evenly spaced behind a random offset, one canvas for each.

    They are of -log p(target | prompt, its length), from `settings.budget` passes a canvas.
    """

    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """See `LikelihoodScorer.greedy_match`; what the sampler writes behind the target does not count."""
        _check(backbone, prompts, targets, settings)
        ids = {"mask_id": NO_TOKEN, "seed": settings.seed}
        return greedy_matches(RenoisingSampler(), backbone, prompts, targets, **ids)

    def estimates(
        self,
        backbone: Backbone,
        prompts: Rows,
        targets: Rows,
        settings: LikelihoodSettings,
        like: Rows | None = None,
        between: Callable[[], object] | None = None,
    ) -> Estimates:
        """See `LikelihoodScorer.estimates`; `between` is called after the passes of every canvas."""
        _check(backbone, prompts, targets, settings)
        budget, size = settings.budget, backbone.sidecar["block_size"]
        nats, passes = numpy.zeros(len(prompts)), numpy.zeros(len(prompts), dtype=numpy.int64)
        most = max((math.ceil(len(target) / size) for target in targets), default=0)
        noise = numpy.zeros((len(prompts), most, budget - 1))
        for request, (prompt, target, whose) in enumerate(zip(prompts, targets, like or prompts, strict=True)):
            key = keyed_hash(settings.seed, token_hash(torch.tensor(list(whose), dtype=torch.long)))
            given = list(prompt) or [backbone.tokenizer.bos_token_id]  # before the second canvas, too
            for number, begin in enumerate(range(0, len(target), size)):
                before, text = [*given, *target[:begin]], list(target[begin : begin + size])
                values = _values(backbone, before, text, keyed_hash(key, number), settings)
                nats[request] += values.mean()
                noise[request, number] = neighbour_noise(values)
                passes[request] += budget + 1
                if between is not None:
                    between()
        return nats, noise.reshape(len(nats), -1), passes


def _values(
    backbone: Backbone, before: list[int], text: list[int], key: Tensor, settings: LikelihoodSettings
) -> numpy.ndarray:
    """What each pass says of the bound of a canvas, [budget] in nats; their mean is the estimate."""
    steps, budget = process_steps(backbone), settings.budget
    levels = noise_levels(key, steps, budget)
    target = torch.tensor(text)
    noised = noised_canvases(target, levels, steps, backbone.vocab_size, key)
    rows = min(budget, max(1, settings.batch_tokens // (len(before) + len(text))))
    values: list[float] = []
    prefix = Prefix(backbone, rows)
    prefix.read(before)
    for low in range(0, budget, rows):
        some = slice(low, min(low + rows, budget))
        if some.stop - low < prefix.rows:  # the last batch
            prefix = Prefix(backbone, some.stop - low)
            prefix.read(before)
        logits = prefix.predict(noised[some].to(backbone.device))
        for level, seen, found in zip(levels[some].tolist(), noised[some], logits, strict=True):
            values.append(steps * float(token_divergences(found, seen, target, level, steps).sum()))
    return numpy.array(values)


def noise_levels(key: Tensor, steps: int, budget: int) -> Tensor:
    """Levels n [budget] in 1..N, evenly spaced behind a random offset."""
    place = (torch.arange(budget) + keyed_uniform(key, _LEVEL).double()) / budget
    return (place * steps).long().clamp(max=steps - 1) + 1


def noised_canvases(target: Tensor, levels: Tensor, steps: int, vocabulary: int, key: Tensor) -> Tensor:
    """A canvas x_t [B, S] of the target [S] for every level n [B], t = n/N."""
    draw, position = torch.arange(len(levels))[:, None], torch.arange(len(target))
    drawn = (keyed_uniform(key, draw, position, _TOKEN) * vocabulary).long()
    kept = keyed_uniform(key, draw, position, _PLACE) >= levels[:, None] / steps
    return torch.where(kept, target, drawn)


def token_divergences(logits: Tensor, seen: Tensor, target: Tensor, level: int, steps: int) -> Tensor:
    """`core.renoise.step_divergence` of each token of a canvas [S], float64 nats, at one level; logits [S, V]."""
    height = max(1, _HELD // logits.shape[-1])
    parts = [slice(low, low + height) for low in range(0, len(seen), height)]
    levels = torch.full((len(seen),), level)
    # on the host: there are devices without float64
    return torch.cat(
        [step_divergence(logits[x].cpu().double(), seen[x].cpu(), target[x].cpu(), levels[x], steps) for x in parts]
    )


def _check(backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> None:
    check_requests(backbone, prompts, targets)
    name = "a model of algorithm = 'renoise'"
    check_settings(settings, model=f"{name}, whose bound has an estimator and canvases", bound=f"the bound of {name}")
