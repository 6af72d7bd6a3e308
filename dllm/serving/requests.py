"""What an engine does for one request: rows of the loop of denoising, or a job of its own; and what it says of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.canvas import Canvas, Completion, Ended, Progress, infill_canvas
from dllm.language_model import DiffusionLM, Prompt, is_chat
from dllm.sampling.edits import EditCanvas, edit_pieces
from dllm.sampling.renoise import RenoisedCanvas
from dllm.serving.events import Edited, Event, Finished, Snapshot

OnEvent = Callable[[int, Event], None]
"""Called in the engine's thread with the number of the answer and what happened to it. It must not block."""

_CONTEXT = 4
"""Tokens to its left that decide what a token adds to a text that is shown."""


@dataclass(eq=False)
class Request:
    """What was asked for at once: rows, or a job. `waits`: nothing of it has begun; `over`: nothing is left of it."""

    on_event: OnEvent
    snapshots: bool
    rows: list[Row] = field(default_factory=list)
    job: Callable[[], Iterator[Event]] | None = None
    """Makes the events one by one, each in a pass or more of the model; the last one is the result."""
    asked: float = field(default_factory=time.monotonic)
    waits: bool = True
    over: bool = False
    cancelled: bool = False

    @property
    def open(self) -> list[int]:
        """The numbers of the answers that have not ended."""
        return [row.index for row in self.rows if not row.over] if self.job is None else [0]

    def events(self) -> Iterator[Event]:
        """What its job has to say."""
        return iter(()) if self.job is None else self.job()

    def tell(self, index: int, event: Event) -> None:
        """Tell who asked; one who cannot be told is gone."""
        if self.over or self.cancelled:
            return
        try:
            self.on_event(index, event)
        except Exception:
            self.cancelled = True

    def fail(self, error: Exception) -> None:
        """End all that is left of it with an error."""
        for index in self.open:
            self.tell(index, error)
        self.over = True


@dataclass(eq=False)
class Row:
    """One answer or infill of a request on its way.

    canvas: one row on the host; begin: where the shown part begins; text: what is final of the shown tokens before
    the first mask; finish: the result of the finished row.
    """

    index: int
    canvas: Canvas
    settings: GenerateSettings
    ended: Ended | None
    begin: int
    text: Callable[[Sequence[int]], str]
    finish: Callable[[Completion, float], Finished]
    over: bool = False
    step: int = 0
    said: str = ""
    known: int = -1
    masked: list[bool] = field(default_factory=list)
    error: Exception | None = None
    """What went wrong when the row was asked whether it ends."""

    def ends(self, progress: Progress) -> bool:
        """`ended`, which ends the row where it fails, and nothing else."""
        try:
            return self.ended is not None and self.ended(progress)
        except Exception as error:
            self.error = error
            return True

    def snapshot(
        self,
        tokens: list[int],
        masked: list[bool],
        confidence: list[float],
        *,
        final: int,
        piece: Callable[[tuple[int, ...]], str],
    ) -> Snapshot:
        """The row after a pass, from all its positions; before `final` and the first mask nothing changes any more."""
        before = self.masked or self.canvas.masked[0].tolist()
        self.step, self.masked = self.step + 1, masked
        shown = slice(self.begin, None)
        ids, hidden = tokens[shown], masked[shown]
        known = hidden.index(True) if True in hidden else len(hidden)
        known = min(known, max(0, final - self.begin))
        if known != self.known:
            # what was said stays: a row that begins anew after an error says it again
            self.known, self.said = known, max(self.said, self.text(ids[:known]), key=len)
        revealed = (now < was for now, was in zip(hidden, before[shown], strict=True))
        return Snapshot(
            step=self.step,
            pieces=tuple(pieces(ids, hidden, piece)),
            ids=tuple(ids),
            confidence=tuple(confidence[shown]),
            revealed=tuple(place for place, new in enumerate(revealed) if new),
            text=self.said,
        )


def pieces(ids: Sequence[int], masked: Sequence[bool], piece: Callable[[tuple[int, ...]], str]) -> Iterator[str | None]:
    """What each token adds to the text of the unmasked tokens to its left, by the last ones of them; None: masked."""
    first = 0
    for place, hidden in enumerate(masked):
        if hidden:
            first = place + 1
            yield None
        else:
            yield piece(tuple(ids[max(first, place - _CONTEXT) : place + 1]))


def piece_of(model: DiffusionLM) -> Callable[[tuple[int, ...]], str]:
    """What the last of some tokens adds to the text of the others: a character with the last of its bytes."""
    decode = model.backbone.tokenizer.decode

    @lru_cache(2**16)
    def piece(ids: tuple[int, ...]) -> str:
        before, whole = (decode(list(part), skip_special_tokens=True).rstrip("\ufffd") for part in (ids[:-1], ids))
        return whole[len(before) :] if whole.startswith(before) else decode([ids[-1]], skip_special_tokens=True)

    return piece


def answer_rows(model: DiffusionLM, prompt: Prompt, settings: GenerateSettings, n: int) -> list[Row]:
    """The rows of `n` answers. Raises ValueError, one line, for a wrong prompt."""
    canvas = model.canvas([prompt], settings)
    begin, chat = int(canvas.start[0]), is_chat(prompt)

    def text(known: Sequence[int]) -> str:
        settled = model.settled(known, settings.stop)
        return settled.lstrip() if chat else settled

    def finish(row: Completion, seconds: float) -> Finished:
        answer = model.answer_of(prompt, row, settings)
        reason: Literal["stop", "length"] = "stop" if answer.tokens < len(row.tokens) else "length"
        return Finished(answer.text, begin, answer.tokens, answer.passes, reason, seconds, answer.ids)

    return [
        Row(
            index=index,
            canvas=canvas,
            settings=settings.model_copy(update={"seed": settings.seed + index}),
            ended=model.ended(settings),
            begin=begin,
            text=text,
            finish=finish,
        )
        for index in range(n)
    ]


def infill_row(model: DiffusionLM, text: str, settings: GenerateSettings) -> Row:
    """The row of a text with holes. Raises ValueError, one line, for a text without one."""
    (tokens,) = model.holes([text])
    canvas = infill_canvas([tokens], mask_id=model.backbone.mask_id, pad_id=model.backbone.pad_id)
    start, holes = int(canvas.start[0]), int(canvas.masked.sum())

    def decoded(ids: Sequence[int]) -> str:
        return model.backbone.tokenizer.decode(list(ids), skip_special_tokens=True)

    def finish(row: Completion, seconds: float) -> Finished:
        whole = [*tokens[:start], *row.tokens]
        return Finished(decoded(whole), len(tokens) - holes, holes, row.passes, "length", seconds, tuple(whole))

    return Row(
        index=0,
        canvas=canvas,
        settings=settings.model_copy(update={"early_stop": False}),
        ended=None,
        begin=0,
        text=lambda ids: "" if len(ids) < len(tokens) else decoded(ids),
        finish=finish,
    )


def edit_events(
    model: DiffusionLM, canvases: Iterator[Canvas], prompt: Prompt, settings: GenerateSettings, asked: float
) -> Iterator[Event]:
    """The events of a draft that is edited, or of an answer that grows so, from its canvases."""
    first = canvas = next(canvases)
    for canvas in canvases:
        text = model.decode(canvas.responses()[0], settings.stop)
        said = tuple(edit_pieces(canvas, model.decode)) if isinstance(canvas, EditCanvas) else (("kept", text),)
        yield Edited(canvas.step - first.step, said, text.strip() if is_chat(prompt) else text)
    row = Completion(0, canvas.responses()[0], canvas.nfe - first.nfe, canvas.computed - first.computed)
    answer = model.answer_of(prompt, row, settings)
    seconds = time.monotonic() - asked
    yield Finished(answer.text, int(first.start[0]), answer.tokens, answer.passes, "stop", seconds, answer.ids)


def infill_events(model: DiffusionLM, tokens: list[int], settings: GenerateSettings, asked: float) -> Iterator[Event]:
    """The events of a text with holes, if its model does not fill them in the loop; its length may change."""
    backbone = model.backbone
    first = infill_canvas([tokens], mask_id=backbone.mask_id, pad_id=backbone.pad_id, device=backbone.device)
    given, canvas, ids, text = len(tokens) - int(first.masked.sum()), first, tokens, ""
    for canvas in model.sampler.denoise(backbone, first, settings):
        ids = canvas.tokens[0, : int(canvas.length[0])].tolist()
        text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
        if canvas.step:
            yield Edited(canvas.step, (("kept", text),), text)
    seconds = time.monotonic() - asked
    yield Finished(text, given, len(ids) - given, canvas.nfe, "length", seconds, tuple(ids))


def canvas_events(
    row: Row, canvases: Iterator[Canvas], piece: Callable[[tuple[int, ...]], str], asked: float
) -> Iterator[Event]:
    """The events of a row whose sampler writes one canvas after the other, from the row after every pass."""
    first = canvas = next(canvases)
    for canvas in canvases:
        final = int(canvas.final[0]) if isinstance(canvas, RenoisedCanvas) and canvas.final is not None else 0
        states = (canvas.tokens, canvas.masked, canvas.confidence)
        tokens, masked, confidence = (state[0].tolist() for state in states)
        yield row.snapshot(tokens, masked, confidence, final=final, piece=piece)
    done = Completion(0, canvas.responses()[0], canvas.nfe - first.nfe, canvas.computed - first.computed)
    yield row.finish(done, time.monotonic() - asked)


def host_rows(tensors: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int]) -> Iterator[tuple[list, list, list]]:
    """The rows of three tensors [B, L] as lists, each as long as it is."""
    for length, one, two, three in zip(lengths, *(tensor.tolist() for tensor in tensors), strict=True):
        yield one[:length], two[:length], three[:length]
