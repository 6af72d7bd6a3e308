"""The options of a run of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """quick: a smoke run whose numbers mean nothing; workdir: that of the laptop run (None: results/laptop)."""

    out: Path
    workdir: Path | None = None
    quick: bool = False

    def repeats(self, count: int) -> int:
        """How many rounds are timed."""
        return 1 if self.quick else count

    def target(self, ratio: float | None) -> float | None:
        """The least ratio wanted, if there is one; a smoke run has none."""
        return None if self.quick else ratio
