"""Stand-ins of published families: random weights that the real weight maps write and load."""

import json

import pytest
import torch

from dllm.config import load_project
from dllm.families import FAMILIES
from dllm.models.load import load_backbone, save_stand_in
from dllm.models.published import family_of, read_tensors
from dllm.models.tokenizers import encode_chat, load_tokenizer
from tests.toys import word_tokenizer

CONFIG = "config"
CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a toy"}]
SMALL = {"hidden_size": 32, "d_model": 32, "num_hidden_layers": 2, "n_layers": 2, "init_std": 0.3, "head_dim": 16}
NAMES = {
    "LLaDA": "model.transformer.blocks.1.ff_proj.weight",
    "LLaDA-MoE": "model.layers.1.mlp.experts.3.up_proj.weight",
    "LLaDA2": "model.layers.1.attention.query_key_value.weight",
    "Dream": "model.layers.1.self_attn.q_proj.bias",
    "RND1": "model.layers.1.self_attn.q_norm.weight",
    "SDAR": "model.layers.1.self_attn.k_norm.weight",
    "Fast-dLLM v2": "model.layers.1.self_attn.v_proj.bias",
    "Stable-DiffCoder": "model.layers.1.mlp.up_proj.weight",
}


@pytest.fixture(scope="module")
def entries():
    models = load_project(CONFIG, f"{CONFIG}/laptop.yaml", f"{CONFIG}/systems.yaml").models
    return {entry.published: small(entry) for entry in models.values() if entry.published}


def small(entry):
    """An entry of the shipped comparison, made smaller."""
    new = {key: SMALL.get(key, value) for key, value in entry.new.items()}
    return entry.model_copy(update={"new": new})


def saved(entries, name, directory):
    save_stand_in(entries[name], word_tokenizer(), directory)
    return directory


def test_every_published_family_has_a_stand_in(entries):
    assert set(entries) == set(FAMILIES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_is_loaded_as_its_family(entries, tmp_path, name):
    directory = saved(entries, name, tmp_path / "model")
    assert family_of(directory).name == name and NAMES[name] in dict(read_tensors(directory))
    backbone = load_backbone(directory, entry=entries[name])
    family = family_of(directory)
    tokens = (backbone.tokenizer.mask_token, backbone.tokenizer.eos_token)
    assert tokens == (family.mask_token, family.end_token) and backbone.prediction == family.prediction
    ids = encode_chat(backbone.tokenizer, CHAT, add_generation_prompt=False)
    assert backbone.tokenizer.convert_tokens_to_ids(family.end_of_turn) in ids
    assert "I am a toy" in backbone.tokenizer.decode(ids)
    again = dict(read_tensors(saved(entries, name, tmp_path / "again")))
    assert all(torch.equal(value, again[key]) for key, value in read_tensors(directory)), "the seed decides"


@pytest.mark.parametrize("name", ["Dream", "RND1"])
def test_a_trained_stand_in_keeps_its_tokenizer(entries, tmp_path, name):
    """AutoTokenizer goes by the model's type and would read a Qwen2 with Qwen2's own tokenizer."""
    directory = saved(entries, name, tmp_path / "model")
    backbone = load_backbone(directory, entry=entries[name])
    trained = tmp_path / "trained"
    backbone.model.save_pretrained(trained)
    backbone.tokenizer.save_pretrained(trained)
    (trained / "dllm.json").write_text(json.dumps(backbone.sidecar))
    texts = [load_tokenizer(path)("I am a toy")["input_ids"] for path in (directory, trained)]
    assert texts[0] == texts[1] == word_tokenizer()("I am a toy")["input_ids"]


def test_a_setting_that_the_family_does_not_have_is_one_line(entries, tmp_path):
    entry = entries["LLaDA"].model_copy(update={"new": entries["LLaDA"].new | {"alibi": True}})
    with pytest.raises(ValueError, match="alibi = True is not a LLaDA") as fault:
        save_stand_in(entry, word_tokenizer(), tmp_path / "model")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "place", ["inclusionAI/LLaDA2.1-mini", "inclusionAI/LLaDA2.2-flash", "manifest", "card", "config"]
)
def test_a_family_whose_decoding_edits_is_refused_with_the_reason(tmp_path, place):
    from dllm.families import LLADA2
    from dllm.models.published import refuse_edited

    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlicense: x\n---\n# LLaDA2.0-mini\nNews: LLaDA2.1 is out.\n")
    (directory / "manifest.json").write_text('{"hub": "inclusionAI/LLaDA2.0-mini"}')
    refuse_edited(LLADA2, directory)
    for harmless in ("inclusionAI/LLaDA2.0-mini", "a/LLaDA2.10-x"):
        refuse_edited(LLADA2, harmless)
    if place == "manifest":
        (directory / "manifest.json").write_text('{\n "hub": "inclusionAI/LLaDA2.1-mini",\n "files": {}}')
    elif place == "card":
        (directory / "README.md").write_text("# LLaDA2.2-mini\n")
    elif place == "config":
        (directory / "config.json").write_text('{"_name_or_path": "x/LLaDA2.1-mini"}')
    with pytest.raises(ValueError, match="decoded with edits of revealed tokens.*take LLaDA2.0") as error:
        refuse_edited(LLADA2, place if "/" in place else directory)
    assert "\n" not in str(error.value)
