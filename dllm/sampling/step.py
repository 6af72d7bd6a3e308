"""One denoising pass over ragged rows, wherever each of them is: the step that all sampling shares.

`DenoisingStep.run` scores the masked positions of each row's active block, proposes a token for each, chooses the best
few and reveals them. The host knows in advance which block of a row is active and how many tokens a pass reveals
(`sampling.plan`), so it lays out every index of a pass itself, and nothing in a pass waits for the device. Only rules
that reveal a varying number of tokens report it, one small tensor per pass. What a row becomes depends on its own
settings, pass number, key and tokens, and not on its batch-mates or on when it joined them.

Rows that revise take tokens back, or replace them, between choosing and `BlockPlan.advance` (`sampling.revise`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.algorithms import resolved
from dllm.choices import REVEAL_RULES
from dllm.config import GenerateSettings
from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.core.packing import Layout, block_layout, layout_of, part_of
from dllm.models.backbone import Backbone
from dllm.models.kv_cache import KVCache
from dllm.sampling import revise
from dllm.sampling.reveal import (
    choose_positions,
    position_noise,
    propose_tokens,
    token_confidence,
    token_noise,
)
from dllm.sampling.rows import Kind, RunningRows, to_device

_HEAD_LOGITS = {"cpu": 2**22, "cuda": 2**28}
"""Most logits held at a time: on a CPU what its cache holds, so that softmax does not read them from memory again."""


class Forward(NamedTuple):
    """How rows are forwarded: those of which this is equal share a pass.

    rule: how they are cut into blocks of a model that attends block-causally (None: it sees all that is there). The
    keys and values of finished blocks are then kept, which is exact; they are not kept under guidance.
    """

    rule: BlockRule | None
    guided: bool
    reuse: str

    @classmethod
    def of(cls, settings: GenerateSettings, rule: BlockRule | None) -> Forward:
        """How settings ask for it."""
        return cls(rule, settings.guidance > 0, settings.reuse)

    @property
    def copies(self) -> int:
        """Forward passes of a row in one step: a guided one takes two."""
        return 2 if self.guided else 1


class DenoisingStep:
    """Rows that are forwarded together, and the pass that takes them one step further."""

    def __init__(self, backbone: Backbone, forward: Forward, rows: RunningRows):
        self.backbone, self.forward, self.rows = backbone, forward, rows
        self.device = torch.device(backbone.device)
        self._layouts: dict[tuple, Layout] = {}
        keeps = forward.reuse != "none" if forward.rule is None else not forward.guided
        self._cache = KVCache() if keeps else None
        self._cached = numpy.zeros(0, dtype=numpy.int64)

    def keep(self, keep: ndarray) -> None:
        """Go on with the rows [B] bool to keep."""
        if not keep.all():
            self.rows = self.rows.taken(keep.nonzero()[0], self.device)

    @torch.no_grad()
    def run(self) -> ndarray:
        """One pass: reveal tokens of every row that is not done. Returns [B] bool: which ended their block."""
        rows, plan = self.rows, self.rows.plan
        window, masks = plan.window()
        # of rows that edit, revealed tokens are candidates, too
        number, count = numpy.where(rows.edits, masks, plan.left), plan.counts()
        kinds = list(dict.fromkeys(rows.kind))
        kind = numpy.array([kinds.index(kind) for kind in rows.kind])
        order = kind.argsort(kind="stable")  # candidates of a kind are neighbours
        row = numpy.repeat(order, number[order])
        column = numpy.arange(len(row)) - numpy.repeat(number[order].cumsum() - number[order], number[order])
        ends = numpy.bincount(kind[row], minlength=len(kinds)).cumsum().tolist()
        parts = to_device((window, masks, count, plan.step, row, column, rows.edits), self.device)
        block, masks, least, step, row, column, edits = parts

        # the positions still masked, from left to right: as many as the host expects, or none in a row that is done
        size = block.shape[1]
        places = torch.arange(size, device=self.device)
        inside = places < masks[:, None]
        still = (rows.masked.gather(1, block) | (edits > 0)[:, None]) & inside
        rank = torch.where(still, still.cumsum(1) - 1, size)
        # (of a row that has ended, which the host does not know yet, some position of the block is taken instead)
        window = block[:, :1].repeat(1, size + 1).scatter_(1, rank, block)[:, :size]
        candidate = rows.masked.gather(1, window) & (places < still.sum(1)[:, None])
        place = row * size + column
        position = window.flatten().index_select(0, place)

        spans = zip(kinds, [0, *ends], ends, strict=False)
        tokens, confidence, score = self._propose(spans, row, position, step.index_select(0, row))
        table = score.new_full((len(rows), size), -torch.inf)
        table.view(-1).index_copy_(0, place, score)
        remasks = (rows.remask != "none").any()
        if remasks:
            amount, back = revise.taken_back(rows, block, inside, revise.expected_back(rows))
            least = least + amount
        sure = self._sure()
        chosen = choose_positions(table, candidate, least, sure)

        rows.passes.add_(~rows.done)
        written, edited = chosen.flatten()[place], None
        if rows.edits.any():
            replaced = revise.edits_of(rows, row, position, tokens, confidence)
            written |= replaced
            edited = torch.zeros(len(rows), device=self.device).index_add(0, row, replaced.float()).cpu().numpy() > 0
        self._reveal(row * rows.tokens.shape[1] + position, written, tokens, confidence)
        revealed = chosen.sum(1)
        if remasks:
            revise.mask_again(rows, block, back, self.backbone.mask_id)
            revealed = revealed - amount
        fewer = count if sure is None else revealed.cpu().numpy()
        ended = plan.advance(numpy.minimum(fewer, plan.left), edited)
        self._end(ended)
        return ended

    def _end(self, ended: ndarray) -> None:
        """End the rows without masks, or with an EOS and no mask left of it; ended [B]: those that ended their block.

        Of a row that revises, no EOS and no last mask counts before its block has ended.
        """
        rows = self.rows
        eos = (rows.tokens == self.backbone.eos_id) & rows.response & ~rows.masked & rows.early_stop[:, None]
        over = (eos & (rows.masked.cumsum(1) == 0)).any(1) | ~rows.masked.any(1)
        if rows.revises.any():
            over &= to_device(~rows.revises | ended, self.device) > 0
        rows.end(over, self.backbone.eos_id)

    def _sure(self) -> Callable[[Tensor], Tensor] | None:
        """How many candidates of each row are sure enough, by their scores in falling order; None: the plan decides."""
        rows = self.rows
        rules = [name for name in {kind.reveal_rule for kind in rows.kind} if REVEAL_RULES[name].sure is not None]
        if not rules:
            return None

        def sure(ranked: Tensor) -> Tensor:
            if len(set(rows.kind)) == 1:
                return resolved(REVEAL_RULES[rules[0]].sure)(ranked, rows.sure[:, None])
            counts = torch.zeros(len(rows), dtype=torch.long, device=self.device)
            for name in rules:
                theirs = numpy.array([kind.reveal_rule == name for kind in rows.kind]).nonzero()[0]
                at = to_device(theirs, self.device)
                found = resolved(REVEAL_RULES[name].sure)(ranked.index_select(0, at), rows.sure[at, None])
                counts.index_copy_(0, at, found)
            return counts

        return sure

    def _reveal(self, flat: Tensor, chosen: Tensor, tokens: Tensor, confidence: Tensor) -> None:
        """Write what was chosen [N] among the proposals at `flat` [N], row * L + position."""
        rows = self.rows
        for canvas, values in ((rows.tokens, tokens), (rows.confidence, confidence), (rows.masked, None)):
            canvas = canvas.view(-1)
            before = canvas.index_select(0, flat)
            after = before & ~chosen if values is None else torch.where(chosen, values, before)
            canvas.index_copy_(0, flat, after)

    def _propose(
        self, spans: Iterable[tuple[Kind, int, int]], row: Tensor, position: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token, its probability and its score under the reveal rule for each candidate [N].

        spans: kind, begin and end of candidates that are treated alike; step [N]: passes of the row so far. The head
        runs on a part of the candidates at a time, so that memory does not grow with their number.
        """
        rows = self.rows
        states = self._forward(row, position)
        size = max(1, _HEAD_LOGITS.get(self.device.type, 2**26) // self.backbone.vocab_size)
        proposals = []
        for kind, begin, end in spans:
            rule = REVEAL_RULES[kind.reveal_rule]
            for low in range(begin, end, size):
                part = slice(low, min(low + size, end))
                own, at = row[part], position[part]
                logits = self._logits([each[part] for each in states], own)
                noise = token_noise(rows.keys[own], at, step[part]) if kind.drawn else None
                top_p = rows.top_p[own, None] if kind.nucleus else 1.0
                token = propose_tokens(logits, noise, temperature=rows.temperature[own, None], top_p=top_p)
                confidence = token_confidence(logits, token)
                order = position_noise(rows.keys[own], at, step[part]) if rule.noise else None
                proposals.append((token, confidence, resolved(rule.score)(logits, confidence, order)))
        token, probability, score = (torch.cat(parts) for parts in zip(*proposals, strict=True))
        return token, probability, score

    def _forward(self, row: Tensor, position: Tensor) -> list[Tensor]:
        """Hidden states [N, D] that score the tokens at `position` [N] of `row` [N]; guided: of copies, too."""
        rows, plan, rule = self.rows, self.rows.plan, self.forward.rule
        here = plan.of_block(plan.begin), plan.of_block(plan.end)
        lengths = numpy.where(rows.alone, numpy.minimum(rows.length, here[1]), rows.length)
        tokens = rows.tokens
        layout = self._layout_of(lengths)
        if self._cache is None:
            rows.computed[:] += lengths * self.forward.copies
            if not self.forward.guided:
                return [self.backbone.hidden_at(tokens, layout, row, position)]
            tokens = torch.cat([tokens, torch.where(rows.response, tokens, self.backbone.mask_id)])
            row, position = torch.cat([row, row + len(rows)]), position.repeat(2)
            return list(self.backbone.hidden_at(tokens, layout, row, position).chunk(2))
        # who predicts one ahead reads the first position of a block off the one before it
        begin, end = numpy.maximum(0, here[0] - (self.backbone.prediction == "next")), lengths
        if rule is not None:
            # the first pass of a block also computes what was finished since the last one's, now that it is clean
            begin = numpy.minimum(begin, rows.finished)
            rows.finished[:] = here[0]
        else:
            passes = plan.of_block(plan.passes) - plan.passes_left
            refreshed = numpy.where(rows.refresh > 0, passes % rows.refresh.clip(1) == 0, passes == 0)
            begin = numpy.where(refreshed, 0, begin)
            if self.forward.reuse == "dual":
                end = numpy.where(refreshed, lengths, numpy.minimum(here[1], lengths))
        part = layout
        if (begin > 0).any() or (end < lengths).any():
            part = self._known(
                lambda: part_of(layout, begin.tolist(), end.tolist()), "part", rows.number, begin, end, lengths
            )
        if not numpy.array_equal(self._cached, rows.number):
            known = {number: at for at, number in enumerate(self._cached.tolist())}
            self._cache.reorder([known.get(number, -1) for number in rows.number.tolist()])
            self._cached = rows.number
        rows.computed[:] += end - begin
        return [self.backbone.hidden_at(tokens, layout, row, position, cache=self._cache, part=part)]

    def _layout_of(self, lengths: ndarray) -> Layout:
        """The layout of the first `lengths` [B] positions of the rows, and of their copies behind them."""
        rows, rule, copies, width = self.rows, self.forward.rule, self.forward.copies, self.rows.tokens.shape[1]
        if rule is None:
            return self._known(lambda: layout_of(lengths.tolist() * copies, width), "whole", lengths)
        origin, each = numpy.tile(rows.origin, copies), numpy.tile(lengths, copies)
        return self._known(
            lambda: block_layout(BlockRows.plain(rule, origin, each), width), "whole", rows.number, lengths
        )

    def _known(self, make: Callable[[], Layout], kind: str, *described_by: ndarray) -> Layout:
        """The layout so described, made anew only when that changes, or the rows' width."""
        key = (kind, self.rows.tokens.shape[1], *(part.tobytes() for part in described_by))
        if key not in self._layouts:
            self._layouts = {known: layout for known, layout in self._layouts.items() if known[0] != kind}
            self._layouts[key] = make().to(self.device)
        return self._layouts[key]

    def _logits(self, states: list[Tensor], row: Tensor) -> Tensor:
        """Scores [N, V] fp32 of `row` [N], with no chance for the mask token, from what `_forward` returns of them.

        With guidance s: u + (s + 1)(c - u), u the scores with every given token masked (Nie et al. 2025, appendix A.2).
        """
        logits, *bare = (self.backbone.head_logits(hidden) for hidden in states)
        if bare:
            logits = bare[0] + self.rows.guidance[row, None] * (logits - bare[0])
        logits[:, self.backbone.mask_id] = -torch.inf
        return logits
