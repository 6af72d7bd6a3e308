"""Sampling with Edit Flows: rows grow and are corrected, all edits of a pass at once.

In a pass from time t to s, each edit that the model thinks outstanding is made with the probability that an outstanding
edit is made in between (`_made`). Every row has a front token, so that an insertion always has an anchor.
Source: Havasi et al. 2025 (arXiv:2506.09018); the model and its rates are in `objectives.edit_flows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm.config import EditSettings, GenerateSettings
from dllm.core.canvas import Canvas, Ended, infill_canvas
from dllm.core.edits import BLANK, DELETE, INSERT, SUBSTITUTE, Edits, open_gaps, rank_within, starts_of
from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from dllm.core.packing import Layout, layout_of
from dllm.models.backbone import Backbone
from dllm.models.edit_heads import TimedHidden, edit_loss
from dllm.sampling.reveal import propose_tokens, token_confidence
from dllm.sampling.rows import NO_REVISING, reject_options
from dllm.sampling.sampler import Sampler
from dllm.schedules import KAPPAS

_INSERT_STREAM, _EDIT_STREAM, _KIND_STREAM, _ROOM_STREAM, _NEW_STREAM, _OLD_STREAM, _UNDO_STREAM = range(7)

_HEAD_ROWS = 4096
"""Most tokens drawn at once: their logits are all held."""


@dataclass(frozen=True, eq=False)
class Trail:
    """Rows of columns laid end to end, as in `core.edits.Columns`: where each token came from and what became of it.

    origin, before, token [C] long: at the start, one pass ago and now, `BLANK` for no token; row [C] long; given,
    gap [C] bool: not edited, and insertions right of it allowed; confidence [C] float32.
    """

    origin: Tensor
    before: Tensor
    token: Tensor
    row: Tensor
    given: Tensor
    gap: Tensor
    confidence: Tensor
    rows: int

    def only(self, which: Tensor) -> Trail:
        """The columns where `which` [C]."""
        return self._each(lambda value: value[which])

    def with_after(self, place: Tensor, tokens: Tensor, confidence: Tensor) -> Trail:
        """The trail with new tokens [N] right of the columns place [N], which differ."""
        after = torch.zeros_like(self.token).index_fill(0, place, 1)
        position = torch.arange(len(after), device=after.device) + after.cumsum(0) - after
        blank = torch.full_like(tokens, BLANK)
        free = torch.zeros_like(tokens, dtype=torch.bool)
        new = Trail(blank, blank, tokens, self.row[place], free, ~free, confidence, self.rows)

        def both(old: Tensor, added: Tensor) -> Tensor:
            result = old.new_empty(len(old) + len(added))
            return result.index_copy(0, position, old).index_copy(0, position[place] + 1, added)

        columns: dict[str, Any] = {n: both(getattr(self, n), getattr(new, n)) for n in _COLUMNS}
        return replace(self, **columns)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Trail:
        columns: dict[str, Any] = {name: change(getattr(self, name)) for name in _COLUMNS}
        return replace(self, **columns)


_COLUMNS = ("origin", "before", "token", "row", "given", "gap", "confidence")


@dataclass(frozen=True)
class EditCanvas(Canvas):
    """A canvas that knows how it came about; `trail` has a front column per row and keeps what was deleted."""

    trail: Trail | None = None


def edit_canvas(
    rows: Sequence[Sequence[int]], start: int | Sequence[int] = 0, *, pad_id: int, device: torch.device | str = "cpu"
) -> Canvas:
    """A canvas of texts to be edited from position `start` on (one number or one per row); what is left of it stays.

    Raises ValueError without rows.
    """
    starts = [start] * len(rows) if isinstance(start, int) else list(start)
    canvas = infill_canvas(rows, mask_id=BLANK, pad_id=pad_id, device=device, start=torch.tensor(starts, device=device))
    return replace(canvas, done=torch.zeros_like(canvas.done))


@dataclass(frozen=True, eq=False)
class _Scored:
    """The T tokens of a state, packed, as the model scored them; twice as many in hidden, log_rates under guidance."""

    column: Tensor
    row: Tensor
    layout: Layout
    hidden: TimedHidden
    log_rates: Tensor


@dataclass(frozen=True)
class EditSampler(Sampler):
    """Edits rows pass by pass. A checkpoint's sidecar says how it was trained, and goes before `edits`."""

    edits: EditSettings = EditSettings()

    def denoise(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[EditCanvas]:
        """The canvas to start from, then the canvas after every pass; its rows grow and shrink.

        The masks of a row are edited, or, in a row that has none and is not done (`edit_canvas`), everything from
        `start` on. `settings.edits.masks` says whether masks are edited or taken out first. A row takes
        `settings.steps` passes (None: `max_new_tokens`), and has at most `max_new_tokens` tokens from `start` on, or as
        many as it came with. `ended` is not asked: a row ends when its time is up. A row's tokens do not depend on
        its batch-mates. Raises ValueError for a model without edit heads, for a row longer than the model's context,
        and for options that concern masks.
        """
        allowed = {"reveal_rule": ("confidence",), "reuse": ("none",), "ahead": ("auto",)} | NO_REVISING
        reject_options("edit_flows", settings, allowed)
        return _Passes(self.trained_with(backbone), backbone, settings).canvases(canvas)

    def trained_with(self, backbone: Backbone) -> EditSettings:
        """How a checkpoint was trained: what its sidecar says, or else these settings."""
        noted = backbone.sidecar.get("edits")
        return self.edits if noted is None else EditSettings(**noted)


class _Passes:
    """One call of `EditSampler.denoise`: the model, the settings, and nothing that changes from pass to pass."""

    def __init__(self, trained: EditSettings, backbone: Backbone, settings: GenerateSettings):
        self.backbone, self.settings, self.sampling = backbone, settings, settings.edits
        self.model = edit_loss(backbone)
        self.kappa, self.latest = KAPPAS[trained.schedule].value, trained.time_ceiling
        self.keeps_masks = {"keep": True, "drop": False, "auto": "masked" in trained.starts}[self.sampling.masks]

    @torch.no_grad()
    def canvases(self, canvas: Canvas) -> Iterator[EditCanvas]:
        room = self._room(canvas).masked_fill(canvas.done, -1)
        given = canvas.valid & ~canvas.masked
        keys = keyed_hash(self.settings.seed, token_hash(canvas.tokens, given))
        trail = self._first(canvas)
        canvas = self._canvas(canvas, trail, canvas.done)
        yield canvas
        steps = self.settings.steps or self.settings.max_new_tokens
        for step in range(steps):
            t, s = step / steps, (step + 1) / steps
            ahead = min(1.0, s + self.sampling.reverse / steps)
            trail = self._forward(trail, keys, room, step, t, self._kept(t, ahead))
            if ahead > s:
                trail = self._undo(trail, keys, room, step, self._at(s) / self._at(ahead))
            last = step + 1 == steps and not self.sampling.finish
            canvas = self._canvas(canvas, trail, canvas.done | last, passes=1)
            yield canvas
        for step in range(steps, steps + self.sampling.finish):
            if bool(canvas.done.all()):
                return
            trail = self._forward(trail, keys, room.masked_fill(canvas.done, -1), step, 1.0, None)
            changed = torch.bincount(trail.row, (trail.token != trail.before).float(), trail.rows) > 0
            last = step + 1 == steps + self.sampling.finish
            canvas = self._canvas(canvas, trail, canvas.done | ~changed | last, passes=1)
            yield canvas

    def _room(self, canvas: Canvas) -> Tensor:
        """The most tokens [B] each row may have, its front token included; below 0, nothing changes in the row."""
        most, longest = self.backbone.max_length - 1, int(canvas.length.max())
        if longest > most:
            raise ValueError(
                f"a row takes {longest} positions and a front token, the model has {most + 1}. Shorten the prompt or "
                "max_new_tokens"
            )
        return torch.maximum(canvas.length, canvas.start + self.settings.max_new_tokens).clamp(max=most) + 1

    def _first(self, canvas: Canvas) -> Trail:
        """The trail of a canvas to start from."""
        whole = ~canvas.masked.any(1) & ~canvas.done
        editable = canvas.masked | (whole[:, None] & (canvas.positions >= canvas.start[:, None]))
        pad = (1, 0)
        valid = torch.nn.functional.pad(canvas.valid, pad, value=True)
        tokens = torch.nn.functional.pad(canvas.tokens, pad, value=self.backbone.mask_id)[valid]
        given = ~torch.nn.functional.pad(editable, pad)[valid]
        confidence = torch.nn.functional.pad(canvas.confidence, pad, value=1.0)[valid]
        row = valid.nonzero()[:, 0]
        gap = open_gaps(given, row)
        trail = Trail(tokens, tokens, tokens, row, given, gap, confidence, len(valid))
        return trail if self.keeps_masks else trail.only(given | (tokens != self.backbone.mask_id))

    def _at(self, t: float) -> float:
        """kappa(t)."""
        return self.kappa(torch.tensor(t, dtype=torch.float64)).item()

    def _kept(self, t: float, s: float) -> float:
        """The share of the edits outstanding at t that are still so at s."""
        return (1 - self._at(s)) / (1 - self._at(t))

    def _forward(self, trail: Trail, keys: Tensor, room: Tensor, step: int, t: float, kept: float | None) -> Trail:
        """One pass: every edit is made with its chance (`_made`), all at once; room [B] as in `_room`."""
        # what was inserted and deleted again is forgotten a pass later
        trail = replace(trail, before=trail.token)
        trail = trail.only((trail.origin != BLANK) | (trail.token != BLANK))
        scored = self._score(trail, t)
        edits = self._draw(trail, scored, keys, room, step, kept)
        tokens, confidence = self._tokens(scored, edits, keys, step)
        inserted, changed = edits.kind == INSERT, edits.kind != INSERT
        column = scored.column[edits.place]
        trail = replace(
            trail,
            token=trail.token.index_copy(0, column[changed], tokens[changed]),
            confidence=trail.confidence.index_copy(0, column[changed], confidence[changed]),
        )
        return trail.with_after(column[inserted], tokens[inserted], confidence[inserted])

    def _score(self, trail: Trail, t: float) -> _Scored:
        column = (trail.token != BLANK).nonzero()[:, 0]
        row = trail.row[column]
        layout = layout_of(torch.bincount(row, minlength=trail.rows).tolist(), device=row.device)
        seen, each = layout, trail.token[column]
        tokens = layout.unpack(each, self.backbone.pad_id)
        if self.settings.guidance:
            hidden = trail.given[column] & (layout.positions > 0)
            blind = layout.unpack(each.masked_fill(hidden, self.backbone.mask_id), self.backbone.pad_id)
            tokens = torch.cat([tokens, blind])
            seen = layout_of(layout.lengths * 2, device=row.device)
        time = torch.full((len(tokens),), min(t, self.latest), device=row.device)
        return _Scored(column, row, layout, *self.model.rates(tokens, seen, time))

    def _guided(self, scores: Tensor) -> Tensor:
        """u + (s + 1)(c - u) with guidance s, of scores with the context (first half) and without."""
        if not self.settings.guidance:
            return scores
        conditional, unconditional = scores.chunk(2)
        return unconditional + (self.settings.guidance + 1) * (conditional - unconditional)

    def _draw(self, trail: Trail, scored: _Scored, keys: Tensor, room: Tensor, step: int, kept: float | None) -> Edits:
        """Which edits are made, without their tokens; insertions beyond a row's room [B] are left out at random."""
        row, keys = scored.row, keys[scored.row]
        insert, delete, substitute = self._guided(scored.log_rates).exp().unbind(-1)
        noise = [keyed_uniform(keys, scored.layout.positions, step, stream) for stream in range(_ROOM_STREAM + 1)]
        free = ~trail.given[scored.column] & (room[row] >= 0)
        inserted = trail.gap[scored.column] & _made(insert, kept, noise[_INSERT_STREAM])
        changed = free & _made(delete + substitute, kept, noise[_EDIT_STREAM])
        at = torch.full_like(insert, 0.5) if kept is None else noise[_KIND_STREAM]
        deleted = changed & (at * (delete + substitute) < delete)
        length = torch.bincount(row, (~deleted).float(), trail.rows)
        place = inserted.nonzero()[:, 0]
        count = torch.bincount(row[place], minlength=trail.rows)
        place = place[rank_within(noise[_ROOM_STREAM][place], row[place], count) < (room - length)[row[place]]]
        other = changed.nonzero()[:, 0]
        kind = torch.where(deleted[other], DELETE, SUBSTITUTE)
        return Edits(
            place=torch.cat([place, other]),
            kind=torch.cat([torch.full_like(place, INSERT), kind]),
            token=torch.full((len(place) + len(other),), BLANK, device=row.device),
        )

    def _tokens(self, scored: _Scored, edits: Edits, keys: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The new token of each edit (`BLANK` for a deletion) and its probability; the LM head runs only there."""
        tokens, confidence = edits.token.clone(), torch.zeros(edits.token.shape, device=edits.token.device)
        for part in (edits.kind != DELETE).nonzero()[:, 0].split(_HEAD_ROWS):
            place, insert = edits.place[part], edits.kind[part] == INSERT
            if self.settings.guidance:
                both = torch.cat([place, place + scored.layout.tokens]), insert.repeat(2)
            else:
                both = place, insert
            logits = self._guided(self.model.token_logits(scored.hidden, *both))
            logits = logits.index_fill(1, torch.tensor([self.backbone.mask_id], device=logits.device), -torch.inf)
            stream = torch.where(insert, _NEW_STREAM, _OLD_STREAM)
            noise = keyed_uniform(keys[scored.row[place]], scored.layout.positions[place], step, stream)
            temperature, top_p = self.settings.temperature, self.settings.top_p
            drawn = propose_tokens(logits, noise if temperature else None, temperature=temperature, top_p=top_p)
            tokens[part], confidence[part] = drawn, token_confidence(logits, drawn)
        return tokens, confidence

    def _undo(self, trail: Trail, keys: Tensor, room: Tensor, step: int, kept: float) -> Trail:
        """One step back: each edit made so far survives with probability `kept`, or else its column is as it began.

        The reverse of the noising process given where each column began, which the trail knows. Nothing is put back
        into a row that has no room for all of it.
        """
        count = torch.bincount(trail.row, minlength=trail.rows)
        index = torch.arange(len(trail.row), device=trail.row.device) - starts_of(count)[trail.row]
        undone = (trail.token != trail.origin) & (keyed_uniform(keys[trail.row], index, step, _UNDO_STREAM) >= kept)
        token = torch.where(undone, trail.origin, trail.token)
        full = torch.bincount(trail.row, (token != BLANK).float(), trail.rows) > room
        undone &= ~((trail.token == BLANK) & full[trail.row])
        return replace(
            trail,
            token=torch.where(undone, trail.origin, trail.token),
            confidence=trail.confidence.masked_fill(undone, 1.0),
        )

    def _canvas(self, canvas: Canvas, trail: Trail, done: Tensor, passes: int = 0) -> EditCanvas:
        """The trail without its front tokens and blanks, as rows."""
        copies = 2 if self.settings.guidance else 1
        count = torch.bincount(trail.row, minlength=trail.rows)
        front = torch.zeros_like(trail.given).index_fill(0, starts_of(count), True)
        here = (trail.token != BLANK) & ~front
        row, tokens = trail.row[here], trail.token[here]
        length = torch.bincount(row, minlength=trail.rows)
        position = torch.arange(len(row), device=row.device) - starts_of(length)[row]

        def rows(values: Tensor, fill: float) -> Tensor:
            return values.new_full((trail.rows, int(length.max())), fill).index_put((row, position), values)

        return EditCanvas(
            tokens=rows(tokens, self.backbone.pad_id),
            masked=rows((tokens == self.backbone.mask_id) & ~trail.given[here], False),
            confidence=rows(trail.confidence[here], 1.0),
            start=canvas.start,
            length=length,
            done=done,
            step=canvas.step + passes,
            nfe=canvas.nfe + passes * copies,
            computed=canvas.computed + passes * copies * int((trail.before != BLANK).sum()),
            trail=trail,
        )


def _made(rate: Tensor, kept: float | None, noise: Tensor) -> Tensor:
    """Whether an edit of a normalised rate happens while a share `kept` of outstanding edits stays outstanding.

    A rate up to 1 is the chance that an edit is outstanding, which then happens with probability 1 - kept; a rate n of
    several insertions is n of them, of which at least one happens with probability 1 - kept^n. To first order both are
    1 - exp(-h w(t) rate), the Euler step, but neither overshoots where w(t) grows without bound. Without `kept`, what
    is more likely outstanding than not is done.
    """
    if kept is None:
        return rate >= 0.5
    return noise < torch.where(rate <= 1, rate * (1 - kept), 1 - kept**rate)


# --------------------------------------------------------------------------------------------------------------------
# Watching it


def edit_pieces(canvas: EditCanvas, decode: Callable[[list[int]], str]) -> list[tuple[str, str]]:
    """The first row's text from `start` on in pieces, each with what the last pass made of it: `kept`, `gone` or `new`.

    decode maps token ids to text.
    """
    trail = canvas.trail.only(canvas.trail.row == 0)
    old, new = trail.before[1:].tolist(), trail.token[1:].tolist()
    skip = int(canvas.start[0])
    pieces: list[tuple[str, str]] = []
    said: list[int] = []
    for kind, before, after in _runs(old[skip:], new[skip:]):
        if kind == "kept":
            pieces.append(("kept", "".join(_piece(decode, said, after))))
        else:
            gone, came = _piece(decode, said, before), _piece(decode, said, after)
            pieces.append(("kept", (gone if before else came)[0]))  # the space in front of a word is not what changes
            pieces += [("gone", gone[1])] if before else []
            pieces += [("new", came[1])] if after else []
        said += after
    return [(kind, text) for kind, text in pieces if text or kind != "kept"]


def _piece(decode: Callable[[list[int]], str], said: list[int], tokens: list[int]) -> tuple[str, str]:
    """Leading space and text of tokens that follow `said`: tokenizers join words differently, so both are decoded."""
    before, whole = decode(said), decode([*said, *tokens])
    piece = whole[len(before) :] if whole.startswith(before) else decode(tokens)
    text = piece.lstrip()
    return piece[: len(piece) - len(text)], text


def _runs(old: list[int], new: list[int]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Neighbouring columns of one kind, kept or changed, with their old and new tokens."""
    kind = "kept"
    before: list[int] = []
    after: list[int] = []
    for was, now in zip(old, new, strict=True):
        if was == now == BLANK:
            continue
        this = "kept" if was == now else "changed"
        if this != kind and (before or after):
            yield kind, before, after
            before, after = [], []
        kind = this
        before += [was] if was != BLANK else []
        after += [now] if now != BLANK else []
    if before or after:
        yield kind, before, after
