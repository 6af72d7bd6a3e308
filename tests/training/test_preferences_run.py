"""Runs that learn from preferences: they learn, go on after a kill, and do not depend on how their work is cut."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from dllm.config import (
    AdapterSettings,
    DataPart,
    DatasetEntry,
    OptimizerSettings,
    PreferenceSettings,
    PrepareConfig,
    load_project,
    write_when_changed,
)
from dllm.data.prepare import prepare
from dllm.training import trainer
from dllm.training.trainer import train
from tests.training.conftest import WORDS, entry_for, metrics_of, run_config, train_once, train_until, workdir  # noqa: F401
from tests.training.launches import launched
from tests.training.test_backends import in_two_processes as in_shards
from tests.training.test_policy_run import SIDECAR
from tests.training.test_trainer import same_weights, weights
from tests.workflow.conftest import ROOT


@pytest.fixture(autouse=True)
def pairs(workdir):  # noqa: F811
    """Answers of several lengths: those with `red` are chosen, those with `blue` rejected."""
    rows = [
        {
            "prompt": f"who {WORDS[i % 8]} {WORDS[i % 7]} ?",
            "chosen": "red " * (1 + i % 4),
            "rejected": "blue " * (1 + j),
        }
        for i, j in ((i, i % 3) for i in range(60))
    ]
    raw = workdir / "downloads/toy/pairs"
    raw.mkdir()
    (raw / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = DatasetEntry(world="pairs", kind="preference", test_share=0.3)
    part = DataPart(name="pairs", path="downloads/toy", entry=entry)
    settings = {"model_path": "downloads/toy-model", "model": entry_for(), "length": 24, "split": "disjoint"}
    prepare(PrepareConfig(name="pairs", parts=[part], **settings), workdir)


def pairs_run(name: str = "run", **changes):
    settings = {"steps": 4, "optimizer": OptimizerSettings(learning_rate=1e-3), "data": "pairs"} | changes
    return run_config(name, algorithm="dpo", data_path=f"data/{settings['data']}", **settings)


def assert_same(directory, first: str, second: str) -> None:
    """Weights that differ by rounding only: fp32, a few steps of Adam at 1e-3."""
    ours, theirs = weights(directory, first), weights(directory, second)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in ours)


def test_chosen_answers_of_held_out_pairs_become_likelier(workdir):  # noqa: F811
    rate = OptimizerSettings(learning_rate=3e-3, warmup_share=0.0)
    train(pairs_run(steps=12, optimizer=rate, evaluations=1), workdir, quiet=True)
    rows = metrics_of(workdir, "run")
    first, last = rows[0], rows[-1]
    assert first["reward_margin"] == 0 and first["accuracy"] == 0.5 and first["preferred"] < 1
    # the model itself prefers more of them, though answers are of different lengths
    assert last["accuracy"] == 1 and last["preferred"] > first["preferred"] + 0.1
    assert last["reward_margin"] > 4 * last["reward_margin_standard_error"] > 0
    steps = [row for row in rows if row["split"] == "train"]
    # the first step's weights are those of the start
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[-1]["loss"] < 0.5
    assert steps[0]["reward_margin"] == 0 < steps[-1]["reward_margin"]


def test_a_run_that_is_killed_goes_on_to_the_same_bits(workdir):  # noqa: F811
    train(pairs_run("whole", steps=5, evaluations=5, eval_rows=5), workdir, quiet=True)
    cut = pairs_run("cut", steps=5, evaluations=5, eval_rows=5)
    train_until(cut, workdir, step=3)
    train(cut, workdir, quiet=True)
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "whole")
    assert same_weights(weights(workdir, "cut"), weights(workdir, "whole"))


@pytest.mark.parametrize("response_end", ["block", "fill", "one"])
def test_the_cut_into_micro_batches_does_not_change_a_run(workdir, response_end):  # noqa: F811
    recipe = {"response_end": response_end}
    for name, cut in (("whole", {"micro_batch_size": 500}), ("cut", {"micro_batch_size": 1})):
        train(pairs_run(name, steps=2, evaluations=1, recipe=recipe, **cut), workdir, quiet=True)
    train(
        pairs_run("budget", steps=2, evaluations=1, recipe=recipe, micro_batch_size=500, micro_batch_tokens=400),
        workdir,
        quiet=True,
    )
    assert_same(workdir, "whole", "cut")
    assert_same(workdir, "whole", "budget")


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(workdir):  # noqa: F811
    # 18 test pairs and 7 of them are no multiple of the processes
    train_once(pairs_run("one", eval_rows=7), workdir)
    config = write_when_changed(workdir / "configs/runs/two.yaml", pairs_run("two", eval_rows=7))
    done = launched(workdir, "ddp", "-m", "dllm", "train", config, "--workdir", workdir, "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(workdir, "one", "two")
    ours, theirs = ([r for r in metrics_of(workdir, name) if r["split"] != "train"] for name in ("one", "two"))
    for one, two in zip(ours, theirs, strict=True):
        assert one["preferred"] == two["preferred"] and one["reward_margin"] == pytest.approx(
            two["reward_margin"], abs=1e-3
        )


@pytest.mark.slow
def test_processes_that_hold_shards_train_the_same_model_as_one(workdir):  # noqa: F811
    train_once(pairs_run("one", eval_rows=7), workdir)
    in_shards(workdir, "fsdp", [pairs_run("two", eval_rows=7)])
    assert_same(workdir, "one", "two")


def test_an_adapter_learns_from_pairs_too(workdir):  # noqa: F811
    adapter = AdapterSettings(rank=2, dropout=0.1)
    train(pairs_run(steps=2, evaluations=1, adapter=adapter), workdir, quiet=True)
    steps = [row for row in metrics_of(workdir, "run") if row["split"] == "train"]
    # nothing is dropped out: the first step compares the start with itself
    assert steps[0]["reward_margin"] == 0 != steps[1]["reward_margin"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": "alpaca"}, "data/alpaca: holds no rejected answers; take a dataset of kind: preference"),
        ({"micro_batch_tokens": 300}, "micro_batch_tokens = 300 is smaller than a pair"),
    ],
)
def test_what_cannot_be_learnt_from_is_one_line_before_the_first_step(workdir, changes, line, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trainer._Run, "_step", None)
    with pytest.raises(ValueError, match=line):
        train(pairs_run(**changes), workdir, quiet=True)


def test_a_model_that_answers_in_another_way_is_no_start(workdir):  # noqa: F811
    (workdir / "downloads/toy-model/dllm.json").write_text(json.dumps(SIDECAR))
    with pytest.raises(ValueError, match="cannot start from a model trained with 'bd3lm'.*allowed: mdlm, mlm, grpo, d"):
        train(pairs_run(), workdir, quiet=True)


@pytest.mark.parametrize(("settings", "line"), [({"beta": 0.0}, "greater than 0"), ({"passes": 4}, "or equal to 5")])
def test_settings_that_cannot_work_are_refused_in_one_line(settings, line):
    with pytest.raises(ValidationError, match=line):
        PreferenceSettings(**settings)


def test_a_dataset_without_rejected_answers_is_refused_with_the_configuration():
    wrong = {"runs": {"sums-preferred": {"data": "sums"}}}
    with pytest.raises(ValueError, match="sums-preferred.data = 'sums' has no rejected answers.*kind: preference"):
        load_project(ROOT / "config", ROOT / "config/laptop.yaml", ROOT / "config/systems.yaml", wrong)


@pytest.mark.parametrize(("run", "init"), [("sums-preferred", "encoder-edits"), ("sums-sampled-1", "a2d-qwen3-bd3lm")])
def test_a_start_that_answers_in_another_way_is_refused_with_the_configuration(run, init):
    with pytest.raises(ValueError, match=f"{run}.init = '{init}' is trained with .* does not know how to score"):
        load_project(
            ROOT / "config", ROOT / "config/laptop.yaml", ROOT / "config/systems.yaml", {"runs": {run: {"init": init}}}
        )
