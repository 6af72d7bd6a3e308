"""What scorers share whose passes are a systematic sample: noise levels evenly spaced behind a random offset.

Source of the standard error: Wolter 2007, Introduction to Variance Estimation, 8.2.
"""

from __future__ import annotations

import math

import numpy

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import canvas_for
from dllm.likelihood.requests import Rows
from dllm.models.backbone import Backbone
from dllm.sampling.sampler import Sampler

LEAST_BUDGET = 2
"""Passes of the smallest estimate: its error comes from their differences."""


def neighbour_noise(values: numpy.ndarray) -> numpy.ndarray:
    """The noise [..., K - 1] of the mean of K passes [..., K], from the differences of neighbours."""
    count = values.shape[-1]
    noise: numpy.ndarray = numpy.diff(values, axis=-1) * math.sqrt(count / 2 / (count - 1)) / count
    return noise


def check_settings(settings: LikelihoodSettings, *, model: str, bound: str) -> None:
    """Raise ValueError, one line, for settings that concern masks, or too few passes for a standard error.

    model, bound: how the line calls what has an estimator of its own, and its bound.
    """
    for name, usual in (("estimator", "auto"), ("block_size", None)):
        if (value := getattr(settings, name)) != usual:
            raise ValueError(f"{name} = {value!r} means nothing to {model} of its own; leave it out")
    if settings.budget < LEAST_BUDGET:
        raise ValueError(
            f"budget = {settings.budget} is too small: {bound} needs {LEAST_BUDGET} passes at least, for its standard "
            "error; raise it"
        )


def greedy_matches(
    sampler: Sampler, backbone: Backbone, prompts: Rows, targets: Rows, *, mask_id: int, seed: int
) -> list[bool]:
    """Whether a sampler at temperature 0, on canvases of the targets' lengths, gives the targets."""
    if not len(prompts):
        return []
    counts = [len(target) for target in targets]
    canvas = canvas_for(prompts, counts, mask_id=mask_id, pad_id=backbone.pad_id)
    decoding = GenerateSettings(max_new_tokens=max(counts), early_stop=False, seed=seed)
    done = {row.number: row.tokens for row in sampler.complete(backbone, canvas, decoding)}
    return [done[number] == list(target) for number, target in enumerate(targets)]
