"""The nouns of sampling and scoring: the canvas a sampler edits, the score of a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Canvas:
    """B rows of [prompt | response | padding]; the padding is on the right only.

    tokens [B, L] long; masked [B, L] bool: still to be revealed; confidence [B, L] float32: the probability a token had
    when it was revealed, 1 for given tokens and for a filled end, 0 while masked; start [B] long: the first response
    position; length [B] long: where the padding begins; done [B] bool: nothing more will change in the row.
    step counts the changes so far, nfe the forward passes (a guided pass counts twice), computed the positions that
    went through the model in them.
    """

    tokens: Tensor
    masked: Tensor
    confidence: Tensor
    start: Tensor
    length: Tensor
    done: Tensor
    step: int = 0
    nfe: int = 0
    computed: int = 0

    @property
    def valid(self) -> Tensor:
        """[B, L] bool: prompt or response, not padding."""
        return self.positions < self.length[:, None]

    @property
    def positions(self) -> Tensor:
        """[L] long: 0, 1, ..., L - 1, on the canvas' device."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def taken(self, rows: Tensor, device: torch.device | str) -> Canvas:
        """Some rows [N], by number, on a device."""
        rows = rows.to(self.tokens.device)
        parts = ("tokens", "masked", "confidence", "start", "length", "done")
        return replace(self, **{part: getattr(self, part)[rows].to(device) for part in parts})

    def responses(self) -> list[list[int]]:
        """The tokens from `start` to `length` of each row, masks included."""
        rows = zip(self.tokens.tolist(), self.start.tolist(), self.length.tolist(), strict=True)
        return [row[start:length] for row, start, length in rows]


@dataclass(frozen=True)
class Completion:
    """A finished row: its number, its response without masks, and what it cost.

    passes: forward passes until it was done (a guided one counts twice); computed: positions of it in these passes.
    """

    number: int
    tokens: list[int]
    passes: int
    computed: int


@dataclass(frozen=True)
class Progress:
    """A row that is not done, after a pass: what `Ended` decides by.

    number: of the row; response: its tokens from `start` on, the mask token where they are masked; known: how many of
    them are before the first mask; new: how many of these were not known when it was last looked at.
    """

    number: int
    response: list[int]
    known: int
    new: int


Ended = Callable[[Progress], bool]
"""Whether a response ends here: a stop string in its text, say. What is still masked then becomes EOS."""


@dataclass(frozen=True)
class Score:
    """A bound on -log p(target | prompt): nats (lower is better), its standard error, forward rows spent on it.

    The standard error is 0 where the estimator is exact. A row shared by several requests is counted in one of them,
    so that the passes of a batch of requests add up to its forward rows.
    """

    nats: float
    standard_error: float
    passes: int


def canvas_for(
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    *,
    mask_id: int,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Canvas:
    """A canvas of `new_tokens` masks behind each prompt; `new_tokens` is one number or one per prompt.

    A mask inside a prompt is given, like every token there: `infill_canvas` is for holes that are to be filled.
    Raises ValueError without prompts.
    """
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    rows = [[*prompt, *[mask_id] * count] for prompt, count in zip(prompts, counts, strict=True)]
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return infill_canvas(rows, mask_id=mask_id, pad_id=pad_id, device=device, start=starts)


def infill_canvas(
    rows: Sequence[Sequence[int]],
    *,
    mask_id: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
) -> Canvas:
    """A canvas whose mask tokens from `start` [B] on are to be revealed; `start` is the first mask by default.

    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a canvas needs at least one row, got none")
    each = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    length = torch.tensor([len(row) for row in each], device=device)
    tokens = pad_sequence(each, batch_first=True, padding_value=pad_id).to(device)
    positions = torch.arange(tokens.shape[1], device=device)
    masked = (tokens == mask_id) & (positions < length[:, None])
    if start is not None:
        masked &= positions >= start[:, None]
    return Canvas(
        tokens=tokens,
        masked=masked,
        confidence=(~masked).float(),
        start=first_position(masked).minimum(length) if start is None else start,
        length=length,
        done=~masked.any(-1),
    )


def first_position(where: Tensor) -> Tensor:
    """The first true position of each row of `where` [B, L], or L where there is none: [B] long."""
    positions = torch.arange(where.shape[1], device=where.device)
    end = torch.full((where.shape[0], 1), where.shape[1], device=where.device)
    return torch.cat([torch.where(where, positions, where.shape[1]), end], 1).amin(1)
