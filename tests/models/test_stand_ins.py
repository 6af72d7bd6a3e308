"""Stand-ins of published families: random weights that the real weight maps write and load."""

import json

import pytest
import torch

from dllm.chat.settings import chat_generation
from dllm.config import GenerateSettings, load_project
from dllm.families import FAMILIES, LLADA2, OWN_CLASS
from dllm.language_model import load
from dllm.models.load import load_backbone, save_stand_in
from dllm.models.published import family_of, published_decoding, read_tensors, refuse_other_routing
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
    assert set(entries) == {*FAMILIES, *OWN_CLASS} and set(FAMILIES) == set(NAMES)


def test_a_stand_in_of_a_class_of_its_own_is_that_class_with_its_tokens(entries, tmp_path):
    entry = entries["DiffusionGemma"]
    directories = [tmp_path / "model", tmp_path / "again"]
    for directory in directories:
        save_stand_in(entry, word_tokenizer(), directory)
    backbone = load_backbone(directories[0], entry=entry)
    assert type(backbone.model).__name__ == "DiffusionGemmaForBlockDiffusion"
    assert backbone.sidecar["block_size"] == entry.new["canvas_length"] and backbone.tokenizer.eos_token == "<eos>"
    ids = encode_chat(backbone.tokenizer, CHAT, add_generation_prompt=False)
    assert backbone.tokenizer.convert_tokens_to_ids("<turn|>") in ids
    first, second = (dict(read_tensors(directory)) for directory in directories)
    assert all(torch.equal(value, second[key]) for key, value in first.items()), "the seed decides"
    wrong = entry.model_copy(update={"new": entry.new | {"text_config": {"hidden_size": "wide"}}})
    with pytest.raises(ValueError, match="no diffusion_gemma can be made of these settings") as fault:
        save_stand_in(wrong, word_tokenizer(), tmp_path / "wrong")
    assert "\n" not in str(fault.value)


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


def called(directory, edition, where):
    """A checkpoint that is called an edition of LLaDA2 in one place, and LLaDA2.0 in the others."""
    directory.mkdir(exist_ok=True)
    names = dict.fromkeys(("manifest", "card", "config"), "LLaDA2.0-mini") | {where: edition}
    (directory / "README.md").write_text(f"---\nlicense: x\n---\n# {names['card']}\nNews: LLaDA2.2 is out.\n")
    (directory / "manifest.json").write_text(f'{{\n "hub": "inclusionAI/{names["manifest"]}",\n "files": {{}}}}')
    (directory / "config.json").write_text(f'{{"_name_or_path": "x/{names["config"]}"}}')
    return directory


@pytest.mark.parametrize("where", ["manifest", "card", "config"])
def test_llada22_is_refused_with_the_reason(tmp_path, where):
    refuse_other_routing(LLADA2, called(tmp_path / "model", "LLaDA2.1-mini", where))
    for harmless in ("inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.1-flash", "a/LLaDA2.20-x"):
        refuse_other_routing(LLADA2, harmless)
    for place in ("inclusionAI/LLaDA2.2-flash", called(tmp_path / "model", "LLaDA2.2-flash", where)):
        with pytest.raises(ValueError, match="experts block by block.*insertions.*take LLaDA2.1") as error:
            refuse_other_routing(LLADA2, place)
        assert "\n" not in str(error.value)


def test_llada22_is_refused_by_its_config_whatever_it_is_called(entries, tmp_path):
    directory = saved(entries, "LLaDA2", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | {"expert_capacity": 48}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model: LLaDA2.2 chooses experts block by block \(expert_capacity\)"):
        load_backbone(directory)


@pytest.mark.parametrize("where", ["manifest", "card", "config"])
def test_llada21_is_sampled_as_published_unless_told_otherwise(tmp_path, where):
    assert published_decoding(LLADA2, called(tmp_path / "model", "LLaDA2.0-mini", where)) == {}
    decoding = published_decoding(LLADA2, called(tmp_path / "model", "LLaDA2.1-mini", where))
    assert decoding == published_decoding(LLADA2, "inclusionAI/LLaDA2.1-mini")
    settings = chat_generation(LLADA2.sidecar() | {"generation": decoding}, 512)
    assert (settings.reveal_rule, settings.threshold, settings.edit_threshold) == ("threshold", 0.7, 0.5)
    assert settings.edit_passes == 16 and settings.block_size == 32 and settings.steps is None


def test_a_checkpoint_of_llada21_generates_as_published(entries, tmp_path):
    directory = saved(entries, "LLaDA2", tmp_path / "LLaDA2.1-mini")
    lm = load(directory, device="cpu")
    assert lm.usual_settings == GenerateSettings(reveal_rule="threshold", threshold=0.7, edit_threshold=0.5)
    passes = [lm.answers([[5, 6, 7]], settings)[0].passes for settings in (None, lm.usual_settings, GenerateSettings())]
    assert passes[0] == passes[1] > passes[2], "a pass that finds nothing to edit is made by the first two only"
