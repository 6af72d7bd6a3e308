"""Where a number comes from, and artifacts that are whole or not there."""

import json
import os
import shutil
import stat
import subprocess
import time

import pytest

from dllm import provenance
from dllm.provenance import (
    VOLATILE,
    collect,
    directory_digest,
    file_digest,
    how_to_make,
    input_digest,
    read_record,
    replace_directory,
    write_atomically,
    write_record,
)


def fill(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


FILES = {"b.txt": "two", "a/c.txt": "three", "a.txt": "one"}


def test_a_file_is_written_with_its_directories_and_readable_by_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    write_atomically(path, "other")
    assert path.read_text() == "other" and os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = fill(tmp_path, {"file": "old"}) / "file"
    monkeypatch.setattr(provenance.os, broken, lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_directory_is_replaced_whole(tmp_path):
    target = fill(tmp_path / "target", {"old.txt": "old"})
    replace_directory(fill(tmp_path / "new", FILES), target)
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*.txt")) == sorted(FILES)
    assert os.listdir(tmp_path) == ["target"]


def test_a_directory_is_put_where_nothing_was(tmp_path):
    replace_directory(fill(tmp_path / "new", FILES), tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]


def test_a_replacement_that_fails_leaves_what_was_there(tmp_path):
    target = fill(tmp_path / "target", {"old.txt": "old"})
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "never-made", target)
    assert (target / "old.txt").read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_a_digest_depends_on_names_and_contents_alone(tmp_path):
    one = fill(tmp_path / "one", FILES)
    other = fill(tmp_path / "other", dict(reversed(FILES.items())))
    os.utime(other / "b.txt", (1, 1))
    digest = directory_digest(one)
    assert digest == directory_digest(other) and digest["files"] == 3 and digest["bytes"] == len("onetwothree")
    (other / "b.txt").write_text("twO")
    assert directory_digest(other)["digest"] != digest["digest"]
    (other / "b.txt").write_text("two")
    (other / "b.txt").rename(other / "d.txt")
    assert directory_digest(other)["digest"] != digest["digest"]


def test_a_digest_of_files_is_the_usual_sha256(tmp_path):
    fill(tmp_path, {"file": "abc"})
    assert file_digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_that_hold_times_do_not_change_a_record(tmp_path):
    target = fill(tmp_path / "run", FILES)
    facts = {"kind": "run", "name": "run", "config_digest": "c", "inputs": {"data/x": "d"}}
    first = write_record(target, **facts)
    for name in VOLATILE:
        (target / name).write_text(str(time.time()))
    assert write_record(target, **facts) == first == read_record(tmp_path / "run.json")
    fill(target, {"a/provenance.json": "an artifact's own only at its top"})
    assert write_record(target, **facts)["digest"] != first["digest"]


def test_a_record_says_what_it_is_of_and_what_it_was_made_from(tmp_path):
    target = fill(tmp_path / "x", FILES)
    record = write_record(target, kind="data", name="x", config_digest="c", inputs={"downloads/y": "d"})
    expected = directory_digest(target) | {
        "kind": "data",
        "name": "x",
        "config_digest": "c",
        "inputs": {"downloads/y": "d"},
    }
    assert record == expected == json.loads((tmp_path / "x.json").read_text())


def test_an_unchanged_artifact_has_a_record_of_the_same_bytes(tmp_path):
    target = fill(tmp_path / "x", FILES)
    contents = []
    for _ in range(2):
        write_record(target, kind="data", name="x", config_digest="c", inputs={"b": "1", "a": "2"})
        contents.append((tmp_path / "x.json").read_bytes())
    assert contents[0] == contents[1]


def test_a_missing_or_damaged_record_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="x.json: missing; run the workflow so that it makes .*/x$"):
        read_record(tmp_path / "x.json")
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match="x.json: damaged; delete it and run the workflow again"):
            read_record(tmp_path / "x.json")


def test_an_artifact_that_is_gone_while_its_record_is_there_names_the_record_to_delete(tmp_path):
    target = fill(tmp_path / "data" / "x", FILES)
    record = write_record(target, kind="data", name="x", config_digest="c", inputs={})
    assert input_digest(target) == record["digest"]
    shutil.rmtree(target)
    with pytest.raises(ValueError, match="x: missing, although its record is there; delete .*x.json and run") as caught:
        input_digest(target)
    assert "\n" not in str(caught.value)

    for inside in (target / "train.tokens.bin", target / "deep" / "er"):
        assert how_to_make(inside) == f"although its record is there; delete {target}.json and run the workflow again"
    assert how_to_make(tmp_path / "data" / "y") == "run the workflow so that it makes it"


def test_provenance_names_commit_versions_hardware_and_time():
    facts = collect(seed=3)
    keys = {"commit", "dirty", "versions", "hardware", "written", "peak_host_gib", "seed"}
    assert facts.keys() == keys and facts["seed"] == 3 and facts["peak_host_gib"] > 0.01
    assert {"python", "torch", "transformers"} <= facts["versions"].keys()
    assert facts["hardware"].endswith("cores")
    time.strptime(facts["written"], "%Y-%m-%dT%H:%M:%S%z")


def test_outside_a_checkout_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    provenance.commit.cache_clear()
    try:
        assert provenance.commit() == {"commit": "unknown", "dirty": None}
    finally:
        provenance.commit.cache_clear()


@pytest.mark.parametrize("below", [".", "unpacked"])
def test_a_release_unpacked_inside_another_repository_does_not_take_its_commit(monkeypatch, tmp_path, below):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    place = tmp_path / below / "dllm" / "provenance.py"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(place))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # two users in one clone
    provenance.commit.cache_clear()
    try:
        found = provenance.commit()
        assert (found == {"commit": "unknown", "dirty": None}) == (below == "unpacked")
        assert below == "unpacked" or (len(found["commit"]) == 40 and found["dirty"] is False)
    finally:
        provenance.commit.cache_clear()
