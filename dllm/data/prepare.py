"""Tokenize, split and pack a dataset once, so that training only reads.

Text is tokenized without special tokens, one EOS after each row, concatenated and cut into rows of equal length; the
tail is dropped. Conversations become one row each: the prompt (everything before the last assistant turn, in the
chat template) and the target (that turn); rows whose prompt fills the length are dropped, the others clipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.config import DataPart, PrepareConfig, digest
from dllm.data.convert import (
    batched,
    kind_of_part,
    messages_of,
    pack_texts,
    place_of,
    split_rows,
    stream_facts,
    text_of,
)
from dllm.data.tokens import TokenWriter
from dllm.models.tokenizers import chat_text, load_tokenizer
from dllm.provenance import read_record, replace_directory, write_record


def prepare(config: PrepareConfig, workdir: str | Path = ".", progress=lambda rows, text: rows) -> dict:
    """Write the token files of `config` below `workdir`/data and return their manifest.

    progress wraps an iterable of rows for display. Nothing is visible under the final name before all is written.
    Raises ValueError, one line, for rows that cannot be used and for a split that ends up empty.
    """
    workdir = Path(workdir)
    tokenizer = load_tokenizer(workdir / config.model_path, config.model)
    target = workdir / "data" / config.name
    scratch = target.with_name(f".{config.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    manifest = {"name": config.name, "length": config.length, "sources": [], "splits": {}}
    writers = {split: TokenWriter(scratch, split, len(tokenizer)) for split in ("train", "test")}
    dropped = {"train": 0, "test": 0}
    unusable: list[str] = []
    for part in config.parts:
        part = part.model_copy(update={"path": str(workdir / part.path)})
        train_numbers, test_numbers, train_rows, test_rows = split_rows(part)
        kind, said = kind_of_part(part, train_rows)
        if config.split == "overlapping":  # published fault F7: rows held out for testing stay in train
            train_numbers = [*test_numbers, *train_numbers] if train_rows is test_rows else train_numbers
        train_numbers = sorted(train_numbers[: config.rows])
        for split, numbers, rows in (("train", train_numbers, train_rows), ("test", test_numbers, test_rows)):
            shown = progress(numbers, f"{part.name} {split}")
            write = _write_text if kind == "text" else _write_conversations
            dropped[split] += write(
                writers[split], tokenizer, config, part, shown, Readable(part, kind, rows, unusable)
            )
        manifest["sources"].append(
            {"name": part.name, "train_rows": len(train_numbers), "test_rows": len(test_numbers)}
            | ({"read_as": said} if said else {})
            | {k: v for k, v in part.entry.model_dump().items() if k in ("hub", "revision", "world", "licence") and v}
        )
    for split, writer in writers.items():
        manifest["splits"][split] = writer.close() | {"dropped_rows": dropped[split]}
        if split == "train" and config.parts[0].entry.stream:
            continue
        if not manifest["splits"][split]["rows"]:
            raise ValueError(
                f"{config.name}: the {split} split is empty after tokenizing; the rows are fewer or shorter than one "
                f"row of length {config.length}, or every prompt is longer; lower `length` of the run"
            )
    if unusable:
        manifest["unusable"] = {"rows": len(unusable), "first": unusable[0]}
    if config.parts[0].entry.stream:
        _describe_stream(config, workdir / config.parts[0].path, scratch, manifest)
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    replace_directory(scratch, target)
    sources = {path: read_record(workdir / f"{path}.json")["digest"] for path in sorted({p.path for p in config.parts})}
    write_record(target, kind="data", name=config.name, config_digest=digest(config), inputs=sources)
    return manifest


def _describe_stream(config: PrepareConfig, source: Path, scratch: Path, manifest: dict) -> None:
    """Note in the manifest what training reads over the network, and about how much that is, in place of train files.

    The train split is estimated from the tokens per document of the test rows and the sizes of the shards.
    """
    entry, facts, splits = config.parts[0].entry, stream_facts(source), manifest["splits"]
    for path in scratch.glob("train.*"):
        path.unlink()
    tested = min(1.0, facts["expansion"] * entry.test_share)  # share of the shard held out that the test rows are
    rows = max(1, round(splits["test"]["rows"] / tested * (facts["expansion"] - 1)))
    tokens = rows * config.length
    splits["train"] = {"rows": rows, "tokens": tokens, "target_tokens": tokens, "longest_row": config.length}
    splits["train"] |= {"dtype": splits["test"]["dtype"], "dropped_rows": 0, "estimated": True}
    manifest["stream"] = {key: facts[key] for key in ("hub", "revision", "shards")} | {
        "append_eos": entry.append_eos,
        "shuffle_rows": entry.shuffle_rows,
    }


@dataclass(frozen=True)
class Readable:
    """The rows of a part as texts or conversations. An unusable one is an error, or is noted where the entry says so.

    unusable: the error lines of what was dropped, over all parts.
    """

    part: DataPart
    kind: str
    rows: object
    unusable: list[str]

    def texts(self, numbers: list[int]) -> list[str]:
        """The texts of some rows."""
        return self._usable(numbers, text_of)

    def conversations(self, numbers: list[int], tokenizer) -> list[tuple[str, str]]:
        """(prompt, whole) of some rows in the chat template: up to the last answer, and with it."""
        return self._usable(numbers, lambda row, where: _prompt_and_whole(tokenizer, row, self.kind, where))

    def _usable(self, numbers: list[int], read: Callable[[dict, str], Any]) -> list:
        found = []
        for number in numbers:
            try:
                found.append(read(self.rows[number], place_of(self.part, self.rows, number)))
            except ValueError as error:
                if not self.part.entry.drop_unusable:
                    name = self.part.name
                    raise ValueError(f"{error}; or set drop_unusable: true in the entry of {name!r}") from None
                self.unusable.append(str(error))
        return found


def _prompt_and_whole(tokenizer, row: dict, kind: str, where: str) -> tuple[str, str]:
    """A conversation in the chat template, without and with its last answer. Raises ValueError for an unusable row."""
    messages = messages_of(row, kind, where)
    try:
        prompt = chat_text(tokenizer, messages[:-1], add_generation_prompt=True)
        whole = chat_text(tokenizer, messages, add_generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return prompt, whole


def _write_text(writer: TokenWriter, tokenizer, config: PrepareConfig, part, numbers, rows: Readable) -> int:
    """Concatenate and cut; returns how many rows were dropped: the unusable ones."""
    carry: list[int] = []
    dropped = 0
    for chunk in batched(list(numbers)):
        texts = rows.texts(chunk)
        dropped += len(chunk) - len(texts)
        packed, carry = pack_texts(tokenizer, texts, carry, config.length, append_eos=part.entry.append_eos)
        for row in packed:
            writer.add(row)
    return dropped


def _write_conversations(writer: TokenWriter, tokenizer, config: PrepareConfig, part, numbers, rows: Readable) -> int:
    """One row per conversation; returns how many were dropped: the prompt fills the length, or the row is unusable."""
    dropped = 0
    for chunk in batched(list(numbers)):
        pairs = rows.conversations(chunk, tokenizer)
        dropped += len(chunk) - len(pairs)
        if not pairs:
            continue
        for prompt, whole in pairs:
            if not whole.startswith(prompt):
                raise ValueError(f"{part.name}: the chat template does not continue its own generation prompt")
        prompts, answers = [prompt for prompt, _ in pairs], [whole[len(prompt) :] for prompt, whole in pairs]
        encoded = tokenizer([*prompts, *answers], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, answer in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
            if len(prompt) >= config.length:
                dropped += 1
            else:
                writer.add((prompt + answer)[: config.length], len(prompt))
    return dropped
