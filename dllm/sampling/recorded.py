"""What a sampler drew, and when: its canvases as one table, from which the probability of what it drew follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.canvas import Canvas
from dllm.models.backbone import Backbone
from dllm.sampling.loop import DenoisingLoop
from dllm.sampling.rows import hides_ahead
from dllm.sampling.sampler import MaskedSampler


@dataclass(frozen=True)
class Recorded:
    """tokens [B, L] long: the finished rows; drawn [B, L] long: in which pass of the row a token was drawn, from 0, -1
    where none was; visible [B, L] long: how many of the row's first positions that pass saw. All on the host."""

    tokens: Tensor
    drawn: Tensor
    visible: Tensor


def add_seeded(loop: DenoisingLoop, canvas: Canvas, settings: GenerateSettings, seeds: Sequence[int]) -> None:
    """Queue the rows of a canvas in their order, each with a seed of its own [B]; equal ones stand side by side."""
    for seed, rows in groupby(range(len(seeds)), key=seeds.__getitem__):
        some = torch.tensor(list(rows))
        loop.add(canvas.taken(some, canvas.tokens.device), settings.model_copy(update={"seed": seed}))


def recorded(
    sampler: MaskedSampler, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, seeds: Sequence[int]
) -> Recorded:
    """Denoise a canvas whose responses are all masks, each row with a seed of its own; they are computed together.

    An end that is filled in is not drawn, nor is a token that had no alternative. On an accelerator nothing waits for
    the device before the end.
    """
    drawn = torch.full_like(canvas.tokens, -1)
    loop, made = sampler.loop(backbone, math.inf, math.inf), 0
    add_seeded(loop, canvas, settings, seeds)
    while loop.busy:
        rows, _ = loop.step()
        if rows is not None:  # all that are not done: they began together
            now = rows.onto(canvas)
            fresh = canvas.masked & ~now.masked & (now.confidence < 1)
            drawn, canvas, made = torch.where(fresh, made, drawn), now, made + 1
    length = canvas.length[:, None]
    visible = length.expand_as(drawn)
    if hides_ahead(backbone, settings):
        size, start = settings.block_size, canvas.start[:, None]
        visible = torch.minimum(
            length, start + ((canvas.positions - start).div(size, rounding_mode="floor") + 1) * size
        )
    return Recorded(canvas.tokens.cpu(), drawn.cpu(), visible.cpu())


def answer_ends(tokens: Tensor, starts: Tensor, lengths: Tensor, *, eos_id: int, block_size: int) -> Tensor:
    """Where the block ends in which each response of finished rows [B, L] ends: [B] long.

    A response without EOS takes its whole length; starts, lengths [B].
    """
    positions = torch.arange(tokens.shape[1])
    inside = (positions >= starts[:, None]) & (positions < lengths[:, None])
    text = (inside & (tokens != eos_id)) * (positions + 1)
    behind = torch.maximum(text.amax(-1), starts)  # the first EOS of those that fill the end
    blocks = (behind - starts).div(block_size, rounding_mode="floor") + 1
    return torch.minimum(lengths, starts + blocks * block_size)
