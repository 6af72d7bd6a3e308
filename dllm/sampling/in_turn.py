"""Rows of samplers whose passes a batch takes together: one batch is denoised after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dllm.config import GenerateSettings
from dllm.core.canvas import Canvas, Completion
from dllm.models.backbone import Backbone

if TYPE_CHECKING:
    from dllm.sampling.sampler import Sampler


def batch_after_batch(
    sampler: Sampler, backbone: Backbone, canvas: Canvas, settings: GenerateSettings
) -> Iterator[Completion]:
    """The rows of a canvas, the longest first, `settings.batch_size` at a time."""
    for rows in canvas.length.argsort(descending=True, stable=True).split(settings.batch_size):
        frames = sampler.denoise(backbone, canvas.taken(rows, backbone.device), settings)
        last = next(frames)
        passes, done = torch.zeros_like(last.start), last.done
        for last in frames:
            passes, done = torch.where(done, passes, last.nfe), last.done
        share = last.computed // len(rows)
        for row, response, nfe in zip(rows.tolist(), last.responses(), passes.tolist(), strict=True):
            yield Completion(row, response, nfe, share)
