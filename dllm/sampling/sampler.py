"""Sampling: passes over the rows of a canvas until none has a mask; infilling and greedy decoding are the same loop.

One pass: score the masked positions of each row's active block, propose a token for each, reveal the best few
(`sampling.step`). The loop (`sampling.loop`) repeats it: over rows that all start together and whose canvas is shown
(`denoise`), over any number of rows that take the places of those that end (`complete`), or over rows that come and go
(`loop`).
Source: Nie et al. 2025 (arXiv:2502.09992), algorithm 5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dllm.config import GenerateSettings
from dllm.core.attention_pattern import BlockRule
from dllm.core.canvas import Canvas, Completion, Ended
from dllm.models.load import Backbone
from dllm.sampling.loop import DenoisingLoop
from dllm.sampling.rows import block_rule


class Sampler(ABC):
    """The one interface of sampling. A sampler has no state but its frozen settings; its subclasses are final."""

    @abstractmethod
    def denoise(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Canvas]:
        """The given canvas, then the canvas after every change, all rows together.

        A row's tokens depend on the model, the settings and its own given tokens only, not on its batch-mates. Every
        canvas has the full size, and one that was handed out is never changed. `ended` ends rows early.
        """

    def complete(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Completion]:
        """Every row of a canvas, which may be many and on the host, in the order in which they are done.

        At most `settings.batch_size` rows are computed together. A row's tokens and passes are those of the row alone.
        Here one batch is denoised after the other, the longest rows first, and `ended` is not asked.
        """
        for rows in canvas.length.argsort(descending=True, stable=True).split(settings.batch_size):
            frames = self.denoise(backbone, canvas.taken(rows, backbone.device), settings)
            last = next(frames)
            passes, done = torch.zeros_like(last.start), last.done
            for last in frames:
                passes, done = torch.where(done, passes, last.nfe), last.done
            share = last.computed // len(rows)
            for row, response, nfe in zip(rows.tolist(), last.responses(), passes.tolist(), strict=True):
                yield Completion(row, response, nfe, share)


@dataclass(frozen=True)
class MaskedSampler(Sampler):
    """Reveals masks, block by block.

    rule: how rows are cut into blocks of a model that attends block-causally, from a backbone and `block_size` of the
    settings; None: a model sees all that is there. Given tokens right of a block then do not help to fill it.
    Both members raise ValueError if a row is longer than the model's context, or `steps` is less than the blocks of a
    row.
    """

    rule: Callable[[Backbone, int | None], BlockRule] | None = None

    def denoise(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Canvas]:
        """See `Sampler.denoise`; `ended` is asked after every pass."""
        loop = self.loop(backbone, math.inf, math.inf, every_pass=ended is not None)
        loop.add(canvas, settings, ended)
        yield canvas
        while loop.busy:
            rows, _ = loop.step()
            if rows is not None:
                copies = 2 if settings.guidance else 1
                step, nfe = canvas.step + 1, canvas.nfe + copies
                canvas = replace(rows.onto(canvas), step=step, nfe=nfe, computed=loop.computed)
                yield canvas

    def complete(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Completion]:
        """See `Sampler.complete`; the longest rows come first, and a row that is done makes room for the next.

        Rows that are computed together have `settings.batch_tokens` tokens at most. `ended` is asked after every pass
        (on an accelerator: every few passes of the row, and at the ends of its blocks). Raises ValueError if a row is
        longer than the token budget, too.
        """
        loop = self.loop(backbone, settings.batch_size, settings.batch_tokens)
        loop.add(canvas, settings, ended)
        while loop.busy:
            yield from loop.step()[1]

    def loop(
        self, backbone: Backbone, most_rows: float, most_tokens: float, *, every_pass: bool = False
    ) -> DenoisingLoop:
        """A loop without rows, for rows that come and go."""
        return DenoisingLoop(
            backbone, most_rows=most_rows, most_tokens=most_tokens, rule=self.rule, every_pass=every_pass
        )


def block_sampler() -> MaskedSampler:
    """The sampler of models that attend block-causally."""
    return MaskedSampler(block_rule)
