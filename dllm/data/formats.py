"""Files of rows on disk, in the formats that people have: jsonl, json, parquet, csv, tsv and txt, also as .gz."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a .gz file that was cut off or is none raises."""


class FileRows(Sequence[Row]):
    """The rows of several files one after another; `where(i)` names file and row for an error line."""

    def __init__(self, files: Iterable[tuple[str, Sequence[Row]]]):
        self._files = list(files)
        self._ends = list(accumulate(len(rows) for _, rows in self._files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [name for name, _ in self._files]

    def __getitem__(self, index: Any) -> Any:
        name, rows, row = self._place(index)
        return rows[row]

    def where(self, index: int) -> str:
        """File and number of a row, counted from 1; of a jsonl file the number of its line."""
        name, rows, row = self._place(index)
        return f"{name} row {rows.lines[row] if isinstance(rows, Lines) else row + 1}"

    def _place(self, index: int) -> tuple[str, Sequence[Row], int]:
        file = bisect_right(self._ends, index)
        name, rows = self._files[file]
        return name, rows, index - (self._ends[file] - len(rows))


class Lines(list):
    """Rows of a jsonl file; `lines` are the numbers of their lines."""

    def __init__(self, numbered: Iterable[tuple[int, Row]]):
        self.lines: list[int] = []
        for number, row in numbered:
            self.lines.append(number)
            self.append(row)


class Table(Sequence[Row]):
    """The rows of a parquet file, each made when it is asked for."""

    def __init__(self, path: Path):
        from pyarrow.parquet import read_table

        table = read_table(path)
        self._rows, self._columns = table.num_rows, dict(zip(table.column_names, table.columns, strict=True))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Any:
        return {name: column[index].as_py() for name, column in self._columns.items()}


def read_files(paths: Iterable[Path]) -> FileRows:
    """The rows of some files. Raises ValueError, one line, for a file that is damaged, empty or of another format."""
    return FileRows((path.name, read_file(path)) for path in paths)


def read_file(path: Path) -> Sequence[Row]:
    """The rows of one file. Raises ValueError, one line, as above."""
    kind = format_of(path)
    if kind is None:
        raise ValueError(f"{path}: a file of this kind is not read; allowed: {', '.join(FORMATS)}, also as .gz")
    try:
        rows = FORMATS[kind](path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except DAMAGED:
        raise ValueError(f"{path}: the compressed file is damaged or was cut off; get it again") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: {_not_utf8(path)}") from None
    except (OSError, ValueError, csv.Error) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(first if first.startswith(str(path)) else f"{path}: cannot be read ({first})") from None
    if not len(rows):
        raise ValueError(f"{path}: has no rows; leave the file out, or fill it")
    return rows


def format_of(path: str | Path) -> str | None:
    """The format that a file's name states (`.jsonl`), None for one that is not read."""
    name = str(path).lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_jsonl(path: str | Path) -> Lines:
    """The rows of a JSON-lines file; blank lines and a byte order mark are passed over.

    Raises ValueError with file and line for anything that is not one.
    """
    try:
        with _opened(path) as file:
            return Lines(_parsed(path, file))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the download again") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: {_not_utf8(path)}") from None


def _parsed(path: str | Path, lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise ValueError(
                f"{path}:{number}: not JSON ({reason}); mend the line, or download the file again"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a row must be an object, not {type(row).__name__}")
        yield number, row


def _json(path: Path) -> Sequence[Row]:
    """Rows of a JSON file: a list of objects, an object that holds one such list, or in truth JSON lines."""
    with _opened(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            return Lines(_parsed(path, io.StringIO(text)))
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend the file") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and _all_objects(value)]
        named = content.keys() & {"messages", "conversations", "conversation"}
        content = lists[0] if len(lists) == 1 and not named else [content]
    if not isinstance(content, list) or not _all_objects(content, empty=True):
        raise ValueError(f"{path}: holds no rows; it needs a list of objects, such as [{{...}}, {{...}}]")
    return content


def _all_objects(values: list, *, empty: bool = False) -> bool:
    return (empty or bool(values)) and all(isinstance(value, dict) for value in values)


def _csv(path: Path, delimiter: str = ",") -> Sequence[Row]:
    csv.field_size_limit(2**31 - 1)
    rows: list[Row] = []
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        for row in reader:
            if "" in row:
                raise ValueError(
                    f"{path} line {reader.line_num}: has more fields than the header; put quotes around texts with "
                    f"{delimiter!r} in them"
                )
            rows.append(row)
    return rows


def _tsv(path: Path) -> Sequence[Row]:
    return _csv(path, "\t")


def _txt(path: Path) -> Sequence[Row]:
    """Paragraphs, which blank lines part; where there are none, lines."""
    with _opened(path) as file:
        text = file.read()
    lines = text.splitlines()
    paragraphs, last = [], True
    for line in lines:
        if line.strip():
            paragraphs.append(line) if last else paragraphs.__setitem__(-1, f"{paragraphs[-1]}\n{line}")
        last = not line.strip()
    return [{"text": text} for text in (paragraphs if len(paragraphs) > 1 else filter(str.strip, lines))]


FORMATS: dict[str, Callable[[Path], Sequence[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _json,
    ".parquet": Table,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
}
"""End of a file's name -> what reads its rows; parquet is the only one that is not read from a .gz file."""


def _opened(path: str | Path, newline: str | None = None):
    """A file as text, unpacked where its name says so; a byte order mark is passed over."""
    opened = gzip.open if str(path).lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline=newline)


def _not_utf8(path: str | Path) -> str:
    with open(path, "rb") as file:
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    found = "UTF-16" if wide else "not UTF-8"
    return f"{found} text; save it as UTF-8, or download it again if it is damaged"
