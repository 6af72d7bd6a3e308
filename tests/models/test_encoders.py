"""Further masked-LM encoders, from one entry each: train, sample and score through the common interfaces."""

import json

import pytest
import torch

from dllm.config import DataPart, DatasetEntry, GenerateSettings, LikelihoodSettings, ModelEntry, PrepareConfig
from dllm.data.prepare import prepare
from dllm.language_model import load
from dllm.models.load import load_backbone
from dllm.provenance import write_record
from dllm.training.trainer import train
from tests.plain_forward import hidden_states, logits_at
from tests.training.conftest import make_model, run_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.08,
         "max_position_embeddings": 64}  # fmt: skip
NEW = {
    "distilbert": SIZES | {"hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0},
    "deberta-v2": SIZES
    | {
        "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
    },
    "eurobert": SIZES | {"intermediate_size": 64, "num_key_value_heads": 1, "mask_token_id": 4},
}  # fmt: skip


def entry_of(kind: str) -> ModelEntry:
    return ModelEntry(new={"model_type": kind} | NEW[kind], tokenizer="toy")


@pytest.fixture
def workdir(tmp_path):
    """Makes a work directory with a model of a kind and a little text: kind -> directory."""

    def make(kind):
        torch.set_num_threads(1)
        make_model(tmp_path / "downloads" / "start", entry_of(kind))
        raw = tmp_path / "downloads" / "toy" / "text"
        raw.mkdir(parents=True)
        texts = ["the cat sees a dog", "who likes one red sun"] * 40
        (raw / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        write_record(raw.parent, kind="dataset", name="toy", config_digest="", inputs={})
        dataset = DatasetEntry(world="text", kind="text", test_share=0.2)
        prepare(
            PrepareConfig(
                name="text",
                parts=[DataPart(name="text", path="downloads/toy", entry=dataset)],
                model_path="downloads/start",
                model=entry_of(kind),
                length=24,
                split="disjoint",
            ),
            tmp_path,
        )
        return tmp_path

    return make


@pytest.mark.parametrize("kind", NEW)
@torch.no_grad()
def test_the_head_makes_the_logits_of_the_class(tmp_path, kind):
    make_model(tmp_path, entry_of(kind))
    model = load_backbone(tmp_path, entry=entry_of(kind)).model
    tokens = torch.arange(5, 21).view(2, 8)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 5:] = False
    expected = model(input_ids=tokens, attention_mask=mask.long()).logits[mask]
    torch.testing.assert_close(logits_at(model, hidden_states(model, tokens, mask), mask), expected)


@pytest.mark.parametrize("kind", NEW)
def test_an_encoder_trains_samples_and_scores_from_one_entry(workdir, kind):
    directory = workdir(kind)
    config = run_config(
        init="start", init_path="downloads/start", model=entry_of(kind), data="text", data_path="data/text", steps=60
    )
    target = train(config, directory, quiet=True)
    metrics = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[-1] < losses[0]
    model = load(target / "model", device="cpu")
    answers = model.answers(["the cat", "who"], GenerateSettings(max_new_tokens=4, block_size=4, steps=4))
    assert len(answers) == 2 and all(answer.passes for answer in answers)
    seen, unseen = model.nelbo(["the cat", "the cat"], [" sees a dog", " sun who ?"], LikelihoodSettings(budget=5))
    assert seen.nats < unseen.nats


def test_an_encoder_whose_head_is_not_known_is_one_line_and_not_wrong_logits(tmp_path):
    entry = ModelEntry(new={"model_type": "mpnet", "intermediate_size": 64} | SIZES, tokenizer="toy")
    make_model(tmp_path, entry)
    with pytest.raises(ValueError, match="the LM head of MPNetForMaskedLM is more than its last linear lay") as caught:
        load_backbone(tmp_path, entry=entry)
    assert "\n" not in str(caught.value)
