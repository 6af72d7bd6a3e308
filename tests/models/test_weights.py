"""Published checkpoints: each loads into a stock class, computes what its architecture says, and is written back."""

import json
import shutil
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm.config import ModelEntry
from dllm.families import FAMILIES
from dllm.language_model import load
from dllm.models.inferred import entry_settings, sidecar_settings
from dllm.models.load import load_backbone
from dllm.models.published import family_of, published_config, read_tensors, save_published, stock_config
from dllm.models.tokenizers import check_messages, encode_chat, encode_text, load_tokenizer
from tests.models.published import diffcoder, dream, fast_dllm, llada, llada2, llada_moe, rnd1, sdar
from tests.models.published.pieces import block_causal, make_weights, save_byte_tokenizer, save_checkpoint
from tests.plain_forward import hidden_states, logits_at

ARCHITECTURES = {
    **{"LLaDA": llada, "LLaDA-MoE": llada_moe, "LLaDA2": llada2, "Dream": dream, "RND1": rnd1},
    **{"SDAR": sdar, "Fast-dLLM v2": fast_dllm, "Stable-DiffCoder": diffcoder},
}
CLASSES = {
    "LLaDA": "LlamaForCausalLM",
    "LLaDA-MoE": "Qwen3MoeForCausalLM",
    "LLaDA2": "Glm4MoeForCausalLM",
    "Dream": "Qwen2ForCausalLM",
    "RND1": "Qwen3MoeForCausalLM",
    "SDAR": "Qwen3ForCausalLM",
    "Fast-dLLM v2": "Qwen2ForCausalLM",
    "Stable-DiffCoder": "LlamaForCausalLM",
}
NAMES = tuple(ARCHITECTURES)
TEMPLATE = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
SUM_ORDER = 1e-5
"""The same sums in another order, in fp32, on logits of order one."""


def save_tiny(directory, name):
    """A tiny checkpoint as it is published, with seeded weights."""
    published = ARCHITECTURES[name]
    weights = make_weights(published.shapes(published.CONFIG))
    save_checkpoint(directory, published.CONFIG, weights)
    end = FAMILIES[name].end_token
    save_byte_tokenizer(directory, published.TOKENS, kind=published.TOKENIZER, template=TEMPLATE, end=end)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("published")
    return {name: save_tiny(root / name, name) for name in NAMES}


@pytest.fixture
def copy(saved, tmp_path):
    """Copies a checkpoint to damage: name -> directory."""
    return lambda name="LLaDA": shutil.copytree(saved[name], tmp_path / "copy")


def rows(vocab_size, length=9):
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (directory / "config.json").write_text(json.dumps(config))


def line_of(directory, **options):
    """The error of loading; it must be one line."""
    with pytest.raises(ValueError) as caught:
        load_backbone(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# Equivalence


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_published_checkpoint_computes_what_its_architecture_says(saved, name):
    published, backbone = ARCHITECTURES[name], load_backbone(saved[name])
    assert type(backbone.model).__name__ == CLASSES[name] and family_of(saved[name]).name == name
    tokens = rows(backbone.vocab_size)
    weights = dict(read_tensors(saved[name]))
    expected = published.logits(published.CONFIG, weights, tokens)
    assert expected.std() > 0.5, "logits of order one, or the tolerance says nothing"
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    found = logits_at(backbone.model, hidden_states(backbone.model, tokens), everywhere).view_as(expected)
    torch.testing.assert_close(found, expected, atol=SUM_ORDER, rtol=SUM_ORDER)


@pytest.mark.parametrize(("name", "block"), [(n, f.block_size) for n, f in FAMILIES.items() if f.block_size])
@torch.no_grad()
def test_a_family_of_blocks_attends_block_by_block_where_it_is_told_to(saved, name, block):
    published, backbone, weights = ARCHITECTURES[name], load_backbone(saved[name]), dict(read_tensors(saved[name]))
    tokens = rows(backbone.vocab_size, 10)
    allowed = block_causal(10, 4)
    expected = published.logits(published.CONFIG, weights, tokens, allowed)
    found = backbone.model(tokens, attention_mask=allowed[None, None].expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(found, expected, atol=SUM_ORDER, rtol=SUM_ORDER)
    assert (found - backbone.model(tokens).logits).abs().max() > 0.1
    assert backbone.sidecar["algorithm"] == "bd3lm" and backbone.sidecar["block_size"] == block


def test_the_bias_of_llada2s_router_chooses_experts_and_does_not_weigh_them():
    config = llada2.CONFIG | {"num_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    gate, token = torch.tensor([[2.0], [1.0], [0.0], [0.0]]), torch.ones(1)
    plain = llada2.route(config, token, gate, torch.zeros(4))
    biased = llada2.route(config, token, gate, torch.tensor([0.0, 9.0, 0.0, 0.0]))
    assert (plain[0][0], biased[0][0]) == (0, 1) and plain[0][1] == biased[0][1] == config["routed_scaling_factor"]


@pytest.mark.parametrize("name", ["Dream", "RND1"])
@torch.no_grad()
def test_a_model_that_predicts_one_ahead_is_read_one_position_before(saved, name):
    published, backbone = ARCHITECTURES[name], load_backbone(saved[name])
    assert backbone.prediction == "next"
    tokens = rows(backbone.vocab_size)
    expected = published.logits(published.CONFIG, dict(read_tensors(saved[name])), tokens)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[0, 3] = where[1, 7] = True
    found = logits_at(backbone.model, hidden_states(backbone.model, tokens), where, backbone.prediction)
    torch.testing.assert_close(found, torch.stack([expected[0, 2], expected[1, 6]]), atol=SUM_ORDER, rtol=SUM_ORDER)


# --------------------------------------------------------------------------------------------------------------------
# Names and sizes


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_written_back_as_it_was_published(saved, tmp_path, name):
    backbone = load_backbone(saved[name])
    save_published(backbone.model, tmp_path / "again", like=saved[name])
    before, after = dict(read_tensors(saved[name])), dict(read_tensors(tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert published_config(tmp_path / "again") == published_config(saved[name])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_training_saves_is_a_plain_stock_checkpoint(saved, tmp_path, name):
    """`save_pretrained` writes transformers' names, so that any tool can read a model that was trained on."""
    backbone = load_backbone(saved[name])
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "dllm.json").write_text(json.dumps(backbone.sidecar))
    assert published_config(tmp_path)["architectures"] == [CLASSES[name]]
    again = load_backbone(tmp_path)
    assert (again.mask_id, again.eos_id, again.prediction) == (backbone.mask_id, backbone.eos_id, backbone.prediction)
    text = f"Is it é? {backbone.tokenizer.eos_token} 12 {family_of(saved[name]).end_of_turn}\n"
    ids = encode_text(backbone.tokenizer, text)
    assert encode_text(again.tokenizer, text) == ids and again.tokenizer.decode(ids) == text
    assert len(again.tokenizer) == len(backbone.tokenizer)
    assert again.tokenizer.chat_template == backbone.tokenizer.chat_template
    tokens = rows(backbone.vocab_size)
    assert torch.equal(hidden_states(again.model, tokens), hidden_states(backbone.model, tokens))


@pytest.mark.parametrize(("name", "model"), [(name, model) for name in NAMES for model in ARCHITECTURES[name].SIZES])
def test_the_published_sizes_make_the_published_number_of_parameters(name, model):
    from transformers import AutoModelForCausalLM

    published = ARCHITECTURES[name]
    sizes, reported = published.SIZES[model]
    config = published.CONFIG | sizes
    family = FAMILIES[name]
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(stock_config(family, config))
    biases = sum(buffer.numel() for key, buffer in stock.named_buffers() if "correction_bias" in key)
    count = sum(parameter.numel() for parameter in stock.parameters()) + biases
    assert count == sum(prod(shape) for shape in published.shapes(config).values())
    assert count == pytest.approx(reported, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_family_agrees_with_the_tokenizer_and_the_config(saved, name):
    published, backbone = ARCHITECTURES[name], load_backbone(saved[name])
    family = family_of(saved[name])
    ids = {token: 256 + i for i, token in enumerate(published.TOKENS)}
    assert backbone.mask_id == published.MASK == ids.get(family.mask_token, 259)
    assert backbone.eos_id == backbone.pad_id == ids[family.end_token] and family.end_of_turn in ids
    assert backbone.max_length == 96 and backbone.family == "decoder" and backbone.model.config.is_causal is False


def test_weights_may_lie_in_one_file(copy):
    directory = copy()
    weights = dict(read_tensors(directory))
    for path in directory.glob("model*"):
        path.unlink()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(directory).prediction == "in_place"


def entry_of(directory) -> ModelEntry:
    return ModelEntry(new={}, tokenizer="saved", **entry_settings(directory))


def test_weights_keep_a_dtype_that_is_asked_for(saved):
    model = load_backbone(saved["LLaDA2"], dtype=torch.bfloat16).model
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Use


def test_a_conversation_of_llada_is_written_as_published_but_ends_where_it_ends(saved):
    tokenizer = load_tokenizer(saved["LLaDA"], entry_of(saved["LLaDA"]))
    question = [{"role": "user", "content": " Hi "}]
    whole = [*question, {"role": "assistant", "content": "Yes"}]
    check_messages(whole)
    head = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    prompt, text = (tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=g)
                    for m, g in ((question, True), (whole, False)))  # fmt: skip
    assert prompt == head + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert text == prompt + "Yes<|eot_id|>"
    ids, full = (encode_chat(tokenizer, m, add_generation_prompt=g) for m, g in ((question, True), (whole, False)))
    assert full[: len(ids)] == ids and full[-1] == 256 + llada.TOKENS.index("<|eot_id|>")


def test_other_families_keep_their_own_template(saved):
    assert load_tokenizer(saved["Dream"], entry_of(saved["Dream"])).chat_template == TEMPLATE


@pytest.mark.parametrize("name", ["LLaDA", "LLaDA-MoE", "Dream", "RND1", "SDAR", "Fast-dLLM v2", "Stable-DiffCoder"])
def test_a_published_checkpoint_samples_and_scores(saved, name):
    from dllm.config import GenerateSettings, LikelihoodSettings

    model = load(saved[name], device="cpu")
    assert model.end_of_turn == family_of(saved[name]).end_of_turn
    settings = GenerateSettings(max_new_tokens=4, block_size=4, steps=2)
    assert len(model.answers(["ab", "a"], settings)) == 2
    assert all(score.nats > 0 for score in model.nelbo(["ab", ""], ["cd", "e"], LikelihoodSettings(budget=4)))


# --------------------------------------------------------------------------------------------------------------------
# Bad input


def test_an_unknown_architecture_is_one_line_and_its_code_is_not_run(copy):
    directory = copy()
    edit(directory, architectures=["GrandModelLM"], model_type="grand")
    line = line_of(directory)
    assert "'GrandModelLM' is not a class of transformers, and code beside a checkpoint is never run" in line
    assert "LLaDA, LLaDA-MoE, LLaDA2, Dream, RND1" in line


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LLaDA", {"n_layers": ...}, "config.json: n_layers is missing; a LLaDA needs it"),
        (
            "LLaDA",
            {"alibi": True},
            "config.json: alibi = True is not a LLaDA setting that llama can follow; allowed",
        ),
        (
            "LLaDA-MoE",
            {"qk_layernorm": False},
            "qk_layernorm = False is not a LLaDA-MoE setting that qwen3_moe",
        ),
        ("LLaDA-MoE", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8 is not a LLaDA-MoE"),
        ("LLaDA2", {"score_function": "softmax"}, "score_function = 'softmax' is not a LLaDA2 setting that glm4_moe"),
        (
            "Dream",
            {"rope_scaling": {"type": "yarn"}},
            "rope_scaling = {'type': 'yarn'} is not a Dream setting",
        ),
        ("RND1", {"num_experts": None}, "config.json: num_experts is missing; a RND1 needs it"),
        ("SDAR", {"block_size": 16}, "block_size = 16 is not a SDAR setting that qwen3 can follow; allowed: 4"),
        ("Fast-dLLM v2", {"bd_size": 8}, "bd_size = 8 is not a Fast-dLLM v2 setting"),
        ("LLaDA", {"d_model": "wide"}, "config.json"),
    ],
)
def test_a_config_that_the_stock_class_cannot_follow_is_one_line(copy, name, changes, message):
    directory = copy(name)
    edit(directory, **changes)
    assert message in line_of(directory)


def rewrite(directory, change):
    """Apply a change to the tensors of a checkpoint's second file."""
    path = directory / "model-00002-of-00002.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_missing_extra_and_misshapen_tensors_are_one_line(copy, tmp_path):
    directory = copy()
    key = "model.transformer.blocks.1.up_proj.weight"
    file = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][key]
    path = directory / file
    whole = load_file(path)
    meta = {"format": "pt"}
    save_file({k: v for k, v in whole.items() if k != key}, path, metadata=meta)
    assert "the weights lack model.layers.1.mlp.up_proj.weight (1 in all)" in line_of(directory)
    save_file(whole | {"model.transformer.wpe.weight": torch.zeros(3)}, path, metadata=meta)
    assert "the weights have model.transformer.wpe.weight (1 in all) that LLaDA does not have" in line_of(directory)
    save_file(whole | {key: torch.zeros(3, 4)}, path, metadata=meta)
    assert "model.layers.1.mlp.up_proj.weight of 3 x 4 (1 of another size in all), and config.json says" in line_of(
        directory
    )
    path.unlink()
    assert f"{file} is missing" in line_of(directory)


def test_a_fused_tensor_of_another_size_is_one_line(copy):
    directory = copy("LLaDA2")
    edit(directory, num_key_value_heads=1)
    assert "the weights cannot be loaded" in line_of(directory)


def test_a_tokenizer_without_the_mask_token_is_one_line(copy):
    directory = copy()
    save_byte_tokenizer(directory, [t if t != "<|mdm_mask|>" else "<|reserved|>" for t in llada.TOKENS], kind="fast")
    line = line_of(directory)
    assert "config.json has mask_token_id = 258, the tokenizer has '<|mdm_mask|>' at 262" in line


def test_a_vocabulary_that_does_not_match_is_one_line(copy):
    directory = copy("Dream")
    save_byte_tokenizer(directory, [*dream.TOKENS, *(f"<|more{i}|>" for i in range(20))], kind="qwen2")
    assert "the tokenizer has 280 tokens, the model 272; they are not from the same checkpoint" in line_of(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "encoder"}, "family = 'encoder' of the model's entry is not that of Dream; set family: decoder"),
        ({"prediction": "in_place"}, "prediction = 'in_place' of the model's entry is not that of Dream; set predicti"),
        ({"mask_token": "[MASK]"}, "the tokenizer has no token '[MASK]' (mask_token)"),
    ],
)
def test_an_entry_that_contradicts_the_family_is_one_line(saved, changes, message):
    entry = entry_of(saved["Dream"]).model_copy(update=changes)
    assert message in line_of(saved["Dream"], entry=entry)


def test_a_published_model_is_only_written_like_one_of_its_own(saved, tmp_path):
    model = load_backbone(saved["LLaDA"]).model
    with pytest.raises(ValueError, match="not a published checkpoint; allowed: a directory of LLaDA, LLaDA-MoE"):
        save_published(model, tmp_path / "a", like=tmp_path)
    with pytest.raises(ValueError, match="model_type = 'llama' of the model is not that of"):
        save_published(model, tmp_path / "a", like=saved["Dream"])


def test_every_entry_of_the_configuration_agrees_with_its_family():
    """config/models.yaml repeats tokens and prediction for its readers; they must be the family's."""
    import yaml

    models = yaml.safe_load(open("config/models.yaml", encoding="utf-8"))["models"]
    owners = {"LLaDA-8B": "LLaDA", "LLaDA-1.5": "LLaDA", "LLaDA-MoE": "LLaDA-MoE", "LLaDA2": "LLaDA2", "Dream": "Dream",
              "RND1": "RND1"}  # fmt: skip
    seen = set()
    for values in models.values():
        owner = next((o for part, o in owners.items() if part in values.get("hub", "").split("/")[-1]), None)
        if owner is not None:
            entry, expected = ModelEntry(**values), sidecar_settings(FAMILIES[owner].sidecar())
            for key in ("family", "prediction", "mask_token", "end_token", "end_of_turn", "chat_template"):
                assert getattr(entry, key) == expected[key], (values["hub"], key)
            seen.add(owner)
    assert {"LLaDA", "Dream"} <= seen


@pytest.mark.parametrize("prompt", [3, 40])
@pytest.mark.parametrize(("name", "block"), [(n, f.block_size) for n, f in FAMILIES.items() if f.block_size])
def test_a_family_samples_its_blocks_with_a_cache_as_its_architecture_says(saved, name, block, prompt):
    """Blocks are counted from the row, so the first one holds the end of the prompt; against plain torch."""
    from dllm.config import GenerateSettings, LikelihoodSettings
    from dllm.core.canvas import canvas_for
    from dllm.likelihood.scorer import block_scorer
    from dllm.sampling.sampler import block_sampler
    from tests.samplers import no_cache

    published, backbone = ARCHITECTURES[name], load(saved[name], device="cpu").backbone
    given = torch.randint(256, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    canvas = canvas_for([given], 40, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    settings = GenerateSettings(block_size=7, steps=12, early_stop=False)  # a sampler's block size does not count here
    (cached,) = block_sampler().complete(backbone, canvas, settings)
    with no_cache():
        (plain,) = block_sampler().complete(backbone, canvas, settings)
    assert cached.tokens == plain.tokens and cached.computed < 0.7 * plain.computed
    weights, row = dict(read_tensors(saved[name])), [*given, *cached.tokens]
    row = row[: 32 * (len(row) // 32) + 2]  # its last block has two tokens, whatever the size of blocks
    low = (
        (len(row) - 1) // block * block
    )  # the bound of the last block, one token masked, by the published architecture
    tokens, last = torch.tensor([row]), len(row) - 1
    tokens[0, last] = backbone.mask_id
    read = last - 1 if backbone.prediction == "next" else last
    logits = published.logits(published.CONFIG, weights, tokens, block_causal(len(row), block))[0, read].double()
    logits[backbone.mask_id] = -torch.inf
    expected = -float(logits.log_softmax(-1)[row[last]])
    assert low < last
    (score,) = block_scorer().nelbo(backbone, [row[:last]], [row[last:]], LikelihoodSettings())
    assert score.nats == pytest.approx(expected, abs=1e-4) and score.passes == 1
