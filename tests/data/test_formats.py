"""Files as people have them: every format gives the same rows, and what is wrong with a file is one line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dllm.config import DATA_FILES
from dllm.data.formats import FORMATS, FileRows, read_file, read_jsonl

ROWS = [{"prompt": "Hi", "response": "Hello, you!"}, {"prompt": "Ünï 😀", "response": 'say "yes"\nor no'}]


def write(path: Path, rows=ROWS) -> Path:
    """The rows in the format that the name of a file states."""
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if plain.endswith(".json"):
            json.dump(rows, file)
        elif plain.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if plain.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def error_of(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "A.JSONL"],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = read_file(write(tmp_path / name))
    assert list(rows) == ROWS and rows[0] == ROWS[0] and [rows[1], rows[1], rows[0]] == [ROWS[1], ROWS[1], ROWS[0]]


def test_any_order_gives_the_rows_of_a_parquet_file_with_several_groups_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("dllm.data.formats.BLOCK_ROWS", 3)
    rows = [{"text": str(i), "turns": [{"role": "user", "content": "a" * i}]} for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=17)
    table = read_file(tmp_path / "a.parquet")
    order = [*range(40), *range(39, -1, -1), 16, 17, 33, 34, 5]
    assert [table[i] for i in order] == [rows[i] for i in order] and table[-1] == rows[-1]


def test_the_configuration_knows_the_formats_that_are_read():
    assert set(DATA_FILES) == set(FORMATS)


@pytest.mark.parametrize("text", ["﻿{rows}", "\n\n{rows}\n \n", "{rows}\r\n"])
def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path, text):
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text.replace("{rows}", lines), encoding="utf-8")
    assert list(read_jsonl(tmp_path / "a.jsonl")) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_other_formats_may_begin_with_a_byte_order_mark_too(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(read_file(path)) == ROWS


def test_a_text_file_is_its_paragraphs_or_else_its_lines(tmp_path):
    (tmp_path / "prose.txt").write_text("One\ntwo.\n\n\nThree.\n \nFour.")
    assert [row["text"] for row in read_file(tmp_path / "prose.txt")] == ["One\ntwo.", "Three.", "Four."]
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n")
    assert [row["text"] for row in read_file(tmp_path / "lines.txt")] == ["One.", "Two."]


@pytest.mark.parametrize("content", [{"data": ROWS, "version": 2}, ROWS])
def test_a_json_file_may_hold_its_rows_under_a_name(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_file(tmp_path / "a.json") == ROWS


def test_a_json_file_may_be_json_lines_in_truth(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_file(tmp_path / "a.json")) == ROWS


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_called_json_lines_may_be_one_list_in_truth(tmp_path, indent):
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(ROWS, indent=indent))
    assert list(read_file(tmp_path / "a.jsonl")) == ROWS


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_fields_of_a_csv_file_may_be_parted_as_a_spreadsheet_does(tmp_path, delimiter):
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert list(read_file(tmp_path / "a.csv")) == ROWS


@pytest.mark.parametrize(
    "content",
    [
        ",a;x,b\n0,1,2\n",  # with the numbers of the rows
        "a;x,b,\n1,2,\n",
        "a;x,b\n1,2,,\n",
        "\n\r\na;x,b\n\n1,2\n",
        "sep=,\na;x,b\n1,2\n",
        "sep=|\na;x|b\n1|2\n",
        '"a;x","b"\n"1","2"\n',
        '"a;x";"b"\n"1";"2"\n',
    ],
)
def test_a_table_may_have_what_spreadsheets_add(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, newline="")
    (row,) = read_file(tmp_path / "a.csv")
    assert (row["a;x"], row["b"]) == ("1", "2")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.csv", b"prompt,response\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"", "not JSON"),
        ("a.json", b"[" * 100_000, "a.json:1: not JSON (nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: not JSON (Exceeds the limit"),
        ("a.json", b"3", "holds no rows; it needs a list of objects"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl:3: not JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-32"), "UTF-32 text; save it as UTF-8"),
        ("a.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "a.jsonl: compressed; add .gz to its name"),
        ("a.csv", b"a,b\n\xff,1\n", "not UTF-8 text"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2: has more fields than the header"),
        ("a.csv", b"a,b,a\n1,2,3\n", "line 1: two columns are called 'a'; rename or remove one"),
        ("a.csv", b'a,b\n1,2\n\n"3,4\n5,6\n', "line 4: cannot be read (unexpected end of data); a quote"),
        ("a.csv", b'a,b\n"1" x,2\n', "line 2: cannot be read"),
        ("a.csv", b"a,b,\n1,2,,3\n", "line 2: has more fields than the header"),
        ("a.jsonl.gz", b"not compressed", "is not compressed; take .gz off its name"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:40], "the compressed file is damaged"),
        ("a.parquet", b"PAR1 no PAR1", "cannot be read"),
        ("a.docx", b"x", "a file of this kind is not read; allowed: .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    message = error_of(lambda: list(read_file(tmp_path / name)))
    assert message.startswith(str(tmp_path / name)) and line in message


def test_a_row_is_named_by_its_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    rows = FileRows([tmp_path / "a.jsonl", write(tmp_path / "b.csv"), write(tmp_path / "c.parquet")])
    assert len(rows) == 6 and rows[1] == {"a": 2} and rows[5] == ROWS[1]
    assert [rows.where(i) for i in (0, 1, 2, 5)] == ["a.jsonl row 2", "a.jsonl row 4", "b.csv row 1", "c.parquet row 2"]


def test_a_copy_of_a_users_own_file_goes_by_the_name_of_the_original(tmp_path):
    for directory, name in ((tmp_path, f"{tmp_path}/a.jsonl"), (tmp_path / "downloads/chats/files", "a.jsonl")):
        directory.mkdir(parents=True, exist_ok=True)
        for content, said in (("", ": has no rows; "), ("{}\nx\n", ":2: not JSON "), ("[1]\n", ":1: a row must be ")):
            (directory / "a.jsonl").write_text(content)
            with pytest.raises(ValueError) as error:
                list(read_file(directory / "a.jsonl"))
            assert str(error.value).startswith(name + said)
