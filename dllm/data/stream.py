"""Rows of a corpus that is larger than the disk: read over the network, tokenized and packed while training.

An epoch reads the shards in an order drawn from (seed, epoch), packs their documents as `dllm prepare` does, and
shuffles the rows within windows of `shuffle_rows`. The row of every step is so a pure function of the seed. Every
process reads the same stream and takes its share of each global batch. What a checkpoint holds is the *place* of the
window its step lies in: shard, document and the tokens left over; a resumed run fills that window again.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
from pyarrow.lib import ArrowException

from dllm.data.convert import cut_into_rows, laid_out, text_of
from dllm.data.hub import one_line_errors
from dllm.data.tokens import TokenRows, row_dtype

DOCUMENTS = 200
"""Documents tokenized at a time."""

RETRIES, RETRY_SECONDS = 120, 5
"""How often a broken connection is tried again, and how far apart: ten minutes in all."""


@dataclass(frozen=True)
class Corpus:
    """What a streamed set is: pinned shards at the hub, and how their documents become rows."""

    hub: str
    revision: str
    shards: tuple[str, ...]
    length: int
    append_eos: bool
    shuffle_rows: int
    rows: int
    """Train rows of one epoch, about."""


def open_corpus(directory: str | Path) -> Corpus | None:
    """The streamed corpus that a prepared dataset describes; None if its train rows are on disk (or damaged)."""
    try:
        manifest = json.loads((Path(directory) / "manifest.json").read_text(encoding="utf-8"))
        stream = manifest["stream"]
    except (OSError, ValueError, KeyError):
        return None
    settings = {key: stream[key] for key in ("hub", "revision", "append_eos", "shuffle_rows")}
    rows = manifest["splits"]["train"]["rows"]
    return Corpus(**settings, shards=tuple(stream["shards"]), length=manifest["length"], rows=rows)


@dataclass(frozen=True)
class Place:
    """Where a window begins, so that reading goes on from there to the same bits.

    step: the first training step that takes rows from it; row: number of its first row in the epoch; documents: how
    far `datasets` had read before the documents of its first row (None: nothing yet); carry: tokens left over
    before those; skip: rows of those documents that belong to the window before.
    """

    step: int = 0
    epoch: int = 0
    row: int = 0
    documents: dict | None = None
    carry: list[int] = field(default_factory=list)
    skip: int = 0


class StreamedRows:
    """The train rows of a streamed corpus, as global batches of `batch_size` rows, step by step."""

    def __init__(self, corpus: Corpus, tokenizer, *, seed: int, batch_size: int):
        self.corpus, self.tokenizer, self.seed, self.batch_size = corpus, tokenizer, seed, batch_size
        self.places = [Place()]

    def state(self, step: int) -> dict:
        """What a checkpoint of `step` holds: the place of the window in which that step lies."""
        while len(self.places) > 1 and self.places[1].step <= step:
            self.places.pop(0)
        return asdict(self.places[0])

    def load_state(self, state: dict) -> None:
        """Go on from a checkpoint's place."""
        self.places = [Place(**state)]

    def batches(self, first: int) -> Iterator[tuple[int, TokenRows]]:
        """(epoch, the rows of one global batch) of the steps from `first` on, for ever.

        A window is given out while the next one fills, so that no step waits for many. The rows left over when an
        epoch's batches are full sit it out. Raises ValueError, one line, if the hub cannot be read, or an epoch has
        not even one global batch.
        """
        size = max(1, self.corpus.shuffle_rows // self.batch_size) * self.batch_size
        start = self.places[0]
        while True:
            packed = self._packed(start)
            window = list(itertools.islice(packed, size))
            if len(window) < self.batch_size:
                raise ValueError(
                    f"{self.corpus.hub}: its shards hold fewer rows than one global batch ({self.batch_size}); "
                    "lower global_batch_size, or set stream: false for the dataset"
                )
            step, row = start.step, start.row
            while len(window) >= self.batch_size:
                self._note(Place(step, start.epoch, row, *window[0][:3]))
                following: list[Any] = []
                for numbers in self._order(start.epoch, row, len(window)):
                    following += itertools.islice(packed, self.batch_size)
                    if step >= first:
                        yield start.epoch, self._batch(window, numbers, row)
                    step += 1
                row, window = row + len(window), following
            start = Place(step=step, epoch=start.epoch + 1)

    def _packed(self, place: Place) -> Iterator[tuple[dict | None, list[int], int, numpy.ndarray]]:
        """The rows from a place to the end of its epoch, each with what its own place needs: documents, carry, skip."""
        corpus, pin = self.corpus, f"{self.corpus.hub}@{self.corpus.revision[:8]}"
        dtype = row_dtype(len(self.tokenizer))
        documents, carry, skip = place.documents, place.carry, place.skip
        with one_line_errors(pin, corpus.hub, "dataset"):
            source = self._documents(place.epoch)
        if documents is not None:
            source.load_state_dict(copy.deepcopy(documents))
        read = iter(source)
        while True:
            try:
                with one_line_errors(pin, corpus.hub, "dataset"):
                    chunk = list(itertools.islice(read, DOCUMENTS))
            except ArrowException as error:
                line = str(error).strip().splitlines()[0]
                raise ValueError(f"{pin}: a shard cannot be read ({line}); check the network and run again") from None
            if not chunk:
                return
            texts = [text_of(document, pin) for document in chunk]
            laid = laid_out(self.tokenizer, texts, append_eos=corpus.append_eos)
            tokens: numpy.ndarray = numpy.fromiter(itertools.chain.from_iterable(laid), dtype)
            rows, rest = cut_into_rows(numpy.asarray(carry, dtype), tokens, corpus.length)
            for index in range(skip, len(rows)):
                yield documents, carry, index, rows[index]
            documents, carry, skip = source.state_dict(), rest.tolist(), 0

    def _documents(self, epoch: int):
        """The documents of an epoch: `datasets`' own stream over the shards in this epoch's order."""
        import datasets
        from huggingface_hub import constants

        corpus = self.corpus
        if constants.HF_HUB_OFFLINE:
            raise ValueError(f"{corpus.hub}: is streamed, but HF_HUB_OFFLINE is set; unset it, or set stream: false")
        for name, value in {"MAX_RETRIES": RETRIES, "RETRY_INTERVAL": RETRY_SECONDS}.items():
            setattr(datasets.config, f"STREAMING_READ_{name}", value)
            setattr(datasets.config, f"STREAMING_OPEN_{name}", value)
        order = numpy.random.Generator(numpy.random.Philox(key=[self.seed, epoch])).permutation(len(corpus.shards))
        files = [f"hf://datasets/{corpus.hub}@{corpus.revision}/{corpus.shards[i]}" for i in order]
        return datasets.load_dataset(
            "parquet", data_files={"train": files}, split="train", streaming=True, columns=["text"]
        )

    def _order(self, epoch: int, row: int, rows: int) -> numpy.ndarray:
        """The rows of a window, shuffled, as global batches [batches, batch_size]; `row` is the number of its first."""
        philox = numpy.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, row + 1])
        order = numpy.random.Generator(philox).permutation(rows)
        return order[: rows // self.batch_size * self.batch_size].reshape(-1, self.batch_size)

    def _batch(self, window: list[tuple], numbers: numpy.ndarray, row: int) -> TokenRows:
        tokens = numpy.concatenate([window[number][3] for number in numbers])
        offsets = numpy.arange(len(numbers) + 1) * self.corpus.length
        return TokenRows(tokens, offsets, numpy.zeros(len(numbers), dtype=numpy.int32), ids=row + numbers)

    def _note(self, place: Place) -> None:
        """Remember where a window begins; called while batches are made, in their thread."""
        if self.places[-1].step == place.step:
            self.places.pop()
        self.places.append(place)
