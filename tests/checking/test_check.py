"""`dllm check` over a loopback hub, and over what was downloaded from it: each fault is one line with its pin."""

import json
import random
import shutil
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from dllm.config import download_configs, load_project, write_when_changed
from tests.hub_commands import ROOT, commands_of, hub_environment
from tests.hub_layouts import DATASETS, chat, write_dataset
from tests.loopback_hub import LoopbackHub
from tests.stock import save_stock

pytestmark = pytest.mark.slow  # processes that import transformers and lm-eval: half a minute of CPU
NOWHERE = "http://127.0.0.1:9"
"""An address at which nothing listens: no network."""

LARGE = 4000
"""Rows of a file that is too large to be read whole: 1 kB of noise each."""


def noisy(i: int) -> str:
    return random.Random(i).randbytes(500).hex()


def write_hub(root) -> None:
    """A model of 64 positions, GSM8K, conversations in parquet files and instructions in a file with lines."""
    save_stock(root / "models/one", "bert").rename(root / "models/one/toy")
    (root / "models/one/bert.json").unlink()
    (root / "models/one/toy/README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copytree(root / "models/one/toy", root / "models/old/toy")
    (root / "models/old/toy/model.safetensors").rename(root / "models/old/toy/tf_model.h5")
    shutil.copytree(root / "models/one/toy", root / "models/causal/toy")
    (root / "models/causal/toy/config.json").write_text('{"model_type": "gpt2"}')
    shutil.copytree(root / "models/one/toy", root / "models/other/toy")
    written = root / "models/other/toy/tokenizer.json"
    written.write_text(written.read_text().replace('"cat"', '"lynx"'))
    write_dataset(root / "datasets/openai/gsm8k", DATASETS["openai/gsm8k"])
    chats = root / "datasets/some/chats"
    (chats / "data").mkdir(parents=True)
    for name, rows in (("train-00000-of-00002", LARGE), ("train-00001-of-00002", LARGE), ("test-00000-of-00001", 6)):
        # no two files are the same: the store has equal ones once, and both would be damaged
        table = [{"messages": chat(i), "id": f"{name} {noisy(i)}"} for i in range(rows)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), chats / f"data/{name}.parquet")
    # as the hub's own cards: the rows of the real files, with which `datasets` compares what it reads
    info = {"splits": [{"name": "train", "num_examples": 2 * LARGE, "num_bytes": 1}], "dataset_size": 1}
    files = [{"split": split, "path": f"data/{split}-*"} for split in ("train", "test")]
    card = {"license": "odc-by", "dataset_info": info, "configs": [{"config_name": "default", "data_files": files}]}
    (chats / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A set\n")
    lines = root / "datasets/some/lines"
    lines.mkdir(parents=True)
    rows = ({"instruction": f"Say {i}.", "input": "", "output": noisy(i)} for i in range(LARGE))
    (lines / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(lines, root / "datasets/closed/lines")


def overlay(hub: LoopbackHub, workdir, **changes) -> dict:
    """Two runs and an evaluation over the hub, with changes of the entries."""
    chats = {"hub": "some/chats", "kind": "messages", "test_split": "test", "drop_unusable": True}
    entries = {
        "models": {"toy": {"hub": "one/toy", "licence": "MIT"}, "twin": {"hub": "other/toy"}},
        "datasets": {
            "chats": chats | {"counts": {"train": 2 * LARGE}, "test_documents": 6, "licence": "ODC-BY 1.0"},
            "lines": {"hub": "some/lines", "kind": "alpaca"},
            "gsm8k-data": {"hub": "openai/gsm8k"},
        },
    }
    for section, found in entries.items():
        for name, entry in found.items():
            entry |= changes.get(name, {})
            if "revision" not in entry:
                entry["revision"] = hub.commit(section, entry["hub"])
    run = {"length": 48, "steps": 1, "launch": "cpu"} | changes.get("run", {})
    return entries | {
        "replaces": "all", "workdir": str(workdir),
        "benchmarks": {"gsm8k": {"size": {"documents": 4}} | changes.get("gsm8k", {})},
        "runs": {name: run | {"init": "toy", "data": name} for name in ("chats", "lines")},
        "evaluations": {"chats": {"checkpoint": "chats", "label": "Toy", "benchmarks": ["gsm8k"]}},
    }  # fmt: skip


WRONG = {
    "moved": ({"chats": {"revision": "0" * 40}}, "has no such commit; correct `revision`, its newest is "),
    "gated": ({"lines": {"hub": "closed/lines", "revision": "0" * 40}}, "gated; accept its terms on the hub"),
    "split": ({"chats": {"test_split": "validation"}}, "split 'validation' of 'chats' cannot be read ("),
    "counts": ({"chats": {"counts": {"train": 7}}}, "split 'train' has 8,000 rows, counts of its entry 7;"),
    "about": ({"chats": {"test_documents": 60}}, "split 'test' has 6 rows, test_documents of its entry 60;"),
    "kind": ({"lines": {"kind": "messages"}}, "lines row 0: "),
    "licence": ({"chats": {"licence": "MIT"}}, "licence 'odc-by' on its card, 'MIT' in its entry;"),
    "documents": ({"gsm8k": {"size": {"documents": 9}}}, "task 'gsm8k' has 4 documents, size of the benchmark 9;"),
    "examples": ({"gsm8k": {"shots": 80}}, "task 'gsm8k': no prompt can be made of its first rows ("),
    "metric": ({"gsm8k": {"metric": "acc"}}, "metric 'acc,strict-match' (metric,filter) does not come out of task"),
    "token": ({"toy": {"mask_token": "<mask>"}}, "the tokenizer has no token '<mask>' (mask_token);"),
    "context": ({"run": {"length": 65}}, "runs.chats.length = 65, and the model has 64 positions; lower it"),
    "shape": (
        {"toy": {"shape": {"model_type": "bert", "layers": 2, "width": 32, "heads": 2, "intermediate": 64,
                           "vocabulary": 999, "positions": 64, "token_types": 2}}},
        "shape of its entry: vocabulary = 999, not ",
    ),
    "family": ({"toy": {"hub": "causal/toy"}}, "model_type = 'gpt2' is not one of transformers' encoders;"),
    "tokenizer": ({"toy": {"tokenizer": "twin"}}, "its tokenizer is not that of 'twin': they differ in model, voc"),
    "weights": ({"toy": {"hub": "old/toy"}}, "has no weights that are fetched (safetensors, or pytorch_model.bin);"),
}  # fmt: skip
"""What is changed of the entries, and the line that says what is wrong then."""


def pin_of(case: str) -> str:
    """The pin whose entry a case changes, or which a run of the case makes wrong."""
    return {"run": "toy"}.get(next(iter(WRONG[case][0])), next(iter(WRONG[case][0])))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What every command said, by name, and what the hub was asked by the first."""
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    write_hub(root)
    found = SimpleNamespace(workdir=home / "work")
    with LoopbackHub(root) as hub:
        hub.gated.add("closed/lines")

        def command(name, *words, **changes):
            path = home / f"{name}.yaml"
            path.write_text(yaml.safe_dump(overlay(hub, found.workdir, **changes)))
            return ["check", str(path), "--config-directory", str(ROOT / "config"), *words]

        with commands_of(hub_environment(hub.url, home / "home")) as run:
            sound = command("sound")
            found.sound = run(sound)
            found.requests = list(hub.requests)
            found.wrong = {
                name: run(command(name, "--only", pin_of(name), **changes)) for name, (changes, _) in WRONG.items()
            }
            found.one, found.unknown = (run([*sound, "--only", name]) for name in ("gsm8k", "gsm9k"))
            for config in download_configs(load_project(ROOT / "config", home / "sound.yaml")).values():
                file = write_when_changed(found.workdir / f"configs/{config.name}.yaml", config)
                run(["download", str(file), "--workdir", str(found.workdir)])
    with commands_of(hub_environment(NOWHERE, home / "home")) as run:
        found.nowhere, found.offline = run(sound), run([*sound, "--offline"])
        damaged = found.workdir / "downloads/chats/data/train-00001-of-00002.parquet"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        (found.workdir / "downloads/lines.json").unlink()
        found.damaged = run([*sound, "--offline"])
    return found


def test_a_configuration_whose_pins_work_is_a_table_and_status_zero(told):
    status, output, error = told.sound
    head, *lines = output.splitlines()
    assert status == 0, output + error
    assert head.split() == "kind name repository commit size rows licence result".split()
    assert [line.split()[1] for line in lines] == ["toy", "chats", "lines", "gsm8k-data", "gsm8k"]
    assert all(line.endswith("works") for line in lines)
    rows = [line.split("MB")[-1] for line in lines]
    assert "train 8,000, test 6" in rows[1] and "train ?" in rows[2] and "tasks 1, documents 4" in rows[4]


def test_large_files_are_read_in_part_and_weights_not_at_all(told):
    whole = [path.rsplit("/", 1)[1] for method, path, part in told.requests if "/resolve/" in path and not part]
    parts = {path.rsplit("/", 1)[1] for _, path, part in told.requests if part}
    assert parts >= {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "train.jsonl"}
    assert not parts & set(whole) and not any("safetensors" in path for _, path, _ in told.requests)
    ends = [map(int, part.removeprefix("bytes=").split("-")) for _, path, part in told.requests if part]
    assert sum(last - first for first, last in ends) < 4e6, "of 12 MB"


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_with_its_pin_and_status_two(told, name):
    status, output, error = told.wrong[name]
    table, lines = output.split("\n\n")
    assert status == 2 and "; the lines above say why" in error, output + error
    assert lines.startswith(f"{pin_of(name)} (") and WRONG[name][1] in lines.splitlines()[0]
    assert all(line.startswith(f"{pin_of(name)} (") for line in lines.splitlines()) and "/tmp" not in lines
    assert f"wrong: {len(lines.splitlines())}" in table.splitlines()[-1]


def test_one_benchmark_is_checked_with_its_data(told):
    assert told.one[0] == 0 and [line.split()[1] for line in told.one[1].splitlines()[1:]] == ["gsm8k-data", "gsm8k"]
    assert told.unknown[0] == 2 and "--only gsm9k: nothing of this name is pinned here. Did you mean" in told.unknown[2]


def test_without_a_network_it_is_one_line_and_status_two(told):
    status, output, error = told.nowhere
    assert status == 2 and not output and error.count("\n") == 1
    assert "the hub gave no answer (" in error and error.endswith("; check the network and run again\n")


def test_offline_what_was_downloaded_is_checked(told):
    status, output, error = told.offline
    assert status == 0, output + error
    assert "train 8,000, test 6" in output and "tasks 1, documents 4" in output


def test_offline_a_damaged_file_and_a_missing_record_are_named(told):
    status, output, error = told.damaged
    assert status == 2 and "2 of 5 do not work" in error
    chats, lines = output.split("\n\n")[1].splitlines()
    record = told.workdir / "downloads/chats.json"
    assert chats == (
        f"chats (some/chats): damaged: data/train-00001-of-00002.parquet; delete {record}, and the workflow fetches it "
        "again"
    )
    assert lines == f"not downloaded below {told.workdir}: lines; the workflow fetches them"
    results = {line.split()[1]: line for line in output.splitlines() if line.startswith(("dataset ", "benchmark "))}
    assert results["lines"].endswith("not downloaded") and "works" not in results["lines"]


def test_the_old_name_of_the_command_is_refused_with_the_new_one(capsys):
    from dllm.cli.main import main

    assert main(["pins"]) == 2 and "Did you mean 'check'?" in capsys.readouterr().err
