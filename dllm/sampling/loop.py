"""The loop of denoising: rows wait, run together, and leave when they are done; what is left of a canvas are passes.

Rows may join between any two passes, each with settings of its own, and be dropped. Everybody who samples uses it:
`MaskedSampler`, and a server whose requests come and go.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.attention_pattern import BlockRule
from dllm.core.canvas import Canvas, Completion, Ended, Progress
from dllm.models.backbone import Backbone
from dllm.sampling.rows import RunningRows, check_context, first_rows, reject_options
from dllm.sampling.step import DenoisingStep, Forward

_PASSES_PER_READING = 4
"""How many passes of a row lie between two looks at it on an accelerator, where looking takes a copy to the host."""


class _Place(NamedTuple):
    """A row's place in the queue, in which the smallest is next.

    The rows of one `add` have turns that follow each other, from the one that is next when they come, so that those
    who add one row and those who add a hundred are served in turn, and nobody is passed over for ever.
    """

    turn: int
    number: int
    cost: int
    forward: Forward
    rows: RunningRows
    row: int


@dataclass
class _Watched:
    """A row that is not known to be done: what ends it early, and how much of its beginning was known."""

    ended: Ended | None
    known: int = 0


class DenoisingLoop:
    """Rows of one model, waiting and running: at most `most_rows` and `most_tokens` of them run (a guided row twice).

    rule: how rows are cut into blocks of a model that attends block-causally, from its backbone and the `block_size` of
    settings; every_pass: whoever looks at the rows after a pass sees them all as they are, on an accelerator too.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        most_rows: float,
        most_tokens: float,
        rule: Callable[[Backbone, int | None], BlockRule] | None = None,
        every_pass: bool = False,
    ):
        self.backbone, self.rule, self.device = backbone, rule, torch.device(backbone.device)
        self.most_rows, self.most_tokens = most_rows, most_tokens
        self.wait_for_readings = every_pass
        self.passes_per_reading = 1 if every_pass or self.device.type == "cpu" else _PASSES_PER_READING
        self.computed = 0
        """Positions that went through the model so far."""
        self._next_number = self._turn = 0
        self._waiting: list[_Place] = []
        self._steps: dict[Forward, DenoisingStep] = {}
        self._watched: dict[int, _Watched] = {}
        self._readings: deque[_Reading] = deque()
        self._done: list[Completion] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do or to tell."""
        return bool(self._waiting or self._steps or self._readings or self._done)

    @property
    def waiting(self) -> set[int]:
        """The numbers of the rows that wait."""
        return {place.number for place in self._waiting}

    @property
    def running(self) -> int:
        """How many rows run."""
        return sum(len(step.rows) for step in self._steps.values())

    def add(self, canvas: Canvas, settings: GenerateSettings, ended: Ended | None = None, *, behind: int = 0) -> range:
        """Queue the rows of a canvas, the longest first; returns their numbers.

        behind: how many rows that were added just before are of the same owner, whose turns these follow. `ended` is
        asked after every pass whether a row ends here (on an accelerator: every few passes of the row, and at the ends
        of its blocks). Raises ValueError, one line, for a row longer than the model's context or than `most_tokens`,
        and if `steps` is less than the blocks of a row.
        """
        check_context(canvas, self.backbone.max_length)
        if self.rule is not None:
            # keys and values of finished blocks are kept, which is exact: `reuse` could approximate nothing
            reject_options("bd3lm", settings, {"reuse": ("none",), "ahead": ("auto", "hidden")})
        forward = Forward.of(settings, self.rule and self.rule(self.backbone, settings.block_size))
        rows = first_rows(self.backbone, canvas, settings, forward.rule, self._next_number)
        cost = rows.length * forward.copies
        if cost.max() > self.most_tokens:
            raise ValueError(
                f"batch_tokens = {self.most_tokens} is less than the {cost.max()} tokens of a single row"
                f"{' with its guidance' if forward.guided else ''}; allow at least {cost.max()}"
            )
        numbers = range(self._next_number, self._next_number + len(rows))
        for at in (~rows.plan.open).nonzero()[0].tolist():
            response = canvas.tokens[at, rows.start[at] : rows.length[at]]
            self._done.append(Completion(numbers[at], response.tolist(), 0, 0))
        longest_first = sorted(rows.plan.open.nonzero()[0].tolist(), key=lambda at: -cost[at])
        for turn, row in enumerate(longest_first, self._turn + 1 + behind):
            number = numbers[row]
            heapq.heappush(self._waiting, _Place(turn, number, int(cost[row]), forward, rows, row))
            self._watched[number] = _Watched(ended)
        self._next_number = numbers.stop
        return numbers

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget rows, waiting or running; nothing more is said of them."""
        gone = set(numbers)
        self._watched = {number: watched for number, watched in self._watched.items() if number not in gone}
        self._done = [completion for completion in self._done if completion.number not in gone]
        self._waiting = [place for place in self._waiting if place.number not in gone]
        heapq.heapify(self._waiting)
        for step in list(self._steps.values()):
            self._keep_watched(step)

    def step(self) -> tuple[RunningRows | None, list[Completion]]:
        """One pass of some running rows, as they are after it, and the rows that were found to be done.

        Rows that share a forward run together, those with another one in the next step. Without a row that runs it only
        waits for what is known of those that did.
        """
        self._admit()
        rows = None
        if self._steps:
            forward = next(iter(self._steps))
            step = self._steps[forward] = self._steps.pop(forward)  # the others are before it now
            rows = step.rows
            before = rows.computed.sum()
            self._look(step, step.run())
            self.computed += int(rows.computed.sum() - before)
        done, self._done = self._done, []
        while self._readings and (rows is None or self.wait_for_readings or self._readings[0].ready()):
            done += self._read(self._readings.popleft())
        if rows is not None:
            over = numpy.isin(rows.number, [completion.number for completion in done])
            if over.any():
                rows.end(torch.from_numpy(over).to(self.device), self.backbone.eos_id)
            self._keep_watched(step)
        return rows, done

    def _admit(self) -> None:
        """Let as many of the waiting rows run as there is room for, in the order of the queue."""
        used = sum(int(step.rows.length.sum()) * forward.copies for forward, step in self._steps.items())
        room = self.most_rows - self.running
        joining: dict[int, list[_Place]] = {}
        while self._waiting and room >= 1 and used + self._waiting[0].cost <= self.most_tokens:
            place = heapq.heappop(self._waiting)
            joining.setdefault(id(place.rows), []).append(place)
            used, room, self._turn = used + place.cost, room - 1, place.turn
        for places in joining.values():
            forward = places[0].forward
            rows = places[0].rows.taken(numpy.array([place.row for place in places]), self.device)
            if forward in self._steps:
                step = self._steps[forward]
                step.rows = step.rows.joined(rows, self.backbone.pad_id)
            else:
                self._steps[forward] = DenoisingStep(self.backbone, forward, rows)

    def _keep_watched(self, step: DenoisingStep) -> None:
        """Let the rows leave that are done, or that nobody waits for."""
        watched = numpy.array([number in self._watched for number in step.rows.number.tolist()], dtype=bool)
        step.keep(step.rows.plan.open & watched)
        if not len(step.rows):
            del self._steps[step.forward]

    def _look(self, step: DenoisingStep, block_ended: ndarray) -> None:
        """Ask for the state of the rows after a pass, if it is time for one of them; block_ended [B] bool."""
        rows = step.rows
        # what a row may yet revise does not say whether it ends
        due = block_ended | ((rows.plan.step % self.passes_per_reading == 0) & ~rows.revises)
        if due.any():
            self._readings.append(_Reading(rows, due, step.forward.copies))

    def _read(self, reading: _Reading) -> Iterator[Completion]:
        """The rows that are done, or end early, by what has arrived."""
        done, passes, tokens, masked = reading.arrays()
        for row in (done | reading.due).nonzero()[0]:
            number = int(reading.number[row])
            response = slice(reading.start[row], reading.length[row])
            ids, left = tokens[row, response], masked[row, response]
            if number in self._watched and (done[row] or self._ends_here(number, ids, left)):
                del self._watched[number]
                ids = numpy.where(left, self.backbone.eos_id, ids).tolist()
                yield Completion(number, ids, int(passes[row]) * reading.copies, int(reading.computed[row]))

    def _ends_here(self, number: int, response: ndarray, masked: ndarray) -> bool:
        """Whether a response with masks says that it ends."""
        watched = self._watched[number]
        if watched.ended is None:
            return False
        known = int(masked.argmax())
        new, watched.known = known - watched.known, known
        return watched.ended(Progress(number, response.tolist(), known, new))


class _Reading:
    """What is known of some rows after a pass, on its way to the host without making the device wait.

    What arrives later is the state of the pass at which it was asked for: rows done in the meantime change no more, so
    that nothing depends on when it arrives. due [B] bool: rows whose time it was to be looked at.
    """

    def __init__(self, rows: RunningRows, due: ndarray, copies: int):
        self.number, self.start, self.length, self.due, self.copies = rows.number, rows.start, rows.length, due, copies
        self.computed = rows.computed.copy()
        tensors = [rows.done, rows.passes, rows.tokens, rows.masked]
        self._event = None
        if rows.tokens.device.type == "cuda":
            self._host: list[Tensor] = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for there, here in zip(self._host, tensors, strict=True):
                there.copy_(here, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = [tensor.cpu() for tensor in tensors]

    def ready(self) -> bool:
        """Whether reading it means no waiting."""
        return self._event is None or self._event.query()

    def arrays(self) -> list[ndarray]:
        """done [B], passes [B], tokens [B, L] and masked [B, L], after waiting for them if need be."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]
