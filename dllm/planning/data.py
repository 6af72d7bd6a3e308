"""How many rows and tokens a run reads: estimates from the entries, or the manifest once the set is prepared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.config import DatasetEntry, PrepareConfig

TARGET_SHARE = 0.5
"""Share of a conversation in its last answer, where the entry does not say."""

TEXT_BYTES = 4.3
"""Bytes of English text per token of a vocabulary of 30,000 to 50,000."""

COMPRESSED = 0.6
"""Size of a downloaded set (mostly parquet) as a share of its text."""


@dataclass(frozen=True)
class Split:
    """Rows, tokens and target tokens of one split; `weighted_length` is the row length that a mean token sees."""

    rows: float = 0.0
    tokens: float = 0.0
    targets: float = 0.0
    weighted_length: float = 1.0
    longest: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """Both splits; tokens and rows read to make them; rows of the sources."""

    train: Split
    test: Split
    read_tokens: float
    bytes_per_token: int
    read_rows: float = 0.0
    source_rows: float = 0.0


def prepared(config: PrepareConfig, workdir: Path, vocabulary: int) -> Prepared | None:
    """What `dllm prepare` writes; None if there is neither a manifest nor an estimate.

    Text becomes rows of equal length. A conversation is one row, cut at the length; lengths are taken as exponentially
    distributed, so that a row of mean m cut at L has m (1 - e^(-L/m)) tokens on average.
    """
    width = 2 if vocabulary <= 2**16 else 4
    counted = _counted(workdir / "data" / config.name / "manifest.json", config)
    source = float(sum((part.entry.documents or 0) + (part.entry.test_documents or 0) for part in config.parts))
    if counted:
        train, test, rows = counted
        return Prepared(train, test, train.tokens + test.tokens, width, rows, max(source, rows))
    train, test, read, read_rows = Split(), Split(), 0.0, 0.0
    for entry in (part.entry for part in config.parts):
        documents, tokens = entry.documents, entry.tokens
        if documents is None or tokens is None:
            return None
        rows, held_out = _documents(entry, documents, config.rows, overlapping=config.split == "overlapping")
        read_rows += rows + held_out
        read += tokens * min(1.0, (rows + held_out) / documents)
        train = _sum(train, _split(entry, rows, config.length, tokens=tokens, documents=documents))
        test = _sum(test, _split(entry, held_out, config.length, tokens=tokens, documents=documents))
    return Prepared(train, test, read, width, read_rows, source)


def _documents(entry: DatasetEntry, documents: int, most: int | None, *, overlapping: bool) -> tuple[float, float]:
    """Rows in train and test of an entry with this number of documents."""
    if entry.test_split:
        train, test = float(documents), float(entry.test_documents or documents * 0.02)
    else:
        test = documents * entry.test_share
        train = documents - (0 if overlapping else test)
    return min([train, *filter(None, (most, entry.rows))]), test


def _split(entry: DatasetEntry, taken: float, length: int, *, tokens: int, documents: int) -> Split:
    """The split that `taken` of the `documents` of an entry make, which have `tokens` tokens together."""
    if entry.kind == "text":
        rows = math.floor(taken * tokens / documents / length)
        return Split(rows, rows * length, rows * length, length, length)
    mean = tokens / documents
    cut = length / mean
    kept = mean * -math.expm1(-cut)
    weighted = 2 * mean * (1 - math.exp(-cut) * (1 + cut)) / -math.expm1(-cut)
    share = entry.target_share or TARGET_SHARE
    return Split(taken, taken * kept, taken * kept * share, weighted, min(length, 4 * mean))


def _sum(a: Split, b: Split) -> Split:
    tokens = a.tokens + b.tokens
    weighted = (a.tokens * a.weighted_length + b.tokens * b.weighted_length) / tokens if tokens else 1.0
    return Split(a.rows + b.rows, tokens, a.targets + b.targets, weighted, max(a.longest, b.longest))


def _counted(path: Path, config: PrepareConfig) -> tuple[Split, Split, float] | None:
    """Both splits as a manifest counts them, and the rows read for them; None without a usable manifest."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        train, test = (_from_counts(manifest["splits"][split], config) for split in ("train", "test"))
        return train, test, float(sum(part["train_rows"] + part["test_rows"] for part in manifest.get("sources", [])))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _from_counts(counts: dict[str, Any], config: PrepareConfig) -> Split:
    rows, tokens = float(counts["rows"]), float(counts["tokens"])
    mean = tokens / max(1.0, rows)
    text = counts["target_tokens"] == counts["tokens"]
    weighted = mean if text else min(2 * mean, (mean + counts["longest_row"]) / 2)
    return Split(rows, tokens, float(counts["target_tokens"]), weighted, float(counts["longest_row"]))
