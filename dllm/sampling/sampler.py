"""Denoising with a masked diffusion model: sampling, infilling and greedy decoding are the same step.

One pass: score the masked positions of each row's active block, propose a token for each, reveal the best few
(`sampling.step`). Here it is repeated: over a fixed batch whose canvas is watched (`denoise_masked`), or over any
number of rows that take the places of those that end (`complete_masked`).
Source: Nie et al. 2025 (arXiv:2502.09992), algorithm 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.blocks import BlockRule
from dllm.core.canvas import Canvas, Completion, first_position
from dllm.models.load import Backbone
from dllm.sampling.step import Decoder, LiveRows, block_rule, merged

_PASSES_PER_READING = 4
"""How many passes of a row lie between two looks at it on an accelerator, where looking takes a copy to the host."""


class Sampler(ABC):
    """The one interface of sampling. A sampler has no state but its frozen settings; its subclasses are final."""

    @abstractmethod
    def denoise(
        self,
        backbone: Backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        finished: Callable[[Canvas], Tensor] | None = None,
    ) -> Iterator[Canvas]:
        """The given canvas, then the canvas after every change. Sampling, infilling and chat are this loop.

        `finished` says which rows [B] may stop early.
        """

    @abstractmethod
    def complete(
        self,
        backbone: Backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        ended: Callable[[list[int], int], bool] | None = None,
    ) -> Iterator[Completion]:
        """Every row of a canvas, which may be many and on the host, in the order in which they are done.

        `ended` says whether a response ends early, given its tokens up to its first mask, the last n of which are new.
        """


@dataclass(frozen=True)
class MaskedSampler(Sampler):
    """Reveals masks, block by block.

    rule: how rows are cut into blocks of a model that attends block-causally, from a backbone and `block_size` of the
    settings; None: a model sees all that is there. Given tokens right of a block then do not help to fill it.
    """

    rule: Callable[[Backbone, int | None], BlockRule] | None = None

    def denoise(self, backbone, canvas, settings, *, finished=None) -> Iterator[Canvas]:
        """See `Sampler.denoise`."""
        return denoise_masked(backbone, canvas, settings, finished=finished, rule=self._rule(backbone, settings))

    def complete(self, backbone, canvas, settings, *, ended=None) -> Iterator[Completion]:
        """See `Sampler.complete`; finished rows make room for waiting ones."""
        return complete_masked(backbone, canvas, settings, ended=ended, rule=self._rule(backbone, settings))

    def _rule(self, backbone: Backbone, settings: GenerateSettings) -> BlockRule | None:
        if self.rule is None:
            return None
        # keys and values of finished blocks are kept, which is exact: there is nothing that `reuse` could approximate
        reject_options("bd3lm", settings, {"reuse": ("none",), "ahead": ("auto", "hidden")})
        return self.rule(backbone, settings.block_size)


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


def finished_by(ended: Callable[[list[int], int], bool]) -> Callable[[Canvas], Tensor]:
    """`ended` of `Sampler.complete` as `finished` of `Sampler.denoise`: rows [B] are asked when they have grown."""
    seen: dict[int, int] = {}

    def finished(canvas: Canvas) -> Tensor:
        known = first_position(canvas.masked).minimum(canvas.length).tolist()
        found = [False] * len(known)
        rows = zip(canvas.start.tolist(), known, canvas.done.tolist(), strict=True)
        for row, (start, end, done) in enumerate(rows):
            if not done and end > seen.get(row, start):
                response = canvas.tokens[row, start:end].tolist()
                found[row] = ended(response, end - seen.get(row, start))
                seen[row] = end
        return torch.tensor(found)

    return finished


def denoise_masked(
    backbone: Backbone,
    canvas: Canvas,
    settings: GenerateSettings,
    *,
    finished: Callable[[Canvas], Tensor] | None = None,
    rule: BlockRule | None = None,
) -> Iterator[Canvas]:
    """Yield the given canvas, then the canvas after every pass, until no row has a mask.

    A row's tokens depend on the model, the settings and its own given tokens only, not on its batch-mates.
    `finished` maps a canvas to [B] bool, rows that may stop early (a stop string in the decoded text, say); their
    remaining masks become EOS, as behind a revealed EOS. Rows that are done leave the batch; every canvas yielded has
    the full size.
    rule, for a model that attends block-causally, as in `Decoder`.
    Raises ValueError if a row is longer than the model's context, or `steps` is less than the blocks of a row.
    """
    check_context(canvas, backbone.max_length)
    decoder = Decoder(backbone, canvas, settings, rule=rule)
    yield canvas
    live = decoder.rows(decoder.plan.open.nonzero()[0], canvas.tokens.shape[1])
    watch = _Watch(decoder) if settings.early_stop or finished else None
    while len(live):
        decoder.step(live)
        canvas = merged(canvas, live)
        if finished is not None:
            live.end(finished(canvas).to(decoder.device).index_select(0, live.index), backbone.eos_id)
            canvas = merged(canvas, live)
        canvas = replace(
            canvas,
            step=canvas.step + 1,
            nfe=canvas.nfe + decoder.passes_per_step,
            computed=int(decoder.computed.sum()),
        )
        yield canvas
        stays = decoder.plan.open[live.numbers]
        if watch is not None:
            stays &= ~watch.done(live)[live.numbers]
        live = live.kept(stays)


def complete_masked(
    backbone: Backbone,
    canvas: Canvas,
    settings: GenerateSettings,
    *,
    ended: Callable[[list[int], int], bool] | None = None,
    rule: BlockRule | None = None,
) -> Iterator[Completion]:
    """Denoise all rows of a canvas, which may be many and on the host, and yield each when it is done.

    At most `settings.batch_size` rows with `settings.batch_tokens` tokens are denoised together, the longest first; a
    row that is done makes room for the next. A row's tokens and passes are those of the row alone.
    `ended` says whether a response ends early, given its tokens up to its first mask, the last n of which are new; it
    is asked once after every pass that made them grow (on an accelerator: every few passes of the row, and at the ends
    of its blocks). rule as in `Decoder`. Raises ValueError if a row is longer than the model's context or
    the token budget, or `steps` is less than the blocks of a row.
    """
    check_context(canvas, backbone.max_length)
    decoder = Decoder(backbone, canvas, settings, rule=rule)
    cost = decoder.length * decoder.passes_per_step
    _check_budget(cost, settings)
    for number in (~decoder.plan.open).nonzero()[0]:
        response = canvas.tokens[number, decoder.start[number] : decoder.length[number]]
        yield Completion(int(number), response.tolist(), 0, 0)
    waiting = deque(sorted(decoder.plan.open.nonzero()[0], key=lambda number: -cost[number]))
    watch, live = _Watch(decoder), None
    while waiting or watch.pending or live is None or len(live):
        live = _filled_up(decoder, live, waiting, cost)
        if len(live):
            watch.look(live, decoder.step(live))
        yield from watch.completions(ended, wait=not len(live))
        live = live.kept(decoder.plan.open[live.numbers] & ~watch.complete[live.numbers])


def _filled_up(decoder: Decoder, live: LiveRows | None, waiting: deque[int], cost: ndarray) -> LiveRows:
    """The live rows with as many of the waiting ones as there is room for."""
    settings, numbers = decoder.settings, []
    used = 0 if live is None else int(cost[live.numbers].sum())
    rows = 0 if live is None else len(live)
    while waiting and rows + len(numbers) < settings.batch_size and used + cost[waiting[0]] <= settings.batch_tokens:
        used += cost[waiting[0]]
        numbers.append(waiting.popleft())
    if live is not None and not numbers:
        return live
    taken = numpy.array(numbers, dtype=numpy.int64)
    fresh = decoder.rows(taken, int(decoder.length[taken].max(initial=0)))
    return live.joined(fresh, decoder.backbone.pad_id) if live is not None and len(live) else fresh


class _Watch:
    """Finds out which rows are done, on the host, without making the device wait.

    On a CPU looking is free and happens after every pass. On an accelerator the rows are copied to the host every few
    passes, and what arrives later is the state of the pass at which the copy was asked for: rows done in the meantime
    change no more, so that nothing depends on when it arrives.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.every = 1 if decoder.device.type == "cpu" else _PASSES_PER_READING
        self.pending: deque[_Reading] = deque()
        self.complete = numpy.zeros(len(decoder.start), dtype=bool)
        self.known = decoder.start.copy()

    def done(self, live: LiveRows) -> ndarray:
        """[R] bool: rows of a fixed batch that are known to be done."""
        if self.decoder.plan.step.max() % self.every == 0:
            self.pending.append(_Reading(live.numbers, live.numbers, [live.done]))
        while self.pending and self.pending[0].is_there():
            reading = self.pending.popleft()
            self.complete[reading.numbers[reading.arrays()[0]]] = True
        return self.complete

    def look(self, live: LiveRows, block_ended: ndarray) -> None:
        """Ask for the state of the live rows after a pass, if it is time for one of them; block_ended [B] bool."""
        due = block_ended | (self.decoder.plan.step[live.numbers] % self.every == 0)
        if due.any():
            state = [live.done, live.passes, live.tokens, live.masked]
            self.pending.append(_Reading(live.numbers, live.numbers[due], state))

    def completions(self, ended: Callable[[list[int], int], bool] | None, wait: bool) -> Iterator[Completion]:
        """Rows found to be complete in what has arrived; `wait` for all that was asked for."""
        while self.pending and (wait or self.pending[0].is_there()):
            reading = self.pending.popleft()
            done, passes, tokens, masked = reading.arrays()
            numbers = reading.numbers
            over = done & ~self.complete[numbers]
            if ended is not None:
                over |= self._stopped(reading, tokens, numpy.where(done, 0, masked.argmax(1)), ended)
            self.complete[numbers[over]] = True
            for row in over.nonzero()[0]:
                number = int(numbers[row])
                response = slice(self.decoder.start[number], self.decoder.length[number])
                left = masked[row, response]
                yield Completion(
                    number,
                    numpy.where(left, self.decoder.backbone.eos_id, tokens[row, response]).tolist(),
                    int(passes[row]) * self.decoder.passes_per_step,
                    int(self.decoder.computed[number]),
                )

    def _stopped(
        self, reading: _Reading, tokens: ndarray, known: ndarray, ended: Callable[[list[int], int], bool]
    ) -> ndarray:
        """[B] bool: rows whose response, known up to a position [B], has grown and says that it ends."""
        numbers, stopped = reading.numbers, numpy.zeros(len(reading.numbers), dtype=bool)
        grown = (known > self.known[numbers]) & ~self.complete[numbers] & numpy.isin(numbers, reading.due)
        for row in grown.nonzero()[0]:
            number, end = numbers[row], known[row]
            response = tokens[row, self.decoder.start[number] : end].tolist()
            stopped[row] = ended(response, int(end - self.known[number]))
            self.known[number] = end
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

    def is_there(self) -> bool:
        """Whether reading it means no waiting."""
        return self._event is None or self._event.query()

    def arrays(self) -> list[ndarray]:
        """The tensors as arrays, after waiting for them if need be."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


def check_context(canvas: Canvas, max_length: int) -> None:
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
