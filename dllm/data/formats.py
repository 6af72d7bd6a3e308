"""Files of rows on disk, in the formats that people have: jsonl, json, parquet, csv, tsv and txt, also as .gz.

All but json are read as a stream: rows asked for in rising order are read once, and one block of them is in memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, groupby, islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FILES = "files"
"""Directory of a download that holds copies of a dataset's own files."""

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
"""Errors of reading a .gz file that was cut off, or that is not one."""

LIST_OF_OBJECTS = re.compile(r"\s*\[\s*(\{|$)")
"""How the first line of a list of objects begins."""

DELIMITERS = ",;\t|"
"""What may part the fields of a csv file: spreadsheets write the semicolon where the comma is a decimal point."""

QUOTED = re.compile(r'"[^"]*("|$)')
"""What stands in quotes in a line, where a delimiter is none."""

STATED = "sep="
"""How the line begins in which a spreadsheet states the delimiter, before the header."""

BLOCK_ROWS, BLOCK_BYTES = 1024, 2**22
"""Rows of a parquet file that are read at a time, and about how many bytes they may have."""


class FileRows(Sequence[Row]):
    """The rows of several files one after another; `where(i)` names file and row for an error line.

    One file is open at a time. Another process may be sent it: the lengths of the files, counted once, go along.
    Raises ValueError, one line, for a file that is damaged, empty or of another format.
    """

    def __init__(self, paths: Iterable[Path], *, may_be_empty: bool = False):
        self.paths = list(paths)
        self._ends = list(accumulate(len(read_file(path, may_be_empty=may_be_empty)) for path in self.paths))
        self._file = -1
        self._rows: Sequence[Row] = []

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def beginnings(self, number: int) -> Iterator[Row]:
        """The first rows of every file, about so many together: files may be of different kinds."""
        share = max(1, number // max(1, len(self.paths)))
        for start, end in pairwise([0, *self._ends]):
            yield from (self[i] for i in range(start, min(end, start + share)))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": -1, "_rows": []}

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [path.name for path in self.paths]

    def __getitem__(self, index: Any) -> Any:
        rows, row = self._place(index)
        return rows[row]

    def where(self, index: int) -> str:
        """File and number of a row, counted from 1; of a jsonl file the number of its line."""
        rows, row = self._place(index)
        return f"{self.paths[self._file].name} row {rows.line(row) if isinstance(rows, Stream) else row + 1}"

    def _place(self, index: int) -> tuple[Sequence[Row], int]:
        """The rows of the file that a row is in, and its number there."""
        index = range(len(self))[index]
        file = bisect_right(self._ends, index)
        if file != self._file:
            self._file, self._rows = file, open_file(self.paths[file])
        return self._rows, index - (self._ends[file - 1] if file else 0)


class Stream(Sequence[Row]):
    """Rows that are read from the beginning of a file on; one before the last one asked for begins it anew.

    items: opens the file, and gives for each row its line and what `row` makes it of.
    """

    def __init__(self, items: Callable[[], Iterator[tuple[int, Any]]], row: Callable[[tuple[int, Any]], Row]):
        self._items, self._row = items, row
        self._open, self._at, self._item = items(), -1, (0, None)

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self._items())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._row(self._found(index))

    def line(self, index: int) -> int:
        """Number of a row's line, from 1; where rows are not lines, the number of the row."""
        return self._found(index)[0]

    def _found(self, index: int) -> tuple[int, Any]:
        if index < 0:
            index += len(self)
        if index < self._at:
            self._open, self._at = self._items(), -1
        while index > self._at:
            try:
                self._item = next(self._open)
            except StopIteration:
                raise IndexError(index) from None
            self._at += 1
        return self._item


class Table(Sequence[Row]):
    """The rows of a parquet file; a block of a row group is in memory at a time."""

    def __init__(self, path: Path):
        from pyarrow.parquet import ParquetFile

        self._file = ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # else a whole row group is in memory
        groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._bytes = [group.total_byte_size / max(1, group.num_rows) for group in groups]
        self._blocks: Iterator[Any] = iter(())
        self._group, self._low = -1, 0
        self._block: Any = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        group = bisect_right(self._ends, index)
        if group != self._group or index < self._low:
            size = max(1, min(BLOCK_ROWS, int(BLOCK_BYTES / max(1.0, self._bytes[group]))))
            self._blocks = self._file.iter_batches(size, row_groups=[group], use_threads=False)
            self._group, self._low, self._block = group, self._ends[group - 1] if group else 0, next(self._blocks)
        while index >= self._low + self._block.num_rows:
            self._low, self._block = self._low + self._block.num_rows, next(self._blocks)
        block, place = self._block, index - self._low
        return {name: column[place].as_py() for name, column in zip(block.schema.names, block.columns, strict=True)}


def open_file(path: Path) -> Sequence[Row]:
    """The rows of one file, not counted yet. Raises ValueError, one line, for one of another format."""
    kind = format_of(path)
    if kind is None:
        raise ValueError(
            f"{shown_name(path)}: a file of this kind is not read; allowed: {', '.join(FORMATS)}, also as .gz"
        )
    return FORMATS[kind](path)


def shown_name(path: str | Path) -> str:
    """How an error line names a file: by its path; a copy of a user's own file by its name, as the original is to be
    corrected."""
    return Path(path).name if Path(path).parent.name == FILES else str(path)


def read_file(path: Path, *, may_be_empty: bool = False) -> Sequence[Row]:
    """The rows of one file, counted. Raises ValueError, one line; for a line that is not JSON only when it is read."""
    try:
        rows = open_file(path)
        count = len(rows)
    except FileNotFoundError:
        raise ValueError(f"{shown_name(path)}: no such file; check the path, or run the download again") from None
    except DAMAGED:
        raise ValueError(f"{shown_name(path)}: {_not_unpacked(path)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{shown_name(path)}: {_not_utf8(path)}") from None
    except (OSError, ValueError, csv.Error) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = shown_name(path)
        raise ValueError(first if first.startswith(name) else f"{name}: cannot be read ({first})") from None
    if not count and not may_be_empty:
        raise ValueError(f"{shown_name(path)}: has no rows; leave the file out, or fill it")
    return rows


def format_of(path: str | Path) -> str | None:
    """The format that a file's name states (`.jsonl`), None for one that is not read."""
    name = str(path).lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def read_jsonl(path: str | Path) -> Stream:
    """The rows of a JSON-lines file; blank lines and a byte order mark are passed over.

    Raises ValueError with file and line for anything that is not one.
    """
    return Stream(lambda: _lines(path), lambda item: _parsed(path, *item))


def _jsonl(path: Path) -> Sequence[Row]:
    """The rows of a JSON-lines file, or of a file that is one list of objects in truth."""
    _, first = next(_lines(path), (0, ""))
    return _json(path) if LIST_OF_OBJECTS.match(first) else read_jsonl(path)


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    with _opened(path) as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if not line.isspace())


def _parsed(path: str | Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = _reason(error)
        where = f"{shown_name(path)}:{number}"
        raise ValueError(f"{where}: not JSON ({reason}); correct the line, or download the file again") from None
    if not isinstance(row, dict):
        raise ValueError(f"{shown_name(path)}:{number}: a row must be an object, not {type(row).__name__}")
    return row


def _json(path: Path) -> Sequence[Row]:
    """Rows of a JSON file: a list of objects, an object that holds one such list, or in truth JSON lines."""
    with _opened(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            return read_jsonl(path)
        where = f"{shown_name(path)}:{getattr(error, 'lineno', 1)}"
        raise ValueError(f"{where}: not JSON ({_reason(error)}); correct the file") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and _all_objects(value)]
        named = content.keys() & {"messages", "conversations", "conversation"}
        content = lists[0] if len(lists) == 1 and not named else [content]
    if not isinstance(content, list) or not _all_objects(content, empty=True):
        raise ValueError(f"{shown_name(path)}: holds no rows; it needs a list of objects, such as [{{...}}, {{...}}]")
    return content


def _reason(error: Exception) -> str:
    """Why JSON cannot be read: bad syntax, brackets in brackets without end, a number of thousands of digits."""
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error).split(";")[0])


def _all_objects(values: list, *, empty: bool = False) -> bool:
    return (empty or bool(values)) and all(isinstance(value, dict) for value in values)


def _csv(path: Path, delimiters: str = DELIMITERS) -> Stream:
    """The rows of a table; its fields are parted by that one of `delimiters` which the header has most often, or by
    the one that is stated."""
    with _opened(path, newline="") as file:
        header = next(filter(str.strip, file), "")
    plain = header.removeprefix(STATED)[:1] if header.startswith(STATED) else QUOTED.sub("", header)
    delimiter = max(delimiters, key=plain.count)
    return Stream(lambda: _records(path, delimiter), _second)


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """The rows of a table with their numbers; blank lines, and what a spreadsheet writes before the header, are passed
    over."""
    csv.field_size_limit(2**31 - 1)
    begin, number, names = 1, 0, list[str]()
    with _opened(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                if names and fields:
                    number += 1
                    yield number, _record(names, fields, f"{shown_name(path)} line {reader.line_num}", delimiter)
                elif any(map(str.strip, fields)) and not fields[0].startswith(STATED):
                    names = _names(fields, f"{shown_name(path)} line {begin}")
                begin = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{shown_name(path)} line {begin}: cannot be read ({error}); a quote within quotes is written twice, "
                "and each that is opened is closed"
            ) from None


def _names(fields: list[str], where: str) -> list[str]:
    """The columns of a header; one without a name, as of row numbers, is given one."""
    twice = [name for number, name in enumerate(fields) if name.strip() and name in fields[:number]]
    if twice:
        raise ValueError(f"{where}: two columns are called {twice[0]!r}; rename or remove one")
    return [name if name.strip() else f"Unnamed: {number}" for number, name in enumerate(fields)]


def _record(names: list[str], fields: list[str], where: str, delimiter: str) -> Row:
    """A row; a field that is not there is None, and delimiters at the end of a line are no fields."""
    if any(fields[len(names) :]):
        raise ValueError(
            f"{where}: has more fields than the header; put quotes around texts with {delimiter!r} in them"
        )
    return dict(zip_longest(names, fields[: len(names)]))


def _second(item: tuple[int, Any]) -> Any:
    return item[1]


def _tsv(path: Path) -> Stream:
    return _csv(path, "\t")


def _txt(path: Path) -> Stream:
    """Paragraphs, which blank lines part; where there are none, lines."""
    if len(list(islice(_paragraphs(path), 2))) > 1:
        return Stream(lambda: enumerate(map("\n".join, _paragraphs(path)), 1), _as_text)
    return Stream(lambda: enumerate(filter(str.strip, _text_lines(path)), 1), _as_text)


def _as_text(item: tuple[int, str]) -> Row:
    return {"text": item[1]}


def _text_lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        for line in file:
            yield from line.splitlines()


def _paragraphs(path: Path) -> Iterator[Iterator[str]]:
    """The lines of each paragraph."""
    return (lines for blank, lines in groupby(_text_lines(path), lambda line: not line.strip()) if not blank)


FORMATS: dict[str, Callable[[Path], Sequence[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
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


def _not_unpacked(path: str | Path) -> str:
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin and begin != GZIP:
        return "is not compressed; take .gz off its name"
    return "the compressed file is damaged or was cut off; get it again"


def _not_utf8(path: str | Path) -> str:
    with open(path, "rb") as file:
        begin = file.read(4)
    if begin.startswith(GZIP) and not str(path).lower().endswith(".gz"):
        return "compressed; add .gz to its name"
    wide = "UTF-32" if begin in UTF_32 else "UTF-16" if begin[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
    return f"{wide} text; save it as UTF-8, or download it again if it is damaged"


GZIP = b"\x1f\x8b"
"""How a compressed file begins."""

UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
"""Byte order marks, of which the first begins as one of UTF-16."""
