"""Answers of a model, kept on disk: an evaluation that was killed goes on, and several processes share the work.

One line of JSON per chunk of answers, {key: answer}, appended; it is on the disk before the next chunk is computed. The
key of an answer is a digest of the request and of everything that decides its answer (the model key), so that another
checkpoint, tokenizer, setting or version of the code finds nothing.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from dllm.config import digest

Answer = dict[str, Any]
"""{"answer": text, [log-likelihood in nats, is_greedy], or log-likelihood; "standard_error", "estimator" of a
likelihood; "rounds" and "doubt" of a raced one; "passes"; "tokens" of a text; "truncated"}"""

SECONDS = "model_seconds"
"""Key, among those of the answers of a chunk, of the wall time that the model took for them."""


def request_key(kind: str, arguments: tuple, *, repeat: int, variant: str, model_key: str) -> str:
    """Key of one answer. repeat numbers the draws of one request; variant: what else is computed (the greedy check)."""
    request = {"kind": kind, "arguments": list(arguments), "repeat": repeat, "variant": variant, "model": model_key}
    return digest(request)


class AnswerStore:
    """The answers under `<directory>/*.jsonl`; this process appends to `<directory>/<writer>.jsonl` only.

    Torn lines (a process was killed while writing) are skipped.
    """

    def __init__(self, directory: str | Path, writer: str = "shard-0-of-1"):
        self.directory = Path(directory)
        self.path = self.directory / f"{writer}.jsonl"
        self._answers: dict[str, Answer] = {}
        self._seconds: dict[tuple[Path, int], float] = {}
        self.read()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def seconds(self) -> float:
        """Wall time in the model of all writers together, as of the last `read`."""
        return math.fsum(self._seconds.values())

    def read(self) -> None:
        """Read what all writers have written so far."""
        for path in sorted(self.directory.glob("*.jsonl")):
            with path.open("rb") as file:
                for number, line in enumerate(file):
                    try:
                        chunk = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(chunk, dict):
                        self._seconds[path, number] = chunk.pop(SECONDS, 0.0)
                        self._answers.update(chunk)

    def write(self, answers: dict[str, Answer], seconds: float = 0.0) -> None:
        """Append a chunk of answers and return once it is on the disk; a crash leaves all of it there, or nothing."""
        self.directory.mkdir(parents=True, exist_ok=True)
        line = json.dumps(answers | {SECONDS: round(seconds, 6)}, ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            if file.tell() and not _ends_with_newline(self.path):
                file.write(b"\n")  # a torn last line must not swallow the next one
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._answers.update(answers)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
