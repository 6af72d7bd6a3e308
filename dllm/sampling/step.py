"""One denoising pass over ragged rows, wherever each of them is: the step that all sampling shares.

The host knows in advance which block of a row is active and how many tokens a pass reveals (`sampling.plan`), so it
lays out every index of a pass itself, and nothing in a pass waits for the device. Only rules that reveal a varying
number of tokens report it, one small tensor per pass. What a row becomes depends on its own pass number, key and
tokens, and not on its batch-mates or on when it joined them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.algorithms import resolved, trained_blocks
from dllm.choices import REVEAL_RULES
from dllm.config import GenerateSettings, Recipe
from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.core.canvas import Canvas
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import Layout, block_layout, layout_of, part_of
from dllm.models.backbone import Backbone
from dllm.models.kv_cache import KVCache
from dllm.sampling.plan import BlockPlan, plan_blocks
from dllm.sampling.reveal import (
    choose_positions,
    position_noise,
    propose_tokens,
    token_confidence,
    token_noise,
)

_HEAD_LOGITS = {"cpu": 2**22, "cuda": 2**28}
"""Most logits held at a time: on a CPU what its cache holds, so that softmax does not read them from memory again."""


@dataclass(frozen=True, eq=False)
class RunningRows:
    """B rows that are being denoised. A pass changes the tensors in place.

    numbers [B]: which rows of the plan they are (host). index [B] long: the same, on the device. tokens [B, L] long;
    masked, response (what was masked at first) [B, L] bool; confidence [B, L] fp32; keys [B] long; passes [B] long:
    made until the row was done; done [B] bool.
    """

    numbers: ndarray
    index: Tensor
    tokens: Tensor
    masked: Tensor
    response: Tensor
    confidence: Tensor
    keys: Tensor
    passes: Tensor
    done: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def kept(self, keep: ndarray) -> RunningRows:
        """Only the rows [B] bool to keep."""
        if keep.all():
            return self
        rows = to_device(keep.nonzero()[0], self.tokens.device)
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return RunningRows(
            **{
                name: part[keep] if isinstance(part, ndarray) else part.index_select(0, rows)
                for name, part in parts.items()
            }
        )

    def joined(self, others: RunningRows, pad_id: int) -> RunningRows:
        """These rows and then the others, all as wide as the widest."""
        width = max(self.tokens.shape[1], others.tokens.shape[1])
        padding = {"tokens": pad_id, "confidence": 1.0}
        parts: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            pair = [getattr(self, name), getattr(others, name)]
            if isinstance(pair[0], ndarray):
                parts[name] = numpy.concatenate(pair)
            elif pair[0].dim() == 2:
                parts[name] = torch.cat([_widened(part, width, padding.get(name, False)) for part in pair])
            else:
                parts[name] = torch.cat(pair)
        return RunningRows(**parts)

    def end(self, ended: Tensor, eos_id: int) -> None:
        """Fill the masks of ended rows [B] with EOS; rows without masks are done."""
        fill = self.masked & ended[:, None]
        self.tokens.masked_fill_(fill, eos_id)
        self.confidence.masked_fill_(fill, 1.0)
        self.masked.logical_and_(~fill)
        torch.any(self.masked, 1, out=self.done).logical_not_()


class DenoisingStep:
    """The rows of a canvas, their plan, and the pass that takes some of them one step further."""

    def __init__(
        self,
        backbone: Backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        rule: BlockRule | None = None,
    ):
        """rule: how rows are cut into blocks of a model that attends block-causally; None: it sees all that is there.

        The keys and values of its finished blocks are kept, which is exact; they are not kept under guidance.
        Raises ValueError if `steps` is less than the blocks of a row.
        """
        self.backbone, self.settings, self.device = backbone, settings, torch.device(backbone.device)
        self.reveal_rule = REVEAL_RULES[settings.reveal_rule]
        self.sure: Callable[[Tensor], Tensor] | None = None
        """How many candidates are sure enough, by their scores in falling order; None: the plan alone says how many."""
        if self.reveal_rule.sure is not None:
            count, number = resolved(self.reveal_rule.sure), getattr(settings, settings.reveal_rule)
            self.sure = lambda ranked: count(ranked, number)
        given = canvas.valid & ~canvas.masked
        self.keys = keyed_hash(settings.seed, token_hash(canvas.tokens, given))
        self.canvas = canvas
        masked, self.start, self.length = (x.cpu().numpy() for x in (canvas.masked, canvas.start, canvas.length))
        self.rule, origin, size = rule, self.start, settings.block_size
        if rule is not None:
            first_mask = numpy.where(masked.any(1), masked.argmax(1), self.length)
            origin, size = rule.starts(numpy.minimum(self.start, first_mask)), rule.size
        self.origin = origin
        self.plan: BlockPlan = plan_blocks(masked, origin, size, settings.steps)
        self.hidden = _hides_ahead(backbone, masked, self.length, settings) | (rule is not None)
        self.computed = numpy.zeros(len(masked), dtype=numpy.int64)
        self._layouts: dict[tuple, Layout] = {}
        reuses = settings.reuse != "none" if rule is None else not settings.guidance
        self._cache = KVCache() if reuses else None
        self._cached = numpy.zeros(0, dtype=numpy.int64)
        self._finished = numpy.zeros_like(self.length)  # clean tokens of each row whose keys and values are stored

    @property
    def passes_per_step(self) -> int:
        """Forward passes of one step: a guided one takes two."""
        return 2 if self.settings.guidance else 1

    def rows(self, numbers: ndarray, width: int) -> RunningRows:
        """Rows of the canvas, by number, at their beginning, `width` positions of each."""
        canvas = self.canvas
        at = to_device(numbers, canvas.tokens.device)
        taken = {
            "tokens": canvas.tokens[at, :width],
            "masked": canvas.masked[at, :width],
            "response": canvas.masked[at, :width],
            "confidence": canvas.confidence[at, :width],
            "keys": self.keys[at],
            "done": canvas.done[at],
        }
        taken = {name: part.to(self.device, non_blocking=True) for name, part in taken.items()}
        return RunningRows(
            numbers=numbers,
            index=to_device(numbers, self.device),
            passes=torch.zeros(len(numbers), dtype=torch.long, device=self.device),
            **taken,
        )

    @torch.no_grad()
    def run(self, running: RunningRows) -> ndarray:
        """One pass: reveal tokens of every running row that is not done. Returns [B] bool: which ended their block."""
        plan, settings, rows = self.plan, self.settings, running.numbers
        window, masks = plan.window(rows)
        left, count = plan.left[rows], plan.counts(rows)
        row = numpy.repeat(numpy.arange(len(rows)), left)
        column = numpy.arange(len(row)) - numpy.repeat(left.cumsum() - left, left)
        parts = to_device((window, masks, count, plan.step[rows], row, column), self.device)
        window, masks, least, step, row, column = parts

        # the positions still masked, from left to right: as many as the host expects, or none in a row that is done
        size = window.shape[1]
        places = torch.arange(size, device=self.device)
        still = running.masked.gather(1, window) & (places < masks[:, None])
        rank = torch.where(still, still.cumsum(1) - 1, size)
        # (of a row that has ended, which the host does not know yet, some position of the block is taken instead)
        window = window[:, :1].repeat(1, size + 1).scatter_(1, rank, window)[:, :size]
        candidate = places < still.sum(1)[:, None]
        place = row * size + column
        position = window.flatten().index_select(0, place)

        keys = running.keys.index_select(0, row)
        tokens, confidence, score = self._propose(running, row, position, keys, step.index_select(0, row))
        table = score.new_full((len(rows), size), -torch.inf)
        table.view(-1).index_copy_(0, place, score)
        chosen = choose_positions(table, candidate, least, self.sure)

        running.passes.add_(~running.done)
        self._reveal(running, row * running.tokens.shape[1] + position, chosen.flatten()[place], tokens, confidence)
        if settings.early_stop:
            eos = (running.tokens == self.backbone.eos_id) & running.response & ~running.masked
            running.end((eos & (running.masked.cumsum(1) == 0)).any(1), self.backbone.eos_id)
        else:
            torch.any(running.masked, 1, out=running.done).logical_not_()
        revealed = chosen.sum(1).cpu().numpy() if self.sure else count
        return plan.advance(rows, numpy.minimum(revealed, left))

    def _reveal(self, running: RunningRows, flat: Tensor, chosen: Tensor, tokens: Tensor, confidence: Tensor) -> None:
        """Write what was chosen [N] among the proposals at `flat` [N], row * L + position."""
        for canvas, values in ((running.tokens, tokens), (running.confidence, confidence), (running.masked, None)):
            canvas = canvas.view(-1)
            before = canvas.index_select(0, flat)
            after = before & ~chosen if values is None else torch.where(chosen, values, before)
            canvas.index_copy_(0, flat, after)

    def _propose(
        self, running: RunningRows, row: Tensor, position: Tensor, keys: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token, its probability and its score under the reveal rule for each candidate [N].

        The head runs on a part of the candidates at a time, so that memory does not grow with their number.
        """
        settings = self.settings
        hidden, layout = self._forward(running)
        noise = token_noise(keys, position, step) if settings.temperature > 0 else None
        order = position_noise(keys, position, step) if self.reveal_rule.noise else None
        size = max(1, _HEAD_LOGITS.get(self.device.type, 2**26) // self.backbone.vocab_size)
        proposals = []
        for low in range(0, len(row), size):
            part = slice(low, low + size)
            logits = self._logits(hidden, layout, len(running), row[part], position[part])
            drawn = None if noise is None else noise[part]
            proposed = propose_tokens(logits, drawn, temperature=settings.temperature, top_p=settings.top_p)
            confidence = token_confidence(logits, proposed)
            score = resolved(self.reveal_rule.score)(logits, confidence, None if order is None else order[part])
            proposals.append((proposed, confidence, score))
        token, probability, score = (torch.cat(parts) for parts in zip(*proposals, strict=True))
        return token, probability, score

    def _forward(self, running: RunningRows) -> tuple[Tensor, Layout]:
        """Hidden states [T, D] of what this pass computes, and its layout."""
        plan, rows = self.plan, running.numbers
        block = plan.block[rows]
        lengths = numpy.where(
            self.hidden[rows], numpy.minimum(self.length[rows], plan.end[rows, block]), self.length[rows]
        )
        tokens, width = running.tokens, running.tokens.shape[1]
        if self._cache is None:
            copies = self.passes_per_step
            layout = self._rows_layout(numpy.tile(rows, copies), numpy.tile(lengths, copies), width)
            if self.settings.guidance:
                bare = torch.where(running.response, tokens, self.backbone.mask_id)
                tokens = torch.cat([tokens, bare])
            self.computed[rows] += lengths * copies
            return self.backbone.hidden(tokens, layout), layout
        layout = self._rows_layout(rows, lengths, width)
        # who predicts one ahead reads the first position of a block off the one before it
        begin, end = numpy.maximum(0, plan.begin[rows, block] - (self.backbone.prediction == "next")), lengths
        if self.rule is not None:
            # the first pass of a block also computes what was finished since the last one's, now that it is clean
            begin = numpy.minimum(begin, self._finished[rows])
            self._finished[rows] = plan.begin[rows, block]
        else:
            passes = plan.passes[rows, block] - plan.passes_left[rows]
            refreshed = passes % self.settings.refresh == 0 if self.settings.refresh else passes == 0
            begin = numpy.where(refreshed, 0, begin)
            if self.settings.reuse == "dual":
                end = numpy.where(refreshed, lengths, numpy.minimum(plan.end[rows, block], lengths))
        part = layout
        if (begin > 0).any() or (end < lengths).any():
            part = self._layout(
                lambda: part_of(layout, begin.tolist(), end.tolist()), "part", rows, begin, end, lengths, width
            )
        if not numpy.array_equal(self._cached, rows):
            known = {number: at for at, number in enumerate(self._cached.tolist())}
            self._cache.reorder([known.get(number, -1) for number in rows.tolist()])
            self._cached = rows
        self.computed[rows] += end - begin
        return self.backbone.hidden(tokens, layout, cache=self._cache, part=part), part

    def _rows_layout(self, rows: ndarray, lengths: ndarray, width: int) -> Layout:
        """The layout of the first `lengths` [N] positions of some rows [N]; a row may occur twice."""

        def make() -> Layout:
            if self.rule is None:
                return layout_of(lengths.tolist(), width)
            return block_layout(BlockRows.plain(self.rule, self.origin[rows], lengths), width)

        return self._layout(make, "whole", rows if self.rule is not None else lengths, lengths, width)

    def _layout(self, make: Callable[[], Layout], kind: str, *described_by) -> Layout:
        """The layout so described, made anew only when that changes."""
        key = (kind, *(part.tobytes() if isinstance(part, ndarray) else part for part in described_by))
        if key not in self._layouts:
            self._layouts = {known: layout for known, layout in self._layouts.items() if known[0] != kind}
            self._layouts[key] = make().to(self.device)
        return self._layouts[key]

    def _logits(self, hidden: Tensor, layout: Layout, rows: int, row: Tensor, position: Tensor) -> Tensor:
        """Scores [N, V] fp32, with no chance for the mask token.

        With guidance s: u + (s + 1)(c - u), u the scores with every given token masked (Nie et al. 2025, appendix A.2).
        """
        backbone, guidance = self.backbone, self.settings.guidance
        logits = backbone.logits(hidden, layout, row, position)
        if guidance:
            bare = backbone.logits(hidden, layout, row + rows, position)
            logits = bare + (guidance + 1) * (logits - bare)
        logits[:, backbone.mask_id] = -torch.inf
        return logits


def block_rule(backbone: Backbone, block_size: int | None = None) -> BlockRule:
    """How a backbone's rows are cut into blocks, if it attends block-causally.

    Its blocks are those that it was trained with, whatever the settings; `block_size` (None: that of a default recipe)
    counts for a model that was not trained in blocks.
    """
    sidecar = backbone.sidecar
    if trained_blocks(sidecar.get("algorithm")) == "trained":
        return BlockRule(int(sidecar["block_size"]), sidecar.get("block_anchor", "response"))
    return BlockRule(block_size or Recipe().block_size, Recipe().block_anchor)


def _hides_ahead(backbone: Backbone, masked: ndarray, length: ndarray, settings: GenerateSettings) -> ndarray:
    """Rows [R] in which the positions right of the active block are not there yet (never if a given token is there)."""
    hidden = settings.ahead == "hidden"
    if settings.ahead == "auto":
        hidden = backbone.sidecar.get("response_end") == "block"
    # everything behind the first mask is masked
    behind = numpy.where(masked.any(1), length - masked.argmax(1), 0)
    return (masked.sum(1) == behind) & hidden


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


def merged(canvas: Canvas, running: RunningRows) -> Canvas:
    """The canvas with the running rows as they are now; a canvas that was handed out is never changed."""

    def placed(rows: Tensor, new: Tensor) -> Tensor:
        rows = rows.clone()
        rows[running.index, : new.shape[1]] = new
        return rows

    return replace(
        canvas,
        tokens=placed(canvas.tokens, running.tokens),
        masked=placed(canvas.masked, running.masked),
        confidence=placed(canvas.confidence, running.confidence),
        done=canvas.done.index_copy(0, running.index, running.done),
    )
