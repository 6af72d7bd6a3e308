"""Rows of a dataset become text or conversations, whatever their columns are called."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm.config import DataPart
from dllm.data.formats import read_files, read_jsonl
from dllm.data.kinds import SEEN, conversation_of, recognised
from dllm.models.literal_text import check_text
from dllm.models.tokenizers import encode_texts

FILES = "files"
"""Directory of a download that holds copies of a dataset's own files."""

LEAST_HELD_OUT = 8
"""Rows of one's own files that are held out at least, where there are twice as many."""


def read_rows(part: DataPart, split: str) -> Any:
    """The rows of one split of a downloaded dataset: a list, or a `datasets.Dataset` for what came from the hub.

    Raises ValueError, one line, for a missing split, and for a damaged or empty file.
    """
    entry = part.entry
    if entry.world:
        return read_jsonl(Path(part.path) / entry.world / f"{split}.jsonl")
    if entry.files:
        return read_files(sorted((Path(part.path) / FILES).iterdir()))
    from datasets import load_dataset

    try:
        if entry.stream:  # one shard of the set: the card's counts are those of all
            shards = [str(path) for path in sorted(Path(part.path).rglob("*.parquet"))]
            return load_dataset("parquet", data_files={split: shards}, split=split)
        rows = load_dataset(part.path, entry.config, split=split)
    except (
        Exception
    ) as error:  # what is wrong with a file comes as an error of whoever reads it, StopIteration included
        first = (str(error).strip() or f"{type(error).__name__}; a file may be empty").splitlines()[0]
        raise ValueError(f"{part.path}: split {split!r} of {part.name!r} cannot be read ({first})") from None
    expected = (entry.counts or {}).get(split)
    if expected is not None and len(rows) != expected:
        raise ValueError(
            f"{part.path}: split {split!r} of {part.name!r} has {len(rows)} rows, and its entry says {expected}; are "
            "other files of the repository among them, or is it another revision? Correct `config` or `counts`"
        )
    return rows


def place_of(part: DataPart, rows, number: int) -> str:
    """How an error line names a row: by its file, where that is known, else by the dataset."""
    return rows.where(number) if hasattr(rows, "where") else f"{part.name} row {number}"


def kind_of_part(part: DataPart, rows) -> tuple[str, str]:
    """The kind of a dataset's rows, and the line that says how it was recognised (empty where the entry states it).

    `auto` if its rows are conversations, each then read in its own way. Raises ValueError, one line, for unknown rows.
    """
    if part.entry.kind != "auto":
        return part.entry.kind, ""
    kind, said = recognised((rows[i] for i in range(min(SEEN, len(rows)))), part.name)
    return ("text" if kind == "text" else "auto"), said


def text_of(row: dict, where: str) -> str:
    """The text of a pretraining row (it may be empty: Wikitext has empty lines)."""
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: no text (column 'text' = {text!r}); a text dataset needs one string per row")
    check_text(text, where)
    return text


def pack_texts(tokenizer, texts: list[str], carry: list[int], length: int, *, append_eos: bool) -> tuple[list, list]:
    """(rows of `length` tokens, tokens left over) of texts laid end to end behind the tokens `carry`.

    Texts are tokenized without special tokens; one EOS after each where `append_eos`.
    """
    end = [tokenizer.eos_token_id] if append_eos else []
    encoded = encode_texts(tokenizer, texts)
    tokens = [*carry, *itertools.chain.from_iterable([*ids, *end] for ids in encoded)]
    whole = len(tokens) // length * length
    return [tokens[start : start + length] for start in range(0, whole, length)], tokens[whole:]


def messages_of(row: dict, kind: str, where: str) -> list[dict]:
    """The conversation of an instruction row, as role and content, ending with an assistant's turn.

    kind: one of `choices.ROW_KINDS` but text, or `auto`, as the row is. Raises ValueError, one line, for a row without
    messages, without a turn before the last answer, or with an empty text.
    """
    messages = conversation_of(row, kind, where)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: no turn of the assistant; a row needs one to learn from")
    if len(messages) == 1:
        raise ValueError(f"{where}: begins with its only answer; a row needs a turn of the user first: drop or mend it")
    for message in messages:
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"{where}: empty text in a turn of role {message['role']!r}; drop or mend the row")
        check_text(message["content"], where)
    return messages


def split_rows(part: DataPart) -> tuple[list, list, Any, Any]:
    """(train row numbers, test row numbers, train rows, test rows) of a dataset; train row numbers are shuffled.

    A set without its own test split gives up `test_share` of its rows. `split_seed` decides both. Of a streamed set
    only the shard held out for testing is there: so many of its rows as that share of the whole comes to, and no
    train rows.
    """
    import numpy

    entry = part.entry
    rows = read_rows(part, "train")
    order = numpy.random.Generator(numpy.random.Philox(entry.split_seed)).permutation(len(rows)).tolist()
    if entry.test_split:
        held_out = read_rows(part, entry.test_split)
        return order, list(range(len(held_out))), rows, held_out
    if entry.stream:
        facts = stream_facts(part.path)
        size = min(len(rows), max(1, round(facts["expansion"] * len(rows) * entry.test_share)))
        return [], sorted(order[:size]), rows, rows
    least = min(LEAST_HELD_OUT, len(rows) // 2) if entry.files else 1
    size = max(least, round(len(rows) * entry.test_share)) if entry.test_share else 0
    return order[size:], sorted(order[:size]), rows, rows


def stream_facts(path: str | Path) -> dict:
    """What a download says of a streamed set: hub, revision, shards with their bytes, and `expansion`, the bytes of
    the whole set as a multiple of those of the shard held out. Raises ValueError if it was not fetched as one."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))
        stream = manifest["stream"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{path}: was not fetched to be streamed; run the download again") from None
    total = sum(stream["shards"].values()) + stream["bytes"]
    return {"hub": manifest["hub"], "revision": manifest["revision"], **stream, "expansion": total / stream["bytes"]}


def batched(numbers: list[int], size: int = 1000) -> Iterator[list[int]]:
    """Consecutive runs of at most `size` numbers."""
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
