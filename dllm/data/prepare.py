"""Tokenize, split and pack a dataset once, so that training only reads.

Text is tokenized without special tokens, one EOS after each row, concatenated and cut into rows of equal length; the
tail is dropped. Conversations become one row each: the prompt (everything before the last assistant turn, in the
chat template) and the target (that turn); rows whose prompt fills the length are dropped, the others clipped. Text that
spells a control token or a turn's mark is text all the same; the manifest counts such rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from dllm.models.literal_text import count_spelling_control, encode_marked, literal_messages
from dllm.models.tokenizers import load_tokenizer, rendered
from dllm.provenance import input_digest, replace_directory, write_record


def prepare(config: PrepareConfig, workdir: str | Path = ".", progress=lambda rows, text: rows) -> dict:
    """Write the token files of `config` below `workdir`/data and return their manifest.

    progress wraps an iterable of rows for display. Nothing is visible under the final name before all is written.
    Raises ValueError, one line, for rows that cannot be used and for a split that ends up empty.
    """
    workdir = Path(workdir)
    sources = {path: input_digest(workdir / path) for path in sorted({p.path for p in config.parts})}
    target = workdir / "data" / config.name
    unpacked = target.with_name(f".{config.name}.rows")
    with nullcontext() if all(part.entry.world for part in config.parts) else _rows_cached_below(unpacked):
        return _prepare(config, workdir, target, sources, progress)


@contextmanager
def _rows_cached_below(directory: Path) -> Iterator[None]:
    """`datasets` unpacks rows here and not in the home directory; removed at the end."""
    import datasets

    shutil.rmtree(directory, ignore_errors=True)

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = directory.resolve()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        shutil.rmtree(directory, ignore_errors=True)


def _prepare(config: PrepareConfig, workdir: Path, target: Path, sources: dict[str, str], progress) -> dict:
    tokenizer = load_tokenizer(workdir / config.model_path, config.model)
    scratch = target.with_name(f".{config.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    manifest: dict[str, Any] = {"name": config.name, "length": config.length, "sources": [], "splits": {}}
    writers = {split: TokenWriter(scratch, split, len(tokenizer)) for split in ("train", "test")}
    dropped, spelt = {"train": 0, "test": 0}, {"train": 0, "test": 0}
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
            readable = Readable(part, kind, rows, unusable)
            counts = write(writers[split], tokenizer, config, part, shown, readable)
            dropped[split] += counts[0]
            spelt[split] += counts[1]
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
                f"row of length {config.length}, or every prompt is longer; "
                + (f"raise `rows` = {config.rows} of the dataset, or " if config.rows and split == "train" else "")
                + "lower `length` of the run"
            )
    manifest["rows_that_spell_control_tokens"] = spelt
    if unusable:
        manifest["unusable"] = {"rows": len(unusable), "first": unusable[0]}
    if config.parts[0].entry.stream:
        _describe_stream(config, workdir / config.parts[0].path, scratch, manifest)
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    replace_directory(scratch, target)
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
    rows: Any
    unusable: list[str]

    def texts(self, numbers: list[int]) -> list[str]:
        """The texts of some rows."""
        return self._usable(numbers, text_of)

    def conversations(self, numbers: list[int], tokenizer) -> list[tuple[str, str, bool]]:
        """(prompt, whole, spells) of some rows in the chat template; see `_in_template`."""
        return self._usable(
            numbers, lambda row, where: _in_template(tokenizer, messages_of(row, self.kind, where), where)
        )

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


def _write_text(
    writer: TokenWriter, tokenizer, config: PrepareConfig, part, numbers, rows: Readable
) -> tuple[int, int]:
    """Concatenate and cut; returns how many rows were dropped, the unusable, and how many spell control tokens."""
    carry: list[int] = []
    dropped = spelt = 0
    for chunk in batched(list(numbers)):
        texts = rows.texts(chunk)
        dropped += len(chunk) - len(texts)
        packed, carry = pack_texts(tokenizer, texts, carry, config.length, append_eos=part.entry.append_eos)
        spelt += count_spelling_control(tokenizer, texts)
        for row in packed:
            writer.add(row)
    return dropped, spelt


def _write_conversations(
    writer: TokenWriter, tokenizer, config: PrepareConfig, part, numbers, rows: Readable
) -> tuple[int, int]:
    """One row per conversation; returns how many were dropped, and how many spell a control token or a turn's mark.

    Dropped are rows whose prompt fills the length, and unusable ones.
    """
    dropped = spelt = 0
    for chunk in batched(list(numbers)):
        conversations = rows.conversations(chunk, tokenizer)
        dropped += len(chunk) - len(conversations)
        if not conversations:
            continue
        prompts, whole, spell = zip(*conversations, strict=True)
        spelt += sum(spell)
        for prompt, text in zip(prompts, whole, strict=True):
            if not text.startswith(prompt):
                raise ValueError(f"{part.name}: the chat template does not continue its own generation prompt")
        answers = [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
        encoded = encode_marked(tokenizer, [*prompts, *answers])
        for prompt, answer in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
            if len(prompt) >= config.length:
                dropped += 1
            else:
                writer.add((prompt + answer)[: config.length], len(prompt))
    return dropped, spelt


def _in_template(tokenizer, messages: list[dict], where: str) -> tuple[str, str, bool]:
    """A conversation up to its last answer, the whole of it, and whether it spells what the template writes itself."""
    literal = literal_messages(tokenizer, messages)
    try:
        prompt = rendered(tokenizer, literal[:-1], add_generation_prompt=True)
        whole = rendered(tokenizer, literal, add_generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return prompt, whole, literal is not messages
