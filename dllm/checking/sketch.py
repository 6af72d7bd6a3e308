"""A repository in small: every file under its name, data with its first rows only, so that the usual code reads it."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dllm.data.formats import format_of, read_file

WHOLE = 2**20
"""Bytes up to which a file of data is read whole, which costs one request; and those that are read of a larger one."""

ROWS = 64
"""Rows of a large parquet file that are kept: more than a prompt has examples."""

AT_ONCE = 8
"""Files of one repository that are read side by side."""

Rows = dict[str, int | None]
"""Numbers of rows by the name of a file, of a split; None where the first bytes do not tell."""


def sketch(files: Any, root: str, sizes: Mapping[str, int], target: Path, *, whole: bool = False) -> Rows:
    """Write the files named in `sizes` (in bytes) to `target`, each cut short unless it is small or `whole`.

    Returns the rows of those that were cut. files: a file system of fsspec, that of the hub or of this disk, on which
    the repository is at `root`. Of parquet files the footer and the first rows are read, of files with lines the first
    bytes.
    """
    # what is one JSON text, or an archive, cannot be cut
    cut = {n for n, size in sizes.items() if not whole and size > WHOLE and format_of(n) not in (None, ".json")}
    first: dict[str, str] = {}
    for name in sorted(cut):
        first.setdefault(re.sub(r"\d+", "", name), name)

    def one(name: str) -> int | None:
        path, copy = f"{root}/{name}", target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if name not in cut:
            copy.write_bytes(files.cat_file(path))
        elif name.endswith(".parquet"):
            like = first[re.sub(r"\d+", "", name)]
            return _table(files, path, copy, None if like == name else target / like)
        else:
            _lines(files.cat_file(path, start=0, end=WHOLE, cache_type="none"), copy)
        return None

    ordered = [*first.values(), *(name for name in sizes if name not in first.values())]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(ordered[: len(first)], pool.map(one, ordered[: len(first)]), strict=True))
        found |= zip(ordered[len(first) :], pool.map(one, ordered[len(first) :]), strict=True)
    return {name: found[name] for name in cut}


def _table(files: Any, path: str, copy: Path, like: Path | None) -> int:
    """Write the first rows of a parquet file, or in their place those of `like`; returns how many it has.

    Of many files of one split the first one shows what the rows are: the others must have its columns, and count.
    """
    import pyarrow
    import pyarrow.parquet

    with files.open(path, "rb", block_size=WHOLE // 4) as file:
        # a buffered stream ends within the first page of each column; a whole column can be hundreds of megabytes
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**16, pre_buffer=False)
        names = table.schema_arrow.names
        if like is None:
            first = table.iter_batches(batch_size=ROWS, row_groups=[0], use_threads=False)
            rows = pyarrow.Table.from_batches([next(first)], schema=table.schema_arrow)
        elif (rows := pyarrow.parquet.read_table(like)).column_names != names:
            raise ValueError(
                f"{copy.name}: has the columns {', '.join(names)}, unlike {like.name}; take another commit"
            )
        pyarrow.parquet.write_table(rows, copy)
        return table.metadata.num_rows


def _lines(start: bytes, copy: Path) -> None:
    """Write the whole lines that the first bytes of a file hold, packed again if they were."""
    packed = copy.name.endswith(".gz")
    text = zlib.decompressobj(31).decompress(start) if packed else start
    text = text[: text.rfind(b"\n") + 1]
    while copy.name.endswith((".csv", ".tsv")) and text.count(b'"') % 2:  # the line ends within a quoted cell
        text = text[: text.rfind(b"\n", 0, len(text) - 1) + 1]
    copy.write_bytes(gzip.compress(text) if packed else text)


def forget_sizes(directory: Path) -> None:
    """Take the numbers of rows that a card states out of it: `datasets` would compare the sketch with them."""
    from huggingface_hub import RepoCard

    if not (directory / "README.md").exists():
        return
    card = RepoCard.load(directory / "README.md", ignore_metadata_errors=True)
    stated: Any = card.data.get("dataset_info") or []
    for info in stated if isinstance(stated, list) else [stated]:
        for key in ("splits", "download_size", "dataset_size"):
            info.pop(key, None)
    card.save(directory / "README.md")


def split_sizes(directory: Path, config: str | None, rows: Rows) -> Rows:
    """Rows of each split of a configuration, as the files of the real repository have them; None where unknown."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(str(directory), config)
    found: Rows = {}
    for split, paths in (builder.config.data_files or {}).items():
        counts = [_rows_of(Path(path), directory, rows) for path in paths]
        found[str(split)] = None if None in counts else sum(count or 0 for count in counts)
    return found


def _rows_of(path: Path, directory: Path, rows: Rows) -> int | None:
    name = path.relative_to(directory).as_posix()
    return rows[name] if name in rows else len(read_file(path))
