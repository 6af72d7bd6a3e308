"""LoRA and QLoRA runs: adapters train, the start does not, and what is left loads like any checkpoint."""

import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parametrize
from transformers import AutoModelForMaskedLM

import dllm
from dllm.config import AdapterSettings, ConfigError, GenerateSettings, OptimizerSettings, load_project
from dllm.models.adapters import NEW_TOKENS, attach_adapter, merge_adapter, target_names
from dllm.models.load import load_backbone
from dllm.models.self_tests import is_bidirectional
from dllm.training import trainer
from dllm.training.trainer import train
from tests.plain_forward import hidden_states, logits_at
from tests.training.conftest import entry_for, make_model, metrics_of, run_config, train_until

KINDS = [
    "lora",
    pytest.param(
        "qlora",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes: pip install 'dllm[adapters]'"
        ),
    ),
]
RATE = OptimizerSettings(learning_rate=1e-2)


def start(workdir, kind, *, mask=True, **sizes) -> dict:
    """Settings of a run from a new model; without `mask` its tokenizer has none, and the loader makes one."""
    entry = entry_for(kind)
    entry = entry.model_copy(update={"new": entry.new | sizes})
    directory = workdir / "downloads/other"
    make_model(directory, entry)
    if not mask:
        entry = entry.model_copy(update={"mask_token": "<|mask|>"})
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = directory / name
            if path.exists():
                path.write_text(path.read_text().replace('"mask_token": "[MASK]"', '"mask_token": null'))
    return {"model": entry, "init": "other", "init_path": "downloads/other"}


def logits(model, vocab=20):
    tokens = torch.arange(24).view(2, 12) % vocab
    with torch.no_grad():
        return logits_at(model, hidden_states(model, tokens), torch.ones_like(tokens, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["modernbert", "llama"])
def test_adapters_lower_the_loss_and_the_merged_model_is_the_one_that_was_trained(workdir, kind, family, monkeypatch):
    seen = {}
    finish = trainer.write_artifact

    def looked_at(trained, *arguments):
        seen["model"] = trained.backbone.model
        finish(trained, *arguments)

    monkeypatch.setattr(trainer, "write_artifact", looked_at)
    settings = start(workdir, family, hidden_size=64)
    adapter = AdapterSettings(kind=kind, rank=8, alpha=16)
    target = train(run_config(steps=40, adapter=adapter, optimizer=RATE, **settings), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "eval"]
    assert losses[-1] < 0.9 * losses[0]
    trained = {name for name, p in seen["model"].named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    merged = load_backbone(target / "model").model
    assert is_bidirectional(merged)
    assert (target / "adapter/adapter_config.json").exists()
    # fp32 sums of 64 terms in another order
    torch.testing.assert_close(logits(merged), logits(seen["model"].eval()), rtol=1e-5, atol=1e-5)
    before = load_file(workdir / "downloads/other/model.safetensors")
    after = load_file(target / "model/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    names = target_names(load_backbone(workdir / "downloads/other", entry=settings["model"]).model, None)
    assert moved == {f"{name}.weight" for name in names}, "only what has an adapter moves, once they are merged"


def test_the_adapter_is_one_that_peft_loads(workdir):
    from peft import PeftModel  # two seconds, with what it imports: not for every worker that collects this

    target = train(run_config(steps=10, adapter=AdapterSettings(rank=4), optimizer=RATE), workdir, quiet=True)
    targets = json.loads((target / "adapter/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 3, "no order of a set is in the file"
    base = AutoModelForMaskedLM.from_pretrained(workdir / "downloads/toy-model").eval()
    tokens = torch.arange(24).view(2, 12) % 20
    with torch.no_grad():
        before = base(tokens).logits
        loaded = PeftModel.from_pretrained(base, target / "adapter")(tokens).logits
        merged = load_backbone(target / "model").model(tokens).logits
    torch.testing.assert_close(loaded, merged, rtol=1e-5, atol=1e-5)  # fp32 rounding
    assert not torch.allclose(before, merged, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_with_an_adapter_resumes_to_the_same_bits(workdir, kind):
    settings = {"adapter": AdapterSettings(kind=kind, rank=4, dropout=0.1), "optimizer": RATE}
    settings |= start(workdir, "llama", mask=False, hidden_size=64, tie_word_embeddings=True)
    train(run_config("whole", **settings), workdir, quiet=True)
    train_until(run_config("cut", **settings), workdir, step=3)
    (checkpoint,) = (workdir / ".work").glob("cut-*/step-2")
    saved = load_file(checkpoint / "model.safetensors")
    rows = {name for name in saved if name.endswith(".rows")}
    assert len(rows) == 1, "the embedding of the new mask token, once"
    assert len(saved) > 1 and all(".lora_" in name for name in saved.keys() - rows), (
        "frozen weights are not saved again"
    )
    train(run_config("cut", **settings), workdir, quiet=True)
    assert metrics_of(workdir, "cut") == metrics_of(workdir, "whole")
    one, other = (load_file(workdir / "runs" / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_of_a_mask_token_that_the_model_was_given_trains(workdir, tied):
    settings = start(workdir, "llama", mask=False, tie_word_embeddings=tied)
    loaded = load_backbone(workdir / "downloads/other", entry=settings["model"])
    first, end = loaded.new_tokens
    assert end - first == 1 and loaded.mask_id == first
    config = run_config(steps=10, adapter=AdapterSettings(rank=4), optimizer=RATE, **settings)
    target = train(config, workdir, quiet=True)
    before, after = loaded.model.get_input_embeddings().weight, load_backbone(target / "model")
    changed = (before != after.model.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == [first]
    assert after.mask_id == first
    assert load_file(target / "adapter" / NEW_TOKENS)["rows"].shape == (1, before.shape[1])


def test_a_merged_adapter_with_new_tokens_computes_what_the_adapter_computed(workdir):
    settings = start(workdir, "llama", mask=False, tie_word_embeddings=True)
    backbone = load_backbone(workdir / "downloads/other", entry=settings["model"])
    attach_adapter(backbone, AdapterSettings(rank=4))
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = logits(backbone.model)
    merged = merge_adapter(backbone.model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert not any(parametrize.is_parametrized(module) for module in merged.modules())
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_what_an_adapter_run_leaves_is_sampled_like_any_model(workdir):
    config = run_config(steps=10, adapter=AdapterSettings(rank=4, targets=["query", "value"]), optimizer=RATE)
    target = train(config, workdir, quiet=True)
    lm = dllm.load(target / "model")
    (answer,) = lm.answers(["who the cat ?"], GenerateSettings(max_new_tokens=8, steps=4, early_stop=False))
    assert answer.passes == 4
    second = run_config("second", steps=2, init="run", init_path="runs/run/model", optimizer=RATE)
    train(second, workdir, quiet=True)  # and a run can start from it


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank = 0"),
        ({"adapter": {"kind": "qlora"}, "launch": "zero3"}, "'qlora' is not for launch = 'zero3'; allowed: cpu, ddp"),
        ({"adapter": {"kind": "lora"}, "optimizer": {"name": "muon"}}, "'muon' is not for adapters"),
        ({"optimizer": {"name": "muon"}, "launch": "zero2"}, "'muon' needs whole matrices, which launch = 'zero2'"),
    ],
)
def test_what_does_not_go_together_is_refused_when_the_configuration_is_read(settings, line):
    overlay = {"runs": {"chat-large": {"optimizer": {"name": "adamw"}} | settings}}
    with pytest.raises(ConfigError, match=line) as caught:
        load_project("config", "config/laptop.yaml", overlay)
    assert "\n" not in str(caught.value)


def test_a_target_that_the_model_has_not_is_named_with_those_it_has(workdir):
    with pytest.raises(
        ValueError, match=r"'querry' is not one of its linear layers; allowed: dense, key, query, value"
    ):
        train(run_config(adapter=AdapterSettings(targets=["querry"])), workdir, quiet=True)


def test_qlora_without_bitsandbytes_says_what_to_install(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'dllm\[adapters\]', or take kind: lora"):
        train(run_config(adapter=AdapterSettings(kind="qlora")), workdir, quiet=True)


@pytest.mark.parametrize("kind", [KINDS[1]])
def test_a_quantized_layer_has_the_gradients_of_the_numbers_it_stands_for(workdir, kind):
    """After an evaluation too, in which a library may have changed how the weights are laid out."""
    from bitsandbytes.functional import dequantize_4bit

    settings = start(workdir, "llama", hidden_size=64)
    attached = [
        attach_adapter(
            load_backbone(workdir / "downloads/other", entry=settings["model"]), AdapterSettings(kind=k)
        ).model
        for k in (kind, "lora")
    ]
    quantized, plain = attached
    for name in plain.peft_config["default"].target_modules:
        weight = quantized.get_submodule(name).base_layer.weight
        plain.get_submodule(name).base_layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    found = []
    for model in attached:
        logits(model.eval())
        hidden_states(model.train(), torch.arange(24).view(2, 12) % 20).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def test_an_adapter_in_bf16_weights_is_fp32(workdir):
    backbone = load_backbone(workdir / "downloads/toy-model", dtype=torch.bfloat16, entry=entry_for())
    attach_adapter(backbone, AdapterSettings(rank=4))
    kinds = {(p.requires_grad, p.dtype) for p in backbone.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
