"""A run with `algorithm: bd3lm` from end to end: its checkpoint knows its blocks, samples, chats and scores."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from dllm.config import GenerateSettings, LikelihoodSettings, ModelEntry, OptimizerSettings, Recipe
from dllm.data.collate import ResponseEnd
from dllm.data.tokens import open_rows
from dllm.language_model import load
from dllm.models import heads
from dllm.models.backbone import Backbone
from dllm.models.load import save_stand_in
from dllm.models.tokenizers import load_tokenizer
from dllm.objectives.bd3lm import BD3LM
from dllm.provenance import write_record
from dllm.sampling.rows import block_rule
from dllm.training.micro_batches import TrainingSplit, micro_batches
from dllm.training.trainer import train
from tests.plain_forward import plain_hidden
from tests.samplers import no_cache
from tests.training.conftest import entry_for, make_model, metrics_of, run_config

SETTINGS = GenerateSettings(max_new_tokens=12, early_stop=False)
CHAT = [{"role": "user", "content": "who ?"}]


def bd3lm(name="run", **changes):
    return run_config(name, algorithm="bd3lm", **changes)


@pytest.fixture(params=["bert", "llama"])
def any_workdir(workdir, request):
    """With an encoder and with a decoder."""
    if request.param == "llama":
        make_model(workdir / "downloads" / "toy-model", entry_for("llama"))
    return workdir, {"model": entry_for(request.param)}


@pytest.mark.parametrize("data", ["text", "alpaca"])
def test_it_trains_loads_samples_chats_and_scores(any_workdir, data):
    workdir, model = any_workdir
    recipe = {"time_low": 0.1, "time_high": 0.9}
    settings = {"data": data, "data_path": f"data/{data}", "steps": 40, "recipe": recipe}
    train(bd3lm(optimizer=OptimizerSettings(learning_rate=5e-3), **settings, **model), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] != "train"]
    assert losses[-1] < 0.9 * losses[0]
    sidecar = json.loads((workdir / "runs/run/model/dllm.json").read_text())
    assert (sidecar["algorithm"], sidecar["block_size"], sidecar["block_anchor"]) == ("bd3lm", 4, "response")
    model = load(workdir / "runs/run/model", device="cpu")
    assert model.algorithm.name == "bd3lm" and block_rule(model.backbone, 99).size == 4
    (answer,) = model.answers([CHAT], SETTINGS)
    with no_cache():
        (without,) = model.answers([CHAT], SETTINGS)
    assert without.ids == answer.ids and answer.passes == 12
    assert without.computed > answer.computed
    (likely, unlikely) = model.nelbo([[]] * 2, [[6, 7, 8, 9, 10], [2, 2, 2, 2, 2]], LikelihoodSettings())
    assert likely.nats < unlikely.nats


@pytest.mark.parametrize("data", ["text", "alpaca"])
def test_neither_the_layout_nor_the_split_into_micro_batches_changes_a_run(workdir, data, monkeypatch):
    where = {"data": data, "data_path": f"data/{data}"}
    runs = {
        "whole": bd3lm("whole", **where),
        "split": bd3lm("split", micro_batch_size=3, micro_batch_tokens=50, **where),
        "saving": bd3lm("saving", activation_checkpointing=True, **where),
        "plain": bd3lm("plain", **where),
    }
    for name, config in runs.items():
        if name == "saving":
            monkeypatch.setattr(heads, "logits_at_once", lambda *_: 5)
        if name == "plain":
            monkeypatch.undo()
            monkeypatch.setattr(Backbone, "hidden", plain_hidden)
        train(config, workdir, quiet=True)
    weights = [load_file(workdir / "runs" / name / "model" / "model.safetensors") for name in runs]
    for other in weights[1:]:
        # AdamW turns rounding into steps where a gradient is nearly zero
        assert all(torch.allclose(weights[0][key], other[key], atol=2e-3, rtol=0) for key in other)
    losses = numpy.array([[row["loss"] for row in metrics_of(workdir, name)] for name in runs])
    numpy.testing.assert_allclose(losses - losses[0], 0, atol=2e-3)


def test_it_goes_on_from_masked_diffusion_and_back(workdir):
    train(run_config("first"), workdir, quiet=True)
    train(bd3lm("second", init="first", init_path="runs/first/model"), workdir, quiet=True)
    train(run_config("third", init="second", init_path="runs/second/model"), workdir, quiet=True)
    assert load(workdir / "runs/third/model", device="cpu").algorithm.name == "mdlm"


def test_another_algorithm_has_to_be_asked_for_and_must_make_sense(workdir):
    train(run_config("masked", steps=1), workdir, quiet=True)
    train(run_config("ar", steps=1, algorithm="ar", model=entry_for()), workdir, quiet=True)
    path = workdir / "runs/masked/model"
    assert load(path, device="cpu").algorithm.name == "mdlm"
    asked = load(path, device="cpu", algorithm="bd3lm")
    assert asked.algorithm.name == "bd3lm"
    assert block_rule(asked.backbone, 3).size == 3  # it was not trained in blocks: the sampler's count
    assert asked.answers([CHAT], SETTINGS)[0].passes == 12
    for trained, wanted in (("masked", "ar"), ("masked", "edit_flows"), ("ar", "bd3lm")):
        with pytest.raises(ValueError, match=f"algorithm = '{wanted}' cannot use a model trained with") as fault:
            load(workdir / "runs" / trained / "model", device="cpu", algorithm=wanted)
        assert "\n" not in str(fault.value)
    with pytest.raises(ValueError, match="algorithm = 'bd4lm'; allowed: mdlm, bd3lm"):
        load(path, device="cpu", algorithm="bd4lm")


def test_a_checkpoint_is_scored_by_the_algorithm_it_was_trained_with(workdir):
    train(run_config("masked", steps=1), workdir, quiet=True)
    train(bd3lm("blocks", steps=1), workdir, quiet=True)
    asked = load(workdir / "runs/masked/model", device="cpu", algorithm="bd3lm")
    for ask in (asked.nelbo, asked.greedy_match):
        with pytest.raises(ValueError, match="'bd3lm' cannot score a checkpoint trained with 'mdlm'") as fault:
            ask([[6]], [[7]])
        assert "\n" not in str(fault.value)
    # it has never seen masks beyond its own block
    with pytest.raises(ValueError, match="algorithm = 'mdlm' cannot use a model trained with 'bd3lm'"):
        load(workdir / "runs/blocks/model", device="cpu", algorithm="mdlm")


def test_llada2_is_trained_in_blocks_or_not_at_all(workdir):
    sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 16}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "num_shared_experts": 1, "n_group": 2, "topk_group": 1}
    rest = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    new = sizes | counts | experts | rest | {"routed_scaling_factor": 2.5}
    entry = ModelEntry(
        new=new, published="LLaDA2", tokenizer="toy", family="decoder", mask_token="<|mask|>",
        end_token="<|endoftext|>", end_of_turn="<|role_end|>", chat_template="own",
    )  # fmt: skip
    target = workdir / "downloads/llada2"
    save_stand_in(entry, load_tokenizer(workdir / "downloads/toy-model"), target)
    write_record(target, kind="model", name="llada2", config_digest="", inputs={})
    start = {"init": "llada2", "init_path": "downloads/llada2", "model": entry, "steps": 2}
    for algorithm in ("mdlm", "ar"):
        with pytest.raises(ValueError, match="LLaDA2 attends block-causally; allowed: bd3lm") as fault:
            train(run_config(algorithm=algorithm, **start), workdir, quiet=True)
        assert "\n" not in str(fault.value)
    train(bd3lm("blocks", **start), workdir, quiet=True)
    assert load(workdir / "runs/blocks/model", device="cpu").algorithm.name == "bd3lm"


def test_a_token_budget_counts_both_halves(workdir):
    for data in ("text", "alpaca"):
        config = bd3lm(data=data, data_path=f"data/{data}", micro_batch_tokens=44)
        rows = open_rows(workdir / config.data_path, "train")
        end = None if data == "text" else ResponseEnd("block", 0, 4, longest=24)
        split = TrainingSplit(rows, BD3LM(config.recipe), end, 0, 4)
        for part in micro_batches(split, config, first=0, last=4):
            layout = part.inputs.layout
            assert layout.tokens == split.ended(part.numbers).forwarded.sum() <= 44
    with pytest.raises(ValueError, match="forwards up to 44 tokens; allowed: 44 and up"):
        train(bd3lm(micro_batch_tokens=43), workdir, quiet=True)


def test_an_empty_range_of_times_gets_one_line():
    with pytest.raises(ValueError, match=r"time_low = 0.5 must be less than time_high = 0.5"):
        Recipe(time_low=0.5, time_high=0.5)
