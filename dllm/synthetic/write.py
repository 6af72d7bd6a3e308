"""Writes the whole world into a directory: corpora, instructions, chats, benchmarks, tokenizer, manifest.

manifest.json   {"seed": 7, "files": {"alpaca/train.jsonl": {"rows": 3000, "sha256": "..."}, ...}}
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dllm.synthetic.benchmarks import all_benchmarks
from dllm.synthetic.chat import smoltalk, tulu
from dllm.synthetic.code import code, humaneval, mbpp
from dllm.synthetic.corpus import openwebtext, wikitext
from dllm.synthetic.entities import SyntheticWorld, make_synthetic_world
from dllm.synthetic.instructions import alpaca, sum_pairs, sums
from dllm.synthetic.tokenizer import save_tokenizer


def training_files(world: SyntheticWorld) -> Iterator[tuple[str, Iterable[dict]]]:
    """Every file that is not a benchmark: its path and its rows."""
    yield "wikitext/train.jsonl", wikitext(world, "train", 3000)
    yield "wikitext/validation.jsonl", wikitext(world, "validation", 100)
    yield "wikitext/test.jsonl", wikitext(world, "test", 100)
    yield "openwebtext/train.jsonl", openwebtext(world, "train", 5000)
    yield "openwebtext/test.jsonl", openwebtext(world, "test", 200)
    yield "alpaca/train.jsonl", alpaca(world, 4000)
    yield "tulu/train.jsonl", tulu(world, 9000)
    yield "smoltalk/train.jsonl", smoltalk(world, "train", 4000)
    yield "smoltalk/test.jsonl", smoltalk(world, "test", 200)


def sums_files(world: SyntheticWorld) -> Iterator[tuple[str, Iterable[dict]]]:
    """Every file of sums to be rewarded or compared: its path and its rows."""
    for split, rows in (("train", 2000), ("test", 200)):
        yield f"sums/{split}.jsonl", sums(world, split, rows)
        yield f"sum_pairs/{split}.jsonl", sum_pairs(world, split, rows)


def code_files(world: SyntheticWorld) -> Iterator[tuple[str, Iterable[dict]]]:
    """Every file about programs: its path and its rows."""
    yield "code/train.jsonl", code(world, "train", 2000)
    yield "code/validation.jsonl", code(world, "validation", 100)
    for benchmark in (humaneval, mbpp):
        for path, rows in benchmark(world):
            yield f"benchmarks/{path}", rows


def build(directory: str | Path, *, seed: int) -> None:
    """Fills `directory` with the world of this seed; the same seed gives the same bytes."""
    directory = Path(directory)
    world = make_synthetic_world(seed)
    rows: dict[str, int] = {}
    texts: Counter[str] = Counter()
    for path, source in training_files(world):
        rows[path] = write_rows(directory / path, source, texts)
    for path, source in all_benchmarks(world):
        rows[f"benchmarks/{path}"] = write_rows(directory / "benchmarks" / path, source, texts)
    # not counted: the tokenizer spells code, and knows the words of sums
    for path, source in (*sums_files(world), *code_files(world)):
        rows[path] = write_rows(directory / path, source)
    save_tokenizer(texts, directory / "tokenizer")
    write_manifest(directory, seed, rows)


def write_rows(path: Path, rows: Iterable[dict], texts: Counter[str] | None = None) -> int:
    """Writes one JSON object per line, counts the strings of the rows in `texts`, if given; the number of rows."""
    rows = list(rows)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if texts is not None:
        texts.update(text for row in rows for text in strings_in(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(lines).encode())
    return len(lines)


LABELS = ("id", "source", "role", "source_id", "split", "split_type", "type", "level")
"""Columns that no model reads: their words need no tokens."""


def strings_in(value: object) -> Iterator[str]:
    """Every string inside a row that a model may read."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in LABELS:
                yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def write_manifest(directory: Path, seed: int, rows: dict[str, int]) -> None:
    """Writes manifest.json: row counts of the data files, sha256 of every file."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"):
        name = path.relative_to(directory).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[name] = {"rows": rows[name], "sha256": digest} if name in rows else {"sha256": digest}
    text = json.dumps({"seed": seed, "files": files}, indent=2, sort_keys=True) + "\n"
    (directory / "manifest.json").write_text(text, encoding="utf-8")
