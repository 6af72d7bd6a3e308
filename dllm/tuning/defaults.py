"""How to train a model of some size on data of some size, where nobody says: plain tables and rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

LEARNING_RATES = ((10e6, 1e-3), (40e6, 5e-4), (80e6, 2e-4), (1e9, 1e-4), (math.inf, 2e-5))
"""(parameters up to, peak learning rate of AdamW). A BERT of 4.4 million parameters learns best at 1e-3, one of 100 to
400 million at 1e-4; between them it is interpolated by eye."""

EPOCHS = ((5_000, 20.0), (20_000, 10.0), (200_000, 3.0), (math.inf, 1.0))
"""(training rows up to, passes over them)."""

LEAST_STEPS, MOST_EPOCHS = 200, 100.0
"""A small dataset is passed over more often, until there are `LEAST_STEPS` steps; `MOST_EPOCHS` passes at most."""

BATCHES = ((20_000, 32), (100_000, 64), (math.inf, 128))
"""(training rows up to, rows per step)."""

SHORT_ANSWER = 16
"""If the median answer has at most this number of tokens, blocks have this size."""

LEAST_LENGTH, MOST_LENGTH = 128, 1024
"""A longest row that leaves a chat some room, and one that fits most devices; rows cost what they are long."""

TEXT_LENGTH, LEAST_TEXT_ROWS = 256, 64
"""Tokens of a row of text, and the least number of rows: with fewer, rows are made shorter."""

KEPT = 0.98
"""Share of the conversations that are not cut."""

MICRO_BATCH_TOKENS = 8192

WISHED = ("length", "global_batch_size", "learning_rate", "epochs", "steps")
"""Settings of a run that a user may state and that decide others."""


@dataclass(frozen=True)
class Facts:
    """What is in the data: `rows` conversations, or texts; the lengths are those of a sample, in tokens."""

    rows: int
    lengths: numpy.ndarray
    answers: numpy.ndarray
    is_text: bool
    unknown: float = 0.0
    """Share of the tokens to learn that the tokenizer does not know."""

    @property
    def tokens(self) -> float:
        """Tokens of all rows, about."""
        return self.rows * float(self.lengths.mean())


def run_settings(facts: Facts, *, parameters: int, positions: int, wished: dict[str, Any]) -> dict[str, Any]:
    """Settings of a RunEntry. wished: those that the user states, of which `epochs` and `steps` exclude each other."""
    length = wished.get("length") or longest_row(facts, positions)
    rows = math.floor(facts.tokens / length) if facts.is_text else facts.rows
    rows = max(1, round(rows * 0.95))
    batch = wished.get("global_batch_size") or min(_up_to(BATCHES, rows), max(4, rows // 8))
    settings = {
        "length": length,
        "global_batch_size": batch,
        "micro_batch_tokens": max(MICRO_BATCH_TOKENS, 4 * length),
        "optimizer": {"learning_rate": wished.get("learning_rate") or _up_to(LEARNING_RATES, parameters)},
        "evaluations": 5,
        "eval_rows": 256,
    }
    if "steps" in wished:
        return settings | {"steps": wished["steps"]}
    return settings | {"epochs": wished.get("epochs") or epochs(rows, batch)}


def longest_row(facts: Facts, positions: int) -> int:
    """The length at which few conversations are cut, in steps of 32 tokens; of text, one that makes enough rows."""
    if facts.is_text:
        length = min(TEXT_LENGTH, positions)
        while length > 32 and facts.tokens / length < LEAST_TEXT_ROWS:
            length //= 2
        return length
    wanted = float(numpy.quantile(facts.lengths, KEPT)) + SHORT_ANSWER
    return min(positions, max(LEAST_LENGTH, min(MOST_LENGTH, math.ceil(wanted / 32) * 32)))


def block_size(facts: Facts, length: int) -> int:
    """Tokens per block: short answers would be mostly the end of a long one."""
    short = not facts.is_text and float(numpy.median(facts.answers)) <= SHORT_ANSWER
    return min(16 if short else 32, length)


def epochs(rows: int, batch: int) -> float:
    """Passes over the data."""
    per_epoch = max(1, rows // batch)
    return min(MOST_EPOCHS, max(_up_to(EPOCHS, rows), float(math.ceil(LEAST_STEPS / per_epoch))))


def _up_to(table: tuple[tuple[float, Any], ...], size: float) -> Any:
    return next(value for most, value in table if size <= most)
