"""What an engine says of a request: its events, its errors, and its own counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dllm.core.canvas import Score


@dataclass(frozen=True)
class Snapshot:
    """The canvas of one answer after one pass.

    step: passes of this row so far; pieces: the text that each response token adds to its neighbours, None while it is
    masked; ids: the response tokens, the mask token where they are masked; confidence: the probability that each had
    when it was revealed, 0 while masked; revealed: which of them this pass revealed, counted from the response's start.
    text: the final text as far as it is known; later snapshots and the end only add to it. Of an infill it is empty
    until no mask is left.
    """

    step: int
    pieces: tuple[str | None, ...]
    ids: tuple[int, ...]
    confidence: tuple[float, ...]
    revealed: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Edited:
    """A draft after one pass: pieces are (kind, text), kind `kept`, `gone` or `new`; text: the draft as it is now."""

    step: int
    pieces: tuple[tuple[str, str], ...]
    text: str


@dataclass(frozen=True)
class Finished:
    """How an answer, an infill or an edit ended.

    text: what `DiffusionLM.generate`, `infill` or `edits` gives; prompt_tokens: given tokens of its row; tokens: of the
    text (`Answer.tokens`; filled holes; tokens of the edited draft); passes: forward passes; reason: `stop` if an end
    of turn, EOS or a stop string ended it, `length` if the canvas was full; seconds: from when it was asked for; ids:
    the tokens of the text.
    """

    text: str
    prompt_tokens: int
    tokens: int
    passes: int
    reason: Literal["stop", "length"]
    seconds: float
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """The scores of a request, in the order of its pairs; prompt_tokens, tokens: of all prompts, of all targets."""

    scores: tuple[Score, ...]
    prompt_tokens: int
    tokens: int
    seconds: float


Event = Snapshot | Edited | Finished | Scored | Exception
"""`Finished`, `Scored` and exceptions are the last event of an answer."""


@dataclass(frozen=True)
class Stats:
    """Counts since the start, and of now: queued (requests), running (rows), jobs (edits and scores that have begun).

    tokens: of finished answers; passes: forward passes of rows, a row once each; computed: positions that went through
    the model in them; batches: forward passes of the model for generation, several rows each; finished, failed,
    cancelled: requests; refused: requests that found the queue full.
    """

    queued: int
    running: int
    jobs: int
    tokens: int
    passes: int
    computed: int
    batches: int
    finished: int
    failed: int
    cancelled: int
    refused: int


class Full(Exception):
    """The queue is full; `retry_after`: in how many seconds there may be room."""

    def __init__(self, retry_after: float):
        super().__init__(f"too many requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine takes no new requests."""


class TooLong(Exception):
    """A request did not end within the engine's time limit."""
