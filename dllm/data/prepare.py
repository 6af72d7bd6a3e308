"""Tokenize, split and pack a dataset once, so that training only reads.

Text is tokenized without special tokens, one EOS after each row, concatenated and cut into rows of equal length; the
tail is dropped. Conversations become one row each: the prompt (everything before the last assistant turn, in the
chat template) and the target (that turn); rows whose prompt fills the length are dropped, the others clipped.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dllm.config import PrepareConfig, digest
from dllm.data.convert import batched, messages_of, pack_texts, split_rows, stream_facts, text_of
from dllm.data.tokens import TokenWriter
from dllm.models.tokenizers import chat_text, load_tokenizer
from dllm.provenance import input_digest, replace_directory, write_record


def prepare(config: PrepareConfig, workdir: str | Path = ".", progress=lambda rows, text: rows) -> dict:
    """Write the token files of `config` below `workdir`/data and return their manifest.

    progress wraps an iterable of rows for display. Nothing is visible under the final name before all is written.
    Raises ValueError, one line, for rows that cannot be used and for a split that ends up empty.
    """
    workdir = Path(workdir)
    sources = {path: input_digest(workdir / path) for path in sorted({p.path for p in config.parts})}
    tokenizer = load_tokenizer(workdir / config.model_path, config.model)
    target = workdir / "data" / config.name
    scratch = target.with_name(f".{config.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    manifest = {"name": config.name, "length": config.length, "sources": [], "splits": {}}
    writers = {split: TokenWriter(scratch, split, len(tokenizer)) for split in ("train", "test")}
    dropped = {"train": 0, "test": 0}
    for part in config.parts:
        part = part.model_copy(update={"path": str(workdir / part.path)})
        train_numbers, test_numbers, train_rows, test_rows = split_rows(part)
        if config.split == "overlapping":  # published fault F7: rows held out for testing stay in train
            train_numbers = [*test_numbers, *train_numbers] if train_rows is test_rows else train_numbers
        train_numbers = sorted(train_numbers[: config.rows])
        for split, numbers, rows in (("train", train_numbers, train_rows), ("test", test_numbers, test_rows)):
            shown = progress(numbers, f"{part.name} {split}")
            write = _write_text if part.entry.kind == "text" else _write_conversations
            dropped[split] += write(writers[split], tokenizer, config, part, shown, rows)
        manifest["sources"].append(
            {"name": part.name, "train_rows": len(train_numbers), "test_rows": len(test_numbers)}
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


def _write_text(writer: TokenWriter, tokenizer, config: PrepareConfig, part, numbers, rows) -> int:
    """Concatenate and cut; returns how many rows were dropped, which is always 0."""
    carry: list[int] = []
    for chunk in batched(list(numbers)):
        texts = [text_of(rows[i], f"{part.name} row {i}") for i in chunk]
        packed, carry = pack_texts(tokenizer, texts, carry, config.length, append_eos=part.entry.append_eos)
        for row in packed:
            writer.add(row)
    return 0


def _write_conversations(writer: TokenWriter, tokenizer, config: PrepareConfig, part, numbers, rows) -> int:
    """One row per conversation; returns how many were dropped: the prompt fills the length, or the row is unusable."""
    dropped = 0
    for chunk in batched(list(numbers)):
        conversations = _conversations(part, rows, chunk)
        dropped += len(chunk) - len(conversations)
        if not conversations:
            continue
        prompts = [chat_text(tokenizer, m[:-1], add_generation_prompt=True) for m in conversations]
        whole = [chat_text(tokenizer, m, add_generation_prompt=False) for m in conversations]
        for prompt, text in zip(prompts, whole, strict=True):
            if not text.startswith(prompt):
                raise ValueError(f"{part.name}: the chat template does not continue its own generation prompt")
        answers = [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
        encoded = tokenizer([*prompts, *answers], add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, answer in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
            if len(prompt) >= config.length:
                dropped += 1
            else:
                writer.add((prompt + answer)[: config.length], len(prompt))
    return dropped


def _conversations(part, rows, numbers: list[int]) -> list[list[dict]]:
    """The conversations of some rows; an unusable row is an error, unless the entry says to drop such rows."""
    conversations = []
    for number in numbers:
        try:
            conversations.append(messages_of(rows[number], part.entry.kind, f"{part.name} row {number}"))
        except ValueError as error:
            if not part.entry.drop_unusable:
                raise ValueError(f"{error}; or set drop_unusable: true in the entry of {part.name!r}") from None
    return conversations
