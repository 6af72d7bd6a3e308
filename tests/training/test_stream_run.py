"""A corpus that is streamed: the order of its rows, their share per process, and a killed run that resumes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from tests.hub_commands import hub_environment
from tests.loopback_hub import LoopbackHub
from tests.training.conftest import WORDS, metrics_of
from tests.training.test_trainer import assert_same_run

pytestmark = pytest.mark.slow  # a process that fetches, streams and trains twice, and then with a copy of its own

ROOT = Path(__file__).parent.parent.parent
SHARDS, DOCUMENTS = 5, 60
CARD = """---
dataset_info:
  config_name: plain_text
  features: [{name: text, dtype: string}]
  splits: [{name: train, num_bytes: 1000, num_examples: 300}]
configs:
- config_name: plain_text
  data_files: [{split: train, path: plain_text/train-*}]
  default: true
license: cc0-1.0
---
"""


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """(work directory, what the reader saw, the hub after it all) of one process that streamed and trained."""
    root, workdir = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("work")
    folder = root / "datasets/web/text/plain_text"
    folder.mkdir(parents=True)
    (folder.parent / "README.md").write_text(CARD)
    draw = numpy.random.default_rng(0)
    for shard in range(SHARDS):
        texts = [" ".join(draw.choice(WORDS[:12], size=draw.integers(3, 30))) for _ in range(DOCUMENTS)]
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / f"train-{shard:05d}-of-00005.parquet", row_group_size=16)
    with LoopbackHub(root) as hub:
        hub.faults = {"web/text/plain_text/train-00001-of-00005.parquet": "cut once"}
        environment = hub_environment(hub.url, workdir / "home")
        command = [sys.executable, "-m", "tests.training.stream_run", str(workdir)]
        done = subprocess.run(
            [*command, hub.commit("datasets", "web/text")], capture_output=True, text=True, env=environment, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return workdir, json.loads(done.stdout.splitlines()[-1]), hub


def test_only_the_shard_held_out_is_stored(streamed):
    workdir, told, _ = streamed
    stored = [path.name for path in (workdir / "downloads/web").rglob("*.parquet")]
    assert stored == ["train-00004-of-00005.parquet"]
    assert not list((workdir / "data/web").glob("train.*"))
    assert told["manifest"]["splits"]["train"]["estimated"]
    assert list(told["manifest"]["stream"]["shards"]) == [
        f"plain_text/train-0000{i}-of-00005.parquet" for i in range(4)
    ]


def test_an_epoch_has_every_row_once_and_about_as_many_as_estimated(streamed):
    _, told, _ = streamed
    first = [ids for epoch, ids, _ in told["rows"] if epoch == 0]
    ids = sorted(i for batch in first for i in batch)
    assert len(ids) == len(set(ids)) and ids == list(range(len(ids)))
    assert len(ids) == pytest.approx(told["manifest"]["splits"]["train"]["rows"], rel=0.35)
    assert {epoch for epoch, _, _ in told["rows"]} >= {0, 1, 2}


def test_epochs_differ_in_order_and_share_their_documents(streamed):
    _, told, _ = streamed
    tokens = {e: [row for epoch, _, rows in told["rows"] if epoch == e for row in rows] for e in (0, 1)}
    assert tokens[0] != tokens[1]
    words = [numpy.bincount(numpy.concatenate(tokens[e]), minlength=40) for e in (0, 1)]
    assert abs(words[0] - words[1]).sum() < 0.1 * words[0].sum()  # but for the rows left over, the same words


def test_rows_are_shuffled_within_windows_only(streamed):
    _, told, _ = streamed
    for number, (_, ids, _) in enumerate(told["rows"][:4]):  # windows of 16 rows, batches of 8
        assert {i // 16 for i in ids} == {number // 2}
    assert told["rows"][0][1] != sorted(told["rows"][0][1])


def test_the_stream_is_a_function_of_its_seed_alone(streamed):
    _, told, _ = streamed
    assert told["again"] == told["rows"][:5]
    assert told["other chunks"] == told["rows"]


def test_a_resumed_stream_goes_on_with_the_same_rows(streamed):
    _, told, _ = streamed
    assert set(told["resumed"]) == {"0", "1", "2", "3", "17", "30", "44"}
    for step, rows in told["resumed"].items():
        assert rows == told["rows"][int(step) : 45], step


def test_every_process_takes_its_share_of_the_same_batches(streamed):
    _, told, _ = streamed
    (whole,) = told["shares"]["1"]
    for ranks in ("2", "4"):
        for step, of_ranks in enumerate(zip(*told["shares"][ranks], strict=True)):
            assert sorted(number for numbers, *_ in of_ranks for number in numbers) == list(range(8))
            assert {tuple(facts) for _, *facts in of_ranks} == {tuple(whole[step][1:])}


def test_a_connection_that_breaks_is_taken_up_again(streamed):
    assert streamed[2].faults == {}, "the connection was never cut"


def test_a_killed_run_resumes_to_the_same_bits(streamed):
    workdir, told, _ = streamed
    assert len(told["states"]) == 2 and all(state["documents"] for state in told["states"])
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "whole")
    one, two = (load_file(workdir / f"runs/{run}/model/model.safetensors") for run in ("cut", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_the_same_run_as_one(streamed):
    assert_same_run(streamed[0], "pair", "whole")
