"""Fetching by commit, with hashes checked; making what the laptop configuration uses instead."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from dllm.config import DatasetEntry, DownloadConfig, ModelEntry, write_when_changed
from dllm.data.download import download, store_of
from dllm.models.load import load_backbone
from dllm.provenance import directory_digest, file_digest, read_record
from tests.hub_commands import ROOT, hub_environment
from tests.loopback_hub import LoopbackHub
from tests.stock import save_stock, stock_entry

NO_COMMIT = "0123456789" * 4
FETCH = """
import json, sys, time
time.sleep = lambda seconds: None  # the hub's client waits between its attempts
from dllm.config import DownloadConfig
from dllm.data.download import download
for text in json.load(sys.stdin):
    try:
        print(json.dumps(str(download(DownloadConfig.model_validate_json(text), sys.argv[1]))))
    except ValueError as fault:
        print(json.dumps("ValueError: " + str(fault)))
"""


def fetch(hub_url, workdir, configs):
    """What each download says, in a process of its own: the hub's address is read when its client is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, str(workdir)],
        input=json.dumps([config.model_dump_json() for config in configs]),
        capture_output=True,
        text=True,
        env=hub_environment(hub_url, workdir / "hub-home"),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def model_config(name, repository, revision):
    return DownloadConfig(name=name, what="model", model=ModelEntry(hub=repository, revision=revision))


def dataset_config(name, repository, revision):
    return DownloadConfig(name=name, what="dataset", dataset=DatasetEntry(hub=repository, revision=revision))


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A hub with sound and faulty repositories, and what fetching each of them said: (workdir, hub, lines)."""
    root, workdir = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("work")
    for name in ("model", "damaged", "torn", "gated"):
        repository = save_stock(root / "models" / name, "bert").rename(root / "models" / name / "toy")
        (repository / "README.md").write_text("a toy\n")
    (root / "models/model/toy/training.py").write_text("raise SystemExit('never fetched')")
    (root / "datasets/rows/toy/data").mkdir(parents=True)
    (root / "datasets/rows/toy/data/train.parquet").write_bytes(b"PAR1" * 100)
    (root / "datasets/rows/toy/README.md").write_text("rows\n")
    (root / "datasets/code/toy").mkdir(parents=True)
    (root / "datasets/code/toy/loader.py").write_text("raise SystemExit('never fetched')")
    with LoopbackHub(root) as hub:
        hub.faults = {"damaged/toy/model.safetensors": "corrupt", "torn/toy/model.safetensors": "cut"}
        commits = {name: hub.commit("models", f"{name}/toy") for name in ("model", "damaged", "torn", "gated")}
        hub.gated = {"gated/toy"}
        configs = [model_config(name, f"{name}/toy", commit) for name, commit in commits.items()] + [
            model_config("unknown-commit", "model/toy", NO_COMMIT),
            model_config("missing", "nobody/nothing", NO_COMMIT),
            dataset_config("rows", "rows/toy", hub.commit("datasets", "rows/toy")),
            dataset_config("code", "code/toy", hub.commit("datasets", "code/toy")),
        ]
        lines = dict(zip((c.name for c in configs), fetch(hub.url, workdir, configs), strict=True))
        # another commit in the place of the torn one: what the first attempt left must not get in
        (root / "models/torn/toy/vocab.txt").write_text("new\n")
        for name in ("tokenizer_config.json", "README.md"):
            (root / "models/torn/toy" / name).unlink()
        hub.faults = {}
        again = [model_config(name, f"{name}/toy", hub.commit("models", f"{name}/toy")) for name in ("damaged", "torn")]
        lines["again"] = fetch(hub.url, workdir, again)
    lines["offline"] = fetch(hub.url, workdir, [model_config("offline", "model/toy", commits["model"])])[0]
    return workdir, root, commits, lines


FAILED = {
    "damaged": "damaged/toy: model.safetensors arrived damaged and was removed; run again to fetch it",
    "torn": "the download broke off (",
    "gated": "gated; accept its terms on the hub and set HF_TOKEN, then run again",
    "unknown-commit": "model/toy@01234567: the repository has no such commit; correct `revision` of 'unknown-commit'",
    "missing": "nobody/nothing@01234567: no such model on the hub; correct `hub` of 'missing'",
    "code": "code/toy: has no file that a dataset needs; correct `hub` of 'code'",
    "offline": "the download broke off (",
}


@pytest.mark.parametrize("name", FAILED)
def test_what_cannot_be_had_is_one_line(answered, name):
    workdir, _, _, lines = answered
    assert lines[name].startswith("ValueError: ") and FAILED[name] in lines[name]
    assert "\n" not in lines[name]


@pytest.mark.parametrize("name", ["gated", "unknown-commit", "missing", "code", "offline"])
def test_a_failed_download_leaves_nothing_under_its_name(answered, name):
    downloads = answered[0] / "downloads"
    assert not (downloads / name).exists() and not (downloads / f"{name}.json").exists()


def test_a_model_is_fetched_with_the_files_it_needs_and_their_hashes(answered):
    workdir, root, commits, lines = answered
    target = workdir / "downloads" / "model"
    assert lines["model"] == str(target)
    served = {p.name: p for p in (root / "models/model/toy").iterdir() if p.suffix != ".py"}
    assert {p.name for p in target.iterdir()} == {*served, "manifest.json"}
    manifest = json.loads((target / "manifest.json").read_text())
    assert (manifest["hub"], manifest["commit"]) == ("model/toy", commits["model"])
    for name, path in served.items():
        assert (target / name).read_bytes() == path.read_bytes()
        assert manifest["files"][name] == {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    record = read_record(workdir / "downloads/model.json")
    assert record["kind"] == "model" and record["digest"] == directory_digest(target)["digest"]
    assert load_backbone(target, entry=stock_entry("bert")).max_length == 64


def test_a_dataset_is_fetched_with_its_folders(answered):
    target = answered[0] / "downloads" / "rows"
    found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert found == {"data/train.parquet", "README.md", "manifest.json"}
    assert read_record(answered[0] / "downloads/rows.json")["kind"] == "dataset"


def test_a_damaged_or_torn_download_is_mended_by_running_again(answered):
    workdir, root, _, lines = answered
    for name, line in zip(("damaged", "torn"), lines["again"], strict=True):
        assert line == str(workdir / "downloads" / name)
        names = {p.name for p in (root / f"models/{name}/toy").iterdir()}
        assert {p.name for p in (workdir / "downloads" / name).iterdir()} == {*names, "manifest.json"}
        assert directory_digest(workdir / "downloads" / name, ("manifest.json",)) == directory_digest(
            root / f"models/{name}/toy"
        )
    assert not [p.name for p in (workdir / "downloads").iterdir() if p.name in (".damaged.partial", ".torn.partial")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A work directory with a small synthetic world and its record."""
    workdir = tmp_path_factory.mktemp("world")
    config = DownloadConfig(name="world", what="dataset", dataset=DatasetEntry(world="all", kind="world", seed=3))
    download(config, workdir)
    return workdir


def test_the_synthetic_world_is_made_with_its_record(world):
    target, record = world / "downloads/world", read_record(world / "downloads/world.json")
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["seed"] == 3 and {"alpaca/train.jsonl", "tokenizer/tokenizer.json"} <= manifest["files"].keys()
    assert record["kind"] == "dataset" and record["inputs"] == {}
    assert record["digest"] == directory_digest(target)["digest"]
    assert not list((world / "downloads").glob(".*"))


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_model_made_from_a_seed_twice_is_the_same_to_the_byte(world, kind):
    entry = stock_entry(kind)
    records = []
    for _ in range(2):
        config = DownloadConfig(name=f"new-{kind}", what="model", model=entry, tokenizer_path="downloads/world")
        target = download(config, world)
        records.append((world / f"downloads/new-{kind}.json").read_bytes())
    assert records[0] == records[1]
    assert read_record(f"{target}.json")["inputs"] == {
        "downloads/world": read_record(world / "downloads/world.json")["digest"]
    }
    other = DownloadConfig(
        name="other", what="model", model=entry.model_copy(update={"seed": 1}), tokenizer_path="downloads/world"
    )
    download(other, world)
    one, two = (file_digest(world / "downloads" / n / "model.safetensors") for n in (f"new-{kind}", "other"))
    assert one != two
    backbone = load_backbone(target, entry=entry)
    assert backbone.vocab_size == -(-len(backbone.tokenizer) // 8) * 8


def test_a_model_that_cannot_be_made_leaves_nothing_under_its_name(world):
    entry = stock_entry("bert").model_copy(update={"new": {"model_type": "nonesuch"}})
    config = DownloadConfig(name="nonesuch", what="model", model=entry, tokenizer_path="downloads/world")
    with pytest.raises(ValueError, match="new.model_type = 'nonesuch' is not an architecture"):
        download(config, world)
    assert not (world / "downloads/nonesuch").exists() and not (world / "downloads/nonesuch.json").exists()


def unpacked(tmp_path, tables: dict[str, str]):
    """The directory of a dataset that came as an archive of these tables."""
    import zipfile

    from dllm.data.download import unpack

    with zipfile.ZipFile(tmp_path / "tables.zip", "w") as archive:
        for name, text in tables.items():
            archive.writestr(name, text)
    unpack(tmp_path)
    return tmp_path


def rows_of(directory, name, split, tmp_path):
    from datasets import load_dataset

    return load_dataset(str(directory), name, split=split, cache_dir=str(tmp_path / ".cache")).to_list()


def test_the_cells_of_an_archives_tables_are_texts_whatever_they_look_like(tmp_path):
    directory = unpacked(
        tmp_path,
        {
            "dev/sums.csv": ",Question,A\n0,0.80,1\n1,007,NA\n",
            "test/sums.csv": '\ufeff,Question,A\n0,"(1), (2)",None\n1,,1e5\n',
        },
    )
    assert rows_of(directory, "sums", "dev", tmp_path) == [
        {"Unnamed: 0": "0", "Question": "0.80", "A": "1"}, {"Unnamed: 0": "1", "Question": "007", "A": "NA"},
    ]  # fmt: skip
    assert [(r["Question"], r["A"]) for r in rows_of(directory, "sums", "test", tmp_path)] == [
        ("(1), (2)", "None"), ("", "1e5"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ("val/law_val.csv", "dev/law_dev.csv", "dev/spring_test.csv", "test/law.csv"),
        ("law_val.csv", "law_dev.csv", "spring_test_dev.csv", "law_test.csv", "__MACOSX/._law_val.csv"),
        ("exam/law_val.csv", "exam/law_dev.csv", "exam/dev/spring_test.csv", "exam/law_test.csv", "exam/._law_dev.csv"),
    ],
    ids=["folders", "flat", "mixed"],
)
def test_the_split_in_the_name_of_a_table_is_no_part_of_its_configuration(tmp_path, names):
    directory = unpacked(tmp_path, dict.fromkeys(names, "id,question\n0,a\n"))
    from huggingface_hub import RepoCard

    described = RepoCard.load(directory / "README.md").data["configs"]
    assert {c["config_name"]: sorted(f["split"] for f in c["data_files"]) for c in described} == {
        "law": ["dev", "test", "val"], "spring_test": ["dev"],
    }  # fmt: skip
    assert len(rows_of(directory, "law", "val", tmp_path)) == 1


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"law.csv": "id\n0\n"}, "law.csv: neither its name nor its folder says which split it is"),
        ({"a/law_val.csv": "id\n0\n", "b/law_val.csv": "id\n0\n"}, "a second table of 'law', split 'val'"),
    ],
)
def test_an_archive_whose_tables_have_no_split_or_two_is_one_line(tmp_path, tables, said):
    with pytest.raises(ValueError, match=said):
        unpacked(tmp_path, tables)


def test_a_torn_row_of_a_table_is_one_line_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"law.csv:3: 1 cells under 2 columns"):
        unpacked(tmp_path, {"dev/law.csv": "id,question\n0,a\n1\n"})


CARD = """---
configs:
- config_name: all
  data_files:
  - {split: train, path: data/all/train-*}
  - {split: test, path: [data/all/test-*]}
- config_name: small
  data_files: data/small/*
---
"""


def test_only_the_files_of_the_configuration_are_fetched(tmp_path, monkeypatch):
    root = tmp_path / "hub"
    directory = root / "datasets/many/toy"
    for name in ("all/train-0", "all/test-0", "small/train-0", "other/train-0"):
        path = directory / f"data/{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n')
    (directory / "README.md").write_text(CARD)
    with LoopbackHub(root) as hub:
        commit = hub.commit("datasets", "many/toy")
        told = fetch(
            hub.url,
            tmp_path,
            [
                DownloadConfig(
                    name=name, what="dataset", dataset=DatasetEntry(hub="many/toy", revision=commit, config=name)
                )
                for name in ("all", "small", "none")
            ],
        )
    assert sorted(p.stem for p in (tmp_path / "downloads/all/data").rglob("*.jsonl")) == ["test-0", "train-0"]
    assert [p.parent.name for p in (tmp_path / "downloads/small/data").rglob("*.jsonl")] == ["small"]
    assert rows_of(tmp_path / "downloads/all", "all", "test", tmp_path) == [{"text": "all/test-0"}]
    assert "has no configuration 'none' (all, small); correct `config`" in told[2]


def test_work_directories_side_by_side_fetch_a_file_once_whatever_happens_to_one_of_them(tmp_path):
    """One is killed while it fetches, then two begin at once, and a damaged file of the store is fetched again."""
    root, large = tmp_path / "served", 3 * 2**23
    directory = root / "models/large/toy"
    save_stock(root / "models/large", "bert").rename(directory)
    (directory / "large.safetensors").write_bytes(random.Random(0).randbytes(large))
    work = [tmp_path / name for name in ("killed", "one", "two")]
    with LoopbackHub(root) as hub:
        config = model_config("toy", "large/toy", hub.commit("models", "large/toy"))
        path = write_when_changed(tmp_path / "toy.yaml", config)
        environment = hub_environment(hub.url, tmp_path / "home")
        del environment["HF_HOME"]

        def begin(workdir):
            command = [sys.executable, "-m", "dllm", "download", str(path), "--workdir", str(workdir)]
            return subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )

        killed = begin(work[0])
        while killed.poll() is None and not list(tmp_path.glob("hub/models--large--toy/blobs/*")):
            time.sleep(0.01)
        killed.kill()
        killed.communicate()
        hub.requests.clear()
        both = [begin(workdir) for workdir in work[1:]]
        told = [process.communicate()[0].decode() for process in both]
        assert [process.returncode for process in both] == [0, 0], told
        asked = [path for method, path, _ in hub.requests if method == "GET" and path.endswith("large.safetensors")]
        assert len(asked) <= 1
        records = [(workdir / "downloads/toy.json").read_text() for workdir in work[1:]]
        names = [workdir / "downloads/toy/large.safetensors" for workdir in work[1:]]
        assert records[0] == records[1] and names[0].samefile(names[1])
        assert not (work[1] / "downloads/toy/config.json").samefile(work[2] / "downloads/toy/config.json")
        with open(names[0], "r+b") as file:  # as a failing disk does
            file.write(b"damaged")
        for status, said in ((2, "large.safetensors arrived damaged and was removed"), (0, "downloads/toy")):
            again = begin(work[0])
            text = again.communicate()[0].decode()
            assert (again.returncode, said in text) == (status, True), text
        assert (work[0] / "downloads/toy.json").read_text() == records[0]


def test_where_the_store_is(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert store_of(tmp_path / "results/paper") == tmp_path / "results/hub"
    (tmp_path / "scratch").mkdir()
    (tmp_path / "results/linked").symlink_to(tmp_path / "scratch")
    assert store_of(tmp_path / "results/linked") == tmp_path / "hub", "on the disk of the work directory"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert store_of(tmp_path / "results/paper") == tmp_path / "results/paper/.work/hub"
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert store_of(tmp_path) is None
