"""The rows of a denoising: what they begin as, and how they leave and join each other.

Each row has settings of its own. What the host decides by is numpy, what the model computes with is on its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.algorithms import trained_blocks
from dllm.choices import REMASKING
from dllm.config import GenerateSettings, Recipe
from dllm.core.attention_pattern import BlockRule
from dllm.core.canvas import Canvas
from dllm.core.noise import keyed_hash, token_hash
from dllm.models.backbone import Backbone
from dllm.sampling.plan import BlockPlan, plan_blocks


class Kind(NamedTuple):
    """What is done alike to the candidates of several rows: how they are ranked, and how their tokens are found."""

    reveal_rule: str
    drawn: bool
    """Tokens are drawn (temperature > 0) and not the most probable ones."""
    nucleus: bool
    """They are drawn from a nucleus (top_p < 1)."""


@dataclass(frozen=True, eq=False)
class RunningRows:
    """B rows that are being denoised. A pass changes arrays and tensors in place.

    On the host: number [B]: the rows' names; start, length [B]: where response and padding begin; origin [B]: where
    blocks are counted from; alone [B] bool: whether what is right of the active block is not there yet; refresh [B]:
    passes from one refresh of `reuse` to the next, 0: one per block; kind [B]: each a `Kind`; plan: their blocks;
    remask [B]: each a name of `REMASKING`, remask_share [B]: of it; edits [B] bool: revealed tokens may be replaced;
    computed [B]: positions computed so far; finished [B]: clean tokens whose keys and values are stored.

    On the device: tokens [B, L] long; masked, response (what was masked at first) [B, L] bool; confidence [B, L] fp32;
    keys [B] long: of their noise; passes [B] long: made until the row was done; done, early_stop [B] bool;
    temperature, top_p, guidance (scale + 1), sure (the number of a reveal rule that has one), edit_threshold [B] fp32.
    """

    number: ndarray
    start: ndarray
    length: ndarray
    origin: ndarray
    alone: ndarray
    refresh: ndarray
    kind: ndarray
    remask: ndarray
    remask_share: ndarray
    edits: ndarray
    plan: BlockPlan
    computed: ndarray
    finished: ndarray
    tokens: Tensor
    masked: Tensor
    response: Tensor
    confidence: Tensor
    keys: Tensor
    passes: Tensor
    done: Tensor
    early_stop: Tensor
    temperature: Tensor
    top_p: Tensor
    guidance: Tensor
    sure: Tensor
    edit_threshold: Tensor

    def __len__(self) -> int:
        return len(self.number)

    @property
    def revises(self) -> ndarray:
        """[B] bool: rows of whose active block no token is final."""
        return self.edits | (self.remask != "none")

    @property
    def final(self) -> ndarray:
        """[B]: the tokens before this position and before the first mask change no more."""
        return numpy.where(self.revises & self.plan.open, self.plan.of_block(self.plan.begin), self.length)

    def taken(self, rows: ndarray, device: torch.device) -> RunningRows:
        """A copy of some rows [N], by their places, on a device."""
        there = to_device(rows, self.tokens.device)
        width = int(self.length[rows].max(initial=0))

        def take(part: Any) -> Any:
            if is_dataclass(part) and not isinstance(part, type):
                return type(part)(**{field.name: take(getattr(part, field.name)) for field in fields(part)})
            if isinstance(part, ndarray):
                return part[rows]
            part = part.index_select(0, there)
            part = part[:, :width].contiguous() if part.dim() == 2 else part
            return part.to(device, non_blocking=True)

        return take(self)

    def joined(self, others: RunningRows, pad_id: int) -> RunningRows:
        """These rows and then the others, all as wide as the longest."""
        width = int(max(self.length.max(initial=0), others.length.max(initial=0)))
        padding = {"tokens": pad_id, "confidence": 1.0}

        def join(name: str, one: Any, two: Any) -> Any:
            if is_dataclass(one) and not isinstance(one, type):
                names = [field.name for field in fields(one)]
                return type(one)(**{name: join(name, getattr(one, name), getattr(two, name)) for name in names})
            if isinstance(one, Tensor):
                fill = padding.get(name, False)
                return torch.cat([_widened(part, width, fill) if part.dim() == 2 else part for part in (one, two)])
            if one.ndim == 2 and one.shape[1] != two.shape[1]:
                most = max(one.shape[1], two.shape[1])
                one, two = (numpy.pad(part, ((0, 0), (0, most - part.shape[1]))) for part in (one, two))
            return numpy.concatenate([one, two])

        return join("", self, others)

    def end(self, ended: Tensor, eos_id: int) -> None:
        """Fill the masks of ended rows [B] with EOS: they are done."""
        fill = self.masked & ended[:, None]
        self.tokens.masked_fill_(fill, eos_id)
        self.confidence.masked_fill_(fill, 1.0)
        self.masked.logical_and_(~fill)
        self.done.logical_or_(ended)

    def onto(self, canvas: Canvas) -> Canvas:
        """The canvas whose rows they are, by number, with these as they are now; the canvas itself is not changed."""
        at = to_device(self.number, canvas.tokens.device)

        def placed(rows: Tensor, new: Tensor) -> Tensor:
            rows = rows.clone()
            rows[at, : new.shape[1]] = new
            return rows

        return replace(
            canvas,
            tokens=placed(canvas.tokens, self.tokens),
            masked=placed(canvas.masked, self.masked),
            confidence=placed(canvas.confidence, self.confidence),
            done=canvas.done.index_copy(0, at, self.done),
        )


def first_rows(
    backbone: Backbone, canvas: Canvas, settings: GenerateSettings, rule: BlockRule | None, number: int
) -> RunningRows:
    """The rows of a canvas at their beginning, named number, number + 1, ..., on the canvas' device.

    rule: how they are cut into blocks of a model that attends block-causally; None: it sees all that is there.
    Raises ValueError if `steps` is less than the blocks of a row, and for a model that was trained without masks.
    """
    if backbone.sidecar.get("uniform_share") == 1:
        raise ValueError("this model was trained without masks (uniform_share = 1); use algorithm: hybrid")
    masked, start, length = (x.cpu().numpy() for x in (canvas.masked, canvas.start, canvas.length))
    origin, size, count = start, settings.block_size, len(start)
    if rule is not None:
        first_mask = numpy.where(masked.any(1), masked.argmax(1), length)
        origin, size = rule.starts(numpy.minimum(start, first_mask)), rule.size
    behind = numpy.where(masked.any(1), length - masked.argmax(1), 0)  # positions from the first mask on
    kind = numpy.empty(count, dtype=object)
    kind[:] = [Kind(settings.reveal_rule, settings.temperature > 0, settings.top_p < 1)] * count
    # a share of 0 takes nothing back: this is the sampler without remasking, token for token
    remask = settings.remask if settings.remask_share > 0 else "none"
    edits = settings.edit_threshold is not None

    def each(value: float | bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=canvas.tokens.device)

    return RunningRows(
        number=number + numpy.arange(count),
        start=start,
        length=length,
        origin=origin,
        alone=(hides_ahead(backbone, settings) & (masked.sum(1) == behind)) | (rule is not None),
        refresh=numpy.full(count, settings.refresh or 0),
        kind=kind,
        remask=numpy.full(count, remask, dtype=object),
        remask_share=numpy.full(count, settings.remask_share),
        edits=numpy.full(count, edits),
        plan=plan_blocks(
            masked,
            origin,
            size,
            settings.steps,
            held=None if remask == "none" else REMASKING[remask].held,
            edits=settings.edit_passes if edits else 0,
        ),
        computed=numpy.zeros(count, dtype=numpy.int64),
        finished=numpy.zeros(count, dtype=numpy.int64),
        tokens=canvas.tokens,
        masked=canvas.masked,
        response=canvas.masked,
        confidence=canvas.confidence,
        keys=keyed_hash(settings.seed, token_hash(canvas.tokens, canvas.valid & ~canvas.masked)),
        passes=each(0, torch.long),
        done=canvas.done,
        early_stop=each(settings.early_stop, torch.bool),
        temperature=each(settings.temperature),
        top_p=each(settings.top_p),
        guidance=each(settings.guidance + 1),
        sure=each(getattr(settings, settings.reveal_rule, 0.0)),
        edit_threshold=each(settings.edit_threshold if edits else 2.0),
    )


def block_rule(backbone: Backbone, block_size: int | None = None) -> BlockRule:
    """How a backbone's rows are cut into blocks, if it attends block-causally.

    Its blocks are those that it was trained with, whatever the settings; `block_size` (None: that of a default recipe)
    counts for a model that was not trained in blocks.
    """
    sidecar = backbone.sidecar
    if trained_blocks(sidecar.get("algorithm")) == "trained":
        return BlockRule(int(sidecar["block_size"]), sidecar.get("block_anchor", "response"))
    return BlockRule(block_size or Recipe().block_size, Recipe().block_anchor)


NO_REVISING: dict[str, tuple] = {"remask": ("none",), "edit_threshold": (None,)}
"""What `reject_options` allows where revealed tokens are not revised pass by pass."""


def reject_options(algorithm: str, settings: GenerateSettings, allowed: dict[str, tuple]) -> None:
    """Raise ValueError, one line, for a sampler's option with a value that an algorithm has no use for.

    allowed: the values of each option that mean something to it.
    """
    for name, values in allowed.items():
        if (value := getattr(settings, name)) not in values:
            raise ValueError(
                f"{name} = {value!r} means nothing to algorithm = {algorithm!r}; allowed: "
                f"{', '.join(map(str, values))}; leave it out"
            )


def check_context(canvas: Canvas, max_length: int) -> None:
    """Raises ValueError if a row of a canvas is longer than the model's context."""
    longest = int(canvas.length.max())
    if longest > max_length:
        raise ValueError(
            f"a prompt and its new tokens take {longest} positions, the model has {max_length}. "
            "Shorten the prompt or max_new_tokens"
        )


def hides_ahead(backbone: Backbone, settings: GenerateSettings) -> bool:
    """Whether what is right of the active block is not there yet, in a response that is all masks at first."""
    if settings.ahead == "auto":
        return backbone.sidecar.get("response_end") == "block"
    return settings.ahead == "hidden"


def to_device(values: ndarray | Sequence[ndarray], device: torch.device):
    """Integer arrays of the host on a device, several in one copy, without waiting for it."""
    arrays = [values] if isinstance(values, ndarray) else values
    packed = torch.from_numpy(numpy.concatenate([array.ravel().astype(numpy.int64) for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory()
    moved = packed.to(device, non_blocking=True).split([array.size for array in arrays])
    shaped = [part.view(array.shape) for part, array in zip(moved, arrays, strict=True)]
    return shaped[0] if isinstance(values, ndarray) else shaped


def _widened(values: Tensor, width: int, fill) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
