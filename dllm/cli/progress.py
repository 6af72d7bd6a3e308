"""How far a command is, on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from dllm.numbers import bar_options, duration

EVERY_SECONDS = 60


class ProgressLine:
    """A bar in a terminal, else a line at every tenth and every minute, both with the speed and the time left."""

    def __init__(self, name: str, unit: str, stream=None):
        self.name, self.unit, self.stream = name, unit, stream or sys.stderr
        self._bar: Any = None
        self._tenth, self._said = 0, time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.stream.isatty():
            self._draw(done, total)
            return
        tenth, now = (10 * done // total if total else 10), time.monotonic()
        if self._first is None or done < self._first[0]:  # it begins, perhaps where an earlier attempt ended
            self._first, self._tenth = (done, now), min(tenth, self._tenth)
        if tenth > self._tenth or now - self._said > EVERY_SECONDS:
            self._tenth, self._said = tenth, now
            seconds, speed = now - self._first[1], ""
            if seconds >= 1 and done > self._first[0]:
                per_second = (done - self._first[0]) / seconds
                speed = f", {per_second:,.0f} a second, {duration((total - done) / per_second)} left"
            print(f"{self.name}: {done:,} of {total:,} {self.unit}s{speed}", file=self.stream, flush=True)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            options = {"mininterval": 1.0, "disable": False} | bar_options()
            self._bar = tqdm(desc=self.name, initial=done, unit=self.unit, file=self.stream, **options)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar, which ends by itself when all is done."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
