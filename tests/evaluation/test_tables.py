"""What `datasets` has read once is found again, and is the same."""

import json

import pytest

from dllm.evaluation.tables import cards_read_once, tables_read_once
from dllm.evaluation.task_files import load_tasks
from tests.hub_layouts import DATASETS, write_dataset

from .echo import evaluation

datasets = pytest.importorskip("datasets")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(directory of MMLU, the cache of `datasets`, calls of load_dataset that it was given)."""
    write_dataset(tmp_path / "mmlu", DATASETS["cais/mmlu"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    called, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: called.append(words) or load(*words, **more))
    return tmp_path / "mmlu", tmp_path / "cache", called


def test_tables_that_were_read_once_are_the_same_when_they_are_asked_for_again(place):
    data, cache, called = place
    plain = datasets.load_dataset(str(data), "anatomy", cache_dir=cache.parent / "other")
    called.clear()
    for _ in range(2):
        with tables_read_once(data, cache):
            found = datasets.load_dataset(path=str(data), name="anatomy")
            datasets.load_dataset(path=str(data), name="virology")
        assert {name: list(split) for name, split in found.items()} == {name: list(s) for name, s in plain.items()}
        assert [split.features for split in found.values()] == [split.features for split in plain.values()]
        assert [str(split.split) for split in found.values()] == list(found)
    assert called == [(str(data), "anatomy"), (str(data), "virology")]
    with tables_read_once(data, cache):  # other options are another question
        assert list(datasets.load_dataset(str(data), "anatomy", split="test")) == list(plain["test"])
    assert len(called) == 3


def test_what_is_derived_from_tables_is_found_again_too(place):
    data, cache, _ = place
    marks = []
    for _ in range(2):
        with tables_read_once(data, cache):
            split = datasets.load_dataset(path=str(data), name="anatomy")["test"]
        marks.append(split.map(lambda row: {"length": len(row["question"])})._fingerprint)
    assert marks[0] == marks[1]


def test_tables_whose_files_were_removed_are_read_again(place):
    data, cache, called = place
    for _ in range(2):
        with tables_read_once(data, cache):
            assert len(datasets.load_dataset(path=str(data), name="anatomy")["test"])
        for path in cache.rglob("*.arrow"):
            path.unlink()
        for path in cache.rglob("dataset_info.json"):
            path.unlink()
    assert len(called) == 2


def test_a_changed_row_is_seen(tmp_path):
    """The cache belongs to the content of the files."""
    for letter in "AB":
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = [{"question": f"{letter}{i}", "answer": f"#### {i}"} for i in range(2)]
        for split in ("test", "train"):
            (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = "{split: test, path: test.jsonl}, {split: train, path: train.jsonl}"
        (tmp_path / "data/README.md").write_text(
            f"---\nconfigs:\n- {{config_name: main, data_files: [{files}]}}\n---\n"
        )
        config = evaluation("gsm8k", task_directory=None, data="data", shots=0)
        (task,) = load_tasks(config, tmp_path)["tasks"].values()
        assert [row["question"] for row in task.eval_docs] == [f"{letter}0", f"{letter}1"]


def test_the_card_of_a_benchmark_is_parsed_once_for_all_its_tasks(tmp_path, monkeypatch):
    import datasets.load
    import huggingface_hub.repocard

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    parsed, parse = [], huggingface_hub.repocard.yaml.safe_load
    monkeypatch.setattr(huggingface_hub.repocard.yaml, "safe_load", lambda text: parsed.append(text) or parse(text))
    before = datasets.load.DatasetCard
    for _ in range(2):
        with cards_read_once():
            first = datasets.load.DatasetCard.load(str(tmp_path / "README.md")).data
            first.license = "changed"
            assert datasets.load.DatasetCard.load(str(tmp_path / "README.md")).data.license == "mit"
    assert len(parsed) == 1 and datasets.load.DatasetCard is before


def test_of_a_card_the_configuration_that_is_asked_for_is_kept(tmp_path):
    import datasets.load

    card = "---\nconfigs:\n- {config_name: a, data_files: a.csv}\n- {config_name: b, data_files: b.csv}\n---\n"
    (tmp_path / "README.md").write_text(card)
    for name, kept in {"b": ["b"], None: ["a", "b"], "other": ["a", "b"]}.items():
        with cards_read_once(name):
            found = datasets.load.DatasetCard.load(tmp_path / "README.md").data.configs
        assert [entry["config_name"] for entry in found] == kept
