"""Token files."""

import json

import numpy
import pytest

from dllm.data.tokens import TokenWriter, open_rows

ROWS = [([5, 6, 7], 1), ([8], 0), ([], 0), ([65_535, 0, 9], 2)]


def write(directory, vocab_size=2**16, rows=ROWS):
    writer = TokenWriter(directory, "train", vocab_size)
    for tokens, prompt in rows:
        writer.add(tokens, prompt)
    counts = writer.close()
    (directory / "manifest.json").write_text(json.dumps({"splits": {"train": counts}}))
    return counts


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_rows_come_back_as_they_were_written(tmp_path, vocab_size, dtype):
    counts = write(tmp_path, vocab_size)
    assert counts == {"rows": 4, "tokens": 7, "target_tokens": 4, "longest_row": 3, "dtype": dtype}
    rows = open_rows(tmp_path, "train")
    assert len(rows) == 4 and rows.lengths.tolist() == [3, 1, 0, 3] and rows.prompts.tolist() == [1, 0, 0, 2]
    assert [rows.row(i).tolist() for i in range(4)] == [tokens for tokens, _ in ROWS]


def test_rows_may_be_appended_many_at_a_time(tmp_path):
    for directory in (tmp_path / "one", tmp_path / "many"):
        directory.mkdir()
    write(tmp_path / "one")
    rows = open_rows(tmp_path / "one", "train")
    writer = TokenWriter(tmp_path / "many", "train", 2**16)
    writer.add(*ROWS[0])
    writer.extend(rows.tokens[3:], rows.lengths[1:], rows.prompts[1:])
    writer.close()
    for path in (tmp_path / "many").iterdir():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


def test_tokens_are_mapped_from_disk_and_cannot_be_written(tmp_path):
    write(tmp_path)
    rows = open_rows(tmp_path, "train")
    assert isinstance(rows.tokens, numpy.memmap)
    with pytest.raises(ValueError, match="read-only"):
        rows.tokens[0] = 1


def test_ids_beyond_65535_need_and_get_four_bytes(tmp_path):
    write(tmp_path, 70_000, [([69_999], 0)])
    assert open_rows(tmp_path, "train").row(0).tolist() == [69_999]


def test_an_empty_split_can_be_opened(tmp_path):
    write(tmp_path, rows=[])
    assert len(open_rows(tmp_path, "train")) == 0


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def junk(path):
    path.write_bytes(b"[1, 2")


def replace_numbers(path):
    numpy.save(path, numpy.arange(3))


@pytest.mark.parametrize(
    ("file", "damage"),
    [(f, d) for f in ("manifest.json", "train.offsets.npy", "train.prompts.npy") for d in (remove, empty, cut, junk)]
    + [("train.tokens.bin", d) for d in (remove, empty, cut)]
    + [("train.offsets.npy", replace_numbers), ("train.prompts.npy", replace_numbers)],
)
def test_a_missing_or_damaged_file_is_one_line(tmp_path, file, damage):
    write(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match="no usable split 'train' .* run the workflow") as caught:
        open_rows(tmp_path, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"splits": []}', '{"splits": {"test": {}}}'])
def test_a_manifest_without_the_split_is_one_line(tmp_path, manifest):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="no usable split 'train'"):
        open_rows(tmp_path, "train")
