"""Entries of files and checkpoints on one's own disk: short overlays, and changed content is made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.config import (
    ConfigError,
    DatasetEntry,
    ModelEntry,
    digest,
    download_configs,
    load_project,
    prepare_configs,
    run_configs,
)
from dllm.data.download import download
from dllm.models.tokenizers import load_tokenizer
from dllm.provenance import read_record
from tests.training.conftest import entry_for, make_model

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
ROWS = [{"prompt": f"who likes {word} ?", "response": f"the {word}"} for word in ("cat", "dog", "sun", "moon")] * 8
SHORTEST = """replaces: all
workdir: {work}
models: {{toy: {{path: {home}/toy}}}}
datasets: {{chats: {{files: ["{home}/chats/*.jsonl"]}}}}
runs:
  chat: {{init: toy, data: chats, length: 48, steps: 2, global_batch_size: 4, launch: cpu}}
"""


@pytest.fixture
def home(tmp_path) -> Path:
    """A directory with a checkpoint, a file of conversations and the shortest overlay over them."""
    make_model(tmp_path / "toy", entry_for())
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.yaml").write_text(SHORTEST.format(home=tmp_path, work=tmp_path / "work"))
    return tmp_path


def project(home, **changes):
    return load_project(CONFIG, home / "mine.yaml", changes)


def test_the_shortest_overlay_plans_one_run_and_nothing_else(home):
    assert len((home / "mine.yaml").read_text().splitlines()) < 15
    found = project(home)
    assert list(download_configs(found)) == ["toy", "chats"]
    assert list(prepare_configs(found)) == ["chats--toy--48"] and list(run_configs(found)) == ["chat"]
    assert found.report.title and not found.evaluations
    done = subprocess.run([sys.executable, "-m", "dllm", "plan", home / "mine.yaml"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_the_shortest_overlay_runs_from_download_to_page_with_the_model_of_the_synthetic_world(home, tmp_path):
    from tests.workflow.conftest import snakemake

    (tmp_path / "scratch/deep/er").mkdir(parents=True)
    (tmp_path / "small").symlink_to("scratch/deep/er")  # as results are on many a cluster
    (home / "world.yaml").write_text(
        f"replaces: all\nworkdir: {tmp_path / 'small'}\nworld_seed: 7\n"
        f"models: {{tiny: {{new: {json.dumps(entry_for().new)}, tokenizer: world}}}}\n"
        f"datasets: {{world: {{world: all, kind: world}}, chats: {{files: ['{home}/chats']}}}}\n"
        "runs:\n  chat: {init: tiny, data: chats, length: 64, steps: 2, global_batch_size: 4, launch: cpu}\n"
    )
    snakemake("--cores", "1", overlays=[home / "world.yaml"])
    assert (tmp_path / "small/runs/chat/model/model.safetensors").exists()
    assert (tmp_path / "small/report/index.html").exists()


def test_changed_content_changes_the_download_and_nothing_but_content_does(home):
    before = download_configs(project(home))["chats"]
    os.utime(home / "chats" / "a.jsonl", (1, 1))
    assert digest(download_configs(project(home))["chats"]) == digest(before)
    (home / "chats" / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    after = download_configs(project(home))["chats"]
    assert after.content != before.content
    (home / "toy" / "config.json").write_text((home / "toy" / "config.json").read_text() + " ")
    changed = download_configs(project(home))
    assert changed["chats"] == after and changed["toy"].content


def test_a_download_copies_and_records_so_that_the_original_may_go(home):
    work = home / "work"
    for config in download_configs(project(home)).values():
        download(config, work)
    assert (work / "downloads/chats/files/a.jsonl").read_text() == (home / "chats/a.jsonl").read_text()
    record = read_record(work / "downloads/toy.json")
    (home / "toy" / "model.safetensors").unlink()
    assert (work / "downloads/toy/model.safetensors").exists() and record["kind"] == "model"
    assert load_tokenizer(work / "downloads/toy", ModelEntry(path="x")).mask_token == "[MASK]"


def test_a_checkpoint_of_links_as_in_the_cache_of_the_hub_is_copied_whole(home):
    (home / "toy").rename(home / "blobs")
    (home / "toy").mkdir()
    for path in (home / "blobs").iterdir():
        (home / "toy" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    (home / "toy" / "manifest.json").write_text("{}")
    download(download_configs(project(home))["toy"], home / "work")
    copied = home / "work/downloads/toy"
    assert not any(path.is_symlink() for path in copied.iterdir())
    assert (copied / "model.safetensors").read_bytes() == (home / "blobs/model.safetensors").read_bytes()
    assert (home / "toy" / "manifest.json").read_text() == "{}", "nothing of the original is written"


def test_files_that_change_between_plan_and_download_are_one_line(home):
    config = download_configs(project(home))["chats"]
    (home / "chats" / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="chats: its files have changed"):
        download(config, home / "work")
    (home / "chats" / "a.jsonl").unlink()
    with pytest.raises(ValueError, match="a.jsonl: no longer there; put it back"):
        download(config, home / "work")


def test_relative_paths_start_from_the_repository_and_do_not_name_it(tmp_path):
    (tmp_path / "config").mkdir()
    for path in CONFIG.glob("*.yaml"):
        (tmp_path / "config" / path.name).write_text(path.read_text())
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    overlay = {
        "replaces": "all",
        "workdir": "results/x",
        "datasets": {"mine": {"files": "rows.csv"}},
    }  # one needs no list
    overlay["runs"] = {"one": {"init": "bert-base", "data": "mine", "steps": 1}}
    (source,) = download_configs(load_project(tmp_path / "config", overlay))["mine"].sources
    assert source == "../../rows.csv"


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        (
            {"datasets": {"chats": {"files": ["/nowhere/*.jsonl"]}}},
            "datasets.chats.files = '/nowhere/*.jsonl': no such",
        ),
        ({"datasets": {"chats": {"files": []}}}, "datasets.chats.files = []"),
        ({"datasets": {"chats": {"files": ["/dev/null"]}}}, "'/dev/null': neither a file nor a directory; allowed: "),
        (
            {"datasets": {"chats": {"files": [str(Path(__file__).parent / "slurm")]}}},
            "/slurm': a directory without files that are read; allowed: .jsonl",
        ),
        ({"datasets": {"chats": {"hub": "a/b", "revision": "0" * 40}}}, "needs exactly one of `hub`, `files`, `world`"),
        ({"datasets": {"chats": {"test_split": "test"}}}, "`files` have no splits"),
        (
            {"datasets": {"chats": {"files": [__file__]}}},
            "test_own_files.py is of no kind that is read; allowed: .jsonl",
        ),
        ({"models": {"toy": {"path": "/nowhere"}}}, "models.toy.path = '/nowhere': no checkpoint there"),
        ({"models": {"toy": {"hub": "a/b", "revision": "0" * 40}}}, "needs exactly one of `hub`, `path` and `new`"),
        ({"models": {"a": {"new": {"model_type": "bert"}, "tokenizer": "tyo"}}}, "neither a dataset nor a model. Did"),
        ({"replaces": "everything"}, "replaces = 'everything' is no section"),
    ],
)
def test_a_mistake_is_one_line(home, overlay, line):
    with pytest.raises(ValueError) as caught:
        download_configs(project(home, **overlay))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_new_model_may_take_the_tokenizer_of_another_model_and_then_shares_its_token_files(home):
    models = {"fresh": {"new": entry_for().new, "tokenizer": "toy"}, "toy": {"end_token": "[SEP]"}}
    runs = {"control": {"like": "chat", "init": "fresh"}}
    found = project(home, models=models, runs=runs)
    assert found.models["fresh"].end_token == "[SEP]", "its special tokens are those of the other model"
    configs = download_configs(found)
    assert configs["fresh"].tokenizer_path == "downloads/toy" and list(prepare_configs(found)) == ["chats--toy--48"]
    for config in configs.values():
        download(config, home / "work")
    fresh, toy = (load_tokenizer(home / "work/downloads" / name) for name in ("fresh", "toy"))
    assert fresh.get_vocab() == toy.get_vocab()
    assert read_record(home / "work/downloads/fresh.json")["inputs"].keys() == {"downloads/toy"}
    models["fresh"]["end_token"] = "[PAD]"
    assert len(prepare_configs(project(home, models=models, runs=runs))) == 2, "other tokens are other token files"


def test_a_tokenizer_does_not_come_from_a_model_without_one(home):
    new, other = {"new": entry_for().new}, {"path": str(home / "toy")}
    for a, b, line in [
        (new, new | {"tokenizer": "toy"}, "models.a.tokenizer = 'b' is a new model itself; .* its tokenizer: toy"),
        (other, other | {"tokenizer": "toy"}, "models.a.tokenizer = 'b' shares that of another model itself; .*: toy"),
        (other, other | {"tokenizer": "a"}, "models.a.tokenizer = 'b' shares that of another model itself; .*: a"),
    ]:
        with pytest.raises(ConfigError, match=line):
            project(home, models={"a": a | {"tokenizer": "b"}, "b": b})
    with pytest.raises(ConfigError, match="models.a.tokenizer = 'chats' is a dataset; name a model with the same"):
        project(home, models={"a": other | {"tokenizer": "chats"}})


def test_models_with_one_tokenizer_share_their_token_files_and_other_tokenizers_are_refused(home):
    larger = entry_for().model_copy(update={"new": entry_for().new | {"hidden_size": 64}})
    make_model(home / "larger", larger)
    models = {"big": {"path": str(home / "larger"), "tokenizer": "toy"}}
    models["fresh"] = {"new": {}, "tokenizer": "big"}
    runs = {f"chat-{name}": {"like": "chat", "init": name} for name in models}
    found = project(home, models=models, runs=runs)
    configs = download_configs(found)
    assert list(configs) == ["toy", "chats", "big", "fresh"] and list(prepare_configs(found)) == ["chats--toy--48"]
    for config in configs.values():
        download(config, home / "work")
    shared = dict.fromkeys(("toy", "big"), {"end_token": "[SEP]"})
    one = project(home, models=models | {name: models.get(name, {}) | entry for name, entry in shared.items()})
    assert one.models["big"].end_token == "[SEP]"

    saved = home / "larger" / "tokenizer.json"
    written = saved.read_text()
    saved.write_text(json.dumps(json.loads(written)))  # the same in other words
    download(download_configs(project(home, models=models, runs=runs))["big"], home / "work")
    changes = {"vocabulary": ('"cat"', '"lynx"'), "normalizer": ('"normalizer": null', '"normalizer": {"type": "NFC"}')}
    for named, (old, new) in changes.items():
        assert old in written
        saved.write_text(written.replace(old, new))
        with pytest.raises(ValueError, match=f"^big: its tokenizer is not that of 'toy': .*{named}.*; leave") as error:
            download(download_configs(project(home, models=models, runs=runs))["big"], home / "work")
        assert "\n" not in str(error.value)


def test_jobs_of_other_entries_do_not_know_of_files_and_paths():
    assert "files" not in DatasetEntry(world="all").model_dump() and "path" not in entry_for().model_dump()
