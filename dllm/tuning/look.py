"""What is in a dataset that was downloaded: how its rows are read, how many there are and how long they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from dllm.config import DataPart
from dllm.data.convert import kind_of_part, place_of, split_rows
from dllm.data.formats import FileRows
from dllm.data.shards import Readable, encoded
from dllm.tuning.defaults import Facts

SAMPLED = 2000
"""Rows of a dataset that are tokenized to see how long they are."""


@dataclass(frozen=True)
class Source:
    """One dataset: its entry and place, the kind of its rows, and the line that tells a user about them."""

    part: DataPart
    rows: Any
    kind: str
    said: str

    @property
    def name(self) -> str:
        """Its files, or what its entry is called."""
        return ", ".join(self.rows.names) if isinstance(self.rows, FileRows) else self.part.name

    @property
    def is_text(self) -> bool:
        """Whether it is continued, not answered."""
        return self.kind == "text"


def open_source(part: DataPart) -> Source:
    """A downloaded dataset. Raises ValueError, one line, for files that cannot be read and rows of unknown kinds."""
    _, _, rows, _ = split_rows(part)
    kind, said = kind_of_part(part, rows)
    return Source(part, rows, kind, said or f"rows are read as {kind}")


def facts_of(sources: Sequence[Source], tokenizer) -> Facts:
    """What is in some datasets together. Raises ValueError if they do not go together, or if nothing is usable."""
    if len({source.is_text for source in sources}) > 1:
        texts = [source.part.name for source in sources if source.is_text]
        raise ValueError(
            f"{', '.join(texts)}: holds plain text, and the other data conversations; train on the text first, and on "
            "the conversations from the model that comes of it"
        )
    tokens: Counter[int] = Counter()
    lengths: list[int] = []
    answers: list[int] = []
    usable = 0.0
    unusable: dict[int, str] = {}
    for source in sources:
        numbers = numpy.linspace(0, len(source.rows) - 1, min(SAMPLED, len(source.rows))).astype(int).tolist()
        part = source.part.model_copy(update={"entry": source.part.entry.model_copy(update={"drop_unusable": True})})
        readable = Readable(part, source.kind, source.rows, unusable)
        passages = [passage for number in numbers if (passage := readable.passage(number, tokenizer))]
        ids = encoded(tokenizer, passages)
        for _, answer_ids in ids:
            tokens.update(answer_ids)
        sizes = [(len(p), len(t) + source.is_text) for p, t in ids]  # a text has an end
        usable += min(len(source.rows), part.entry.rows or len(source.rows)) * len(sizes) / max(1, len(numbers))
        answers += [answer for _, answer in sizes]
        lengths += [prompt + answer for prompt, answer in sizes]
    if not lengths or max(lengths) < 2:
        raise ValueError(f"no row can be used: {next(iter(unusable.values())) if unusable else 'all are empty'}")
    unknown = tokens[tokenizer.unk_token_id] / max(1, tokens.total()) if tokenizer.unk_token_id is not None else 0.0
    return Facts(round(usable), numpy.array(lengths), numpy.array(answers), sources[0].is_text, unknown)


def held_out(source: Source, number: int) -> list[tuple[int, str]]:
    """Some rows that training never sees, spread over the held-out ones: (number of the row, its place)."""
    _, test, _, rows = split_rows(source.part)
    chosen = numpy.linspace(0, max(0, len(test) - 1), min(number, len(test))).astype(int)
    return [(row, place_of(source.part, rows, row)) for row in test[chosen].tolist()]
