"""Rows become tokens shard by shard, on several processes; a shard that is finished outlives the process.

A shard is some rows of one source in rising order, and a small prepared dataset of its own. Which rows, and so its
bytes, do not depend on how many processes there are. Only a few rows of a source are in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy

from dllm.config import DataPart, PrepareConfig
from dllm.data.convert import answers_of, place_of, text_of
from dllm.data.formats import FileRows
from dllm.data.kinds import has_rejected
from dllm.data.tokens import TokenWriter, open_rows, rejected_split
from dllm.models.literal_text import count_spelling_control, encode_marked, literal_messages, marked
from dllm.models.tokenizers import load_tokenizer, rendered
from dllm.provenance import settle

SHARD_ROWS = 2000
LEAST_SHARDS = 5
"""Shards that a process of its own is started for, at least: to start one takes as long as two or three."""

BATCH_ROWS, BATCH_CHARACTERS = 200, 1_000_000
"""Rows that are tokenized in one call: so many, or fewer that have about so many characters together."""


@dataclass(frozen=True)
class Shard:
    """Rows [N] of one source (the train or the test rows of a part), and which of them belong to a split, bool [N]."""

    name: str
    part: int
    source: str
    numbers: numpy.ndarray
    splits: dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Passage:
    """A row as it is tokenized, marked: prompt (empty for text) and target; whether it spells what it must not mean;
    and a rejected target, if its kind has one."""

    prompt: str
    target: str
    spells: bool
    rejected: str = ""


@dataclass(frozen=True)
class Readable:
    """The rows of a part as passages. An unusable one is an error, or is noted where the entry says so.

    unusable: the error lines of what was dropped, by number.
    """

    part: DataPart
    kind: str
    rows: FileRows
    unusable: dict[int, str]

    def passage(self, number: int, tokenizer) -> Passage | None:
        """A row; None if it cannot be used. Raises ValueError, one line."""
        where, row = place_of(self.part, self.rows, number), self.rows[number]
        try:
            if self.kind == "text":
                text = text_of(row, where)
                return Passage("", marked(tokenizer, text), count_spelling_control(tokenizer, [text]) > 0)
            found = [_in_template(tokenizer, turns, where) for turns in answers_of(row, self.kind, where)]
        except ValueError as error:
            if not self.part.entry.drop_unusable:
                name = self.part.name
                raise ValueError(f"{error}; or set drop_unusable: true in the entry of {name!r}") from None
            self.unusable[number] = str(error)
            return None
        prompt, spells = found[0][0], any(spells for _, _, spells in found)
        if not all(whole.startswith(prompt) for _, whole, _ in found):
            raise ValueError(f"{self.part.name}: the chat template does not continue its own generation prompt")
        target, rejected = (*(whole[len(prompt) :] for _, whole, _ in found), "")[:2]
        return Passage(prompt, target, spells, rejected)


def encoded(tokenizer, passages: Sequence[Passage]) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompt and target of each passage."""
    ids = encode_marked(tokenizer, [text for passage in passages for text in (passage.prompt, passage.target)])
    return list(zip(ids[::2], ids[1::2], strict=True))


def _in_template(tokenizer, messages: list[dict], where: str) -> tuple[str, str, bool]:
    """A conversation up to its last answer, the whole of it, and whether it spells what the template writes itself."""
    literal = literal_messages(tokenizer, messages)
    try:
        prompt = rendered(tokenizer, literal[:-1], add_generation_prompt=True)
        whole = rendered(tokenizer, literal, add_generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return prompt, whole, literal is not messages


def shards_of(part: int, train: numpy.ndarray, test: numpy.ndarray, *, one_source: bool, first: int = 0) -> list[Shard]:
    """The shards of a part with these row numbers, named from `first` on; a row of both splits is read once."""
    if one_source:
        numbers = numpy.union1d(train, test)
        sources = [("train", numbers, {"train": numpy.isin(numbers, train), "test": numpy.isin(numbers, test)})]
    else:
        chosen = {"train": numpy.sort(train), "test": test}
        sources = [(name, numbers, {name: numpy.ones(len(numbers), dtype=bool)}) for name, numbers in chosen.items()]
    found: list[Shard] = []
    for source, numbers, splits in sources:
        for low in range(0, len(numbers), SHARD_ROWS):
            rows = slice(low, low + SHARD_ROWS)
            here = {split: chosen[rows] for split, chosen in splits.items()}
            found.append(Shard(f"{first + len(found):06d}", part, source, numbers[rows], here))
    return found


@dataclass(frozen=True)
class Tokenizing:
    """How shards are made: of `sources` (by part: its train and test rows) and `kinds`, below `directory`."""

    config: PrepareConfig
    workdir: Path
    directory: Path
    sources: list[dict[str, FileRows]]
    kinds: list[str]

    @cached_property
    def tokenizer(self):
        """That of the model."""
        return load_tokenizer(self.workdir / self.config.model_path, self.config.model)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}

    def is_made(self, shard: Shard) -> bool:
        """Whether a shard is there, whole."""
        try:
            return all(open_rows(self.directory / shard.name, split) is not None for split in shard.splits)
        except ValueError:
            return False

    def make(self, shard: Shard) -> None:
        """Write a shard; it is visible once it is whole."""
        target = self.directory / shard.name
        scratch = target.with_name(f"{shard.name}.{os.getpid()}")
        for left in (scratch, target):
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        (scratch / "manifest.json").write_text(json.dumps({"splits": self._write(shard, scratch)}), encoding="utf-8")
        settle(*scratch.iterdir())
        os.replace(scratch, target)

    def _write(self, shard: Shard, directory: Path) -> dict[str, dict]:
        """Write the token files of a shard; what its manifest says of each split."""
        part, kind, length = self.config.parts[shard.part], self.kinds[shard.part], self.config.length
        readable = Readable(part, kind, self.sources[shard.part][shard.source], {})
        names = [*shard.splits, *(rejected_split(split) for split in shard.splits if has_rejected(kind))]
        writers = {name: TokenWriter(directory, name, len(self.tokenizer)) for name in names}
        counts = {split: {"dropped_rows": 0, "spelt": 0, "unusable": 0, "first": ""} for split in shard.splits}
        end = [self.tokenizer.eos_token_id] if kind == "text" and part.entry.append_eos else []
        numbers = shard.numbers.tolist()
        for place, (passage, prompt, target, rejected) in enumerate(self._tokenized(readable, numbers)):
            row = [*prompt, *target, *end]
            for split in (name for name, chosen in shard.splits.items() if chosen[place]):
                count = counts[split]
                if passage is None:
                    count["unusable"] += 1
                    count["first"] = count["first"] or readable.unusable[numbers[place]]
                else:
                    count["spelt"] += passage.spells
                if passage is None or len(prompt) >= length:  # without a place for the target
                    count["dropped_rows"] += 1
                else:  # text is cut when all of it lies end to end
                    writers[split].add(row if kind == "text" else row[:length], len(prompt))
                    if rejected:
                        writers[rejected_split(split)].add([*prompt, *rejected][:length], len(prompt))
        return {name: writer.close() | counts.get(name, {}) for name, writer in writers.items()}

    def _tokenized(self, readable: Readable, numbers: list[int]) -> Iterator[tuple[Passage | None, list, list, list]]:
        """Passage and tokens of prompt, target and rejected target of each row; None where it cannot be used."""
        batch: list[Passage | None] = []
        characters = 0
        for number in numbers:
            passage = readable.passage(number, self.tokenizer)
            batch.append(passage)
            characters += len(passage.prompt) + len(passage.target) + len(passage.rejected) if passage else 0
            if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS or number == numbers[-1]:
                usable = [passage for passage in batch if passage]
                worse = encode_marked(self.tokenizer, [passage.rejected for passage in usable])
                ids = iter([(*both, one) for both, one in zip(encoded(self.tokenizer, usable), worse, strict=True)])
                yield from ((passage, *(next(ids) if passage else ([], [], []))) for passage in batch)
                batch, characters = [], 0


def make_shards(
    tokenizing: Tokenizing, shards: Sequence[Shard], processes: int, progress: Callable[[int, int], None]
) -> None:
    """Make the shards that are not there yet, on at most so many processes (few rows: in this one).

    progress is called with the source rows done and in all.

    Raises ValueError, one line, if a row cannot be used or a process is killed.
    """
    missing = [shard for shard in shards if not tokenizing.is_made(shard)]
    total, done = (sum(len(shard.numbers) for shard in found) for found in (shards, missing))
    done = total - done
    progress(done, total)
    for shard in _each_made(tokenizing, missing, min(processes, len(missing) // LEAST_SHARDS)):
        done += len(shard.numbers)
        progress(done, total)


def _each_made(tokenizing: Tokenizing, shards: list[Shard], processes: int) -> Iterator[Shard]:
    """The shards, each when it and those before it are made."""
    if processes < 2:
        for shard in shards:
            tokenizing.make(shard)
            yield shard
        return
    context = get_context("forkserver")  # what its server has imported, its processes share
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto", "pyarrow.parquet"])
    pool = ProcessPoolExecutor(processes, context, _start, (tokenizing,))
    try:
        for shard, _ in zip(shards, pool.map(_make, shards), strict=True):
            yield shard
    except BrokenProcessPool:
        raise ValueError(
            f"{tokenizing.config.name}: one of {processes} processes was killed, as a rule for want of memory; run "
            "again with fewer --processes or more memory: what is finished is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizing: Tokenizing


def _start(tokenizing: Tokenizing) -> None:
    """Make this process one that makes shards: it ends with the process that started it, and not by Ctrl-C."""
    global _tokenizing
    _tokenizing = tokenizing
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(shard: Shard) -> None:
    _tokenizing.make(shard)
