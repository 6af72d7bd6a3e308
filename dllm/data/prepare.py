"""Tokenize, split and pack a dataset once, so that training only reads.

Text is tokenized without special tokens, one EOS after each row, concatenated and cut into rows of equal length; the
tail is dropped. Conversations become one row each: the prompt (everything before the last assistant turn, in the
chat template) and the target (that turn); rows whose prompt fills the length are dropped, the others clipped. Text that
spells a control token or a turn's mark is text all the same; the manifest counts such rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from dllm.config import WEIGHT_FILES, PrepareConfig, digest
from dllm.data.convert import cut_into_rows, kind_of_part, split_rows, stream_facts
from dllm.data.kinds import has_rejected
from dllm.data.shards import Shard, Tokenizing, make_shards, shards_of
from dllm.data.tokens import TokenWriter, open_rows, rejected_split
from dllm.provenance import (
    commit,
    file_digest,
    input_digest,
    replace_directory,
    versions,
    write_atomically,
    write_record,
)

SPLITS = ("train", "test")


def prepare(
    config: PrepareConfig,
    workdir: str | Path = ".",
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: int = 1,
) -> dict:
    """Write the token files of `config` below `workdir`/data and return their manifest.

    progress is called with the source rows done and in all. Nothing is visible under the final name before all is
    written; shards finished by an attempt that was killed are used again. The result does not depend on `processes`.
    Raises ValueError, one line, for rows that cannot be used and for a split that ends up empty.
    """
    workdir = Path(workdir)
    inputs = {path: input_digest(workdir / path) for path in sorted({p.path for p in config.parts})}
    target = workdir / "data" / config.name
    scratch = target.with_name(f".{config.name}.partial")
    _begin(scratch, config, workdir, inputs)
    parts = [part.model_copy(update={"path": str(workdir / part.path)}) for part in config.parts]
    tokenizing = Tokenizing(config.model_copy(update={"parts": parts}), workdir, scratch, [], [])
    vocabulary = len(tokenizing.tokenizer)
    shards, described = list[Shard](), []
    for number, part in enumerate(parts):
        train, test, train_rows, test_rows = split_rows(part)
        kind, said = kind_of_part(part, train_rows)
        if config.split == "overlapping" and train_rows is test_rows:  # published fault F7: test rows stay in train
            train = numpy.concatenate([test, train])
        train = train[: config.rows][: part.entry.rows]  # a part of a mixture may state its own
        one_source = train_rows is test_rows
        shards += shards_of(number, train, test, one_source=one_source, first=len(shards))
        tokenizing.sources.append({"train": train_rows, "test": test_rows})
        tokenizing.kinds.append(kind)
        described.append(
            {"name": part.name, "train_rows": len(train), "test_rows": len(test)}
            | ({"read_as": said} if said else {})
            | {k: v for k, v in part.entry.model_dump().items() if k in ("hub", "revision", "world", "licence") and v}
        )
    make_shards(tokenizing, shards, processes, progress)
    manifest = {"name": config.name, "length": config.length, "sources": described}
    manifest |= _joined(tokenizing, shards, vocabulary)
    if config.parts[0].entry.stream:
        _describe_stream(config, workdir / config.parts[0].path, scratch / "whole", manifest)
    (scratch / "whole" / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    replace_directory(scratch / "whole", target)
    shutil.rmtree(scratch, ignore_errors=True)
    write_record(target, kind="data", name=config.name, config_digest=digest(config), inputs=inputs)
    return manifest


def _begin(scratch: Path, config: PrepareConfig, workdir: Path, inputs: dict[str, str]) -> None:
    """Make `scratch`, empty unless an earlier attempt at the very same job left finished shards there."""
    model = [path for path in sorted((workdir / config.model_path).glob("*")) if path.is_file()]
    tokenizer = {path.name: file_digest(path) for path in model if path.suffix not in WEIGHT_FILES}
    job = {"config": digest(config), "inputs": inputs, "tokenizer": tokenizer} | versions() | commit()
    made_of = json.dumps(job, sort_keys=True)
    try:
        same = (scratch / "job.json").read_text(encoding="utf-8") == made_of
    except FileNotFoundError:
        same = False
    if not same:
        shutil.rmtree(scratch, ignore_errors=True)
        write_atomically(scratch / "job.json", made_of)


def _joined(tokenizing: Tokenizing, shards: Sequence[Shard], vocabulary: int) -> dict[str, Any]:
    """Write the shards one after another as `whole`, text cut into rows; the manifest's counts.

    Raises ValueError for a split without rows.
    """
    config, whole = tokenizing.config, tokenizing.directory / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    pairs = [rejected_split(split) for split in SPLITS if all(map(has_rejected, tokenizing.kinds))]
    writers = {split: TokenWriter(whole, split, vocabulary) for split in (*SPLITS, *pairs)}
    counts: list[tuple[int, str, dict]] = []
    carry: dict[tuple[int, str], numpy.ndarray] = {}
    for shard in shards:
        directory = tokenizing.directory / shard.name
        stated = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["splits"]
        for split in shard.splits:
            counts.append((shard.part, split, stated[split]))
            rows, key = open_rows(directory, split), (shard.part, split)
            if tokenizing.kinds[shard.part] != "text":
                writers[split].extend(rows.tokens, rows.lengths, rows.prompts)
                if pairs:
                    rejected = open_rows(directory, rejected_split(split))
                    writers[rejected_split(split)].extend(rejected.tokens, rejected.lengths, rejected.prompts)
                continue
            left = carry.get(key, numpy.zeros(0, dtype=writers[split].dtype))
            cut, carry[key] = cut_into_rows(left, rows.tokens, config.length)
            lengths = numpy.full(len(cut), config.length)
            writers[split].extend(cut, lengths, numpy.zeros_like(lengths))

    def total(split: str, key: str) -> int:
        return sum(count[key] for _, of, count in counts if of == split)

    splits = {name: writer.close() | {"dropped_rows": total(name, "dropped_rows")} for name, writer in writers.items()}
    for split in ("test",) if config.parts[0].entry.stream else SPLITS:
        if not splits[split]["rows"]:
            long = total(split, "dropped_rows") - total(split, "unusable")
            first = next((count["first"] for _, of, count in counts if of == split and count["first"]), "")
            why = _why_empty(config, split, "text" in tokenizing.kinds, long, first)
            raise ValueError(f"{config.name}: the {split} split is empty after tokenizing; {why}")
    facts: dict[str, Any] = {
        "splits": splits,
        "rows_that_spell_control_tokens": {split: total(split, "spelt") for split in SPLITS},
    }
    unusable = sum(total(split, "unusable") for split in SPLITS)
    if unusable:  # the first part's train rows come first, then its test rows
        ordered = sorted(counts, key=lambda stated: (stated[0], SPLITS.index(stated[1])))
        first = next(count["first"] for _, _, count in ordered if count["first"])
        facts["unusable"] = {"rows": unusable, "first": first}
    return facts


def _why_empty(config: PrepareConfig, split: str, is_text: bool, long: int, first: str) -> str:
    """What to do about a split without rows, of which `long` have a prompt that fills the length, and others cannot be
    used, as the first of them says."""
    entry = config.parts[0].entry
    more = f"`rows` = {config.rows}" if config.rows and split == "train" else ""
    more = f"`test_share` = {entry.test_share:g}" if split == "test" and not entry.test_split else more
    more = f"raise {more} of the dataset, or " if more else ""
    if is_text:
        return (
            f"its rows together are shorter than one row of length {config.length}; {more}lower `length` of the run, "
            "or give more text, in more paragraphs or lines"
        )
    if long:
        return f"the prompts of {long} rows fill the length of {config.length} tokens; raise `length` of the run"
    return f"no row of it can be used: {first}" if first else f"no row is left for it; {more}give more rows"


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
