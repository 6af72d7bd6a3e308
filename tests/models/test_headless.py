"""Encoders that were saved without an LM head, and heads of further masked-LM classes."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from dllm.models.headless import give_head, lacks_head
from dllm.models.inferred import entry_settings, parameters
from dllm.models.load import load_backbone
from dllm.provenance import directory_digest
from tests.training.conftest import entry_for, make_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "initializer_range": 0.08, "max_position_embeddings": 64}  # fmt: skip
KINDS = {
    "bert": {},
    "roberta": {},
    "modernbert": {},
    "distilbert": {"intermediate_size": None, "hidden_dim": 64},
    "deberta-v2": {"type_vocab_size": 0, "relative_attention": True, "position_biased_input": False},
    "eurobert": {"num_key_value_heads": 1},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "xlm-roberta": {},
    "camembert": {},
    "ernie": {},
    "data2vec-text": {},
    "nomic_bert": {},
}


def new_of(kind: str) -> dict:
    settings = {"model_type": kind} | SIZES | KINDS[kind]
    return {key: value for key, value in settings.items() if value is not None}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masked_lm_classes_of_every_family_load_and_give_their_own_logits(tmp_path, kind):
    make_model(tmp_path, entry_for().model_copy(update={"new": new_of(kind)}))
    found = entry_settings(tmp_path)
    assert (found["family"], found["mask_token"], found["end_token"]) == ("encoder", "[MASK]", "[PAD]")
    entry = entry_for().model_copy(update=found | {"new": new_of(kind)})
    backbone = load_backbone(tmp_path, entry=entry)  # which compares the logits with those of the class
    assert backbone.mask_id == 4 and backbone.max_length in (63, 64)
    assert parameters(tmp_path) == pytest.approx(sum(p.numel() for p in backbone.model.parameters()), rel=0.1)


@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_the_head_that_a_deberta_has_under_the_names_of_its_authors_is_taken(tmp_path, told):
    new = new_of("deberta-v2") | {"legacy": False, "hidden_act": "gelu"}
    make_model(tmp_path, entry_for().model_copy(update={"new": new}))
    stored = AutoModelForMaskedLM.from_pretrained(tmp_path)
    stored.lm_predictions.lm_head.bias.normal_()
    stored.save_pretrained(tmp_path)
    if not told:  # as deberta-v3-base and others are on the hub
        config = json.loads((tmp_path / "config.json").read_text())
        del config["legacy"], config["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert give_head(tmp_path).endswith(" was saved with its LM head under other names, which is taken")
    assert not lacks_head(tmp_path) and give_head(tmp_path) is None
    tokens = torch.arange(5, 17)[None]
    model = load_backbone(tmp_path, entry=entry_for()).model
    torch.testing.assert_close(model(input_ids=tokens).logits, stored.eval()(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "albert", "electra"])
def test_an_encoder_without_a_head_keeps_its_layers_and_is_given_a_head_on_its_embeddings(tmp_path, kind):
    make_model(tmp_path, entry_for().model_copy(update={"new": new_of(kind)}))
    base = AutoModel.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path)
    assert lacks_head(tmp_path)
    line = give_head(tmp_path)
    assert type(base).__name__ in line and "tied embeddings" in line and "\n" not in line
    backbone = load_backbone(tmp_path, entry=entry_for())
    whole = backbone.model
    assert isinstance(whole, type(AutoModelForMaskedLM.from_pretrained(tmp_path)))
    kept = getattr(whole, whole.base_model_prefix).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items() if name in kept)
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    before = directory_digest(tmp_path)
    assert give_head(tmp_path) is None and directory_digest(tmp_path) == before, "a second time there is nothing to do"


def test_the_head_that_is_given_is_always_the_same(tmp_path):
    digests = set()
    for name in "ab":
        make_model(tmp_path / name, entry_for())
        AutoModel.from_pretrained(tmp_path / name).save_pretrained(tmp_path / name)
        torch.rand(1)
        give_head(tmp_path / name)
        digests.add(directory_digest(tmp_path / name)["digest"])
    assert len(digests) == 1


def test_a_checkpoint_with_its_head_is_left_alone_and_a_damaged_encoder_is_one_line(tmp_path):
    make_model(tmp_path, entry_for())
    before = directory_digest(tmp_path)
    assert give_head(tmp_path) is None and directory_digest(tmp_path) == before
    from safetensors.torch import load_file, save_file

    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the weights lack .*layer.1") as caught:
        give_head(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_causal_model_is_a_decoder_that_scores_the_next_token(tmp_path):
    make_model(tmp_path, entry_for("llama"))
    found = entry_settings(tmp_path)
    assert (found["family"], found["prediction"], found["chat_template"]) == ("decoder", "next", "bert") or found
    assert entry_settings(tmp_path, "in_place")["prediction"] == "in_place"
    make_model(tmp_path / "encoder", entry_for())
    with pytest.raises(
        ValueError, match="prediction = 'next' is for causal models, and BertForMaskedLM fills in masks"
    ):
        entry_settings(tmp_path / "encoder", "next")


def test_a_model_that_cannot_be_used_says_why(tmp_path):
    make_model(tmp_path, entry_for())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["mask_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its tokenizer has no mask token, which diffusion needs"):
        entry_settings(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(ValueError, match="T5Model fills in no masks, and transformers has no masked-LM class"):
        give_head(tmp_path)
