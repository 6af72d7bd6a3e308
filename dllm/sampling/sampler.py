"""Sampling: passes over the rows of a canvas until none has a mask; infilling and greedy decoding are the same loop.

One pass: score the masked positions of each row's active block, propose a token for each, reveal the best few
(`sampling.step`). Here it is repeated, over rows that all start together and whose canvas is shown (`denoise`), or over
any number of rows that take the places of those that end (`complete`).
Source: Nie et al. 2025 (arXiv:2502.09992), algorithm 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.attention_pattern import BlockRule
from dllm.core.canvas import Canvas, Completion, Ended, Progress
from dllm.models.load import Backbone
from dllm.sampling.step import DenoisingStep, RunningRows, block_rule, merged

_PASSES_PER_READING = 4
"""How many passes of a row lie between two looks at it on an accelerator, where looking takes a copy to the host."""


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

    @abstractmethod
    def complete(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Completion]:
        """Every row of a canvas, which may be many and on the host, in the order in which they are done.

        At most `settings.batch_size` rows are computed together. A row's tokens and passes are those of the row alone.
        """


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
        step = self._step(backbone, canvas, settings)
        yield canvas
        rows = step.plan.open.nonzero()[0]
        tracker = CompletionTracker(step, ended, at_once=ended is not None)
        for running, completions in _passes(step, tracker, rows, step.length, len(rows), step.length.sum()):
            if len(running):
                if completions:
                    over = numpy.isin(running.numbers, [completion.number for completion in completions])
                    running.end(torch.from_numpy(over).to(step.device), backbone.eos_id)
                canvas = replace(
                    merged(canvas, running),
                    step=canvas.step + 1,
                    nfe=canvas.nfe + step.passes_per_step,
                    computed=int(step.computed.sum()),
                )
                yield canvas

    def complete(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Completion]:
        """See `Sampler.complete`; the longest rows come first, and a row that is done makes room for the next.

        Rows that are computed together have `settings.batch_tokens` tokens at most. `ended` is asked after every pass
        (on an accelerator: every few passes of the row, and at the ends of its blocks). Raises ValueError if a row is
        longer than the token budget, too.
        """
        step = self._step(backbone, canvas, settings)
        cost = step.length * step.passes_per_step
        _check_budget(cost, settings)
        for number in (~step.plan.open).nonzero()[0]:
            response = canvas.tokens[number, step.start[number] : step.length[number]]
            yield Completion(int(number), response.tolist(), 0, 0)
        rows = sorted(step.plan.open.nonzero()[0], key=lambda number: -cost[number])
        tracker = CompletionTracker(step, ended)
        for _, completions in _passes(step, tracker, rows, cost, settings.batch_size, settings.batch_tokens):
            yield from completions

    def _step(self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings) -> DenoisingStep:
        _check_context(canvas, backbone.max_length)
        if self.rule is None:
            return DenoisingStep(backbone, canvas, settings)
        # keys and values of finished blocks are kept, which is exact: there is nothing that `reuse` could approximate
        reject_options("bd3lm", settings, {"reuse": ("none",), "ahead": ("auto", "hidden")})
        return DenoisingStep(backbone, canvas, settings, rule=self.rule(backbone, settings.block_size))


def block_sampler() -> MaskedSampler:
    """The sampler of models that attend block-causally."""
    return MaskedSampler(block_rule)


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


def _passes(
    step: DenoisingStep, tracker: CompletionTracker, rows: Iterable[Any], cost: ndarray, most_rows: int, most_cost: int
) -> Iterator[tuple[RunningRows, list[Completion]]]:
    """The running rows after each pass, and the completions found there; the last ones may come without a pass.

    rows: the numbers of all rows, in the order in which they start. At most `most_rows` run together, and no more than
    cost `most_cost`; cost: of each row of the canvas.
    """
    waiting, running = deque(rows), None
    while waiting or tracker.pending or running is None or len(running):
        running = _with_waiting(step, running, waiting, cost, most_rows, most_cost)
        if len(running):
            tracker.look(running, step.run(running))
        yield running, list(tracker.completions(wait=not len(running)))
        running = running.kept(step.plan.open[running.numbers] & ~tracker.complete[running.numbers])


def _with_waiting(
    step: DenoisingStep,
    running: RunningRows | None,
    waiting: deque[int],
    cost: ndarray,
    most_rows: int,
    most_cost: int,
) -> RunningRows:
    """The running rows with as many of the waiting ones as there is room for."""
    numbers: list[int] = []
    used = 0 if running is None else int(cost[running.numbers].sum())
    rows = 0 if running is None else len(running)
    while waiting and rows + len(numbers) < most_rows and used + cost[waiting[0]] <= most_cost:
        used += cost[waiting[0]]
        numbers.append(waiting.popleft())
    if running is not None and not numbers:
        return running
    taken = numpy.array(numbers, dtype=numpy.int64)
    fresh = step.rows(taken, int(step.length[taken].max(initial=0)))
    return running.joined(fresh, step.backbone.pad_id) if running is not None and len(running) else fresh


class CompletionTracker:
    """Finds out which rows are done, on the host, without making the device wait.

    On a CPU looking is free and happens after every pass. On an accelerator the rows are copied to the host every few
    passes, and what arrives later is the state of the pass at which the copy was asked for: rows done in the meantime
    change no more, so that nothing depends on when it arrives. at_once: wait for a copy after every pass.
    """

    def __init__(self, step: DenoisingStep, ended: Ended | None, *, at_once: bool = False):
        self.step, self.ended, self.at_once = step, ended, at_once
        self.every = 1 if at_once or step.device.type == "cpu" else _PASSES_PER_READING
        self.pending: deque[_Reading] = deque()
        self.complete = numpy.zeros(len(step.start), dtype=bool)
        self.known = numpy.zeros_like(step.start)

    def look(self, running: RunningRows, block_ended: ndarray) -> None:
        """Ask for the state of the running rows after a pass, if it is time for one of them; block_ended [B] bool."""
        due = block_ended | (self.step.plan.step[running.numbers] % self.every == 0)
        if due.any():
            state = [running.done, running.passes, running.tokens, running.masked]
            self.pending.append(_Reading(running.numbers, running.numbers[due], state))

    def completions(self, *, wait: bool) -> Iterator[Completion]:
        """Rows found to be complete in what has arrived; `wait` for all that was asked for."""
        while self.pending and (wait or self.at_once or self.pending[0].ready()):
            reading = self.pending.popleft()
            done, passes, tokens, masked = reading.arrays()
            numbers = reading.numbers
            over = done & ~self.complete[numbers]
            if self.ended is not None:
                over |= self._stopped(reading, done, tokens, masked)
            self.complete[numbers[over]] = True
            for row in over.nonzero()[0]:
                number = int(numbers[row])
                response = slice(self.step.start[number], self.step.length[number])
                left = masked[row, response]
                yield Completion(
                    number,
                    numpy.where(left, self.step.backbone.eos_id, tokens[row, response]).tolist(),
                    int(passes[row]) * self.step.passes_per_step,
                    int(self.step.computed[number]),
                )

    def _stopped(self, reading: _Reading, done: ndarray, tokens: ndarray, masked: ndarray) -> ndarray:
        """[B] bool: rows with masks whose response says that it ends."""
        numbers, stopped = reading.numbers, numpy.zeros(len(reading.numbers), dtype=bool)
        first = masked.argmax(1)
        for row in (~done & ~self.complete[numbers] & numpy.isin(numbers, reading.due)).nonzero()[0]:
            number = int(numbers[row])
            start = self.step.start[number]
            known = max(0, int(first[row] - start))
            response = tokens[row, start : self.step.length[number]].tolist()
            stopped[row] = self.ended(Progress(number, response, known, known - int(self.known[number])))
            self.known[number] = known
        return stopped


class _Reading:
    """Tensors of some rows on their way to the host; `due` are the numbers of those it was their time to look at."""

    def __init__(self, numbers: ndarray, due: ndarray, tensors: list[Tensor]):
        self.numbers, self.due, self._event = numbers, due, None
        if tensors[0].device.type == "cuda":
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
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
        """The tensors as arrays, after waiting for them if need be."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


def _check_context(canvas: Canvas, max_length: int) -> None:
    """Raises ValueError if a row of a canvas is longer than the model's context."""
    longest = int(canvas.length.max())
    if longest > max_length:
        raise ValueError(
            f"a prompt and its new tokens take {longest} positions, the model has {max_length}. "
            "Shorten the prompt or max_new_tokens"
        )


def _check_budget(cost: ndarray, settings: GenerateSettings) -> None:
    if cost.max() > settings.batch_tokens:
        raise ValueError(
            f"batch_tokens = {settings.batch_tokens} is less than the {cost.max()} tokens of a single row"
            f"{' with its guidance' if settings.guidance else ''}; allow at least {cost.max()}"
        )
