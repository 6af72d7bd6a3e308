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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.config import RunConfig
from dllm.core.batch import Inputs, Noise, evaluation_noise, row_noise
from dllm.core.losses import denominator
from dllm.data.collate import ResponseEnd, collate, ended_lengths, epoch_batches, row_widths
from dllm.data.stream import StreamedRows
from dllm.data.tokens import TokenRows
from dllm.objectives.objective import Objective

AHEAD = 4
"""Micro-batches made ahead of the step."""

EVALUATION_SEED = 20_240_611
"""Seed of the fixed evaluation noise, the same for every run, so that eval curves are comparable."""


@dataclass(frozen=True)
class Limits:
    """What fits into a micro-batch: rows, and tokens (None: any number)."""

    rows: int
    tokens: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """The objective's inputs, what their summed loss is divided by, and whether they are the last of their step.

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
class EndedRows:
    """Rows of a split with the ends of their responses, and what is counted of them.

    numbers [B]: which rows; lengths [B]: their tokens, the ends included; forwarded [B]: tokens that go through the
    model; targets [B]: targets that the loss counts.
    """

    numbers: ndarray
    epoch: int
    lengths: ndarray
    forwarded: ndarray
    targets: ndarray

    def taken(self, index: ndarray) -> EndedRows:
        """Some of the rows, with the ends that they have among all of them."""
        return EndedRows(
            self.numbers[index], self.epoch, self.lengths[index], self.forwarded[index], self.targets[index]
        )


@dataclass(frozen=True)
class TrainingSplit:
    """One split of a run's data as its objective sees it.

    stream: where the rows of training steps come from, if they are not on disk; `rows` is then the step's alone.
    """

    rows: TokenRows
    objective: Objective
    end: ResponseEnd | None
    pad_id: int
    mask_id: int
    stream: StreamedRows | None = None

    def ended(self, numbers: ndarray, epoch: int = 0) -> EndedRows:
        """The rows `numbers` with the ends that they have in a batch of exactly these."""
        prompts = self.rows.prompts[numbers]
        lengths = ended_lengths(self.rows, numbers, self.end, epoch)
        targets = lengths if self.end is None else lengths - prompts
        forwarded = self.objective.forward_lengths(lengths, prompts)
        counted = self.objective.target_counts(torch.from_numpy(targets), torch.from_numpy(prompts)).numpy()
        return EndedRows(numbers, epoch, lengths, forwarded, counted)

    def inputs(self, rows: EndedRows, noise: Callable[[Tensor, int], Noise]) -> Inputs:
        """The rows as inputs of the loss; noise is a function of (sample ids, width)."""
        batch = collate(self.rows, rows.numbers, rows.lengths, pad_id=self.pad_id, end=self.end)
        drawn = noise(batch.sample_ids, batch.tokens.shape[1])
        return self.objective.corrupt(batch, drawn, mask_id=self.mask_id)


def micro_batches(
    split: TrainingSplit, config: RunConfig, *, first: int, last: int, rank: int = 0, ranks: int = 1
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the steps `first` to `last` - 1, in order."""
    if split.stream is not None:
        for epoch, rows in itertools.islice(split.stream.batches(first), last - first):
            numbers = numpy.arange(len(rows))
            yield from _of_step(replace(split, rows=rows), config, numbers, epoch, rank, ranks)
        return
    batches, known = numpy.zeros(0), -1
    per_epoch = steps_per_epoch(config, len(split.rows))
    for step in range(first, last):
        epoch, position = divmod(step, per_epoch)
        if epoch != known:
            widths, grouped = row_widths(split.rows, split.end), split.end is not None
            batches = epoch_batches(widths, config.global_batch_size, config.seed, epoch, grouped=grouped)
            known = epoch
        yield from _of_step(split, config, batches[position], epoch, rank, ranks)


def one_step(made: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The next micro-batches, up to the last one of their step."""
    for part in made:
        yield part
        if part.last:
            return


def steps_per_epoch(config: RunConfig, rows: int) -> int:
    """Optimiser steps in one pass over `rows` rows, at least one; of prompts that are answered, several to a batch."""
    if config.policy is None:
        return max(1, rows // config.global_batch_size)
    prompts = config.global_batch_size // config.policy.num_generations
    return max(1, rows // prompts) * config.policy.num_iterations


def _of_step(
    split: TrainingSplit, config: RunConfig, numbers: ndarray, epoch: int, rank: int, ranks: int
) -> Iterator[MicroBatch]:
    rows = split.ended(numbers, epoch)
    tokens = int(split.rows.lengths[numbers].sum())

    def noise(ids: Tensor, width: int) -> Noise:
        return row_noise(config.seed, epoch, ids, width)

    def total(counted: EndedRows) -> float:
        return denominator(torch.from_numpy(counted.targets), config.recipe.normalisation)

    if config.recipe.denominator == "micro_batch":  # fault F5: the loss depends on this cut, which is the published one
        mine = numpy.arange(len(numbers)).reshape(ranks, -1)[rank]
        parts = [mine[i : i + config.micro_batch_size] for i in range(0, len(mine), config.micro_batch_size)]
        totals = [total(split.ended(numbers[part], epoch)) for part in parts]  # filled to its own longest row only
    else:
        parts = cut_rows(rows.forwarded, limits_of(config), rank=rank, ranks=ranks)
        totals = [total(rows)] * len(parts)
    for index, part in enumerate(parts):
        inputs = split.inputs(rows.taken(part), noise)
        yield MicroBatch(inputs, totals[index], index == len(parts) - 1, numbers[part], tokens)


def evaluated_rows(config: RunConfig, rows: int, *, final: bool) -> ndarray:
    """The numbers of the test rows, of `rows`, that an evaluation reads, ascending: the first `eval_rows`.

    The last one (`final`), and every one without `eval_rows`, reads all, or `test_rows` at even distances, so that all
    parts of a mixture are among them.
    """
    if config.eval_rows and not final:
        return numpy.arange(min(rows, config.eval_rows))
    count = min(rows, config.test_rows or rows)
    return numpy.arange(count) * rows // count


def evaluation_micro_batches(
    split: TrainingSplit,
    config: RunConfig,
    rows: EndedRows,
    *,
    draw_seed: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of test rows, each with the first noise draw, then the second, and so on.

    draw_seed: None for the fixed evaluation noise; an integer for noise of its own (published fault F6).
    """
    order = numpy.argsort(-rows.forwarded, kind="stable")
    lengths, limits = rows.forwarded[order], limits_of(config)
    needed = len(greedy_cut(lengths, limits)) - 1
    bounds = even_cut(lengths, min(len(order), -(-needed // ranks) * ranks), limits)
    cuts = list(zip(bounds, bounds[1:], strict=False))
    for turn in range(rank, -(-len(cuts) // ranks) * ranks, ranks):
        counts = turn < len(cuts)  # fewer rows than ranks: some rank forwards what is not its own
        low, high = cuts[min(turn, len(cuts) - 1)]
        part = rows.taken(order[low:high])
        for draw in range(config.eval_draws):

            def noise(ids: Tensor, width: int, draw: int = draw) -> Noise:
                if draw_seed is None:
                    return evaluation_noise(EVALUATION_SEED, draw, ids, width)
                return row_noise(draw_seed, draw, ids, width)

            yield MicroBatch(split.inputs(part, noise), 1.0, True, part.numbers, 0, counts)


def limits_of(config: RunConfig) -> Limits:
    """What a run's settings allow in a micro-batch."""
    return Limits(config.micro_batch_size, config.micro_batch_tokens)


def cut_rows(lengths: ndarray, limits: Limits, *, rank: int = 0, ranks: int = 1) -> list[ndarray]:
    """The micro-batches of one rank: arrays of indices into `lengths` [N], longest rows first.

    Over all ranks every row is in exactly one of them; ranks have equally many rows and micro-batches. Raises
    ValueError if N does not divide by the ranks, or if a row is longer than the limit.
    """
    shares = balance_rows(lengths, ranks)
    parts = max(len(greedy_cut(lengths[share], limits)) - 1 for share in shares)
    mine = shares[rank]
    bounds = even_cut(lengths[mine], parts, limits)
    return [mine[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]


def balance_rows(lengths: ndarray, ranks: int) -> ndarray:
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
        if most is not None:
            high = min(high, int(numpy.searchsorted(ends, ends[low] + most, side="right")) - 1)
        bounds.append(min(high, len(lengths)))
    return bounds


def even_cut(lengths: ndarray, parts: int, limits: Limits) -> list[int]:
    """Bounds [0, ..., N] of exactly `parts` consecutive micro-batches within the limits, of nearly equal size.

    lengths [N] descend; `parts` lies between the fewest that are possible (`greedy_cut`) and N.
    """
    low, high = int(lengths[0]), int(lengths[0]) * len(lengths)
    high = high if limits.tokens is None else min(high, limits.tokens)
    while low < high:  # the smallest budget with which `parts` micro-batches are enough
        middle = (low + high) // 2
        enough = len(greedy_cut(lengths, replace(limits, tokens=middle))) - 1 <= parts
        low, high = (low, middle) if enough else (middle + 1, high)
    bounds = greedy_cut(lengths, replace(limits, tokens=low))
    while len(bounds) - 1 < parts:
        sizes = numpy.diff(bounds)
        widest = int(sizes.argmax())
        bounds.insert(widest + 1, bounds[widest] + int(sizes[widest]) // 2)
    return bounds


class Prefetcher(Iterator[MicroBatch]):
    """An iterator whose items are made in a background thread, a few ahead: `with Prefetcher(made) as ahead: ...`.

    An error in making an item is raised where the item is taken. The thread draws nothing from a global
    random state and ends with the block, whatever ends the block. pin: put the inputs into page-locked memory.
    Ctrl-C may come at any moment: within a `queue.Queue`, which is Python, it can leave a lock taken for ever.
    """

    _END = object()

    def __init__(self, made: Iterator[MicroBatch], *, ahead: int = AHEAD, pin: bool = False):
        self._source, self._pin = made, pin
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        self._room: queue.SimpleQueue = queue.SimpleQueue()  # something for each item that may be made
        for _ in range(ahead):
            self._room.put(None)
        self._closed = False
        self._thread = threading.Thread(target=self._make, name="dllm-input", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._closed = True
        self._room.put(None)
        self._thread.join()

    def __next__(self) -> MicroBatch:
        made = self._made.get()
        if made is self._END:
            self._made.put(made)  # for the next call
            raise StopIteration
        if isinstance(made, BaseException):
            self._made.put(made)
            raise made
        self._room.put(None)
        return made

    def _make(self) -> None:
        try:
            for part in self._source:
                part = replace(part, inputs=part.inputs.pin_memory()) if self._pin else part
                self._room.get()
                if self._closed:
                    return
                self._made.put(part)
            self._made.put(self._END)
        except BaseException as error:  # handed to the thread that trains, which alone can end the run
            self._made.put(error)
