"""The loading code against repositories laid out as the real ones, whole and with every fault of a hub.

A fault is one line and status 2, leaves nothing under the final name, and is mended by running again when it is gone.
"""

import json
import shutil
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from dllm.config import DataPart, DatasetEntry, DownloadConfig, ModelEntry, PrepareConfig
from dllm.data.tokens import open_rows
from tests.hub_commands import hub_environment, run_commands
from tests.hub_layouts import DATASETS, write_dataset
from tests.loopback_hub import LoopbackHub
from tests.stock import save_stock

pytestmark = pytest.mark.slow  # four processes, one of which tokenizes: 15 s of CPU

NOWHERE = "http://127.0.0.1:9"
"""An address at which nothing listens: no network."""


def turn(role, content):
    return {"role": role, "content": content}


CHATS = [[turn("user", f"who sees {w} ?"), turn("assistant", f"the {w} sees")] for w in ("cat", "dog", "sun", "moon")]
CHATS += [[turn("system", "one"), *CHATS[0], turn("user", "who ?"), turn("assistant", "a dog")]] * 8
ALPACA = {
    "instruction": ["who likes the cat ?"] * 20, "input": ["", "the dog"] * 10, "output": ["the dog likes"] * 20,
    "text": ["Below is an instruction ..."] * 20,
}  # fmt: skip
TULU = {"id": [f"source_{i}" for i in range(12)], "messages": CHATS, "source": ["ai2-adapt-dev/one"] * 12}
SMOLTALK = {"messages": CHATS, "source": ["smol-magpie-ultra"] * 12}
WIKITEXT = {"text": ["", " = The cat = \n", "", " the cat sees the dog and likes the red sun <unk> \n"] * 20}


def card(**configs):
    """A card whose configurations have data files by split, and a licence."""
    described = [
        {"config_name": name, "data_files": [{"split": s, "path": p} for s, p in files.items()]}
        for name, files in configs.items()
    ]
    return "---\n" + yaml.safe_dump({"configs": described, "license": "mit"}) + "---\n# A set\n"


REPOSITORIES = {
    "tatsu-lab/alpaca": (card(default={"train": "data/train-*"}), {"data/train-00000-of-00001-a09b": ALPACA}),
    "allenai/tulu-3-sft-mixture": (
        card(default={"train": "data/train-*"}),
        {f"data/train-0000{i}-of-00002": {k: v[6 * i : 6 * i + 6] for k, v in TULU.items()} for i in range(2)},
    ),
    "HuggingFaceTB/smoltalk": (
        card(**{
            "all": {"train": "data/all/train-*", "test": "data/all/test-*"},
            "everyday-conversations": {"train": "data/everyday-conversations/train-*"},
        }),
        {
            "data/all/train-00000-of-00001": SMOLTALK, "data/all/test-00000-of-00001": SMOLTALK,
            "data/everyday-conversations/train-00000-of-00001": SMOLTALK,
        },
    ),
    "Salesforce/wikitext": (
        card(**{
            f"wikitext-{n}-v1": {s: f"wikitext-{n}-v1/{s}-*" for s in ("train", "validation", "test")}
            for n in ("103", "2")
        }),
        {
            f"wikitext-{n}-v1/{s}-00000-of-00001": WIKITEXT
            for n in ("103", "2") for s in ("train", "validation", "test")
        },
    ),
}  # fmt: skip


def write_repositories(root: Path) -> None:
    for repository, (readme, tables) in REPOSITORIES.items():
        directory = root / "datasets" / repository
        for name, columns in tables.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), directory / f"{name}.parquet")
        (directory / "README.md").write_text(readme)
    for repository in ("openai/gsm8k", "haonan-li/cmmlu"):
        write_dataset(root / "datasets" / repository, DATASETS[repository])
    for name in ("torn", "damaged", "moved", "gated", "refused", "missing", "once", "sound"):
        repository = save_stock(root / "models" / name, "bert").rename(root / "models" / name / "toy")
        shutil.rmtree(root / "models" / name / "bert", ignore_errors=True)
        (root / "models" / name / "bert.json").unlink()
        (repository / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    noise = {
        "x": numpy.random.default_rng(0).integers(2**62, size=3_000_000)
    }  # 24 MB: more than the client reads at once
    large = root / "models/once/toy/large.safetensors"
    pyarrow.parquet.write_table(pyarrow.table(noise), large, compression="none")


ENTRIES = {
    "alpaca": {"hub": "tatsu-lab/alpaca", "kind": "alpaca", "test_share": 0.2},
    "tulu": {"hub": "allenai/tulu-3-sft-mixture", "kind": "messages", "test_share": 0.2},
    "smoltalk": {"hub": "HuggingFaceTB/smoltalk", "config": "all", "kind": "messages", "test_split": "test"},
    "wikitext": {"hub": "Salesforce/wikitext", "config": "wikitext-103-v1", "test_split": "validation"},
    "gsm8k-data": {"hub": "openai/gsm8k", "kind": "benchmark"},
    "cmmlu-data": {"hub": "haonan-li/cmmlu", "kind": "benchmark"},
}
FAULTS = {
    "torn": "the download broke off (",
    "damaged": "damaged/toy: model.safetensors arrived damaged and was removed; run again to fetch it",
    "moved": "the repository has no such commit; correct `revision` of 'moved' (`dllm check` shows its newest)",
    "gated": "gated; accept its terms on the hub and set HF_TOKEN, then run again",
    "refused": "the hub refuses access (401); set HF_TOKEN to a valid token",
    "missing": "no such model on the hub; correct `hub` of 'missing', or set HF_TOKEN if it is private",
}


class World:
    """A hub, a work directory, and what the commands said."""

    def __init__(self, root: Path, workdir: Path):
        self.root, self.workdir, self.told = root, workdir, {}

    def write(self, kind: str, config) -> list[str]:
        path = self.workdir / f"configs/{kind}/{config.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        verb = {"downloads": "download", "data": "prepare"}[kind]
        return [verb, str(path), "--workdir", str(self.workdir)]

    def run(self, phase: str, commands: dict[str, list[str]], url: str, **more: str) -> None:
        environment = hub_environment(url, self.workdir / "home", **more)
        self.told[phase] = dict(zip(commands, run_commands(list(commands.values()), environment), strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Downloads with faults, without a network, and with the faults gone; then everything prepared offline."""
    world = World(tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("work"))
    write_repositories(world.root)
    with LoopbackHub(world.root) as hub:
        models = {
            name: world.write("downloads", DownloadConfig(name=name, what="model", model=ModelEntry(
                hub=f"{name}/toy", revision=hub.commit("models", f"{name}/toy")
            )))
            for name in (*FAULTS, "once", "sound")
        }  # fmt: skip
        entries = {
            name: DatasetEntry(**entry, revision=hub.commit("datasets", entry["hub"]))
            for name, entry in ENTRIES.items()
        }
        datasets = {
            name: world.write("downloads", DownloadConfig(name=name, what="dataset", dataset=entry))
            for name, entry in entries.items()
        }
        hub.faults = {
            "torn/toy/model.safetensors": "cut", "damaged/toy/model.safetensors": "corrupt",
            "once/toy/large.safetensors": "cut once",
        }  # fmt: skip
        hub.gated, hub.refused = {"gated/toy"}, {"refused/toy"}
        (world.root / "models/moved/toy/new.txt").write_text("another commit\n")
        (world.root / "models/missing/toy").rename(world.root / "models/missing/elsewhere")
        world.run("faults", {name: models[name] for name in (*FAULTS, "once")}, hub.url)
        world.ranges = [r for _, path, r in hub.requests if path.endswith("large.safetensors") and r]
        world.half = sorted(p.name for p in (world.workdir / "downloads").glob("[!.]*"))
        world.run("no network", {"sound": models["sound"], "alpaca": datasets["alpaca"]}, NOWHERE)
        hub.faults, hub.gated, hub.refused = {}, set(), set()
        (world.root / "models/moved/toy/new.txt").unlink()
        (world.root / "models/missing/elsewhere").rename(world.root / "models/missing/toy")
        hub.requests.clear()
        world.run("mended", {name: models[name] for name in (*FAULTS, "sound")} | datasets, hub.url)
        world.again = [path for method, path, _ in hub.requests if "torn/toy" in path and method == "GET"]
    parts = {name: [name] for name in ("alpaca", "tulu", "smoltalk", "wikitext")} | {"chat": ["tulu", "smoltalk"]}
    prepared = {
        name: world.write("data", PrepareConfig(
            name=name, parts=[DataPart(name=n, path=f"downloads/{n}", entry=entries[n]) for n in names],
            model_path="downloads/sound", model=ModelEntry(hub="sound/toy", revision="0" * 40), length=48,
            split="disjoint",
        ))
        for name, names in parts.items()
    }  # fmt: skip
    world.run("offline", prepared, NOWHERE, HF_HUB_OFFLINE="1")
    return world


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_hub_is_one_line_and_status_two(world, name):
    status, _, error = world.told["faults"][name]
    line = error.splitlines()[-1]
    assert status == 2 and line.startswith("dllm download: error: ") and FAULTS[name] in line


def test_without_a_network_a_download_is_one_line_and_status_two(world):
    for status, _, error in world.told["no network"].values():
        assert status == 2 and "the download broke off (" in error.splitlines()[-1]
        assert error.splitlines()[-1].endswith("; check the network and run again")


def test_a_failed_download_leaves_neither_directory_nor_record(world):
    assert world.half == ["once", "once.json"]


def test_a_connection_cut_once_is_taken_up_where_it_broke(world):
    assert world.told["faults"]["once"][0] == 0
    assert world.ranges and all(asked.startswith("bytes=1") for asked in world.ranges), world.ranges


def test_running_again_succeeds_when_the_fault_is_gone(world):
    for name, (status, output, error) in world.told["mended"].items():
        assert status == 0, error
        assert (world.workdir / f"downloads/{name}.json").exists() and name in output
    assert not list((world.workdir / "downloads").glob(".*.partial"))


def test_files_complete_before_the_connection_broke_are_not_fetched_again(world):
    fetched = {path.rsplit("/", 1)[1] for path in world.again if "/resolve/" in path}
    assert fetched == {"model.safetensors"}


def test_the_licence_of_the_card_is_recorded_and_shown(world):
    manifest = json.loads((world.workdir / "downloads/alpaca/manifest.json").read_text())
    assert manifest["licence"] == "mit"
    assert "licence mit" in world.told["mended"]["alpaca"][1]
    assert "licence apache-2.0" in world.told["mended"]["sound"][1]


@pytest.mark.parametrize("name", ["alpaca", "tulu", "smoltalk", "wikitext", "chat"])
def test_what_was_fetched_is_prepared_without_a_network(world, name):
    status, output, error = world.told["offline"][name]
    assert status == 0, error
    rows = {split: len(open_rows(world.workdir / "data" / name, split)) for split in ("train", "test")}
    documents = {"alpaca": (16, 4), "tulu": (10, 2), "smoltalk": (12, 12), "chat": (22, 14)}
    if name == "wikitext":
        assert rows["train"] == rows["test"] > 5
    else:
        assert (rows["train"], rows["test"]) == documents[name]
    assert f"{name} train: {rows['train']} rows" in output


def test_an_archive_beside_a_loading_script_becomes_tables_by_configuration_and_split(world):
    from datasets import load_dataset

    directory = world.workdir / "downloads/cmmlu-data"
    assert not list(directory.rglob("*.py")) and not list(directory.rglob("*.zip"))
    for subject in ("anatomy", "astronomy"):
        rows = load_dataset(str(directory), subject, split="test", cache_dir=str(world.workdir / "cache"))
        assert rows[1]["Question"] == "第1题：谁看见船？" and rows[1]["Answer"] == "B"


def test_a_benchmark_reads_its_snapshot(world):
    from datasets import load_dataset

    rows = load_dataset(
        str(world.workdir / "downloads/gsm8k-data"), "main", split="test", cache_dir=str(world.workdir / "cache")
    )
    assert rows.column_names == ["question", "answer"] and len(rows) == 4
