"""A run of Edit Flows: its heads are trained, saved, resumed and loaded with the model."""

import json

import pytest
import torch
from safetensors.torch import load_file

import dllm
from dllm.algorithms import algorithm_named
from dllm.config import (
    ConfigError,
    EditSettings,
    GenerateSettings,
    OptimizerSettings,
    RunConfig,
    load_project,
    write_when_changed,
)
from dllm.language_model import DiffusionLM
from dllm.models.edit_heads import HEADS_FILE, save_edit_heads
from dllm.models.load import SIDECAR, load_backbone
from dllm.objectives.edit_flows import trained_module
from dllm.training.optimizer import build_optimizers
from dllm.training.trainer import train
from tests.training.conftest import entry_for, make_model, metrics_of, run_config, train_until
from tests.training.launches import launched

STARTS = EditSettings(starts=["empty", "masked", "noisy"], masks=6, schedule="linear", adapter_rank=8)


def edit_config(name: str = "run", **changes) -> RunConfig:
    recipe = {"response_end": "one"} | changes.pop("recipe", {})
    settings = {"algorithm": "edit_flows", "edits": STARTS, "recipe": recipe}
    return run_config(name, **settings | changes)


def weights(workdir, run: str) -> dict[str, torch.Tensor]:
    """All of a checkpoint: the stock model's weights and the heads'."""
    directory = workdir / "runs" / run / "model"
    heads = {f"heads.{name}": value for name, value in load_file(directory / HEADS_FILE).items()}
    return load_file(directory / "model.safetensors") | heads


def assert_equal(one, other, tolerance: float = 0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("data", ["alpaca", "text"])
def test_a_run_learns_and_leaves_a_stock_model_its_heads_and_how_it_was_trained(workdir, kind, data):
    entry = entry_for(kind)
    make_model(workdir / "downloads/other", entry)
    optimizer = OptimizerSettings(name="muon", learning_rate=3e-3)
    paths = {"init": "other", "init_path": "downloads/other", "data": data, "data_path": f"data/{data}"}
    train(edit_config(steps=30, model=entry, optimizer=optimizer, **paths), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "eval"]
    assert losses[-1] < 0.9 * losses[0]

    directory = workdir / "runs/run/model"
    assert not [name for name in load_file(directory / "model.safetensors") if "heads" in name]
    sidecar = json.loads((directory / SIDECAR).read_text())
    assert sidecar["algorithm"] == "edit_flows" and EditSettings(**sidecar["edits"]) == STARTS
    heads = load_file(directory / HEADS_FILE)
    assert all(value.dtype == torch.float32 for value in heads.values())
    assert heads["rates.weight"].abs().max() > 0, "they start at zero"
    facts = json.loads((workdir / "runs/run/provenance.json").read_text())
    backbone = load_backbone(directory)
    trained = (*backbone.model.parameters(), *backbone.edit_heads.parameters())
    assert facts["parameters"] == sum(p.numel() for p in trained)


def test_a_trained_run_samples_edits_and_chats(workdir):
    train(edit_config(), workdir, quiet=True)
    model = dllm.load(workdir / "runs/run/model", device="cpu")
    assert model.algorithm.name == "edit_flows" and model.sampler.trained_with(model.backbone) == STARTS
    settings = GenerateSettings(max_new_tokens=6, steps=4, temperature=1.0)
    turns = [{"role": "user", "content": "who sees the cat ?"}]
    assert len(model.generate([turns, "the cat"], settings)) == 2
    *_, last = model.stream([turns], settings)
    assert last.done.all()
    first, *_, last = model.edits("the the dog", turns, settings)
    assert model.decode(first.responses()[0]).split()[:3] == ["the", "the", "dog"]
    assert first.responses()[0][-1] == model.backbone.eos_id  # as training ends an answer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_bits(workdir, optimizer):
    settings = OptimizerSettings(name=optimizer, learning_rate=3e-3)
    train(edit_config("whole", optimizer=settings), workdir, quiet=True)
    train_until(edit_config("cut", optimizer=settings), workdir, step=3)
    train(edit_config("cut", optimizer=settings), workdir, quiet=True)
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "whole")
    assert_equal(weights(workdir, "cut"), weights(workdir, "whole"))


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"micro_batch_tokens": 40}], ids=str)
def test_how_a_step_is_computed_does_not_change_the_run(workdir, changes):
    train(edit_config("one"), workdir, quiet=True)
    train(edit_config("two", **changes), workdir, quiet=True)
    assert_equal(weights(workdir, "one"), weights(workdir, "two"), 1e-4)  # sums in another order, six Adam steps


def test_a_master_copy_in_bf16_leaves_the_heads_in_fp32(workdir):
    train(edit_config(recipe={"parameters": "bf16"}), workdir, quiet=True)
    found = weights(workdir, "run")
    assert {v.dtype for k, v in found.items() if k.startswith("heads.")} == {torch.float32}
    assert {v.dtype for k, v in found.items() if not k.startswith("heads.")} == {torch.bfloat16}


def test_a_run_goes_on_with_the_heads_of_the_run_it_starts_from(workdir):
    train(edit_config("first"), workdir, quiet=True)
    after = {"init": "first", "init_path": "runs/first/model"}
    train(edit_config("second", **after), workdir, quiet=True)
    end = [row["loss"] for row in metrics_of(workdir, "first") if row["split"] == "eval"][-1]
    assert metrics_of(workdir, "second")[0]["loss"] == pytest.approx(end, rel=1e-5)
    other = STARTS.model_copy(update={"adapter_rank": 16})
    with pytest.raises(ValueError, match="adapter_rank = 16, but the edit heads of the checkpoint .* have 8") as fault:
        train(edit_config("third", edits=other, **after), workdir, quiet=True)
    assert "\n" not in str(fault.value)


def test_muon_leaves_the_heads_to_adamw(workdir):
    backbone = load_backbone(workdir / "downloads/toy-model")
    scores = trained_module(edit_config("run"), backbone)
    adamw, muon = build_optimizers(scores, OptimizerSettings(name="muon", learning_rate=1e-3))
    held = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert all(id(p) in held for p in scores.heads.parameters())
    assert sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(list(scores.parameters()))


@pytest.mark.slow
def test_two_processes_train_the_same_run_as_one(workdir):
    train(edit_config("one"), workdir, quiet=True)
    config = write_when_changed(workdir / "configs/runs/two.yaml", edit_config("two", micro_batch_size=3))
    done = launched(workdir, "ddp", "-m", "dllm", "train", config, "--workdir", workdir, "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(weights(workdir, "one"), weights(workdir, "two"), 1e-4)  # as above


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"recipe": {"response_end": "block"}}, "response_end = 'block'; algorithm = 'edit_flows' allows `one` only"),
    ],
    ids=["response_end"],
)
def test_what_edit_flows_does_not_take_is_one_clear_line(changes, line):
    with pytest.raises(ValueError, match=line):
        edit_config(**changes)


def test_a_recipe_for_edit_flows_that_ends_rows_otherwise_names_file_and_key():
    run = {"algorithm": "edit_flows", "init": "modernbert-large", "data": "alpaca", "recipe": "corrected", "steps": 5}
    with pytest.raises(
        ConfigError, match=r"runs.edits.recipe = 'corrected' has response_end = 'block'; algorithm"
    ) as e:
        load_project("config", "config/laptop.yaml", {"runs": {"edits": run}})
    assert "\n" not in str(e.value)


def test_the_front_token_is_counted_in_the_length(workdir):
    with pytest.raises(ValueError, match=r"length = 64 is longer than the model allows \(63\)"):
        train(edit_config(length=64), workdir, quiet=True)
    train(edit_config(), workdir, quiet=True)
    model = dllm.load(workdir / "runs/run/model", device="cpu")
    assert model.max_length == 63
    settings = GenerateSettings(max_new_tokens=60, steps=1, temperature=1.0)
    assert model.generate([[5, 6, 7]], settings)
    with pytest.raises(ValueError, match="context of 63 tokens leaves 3"):
        model.generate([[5, 6, 7, 8]], settings)
    with pytest.raises(ValueError, match="prompt and draft have 65 tokens; the model's context is 63"):
        model.edits("the " * 65)


@pytest.mark.parametrize("damage", ["missing", "damaged", "foreign"])
def test_heads_that_are_missing_damaged_or_foreign_are_one_clear_line(workdir, damage):
    train(edit_config(), workdir, quiet=True)
    directory = workdir / "runs/run/model"
    path = directory / HEADS_FILE
    if damage == "missing":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:500])
    else:
        heads = load_backbone(directory).edit_heads
        save_edit_heads(type(heads)(48, 8), directory)
    line = {"missing": "edit_heads.safetensors: missing", "damaged": "damaged", "foreign": "not from the same"}[damage]
    with pytest.raises(ValueError, match=line) as fault:
        dllm.load(directory, device="cpu")
    assert "\n" not in str(fault.value)


def test_a_likelihood_and_a_draft_for_another_algorithm_are_one_clear_line(workdir):
    train(edit_config(), workdir, quiet=True)
    model = dllm.load(workdir / "runs/run/model", device="cpu")
    for ask in (model.nelbo, model.greedy_match):
        with pytest.raises(ValueError, match="algorithm = 'edit_flows' has no estimator of the likelihood"):
            ask(["the cat"], ["sees"])
    masked = DiffusionLM(load_backbone(workdir / "downloads/toy-model"), algorithm_named("mdlm"))
    with pytest.raises(ValueError, match="a model trained with edit_flows only; this one was trained with mdlm"):
        masked.edits("the cat")
