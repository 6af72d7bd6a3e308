"""Rows become text and conversations."""

import json

import pytest

from dllm.config import DataPart, DatasetEntry
from dllm.data.convert import kind_of_part, messages_of, read_rows, split_rows, text_of

QUESTION, ANSWER = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "the cat"}
SYSTEM = {"role": "system", "content": ""}


def part_of(directory, **entry):
    return DataPart(name="toy", path=str(directory), entry=DatasetEntry(**{"world": "rows"} | entry))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def error_of(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_alpaca_row_becomes_a_question_and_its_answer():
    row = {"instruction": "who ?", "input": "", "output": "the cat"}
    assert messages_of(row, "alpaca", "") == [QUESTION, ANSWER]
    assert messages_of(row | {"input": "the dog"}, "alpaca", "")[0]["content"] == "who ?\n\nthe dog"
    for nothing in (None, "  \n"):
        assert messages_of(row | {"input": nothing}, "alpaca", "")[0]["content"] == "who ?"


def test_messages_stay_as_they_stand_up_to_the_last_answer():
    turns = [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER]
    assert messages_of({"messages": turns}, "messages", "") == turns
    assert messages_of({"messages": [*turns, QUESTION]}, "messages", "") == turns
    assert messages_of({"messages": [{**QUESTION, "id": 3}, ANSWER]}, "messages", "") == [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("kind", "row", "line"),
    [
        ("messages", {}, "no messages (None); a row needs a list of role and content"),
        ("messages", {"messages": []}, "no messages ([])"),
        ("messages", {"messages": "who ?"}, "no messages ('who ?')"),
        ("messages", {"messages": ["who ?"]}, "messages[0] = 'who ?' has no text"),
        ("messages", {"messages": [QUESTION]}, "no turn of the assistant; a row needs one to learn from"),
        ("messages", {"messages": [QUESTION, ANSWER | {"content": " \n"}]}, "empty text in a turn of role 'assistant'"),
        ("messages", {"messages": [QUESTION | {"content": ""}, ANSWER]}, "empty text in a turn of role 'user'"),
        ("messages", {"messages": [QUESTION, {"role": "assistant"}]}, "messages[1] = "),
        ("messages", {"messages": [QUESTION | {"role": "tool"}, ANSWER]}, "messages[0].role = 'tool'"),
        ("messages", {"messages": [QUESTION, SYSTEM, ANSWER]}, "messages[1].role = 'system'; only the first turn"),
        ("alpaca", {"instruction": "who ?", "input": "", "output": ""}, "empty text in a turn of role 'assistant'"),
        ("alpaca", {"instruction": "", "input": "", "output": "the cat"}, "empty text in a turn of role 'user'"),
        ("alpaca", {"instruction": "who ?"}, "column 'output' = None is not a text; columns: instruction"),
        (
            "alpaca",
            {"prompt": "who ?", "output": "a"},
            "column 'instruction' = None is not a text; columns: prompt, output",
        ),
        ("alpaca", {"instruction": "who ?", "input": 3, "output": "a"}, "column 'input' = 3 is not a text"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_line_with_dataset_and_row(kind, row, line):
    text = error_of(messages_of, row, kind, "toy row 17")
    assert text.startswith("toy row 17: ") and line in text


def test_a_text_may_be_empty_but_not_missing():
    assert text_of({"text": ""}, "") == "" and text_of({"text": " a\n"}, "") == " a\n"
    for row in ({}, {"text": None}, {"text": ["a"]}, {"content": "a"}):
        assert "toy row 3: no text (column 'text' = " in error_of(text_of, row, "toy row 3")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n{"text": \n', ":2: not JSON"),
        ('{"text": "a"}\n["a"]\n', ":2: a row must be an object, not list"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_line_number(tmp_path, content, line):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(content)
    assert f"rows/train.jsonl{line}" in error_of(list, read_rows(part_of(tmp_path), "train"))
    assert "no such file" in error_of(read_rows, part_of(tmp_path), "test")


def test_a_share_is_held_out_where_there_is_no_test_split(tmp_path):
    write_rows(tmp_path / "rows" / "train.jsonl", [{"text": str(i)} for i in range(200)])
    train, test, train_rows, test_rows = split_rows(part_of(tmp_path, test_share=0.1))
    assert sorted([*train, *test]) == list(range(200)) and len(test) == 20 and train_rows is test_rows
    again, others = (split_rows(part_of(tmp_path, test_share=0.1, split_seed=seed)) for seed in (42, 43))
    assert [a.tolist() for a in again[:2]] == [train.tolist(), test.tolist()] and others[1].tolist() != test.tolist()
    assert len(split_rows(part_of(tmp_path, test_share=0.0001))[1]) == 1, "a share is at least one row"
    assert len(split_rows(part_of(tmp_path, test_share=0.0))[1]) == 0


def test_an_own_test_split_is_taken_whole(tmp_path):
    for split, size in (("train", 30), ("validation", 7)):
        write_rows(tmp_path / "rows" / f"{split}.jsonl", [{"text": split}] * size)
    train, test, train_rows, test_rows = split_rows(part_of(tmp_path, test_split="validation"))
    assert sorted(train) == list(range(30)) and test.tolist() == list(range(7))
    assert train_rows[0] == {"text": "train"} and test_rows[0] == {"text": "validation"}


def test_the_files_of_a_hub_repository_are_read_by_split(tmp_path):
    repository = tmp_path / "repository"
    rows = {split: [{"text": f"{split} {i}"} for i in range(4)] for split in ("train", "test")}
    for split, content in rows.items():
        write_rows(repository / "data" / f"{split}-00000-of-00001.jsonl", content)
    (repository / "manifest.json").write_text('{"files": {}}')  # what the download leaves beside the files
    part = part_of(repository, world=None, hub="toy/rows", revision="0" * 40)
    for split, content in rows.items():
        assert [row["text"] for row in read_rows(part, split)] == [row["text"] for row in content]
    line = error_of(read_rows, part, "validation")
    assert "split 'validation' of 'toy' cannot be read" in line


def test_another_number_of_rows_than_the_entry_says_is_one_line(tmp_path):
    """A card without configurations: the files of several languages would be joined without a word."""
    for name in ("data/words_test.jsonl", "data/words_test_de.jsonl"):
        write_rows(tmp_path / "snapshot" / name, [{"text": name}] * 3)
    pin = {"world": None, "hub": "a/b", "revision": "0" * 40}
    assert len(read_rows(part_of(tmp_path / "snapshot", **pin), "test")) == 6
    with pytest.raises(ValueError, match="has 6 rows, and its entry says 3; are other files") as error:
        read_rows(part_of(tmp_path / "snapshot", **pin, counts={"test": 3}), "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"), [("", "its files are empty"), ("{", "train.jsonl:1: not JSON"), ("\0\xff", "UTF-8")]
)
def test_a_file_of_a_snapshot_that_cannot_be_read_is_one_line(tmp_path, content, line):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").write_text(content, encoding="latin-1")
    part = part_of(tmp_path / "snapshot", world=None, hub="a/b", revision="0" * 40)
    assert line in error_of(lambda: list(read_rows(part, "train")))


def test_files_of_ones_own_hold_out_eight_rows_at_least_where_there_are_twice_as_many(tmp_path):
    for size, held_out in ((40, 8), (1000, 50), (10, 5), (3, 1)):
        write_rows(tmp_path / "files" / "a.jsonl", [{"text": str(i)} for i in range(size)])
        assert len(split_rows(part_of(tmp_path, world=None, files=["a.jsonl"]))[1]) == held_out


def test_what_files_hold_is_told_of_each_of_them_however_long_the_first_is(tmp_path):
    (tmp_path / "files").mkdir()
    kinds = {"a": {"instruction": "a", "input": "", "output": "b"}, "b": {"question": "a", "answer": "b"}}
    for name, row in kinds.items():
        (tmp_path / f"files/{name}.jsonl").write_text((json.dumps(row) + "\n") * 300)
    part = DataPart(name="mine", path=str(tmp_path), entry=DatasetEntry(files=["x"]))
    kind, said = kind_of_part(part, read_rows(part, "train"))
    assert kind == "auto" and "(Alpaca)" in said and "prompts and responses" in said
    (tmp_path / "files/c.txt").write_text("a text\n")
    with pytest.raises(ValueError, match="mine: holds both texts and conversations; make two datasets of them"):
        kind_of_part(part, read_rows(part, "train"))
