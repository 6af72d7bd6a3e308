"""How a ratio is measured: both sides in turn in one run, the median of each, the spread of the pairs.

A machine that is busy slows both sides of a pair, so the ratio stays meaningful where seconds do not. What the first
calls pay for once (allocation, caches, compilation) is left out of both sides alike.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dllm import provenance

Times = dict[str, list[float]]
"""Samples of each side, in the order they were taken; sample i of all sides belongs together."""


@dataclass(frozen=True)
class Row:
    """One comparison: theirs over ours, so that 8 means eight times less time (or memory, or passes) with ours.

    ours and theirs are medians in `unit`; ratio is theirs / ours, low and high the quartiles of the paired ratios.
    target is the least ratio wanted, or None. correct says what was asserted before the timing.
    """

    name: str
    against: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    pairs: int
    held_equal: str
    correct: str
    target: float | None = None
    note: str = ""
    hardware: str = field(default_factory=provenance.hardware)
    commit: str = field(default_factory=lambda: _commit())
    versions: dict = field(default_factory=provenance.versions)
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def verdict(self) -> str:
        """`reached` or `missed`, empty without a target."""
        return "" if self.target is None else "reached" if self.ratio >= self.target else "missed"


@dataclass(frozen=True)
class Growth:
    """How cost grows: one or more lines over the same x. low and high are the quartiles of the samples at each x."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: list[float]
    lines: dict[str, list[float]]
    low: dict[str, list[float]] = field(default_factory=dict)
    high: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Result:
    """The results of a case: rows and curves, plus its setup; `skipped` says why there are no results."""

    rows: list[Row] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    setup: dict = field(default_factory=dict)
    skipped: str = ""


def interleaved(
    jobs: dict[str, Callable[[], object]], repeats: int, *, warmup: int = 1, at_most: float = 60.0
) -> Times:
    """Seconds of each job, taken in turn (A B A B ...) after `warmup` rounds that do not count.

    At least three rounds (or `repeats` if that is less); then no round begins after `at_most` seconds.
    """
    times: Times = {name: [] for name in jobs}
    for _ in range(warmup):
        for job in jobs.values():
            job()
    began = time.perf_counter()
    for done in range(repeats):
        if done >= min(3, repeats) and time.perf_counter() - began > at_most:
            break
        for name, job in jobs.items():
            gc.collect()
            start = clock()
            job()
            times[name].append(clock() - start)
    return times


def clock() -> float:
    """Seconds, after an accelerator has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    ours: Sequence[float], theirs: Sequence[float], *, name: str, against: str, unit: str = "s", **facts
) -> Row:
    """The row of paired samples, smaller being better on both sides. Raises ValueError unless they are pairs."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{name}: {len(ours)} samples of ours and {len(theirs)} of theirs; samples come in pairs")
    low, high = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
    a, b = statistics.median(ours), statistics.median(theirs)
    return Row(name, against, unit, a, b, b / a, low, high, len(ours), **facts)


def growth(points: dict[float, Times], **facts) -> Growth:
    """A curve of medians with their quartiles, from the samples at each x."""
    sides = list(next(iter(points.values())))
    return Growth(
        x=list(points),
        lines={side: [statistics.median(times[side]) for times in points.values()] for side in sides},
        low={side: [quartiles(times[side])[0] for times in points.values()] for side in sides},
        high={side: [quartiles(times[side])[1] for times in points.values()] for side in sides},
        **facts,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, interpolated between the samples."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def require(holds: bool, what: str) -> str:
    """`what`, which was found to be true. Raises AssertionError, which ends the case, where it is not."""
    if not holds:
        raise AssertionError(f"not so: {what}; its time would mean nothing")
    return what


def say(text: str) -> None:
    """One line of progress on the terminal."""
    print(text, file=sys.stderr, flush=True)


def write_result(path: Path, case: str, title: str, result: Result, seconds: float, *, quick: bool) -> None:
    """Write a case's JSON in one piece."""
    content = {"case": case, "title": title, "quick": quick, "seconds": round(seconds, 1)} | asdict(result)
    content["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    content |= provenance.collect(threads=torch.get_num_threads())
    provenance.write_atomically(path, json.dumps(content, indent=1) + "\n")


def _commit() -> str:
    state = provenance.commit()
    return state["commit"] + (" with uncommitted changes" if state["dirty"] else "")
