"""Runs that fine-tune a DiffusionGemma, whole or with an adapter: what they write is one again."""

import json

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

import dllm
from dllm.algorithms import algorithm_named
from dllm.config import AdapterSettings, GenerateSettings, LikelihoodSettings, ModelEntry, OptimizerSettings
from dllm.models.load import load_backbone, save_stand_in
from dllm.models.tokenizers import load_tokenizer
from dllm.provenance import write_record
from dllm.training import trainer
from dllm.training.trainer import train
from tests.sampling.test_renoise import TEXT, VISION
from tests.training.conftest import metrics_of, run_config, train_until

NEW = {
    "model_type": "diffusion_gemma", "canvas_length": 4, "vision_config": VISION,
    "text_config": TEXT | {"initializer_range": 0.08},
}  # fmt: skip
ENTRY = ModelEntry(
    new=NEW, published="DiffusionGemma", tokenizer="toy", family="decoder", mask_token="<mask>", end_token="<eos>",
    end_of_turn="<turn|>", chat_template="own",
)  # fmt: skip
RATE = OptimizerSettings(learning_rate=1e-2)
PROMPT = [6, 7, 8]


@pytest.fixture
def start(workdir):
    """Settings of a run from a tiny random DiffusionGemma."""
    target = workdir / "downloads/gemma"
    save_stand_in(ENTRY, load_tokenizer(workdir / "downloads/toy-model"), target)
    write_record(target, kind="model", name="gemma", config_digest="", inputs={})
    return {
        "algorithm": "renoise", "init": "gemma", "init_path": "downloads/gemma", "model": ENTRY, "optimizer": RATE,
        "eval_rows": 12,
    }  # fmt: skip


def canvas_logits(model):
    """Logits of a canvas behind a prompt, by transformers' own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([[9, 10, 11, 12]])).logits


@pytest.mark.parametrize("adapter", [None, AdapterSettings(rank=16, alpha=64)], ids=["whole", "lora"])
def test_a_run_learns_and_transformers_reads_what_was_trained(workdir, start, adapter, monkeypatch):
    seen = {}
    finish = trainer.write_artifact

    def looked_at(trained, *arguments):
        seen["logits"] = canvas_logits(trained.backbone.model.eval())
        seen["trained"] = {name for name, p in trained.backbone.model.named_parameters() if p.requires_grad}
        finish(trained, *arguments)

    monkeypatch.setattr(trainer, "write_artifact", looked_at)
    target = train(run_config(steps=30 if adapter is None else 100, adapter=adapter, **start), workdir, quiet=True)
    losses = [row["loss"] for row in metrics_of(workdir, "run") if row["split"] == "eval"]
    assert losses[-1] < (0.9 if adapter is None else 0.99) * losses[0]  # its embeddings stay those of nobody
    assert not any("vision" in name for name in seen["trained"])
    assert adapter is None or all(".lora_" in name for name in seen["trained"])
    theirs, report = DiffusionGemmaForBlockDiffusion.from_pretrained(target / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # bit for bit without an adapter; merged, its products are summed in another order
    torch.testing.assert_close(canvas_logits(theirs.eval()), seen["logits"], rtol=1e-4, atol=1e-5 if adapter else 0)
    before = load_backbone(workdir / "downloads/gemma").model.state_dict()
    moved = {name for name, value in theirs.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any("vision" in name for name in moved)
    assert adapter is None or not any("embed" in name or "experts" in name for name in moved)


def test_its_checkpoint_is_sampled_and_scored_and_knows_its_canvases(workdir, start):
    train(run_config(steps=1, **start), workdir, quiet=True)
    model = dllm.load(workdir / "runs/run/model", device="cpu")
    assert model.algorithm is algorithm_named("renoise")
    assert model.backbone.sidecar["block_size"] == 4 and model.backbone.tokenizer.eos_token == "<eos>"
    (answer,) = model.answers([PROMPT], GenerateSettings(max_new_tokens=6, steps=6))
    assert 1 <= answer.passes <= 8
    (score,) = model.nelbo([PROMPT], [[9, 10, 11, 12, 13]], LikelihoodSettings(budget=16))
    assert score.standard_error > 0


def test_the_loss_of_the_test_rows_is_their_score(workdir, start):
    """The mean of many draws of a run's evaluation is the scorer's bound, a few standard errors apart."""
    config = run_config(steps=1, eval_draws=12, **start | {"eval_rows": None})
    train(config, workdir, quiet=True)
    final = metrics_of(workdir, "run")[-1]
    assert final["split"] == "final"
    model = dllm.load(workdir / "runs/run/model", device="cpu")
    rows = trainer.open_rows(workdir / config.data_path, "test")
    end, nats, error, count = model.backbone.eos_id, 0.0, 0.0, 0
    for number in range(len(rows)):
        low, prompt = int(rows.offsets[number]), int(rows.prompts[number])
        tokens = rows.tokens[low : low + int(rows.lengths[number])].tolist()
        target = tokens[prompt:] + [end] * (4 - (len(tokens) - prompt) % 4)  # to the end of a canvas
        target = target[: max(len(tokens) - prompt, 24 - prompt)]
        (score,) = model.nelbo([tokens[:prompt]], [target], LikelihoodSettings(budget=8, seed=number))
        nats, error, count = nats + score.nats, error + score.standard_error**2, count + len(target)
    assert count == final["targets"]
    assert abs(nats / count - final["loss"]) < 5 * error**0.5 / count


def test_a_killed_run_resumes_to_the_same_bits_and_micro_batches_do_not_matter(workdir, start):
    start["eval_rows"] = 5
    train(run_config("whole", **start), workdir, quiet=True)
    train_until(run_config("cut", **start), workdir, step=3)
    train(run_config("cut", **start), workdir, quiet=True)
    whole, cut = ((workdir / f"runs/{run}/model/model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert whole == cut and metrics_of(workdir, "whole") == metrics_of(workdir, "cut")
    train(run_config("small", micro_batch_size=3, **start), workdir, quiet=True)
    for one, other in zip(metrics_of(workdir, "whole"), metrics_of(workdir, "small"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)  # fp32 sums in another order, over six steps


def test_what_it_cannot_be_trained_with_is_one_line(workdir, start):
    for change, words in (
        ({"algorithm": "mdlm"}, "DiffusionGemma attends block-causally; allowed: renoise"),
        ({"algorithm": "ar"}, "trained with algorithm: renoise only, and not causally"),
        ({"recipe": {"block_size": 8}}, "canvases have 4 tokens; set block_size: 4"),
    ):
        with pytest.raises(ValueError, match=words) as fault:
            train(run_config(**start | change), workdir, quiet=True)
        assert "\n" not in str(fault.value)
    with pytest.raises(ValueError, match="algorithm = 'renoise' needs a DiffusionGemma") as fault:
        train(run_config(algorithm="renoise"), workdir, quiet=True)
    assert "\n" not in str(fault.value)


def test_the_adapter_is_written_once_for_both_readers(workdir, start):
    target = train(run_config(steps=1, adapter=AdapterSettings(rank=2), **start), workdir, quiet=True)
    named = json.loads((target / "adapter/adapter_config.json").read_text())["target_modules"]
    assert named and all(name.startswith("model.decoder.layers.") for name in named)
