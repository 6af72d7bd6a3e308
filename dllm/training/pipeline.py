"""From rows on disk to micro-batches on the device, a few of them ahead of the step.

Which rows a step takes is a pure function of (seed, epoch). How they are laid out is free, because denominators count
the global batch and noise is keyed by sample: here the ranks get the same number of rows and nearly the same number of
tokens, and a rank's rows are sorted by length and cut into micro-batches of nearly equal size. The ranks have equally
many micro-batches, so that a wrapper which exchanges parameters in every forward pass finds them in step.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from numpy import ndarray

from dllm.config import RunConfig
from dllm.core.batch import Inputs, Noise, evaluation_noise, row_noise
from dllm.core.losses import denominator
from dllm.data.collate import ResponseEnd, collate, epoch_batches, row_lengths, row_widths, target_counts
from dllm.data.stream import StreamedRows
from dllm.data.tokens import TokenRows
from dllm.objectives.objective import Objective

AHEAD = 4
"""Micro-batches made ahead of the step."""

EVALUATION_SEED = 20_240_611
"""Seed of the fixed evaluation noise, the same for every run, so that eval curves are comparable."""


@dataclass(frozen=True)
class Limits:
    """What fits into a micro-batch: rows, and tokens (None: any number), counted with padding where `padded`."""

    rows: int
    tokens: int | None = None
    padded: bool = False


@dataclass(frozen=True)
class Part:
    """A micro-batch: the objective's inputs, what its summed loss is divided by, and whether it ends its step.

    numbers: the rows in it; tokens: tokens of the whole global batch on disk, the same on every rank; counts: false
    for one that another rank evaluates, forwarded to keep the ranks in step.
    """

    inputs: Inputs
    denominator: float
    last: bool
    numbers: ndarray
    tokens: int
    counts: bool = True


@dataclass(frozen=True)
class Source:
    """One split of a run's data as its objective sees it.

    stream: where the rows of training steps come from, if they are not on disk; `rows` is then the step's alone.
    """

    rows: TokenRows
    objective: Objective
    end: ResponseEnd | None
    pad_id: int
    mask_id: int
    stream: StreamedRows | None = None

    def inputs(self, numbers: ndarray, epoch: int, fill_to: int, noise) -> Inputs:
        """The rows `numbers` as inputs; noise is a function of (sample ids, width)."""
        batch = collate(self.rows, numbers, pad_id=self.pad_id, end=self.end, epoch=epoch, fill_to=fill_to)
        drawn: Noise = noise(batch.sample_ids, batch.tokens.shape[1])
        return self.objective.corrupt(batch, drawn, mask_id=self.mask_id)

    def forwarded(self, numbers: ndarray, epoch: int, fill_to: int) -> ndarray:
        """How many tokens each row sends through the model, [B]."""
        lengths = row_lengths(self.rows, numbers, self.end, epoch, fill_to)
        return self.objective.forward_lengths(lengths, self.rows.prompts[numbers])

    def counted(self, numbers: ndarray, epoch: int = 0) -> torch.Tensor:
        """How many targets of each row the loss counts, [B] long."""
        targets = torch.from_numpy(target_counts(self.rows, numbers, self.end, epoch))
        return self.objective.target_counts(targets, torch.from_numpy(self.rows.prompts[numbers]))


def training_parts(
    source: Source, config: RunConfig, *, first: int, last: int, rank: int = 0, ranks: int = 1
) -> Iterator[Part]:
    """This rank's micro-batches of the steps `first` to `last` - 1, in order."""
    if source.stream is not None:
        for epoch, rows in itertools.islice(source.stream.batches(first), last - first):
            numbers = numpy.arange(len(rows))
            yield from _step_parts(replace(source, rows=rows), config, numbers, epoch, rank, ranks)
        return
    batches, known = numpy.zeros(0), -1
    per_epoch = steps_per_epoch(config, len(source.rows))
    for step in range(first, last):
        epoch, position = divmod(step, per_epoch)
        if epoch != known:
            widths, grouped = row_widths(source.rows, source.end), source.end is not None
            batches = epoch_batches(widths, config.global_batch_size, config.seed, epoch, grouped=grouped)
            known = epoch
        yield from _step_parts(source, config, batches[position], epoch, rank, ranks)


def steps_per_epoch(config: RunConfig, rows: int) -> int:
    """Global batches in one pass over `rows` rows, at least one."""
    return max(1, rows // config.global_batch_size)


def _step_parts(
    source: Source, config: RunConfig, numbers: ndarray, epoch: int, rank: int, ranks: int
) -> Iterator[Part]:
    disk = source.rows.lengths[numbers]
    longest, tokens = int(disk.max()), int(disk.sum())
    normalisation = config.recipe.normalisation
    published = config.recipe.denominator == "micro_batch"
    if published:  # fault F5: the loss depends on this split, which is therefore the published one
        mine = numbers.reshape(ranks, -1)[rank]
        parts = [mine[i : i + config.micro_batch_size] for i in range(0, len(mine), config.micro_batch_size)]
    else:
        lengths = source.forwarded(numbers, epoch, longest)
        parts = [numbers[part] for part in micro_batches(lengths, limits_of(config), rank=rank, ranks=ranks)]
    total = denominator(source.counted(numbers, epoch), normalisation)
    for index, part in enumerate(parts):
        inputs = source.inputs(part, epoch, longest, lambda ids, width: row_noise(config.seed, epoch, ids, width))
        share = denominator(source.counted(part, epoch), normalisation) if published else total
        yield Part(inputs, share, index == len(parts) - 1, part, tokens)


def evaluation_parts(
    source: Source, config: RunConfig, numbers: ndarray, *, draw_seed: int | None = None, rank: int = 0, ranks: int = 1
) -> Iterator[Part]:
    """This rank's micro-batches of test rows, each with the first noise draw, then the second, and so on.

    draw_seed: None for the fixed evaluation noise; an integer for noise of its own (published fault F6).
    """
    longest = int(source.rows.lengths[numbers].max())
    lengths = source.forwarded(numbers, 0, longest)
    order = numpy.argsort(-lengths, kind="stable")
    limits = limits_of(config)
    needed = len(greedy_cut(lengths[order], limits)) - 1
    parts = min(len(order), -(-needed // ranks) * ranks)
    bounds = even_cut(lengths[order], parts, limits)
    cuts = list(zip(bounds, bounds[1:], strict=False))
    for turn in range(rank, -(-len(cuts) // ranks) * ranks, ranks):
        counts = turn < len(cuts)  # fewer rows than ranks: some rank forwards what is not its own
        low, high = cuts[min(turn, len(cuts) - 1)]
        part = numbers[order[low:high]]
        for draw in range(config.eval_draws):

            def noise(ids, width, draw=draw):
                if draw_seed is None:
                    return evaluation_noise(EVALUATION_SEED, draw, ids, width)
                return row_noise(draw_seed, draw, ids, width)

            yield Part(source.inputs(part, 0, longest, noise), 1.0, True, part, 0, counts)


def limits_of(config: RunConfig) -> Limits:
    """What a run's settings allow in a micro-batch."""
    return Limits(config.micro_batch_size, config.micro_batch_tokens)


def micro_batches(lengths: ndarray, limits: Limits, *, rank: int = 0, ranks: int = 1) -> list[ndarray]:
    """The micro-batches of one rank: arrays of indices into `lengths` [N], longest rows first.

    Over all ranks every row stands in exactly one of them; ranks have equally many rows and micro-batches. Raises
    ValueError if N does not divide by the ranks, or if a row is longer than the limit.
    """
    shares = share_out(lengths, ranks)
    parts = max(len(greedy_cut(lengths[share], limits)) - 1 for share in shares)
    mine = shares[rank]
    bounds = even_cut(lengths[mine], parts, limits)
    return [mine[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]


def share_out(lengths: ndarray, ranks: int) -> ndarray:
    """Indices of rows [ranks, N / ranks], longest first, so that the ranks hold nearly equal numbers of tokens.

    The rows are taken by length, as many at a time as there are ranks; the longest of them goes to the rank that holds
    the fewest tokens so far.
    """
    if len(lengths) % ranks:
        raise ValueError(f"{len(lengths)} rows do not divide by {ranks} processes; change one of them")
    groups = numpy.argsort(-lengths, kind="stable").reshape(-1, ranks)
    shares, load = numpy.empty_like(groups), numpy.zeros(ranks, dtype=numpy.int64)
    for place, group in enumerate(groups):
        lightest = numpy.argsort(load, kind="stable")
        shares[place, lightest] = group
        load[lightest] += lengths[group]
    return numpy.ascontiguousarray(shares.T)


def greedy_cut(lengths: ndarray, limits: Limits) -> list[int]:
    """Bounds [0, ..., N] of the fewest consecutive micro-batches of rows with descending `lengths` [N].

    Raises ValueError if a row is longer than `limits.tokens`.
    """
    ends = numpy.concatenate([[0], numpy.cumsum(lengths)])
    most = limits.tokens
    if most is not None and len(lengths) and lengths[0] > most:
        raise ValueError(
            f"micro_batch_tokens = {most} is smaller than a row of {lengths[0]} tokens; "
            f"allowed: {lengths[0]} and up; raise it or lower length"
        )
    bounds = [0]
    while bounds[-1] < len(lengths):
        low = bounds[-1]
        high = low + limits.rows
        if most is not None and limits.padded:
            high = min(high, low + most // int(lengths[low]))
        elif most is not None:
            high = min(high, int(numpy.searchsorted(ends, ends[low] + most, side="right")) - 1)
        bounds.append(min(high, len(lengths)))
    return bounds


def even_cut(lengths: ndarray, parts: int, limits: Limits) -> list[int]:
    """Bounds [0, ..., N] of exactly `parts` consecutive micro-batches within the limits, of nearly equal size.

    lengths [N] descend; `parts` lies between the fewest that are possible (`greedy_cut`) and N.
    """
    low, high = int(lengths[0]), int(lengths[0]) * len(lengths)
    high = high if limits.tokens is None else min(high, limits.tokens)
    while low < high:  # the smallest budget that does with so many parts
        middle = (low + high) // 2
        enough = len(greedy_cut(lengths, replace(limits, tokens=middle))) - 1 <= parts
        low, high = (low, middle) if enough else (middle + 1, high)
    bounds = greedy_cut(lengths, replace(limits, tokens=low))
    while len(bounds) - 1 < parts:
        sizes = numpy.diff(bounds)
        widest = int(sizes.argmax())
        bounds.insert(widest + 1, bounds[widest] + int(sizes[widest]) // 2)
    return bounds


class Ahead(Iterator[Part]):
    """An iterator whose items are made in a background thread, a few ahead: `with Ahead(parts) as parts: ...`.

    What is raised while an item is made is raised where that item is asked for. The thread draws nothing from a global
    random state and ends with the block, whatever ends the block. pin: put the inputs into page-locked memory.
    """

    _END = object()

    def __init__(self, parts: Iterator[Part], *, ahead: int = AHEAD, pin: bool = False):
        self._parts, self._pin = parts, pin
        self._made: queue.Queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make, name="dllm-input", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._closed.set()
        self._thread.join()

    def __next__(self) -> Part:
        made = self._made.get()
        if isinstance(made, BaseException) or made is self._END:
            self._made.put(made)  # whoever asks again hears the same
            raise StopIteration if made is self._END else made
        return made

    def _make(self) -> None:
        try:
            for part in self._parts:
                if not self._put(replace(part, inputs=part.inputs.pin_memory()) if self._pin else part):
                    return
            self._put(self._END)
        except BaseException as fault:  # handed to the thread that trains, which alone can end the run
            self._put(fault)

    def _put(self, item) -> bool:
        """Wait for room; False when the block has ended meanwhile."""
        while not self._closed.is_set():
            try:
                self._made.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False
