"""Rows of a dataset become text or conversations, whatever their columns are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy

from dllm.config import DataPart
from dllm.data.formats import FILES, FileRows
from dllm.data.kinds import SEEN, conversation_of, has_rejected, named_plainly, recognised, rejected_conversation_of
from dllm.models.literal_text import check_text
from dllm.models.tokenizers import encode_texts

LEAST_HELD_OUT = 8
"""Rows of one's own files that are held out at least, where there are twice as many."""


def read_rows(part: DataPart, split: str) -> FileRows:
    """The rows of one split of a downloaded dataset.

    Raises ValueError, one line, for a missing split, and for a damaged or empty file.
    """
    entry, directory = part.entry, Path(part.path)
    if entry.world or entry.files:
        paths = [directory / entry.world / f"{split}.jsonl"] if entry.world else sorted((directory / FILES).iterdir())
        return FileRows(paths)
    try:
        # of a streamed set, one shard: the card's configurations are those of all
        paths = sorted(directory.rglob("*.parquet")) if entry.stream else _files_of_split(part, split)
        rows = FileRows(paths, may_be_empty=True)
        if not len(rows):
            raise ValueError("its files are empty")
    except Exception as error:  # what is wrong with a card comes as an error of whoever reads it
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{part.path}: split {split!r} of {part.name!r} cannot be read ({first})") from None
    expected = (entry.counts or {}).get(split)
    if expected is not None and len(rows) != expected:
        raise ValueError(
            f"{part.path}: split {split!r} of {part.name!r} has {len(rows)} rows, and its entry says {expected}; are "
            "other files of the repository among them, or is it another revision? Correct `config` or `counts`"
        )
    return rows


def _files_of_split(part: DataPart, split: str) -> list[Path]:
    """The files of a split as the repository's card states them, or as `datasets` goes by their names."""
    from datasets import load_dataset_builder

    with TemporaryDirectory() as cache:
        found = load_dataset_builder(part.path, part.entry.config, cache_dir=cache).config.data_files or {}
    if split not in found:
        raise ValueError(f"there are the splits {', '.join(map(str, found))}; correct the entry")
    return [Path(path) for path in found[split]]


def place_of(part: DataPart, rows: FileRows, number: int) -> str:
    """How an error line names a row: by its file, where that is a user's own, else by the dataset."""
    return rows.where(number) if part.entry.files else f"{part.name} row {number}"


def kind_of_part(part: DataPart, rows: FileRows) -> tuple[str, str]:
    """The kind of a dataset's rows, and the line that says how it was recognised (empty where the entry states it).

    `auto` if its rows are conversations, each then read in its own way; chosen and rejected answers are of one kind.
    Raises ValueError, one line, for unknown rows.
    """
    if part.entry.kind != "auto":
        return part.entry.kind, ""
    kind, said = recognised(rows.beginnings(SEEN), part.name)
    return (kind if kind == "text" or has_rejected(kind) else "auto"), said


def text_of(row: dict, where: str) -> str:
    """The text of a pretraining row (it may be empty: Wikitext has empty lines)."""
    text = named_plainly(row).get("text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: no text (column 'text' = {text!r}); a text dataset needs one string per row")
    check_text(text, where)
    return text


def laid_out(tokenizer, texts: Sequence[str], *, append_eos: bool) -> list[list[int]]:
    """The tokens of texts, without special tokens but for one EOS after each where `append_eos`."""
    end = [tokenizer.eos_token_id] if append_eos else []
    return [[*ids, *end] for ids in encode_texts(tokenizer, texts)]


def cut_into_rows(carry: numpy.ndarray, tokens: numpy.ndarray, length: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(whole rows [N, length], tokens left over) of tokens behind the ones left over before them."""
    tokens = numpy.concatenate([carry, tokens])
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length), tokens[whole:]


def messages_of(row: dict, kind: str, where: str) -> list[dict]:
    """The conversation of an instruction row, as role and content, ending with an assistant's turn.

    kind: one of `choices.ROW_KINDS` but text, or `auto`, as the row is. Raises ValueError, one line, for a row without
    messages, without a turn before the last answer, or with an empty text.
    """
    return _ending_with_answer(conversation_of(row, kind, where), where)


def answers_of(row: dict, kind: str, where: str) -> list[list[dict]]:
    """The conversation of a row as `messages_of`, and behind it that with the rejected answer, if the kind has one.

    Raises ValueError, one line, as `messages_of`, and if both are the same or differ before their last answers.
    """
    messages = messages_of(row, kind, where)
    if not has_rejected(kind):
        return [messages]
    rejected = _ending_with_answer(rejected_conversation_of(row, kind, where), where)
    if messages == rejected:
        raise ValueError(f"{where}: the chosen answer is also the rejected one; drop or mend the row")
    if messages[:-1] != rejected[:-1]:
        raise ValueError(
            f"{where}: chosen and rejected differ before their last answers; they need the same prompt: drop or mend "
            "the row"
        )
    return [messages, rejected]


def _ending_with_answer(messages: list[dict], where: str) -> list[dict]:
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: no turn of the assistant; a row needs one to learn from")
    if len(messages) == 1:
        raise ValueError(
            f"{where}: begins with its only answer; a row needs a turn of the user first: drop or correct it"
        )
    for message in messages:
        seen = any(letter.isprintable() and not letter.isspace() for letter in message["content"])
        if message["role"] != "system" and not seen:
            raise ValueError(f"{where}: empty text in a turn of role {message['role']!r}; drop or correct the row")
        check_text(message["content"], where)
    return messages


def split_rows(part: DataPart) -> tuple[numpy.ndarray, numpy.ndarray, FileRows, FileRows]:
    """(train row numbers, test row numbers, train rows, test rows) of a dataset; train row numbers are shuffled.

    A set without its own test split gives up `test_share` of its rows. `split_seed` decides both. Of a streamed set
    only the shard held out for testing is there: so many of its rows as that share of the whole comes to, and no
    train rows.
    """
    entry = part.entry
    rows = read_rows(part, "train")
    order = numpy.random.Generator(numpy.random.Philox(entry.split_seed)).permutation(len(rows))
    if entry.test_split:
        held_out = read_rows(part, entry.test_split)
        return order, numpy.arange(len(held_out)), rows, held_out
    if entry.stream:
        facts = stream_facts(part.path)
        size = min(len(rows), max(1, round(facts["expansion"] * len(rows) * entry.test_share)))
        return order[:0], numpy.sort(order[:size]), rows, rows
    least = min(LEAST_HELD_OUT, len(rows) // 2) if entry.files else 1
    size = max(least, round(len(rows) * entry.test_share)) if entry.test_share else 0
    return order[size:], numpy.sort(order[:size]), rows, rows


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
