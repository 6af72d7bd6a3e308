"""Loading checkpoints and making new ones: what is there is read, what is not is one line."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm.chat.settings import find_checkpoint
from dllm.config import checkpoint_directory
from dllm.core.packing import layout_of
from dllm.models.inferred import entry_settings, parameters
from dllm.models.load import load_backbone, longest_row, new_model, read_sidecar
from dllm.models.self_tests import ordinary_tokens
from dllm.models.tokenizers import load_tokenizer, read_tokenizer
from tests.models.own_ids import SPECIAL, save_with_own_ids
from tests.plain_forward import hidden_states, packed_logits
from tests.stock import KINDS, save_stock, stock_entry
from tests.toys import save_toy


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.set_num_threads(1)
    return save_stock(tmp_path_factory.mktemp("models"), "bert")


@pytest.fixture
def copy(bert, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(bert, tmp_path / "copy")


def line_of(directory, **options):
    """The error of loading; it must be one line."""
    with pytest.raises(ValueError) as caught:
        load_backbone(directory, **{"entry": stock_entry("bert")} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_and_its_sidecar_come_back_as_they_were_saved(tmp_path):
    directory = save_toy(tmp_path, prediction="next", block_size=4, response_end="block")
    backbone = load_backbone(directory)
    assert backbone.sidecar == json.loads((directory / "dllm.json").read_text()) == read_sidecar(directory)
    assert (backbone.family, backbone.prediction, backbone.sidecar["block_size"]) == ("encoder", "next", 4)
    vocabulary = backbone.tokenizer.get_vocab()
    assert backbone.mask_id == vocabulary["[MASK]"] and backbone.eos_id == backbone.pad_id == vocabulary["[PAD]"]
    assert backbone.max_length == 96 and not backbone.model.training and backbone.device.type == "cpu"
    saved = load_file(directory / "model.safetensors")
    for name, value in backbone.model.state_dict().items():
        assert name not in saved or torch.equal(value, saved[name])


def test_the_sidecar_names_the_special_tokens(tmp_path):
    directory = save_toy(tmp_path, special_tokens={"mask": "[UNK]", "eos": "[SEP]", "end_of_turn": "[/Answer]"})
    backbone = load_backbone(directory)
    vocabulary = backbone.tokenizer.get_vocab()
    assert (backbone.mask_id, backbone.eos_id) == (vocabulary["[UNK]"], vocabulary["[SEP]"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_checkpoint_needs_no_sidecar(tmp_path, kind):
    directory = save_stock(tmp_path, kind)
    backbone = load_backbone(directory)
    assert backbone.sidecar == {} and backbone.family == stock_entry(kind).family
    assert backbone.vocab_size % 8 == 0 and backbone.vocab_size >= len(backbone.tokenizer)


def test_weights_are_fp32_unless_another_dtype_is_asked_for(bert):
    entry = stock_entry("bert")
    assert load_backbone(bert, entry=entry).model.dtype == torch.float32
    assert load_backbone(bert, entry=entry, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_missing_directory_is_one_line(tmp_path):
    for path in (tmp_path / "nothing", "nothing", "./a/b", "~/no-such-checkpoint"):
        assert "no checkpoint there; give a directory with config.json, or a hub id" in line_of(path)
    assert "no config.json" in line_of(tmp_path)


def test_an_adapter_alone_is_said_to_be_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    assert "an adapter of a/b without its model; merge the two" in line_of(tmp_path)
    for named in (find_checkpoint, lambda path: checkpoint_directory(path, tmp_path, "MODEL")):
        with pytest.raises(ValueError, match="an adapter of a/b without its model; merge the two"):
            named(str(tmp_path))


def test_missing_weights_are_one_line(copy):
    (copy / "model.safetensors").unlink()
    assert "no weights (model.safetensors); the checkpoint is incomplete" in line_of(copy)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_damaged_weights_are_one_line(copy, keep):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert "the weights cannot be loaded" in line_of(copy)


def test_a_damaged_pickle_of_weights_is_one_line(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert "the weights cannot be loaded" in line_of(copy)


def test_weights_that_lack_a_tensor_are_one_line_and_not_drawn_at_random(copy):
    path = copy / "model.safetensors"
    weights = load_file(path)
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "the weights lack bert.encoder.layer.1.output.dense.weight (1 in all)" in line_of(copy)


def test_weights_of_another_size_are_one_line(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    assert re.search(
        r"the weights have bert.encoder.layer.0.intermediate.dense.bias of \d+ \(\d+ of another size in all\), and "
        "config.json says 80; they are not from the same checkpoint",
        line_of(copy),
    )


def test_weights_that_are_quantized_are_one_line(copy):
    config = json.loads((copy / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    assert "config.json: has a quantization_config; weights that are quantized are not read" in line_of(copy)


def test_an_encoder_that_was_saved_as_a_decoder_is_one_line(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    assert "config.json: has is_decoder: true" in line_of(copy)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", "null", "3", '{"architectures": 3}', '{"model_type": 3}', '{"model_type": "nonesuch"}'],
)
def test_a_damaged_config_is_one_line(copy, content):
    (copy / "config.json").write_text(content)
    assert "config.json: cannot be used" in line_of(copy)


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 0}, {"hidden_size": 0}, {"hidden_act": "nope"}, {"pad_token_id": 10**9}],
)
def test_a_config_that_describes_no_model_is_one_line(copy, changes):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    assert "no model can be built of its config.json and weights (" in line_of(copy)


@pytest.mark.parametrize("changes", [{"vocab_size": "x"}, {"hidden_size": None}, {"layer_norm_eps": "small"}])
def test_a_value_of_another_type_in_a_config_is_named_also_by_who_reads_the_tokenizer(copy, changes):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    (name,) = changes
    assert f"config.json: cannot be used (Validation error for field '{name}'" in line_of(copy)
    with pytest.raises(ValueError, match=f"no usable tokenizer .Validation error for field '{name}': TypeError: Field"):
        read_tokenizer(copy)


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"weight_map": null}', '{"weight_map": []}'])
def test_a_damaged_index_of_shards_is_one_line(copy, content):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(content)
    assert re.search("no model can be built of its config.json and weights|weights cannot be loaded", line_of(copy))


def test_a_shard_that_is_missing_is_named(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    weights = load_file(copy / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in line_of(copy)


def test_weights_that_are_no_numbers_are_one_line(copy):
    path = copy / "model.safetensors"
    save_file({name: weights * float("nan") for name, weights in load_file(path).items()}, path, {"format": "pt"})
    assert "the logits of BertForMaskedLM are no finite numbers; its weights are damaged" in line_of(copy)


@pytest.mark.parametrize("content", [b"", b"x" * 50, (10**18).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0[]"])
def test_the_size_of_damaged_weights_is_one_line(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: no file of weights, or a damaged one"):
        parameters(copy)


def test_the_size_of_missing_weights_is_one_line(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="copy: no weights .model.safetensors."):
        parameters(copy)


def test_the_end_of_a_text_is_never_the_mask(copy):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[MASK]", "sep_token": "[PAD]"}))
    assert entry_settings(copy)["end_token"] == "[PAD]"
    entry = stock_entry("bert").model_copy(update={"end_token": "[MASK]"})
    assert "mask_token and end_token are both '[MASK]'" in line_of(copy, entry=entry)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"special_tokens": {"mask": 3, "eos": "[PAD]"}}', "\udcff"])
def test_a_damaged_sidecar_is_one_line(copy, content):
    (copy / "dllm.json").write_text(content, errors="surrogateescape")
    assert "dllm.json: damaged; train or fetch this checkpoint again" in line_of(copy)


def test_a_tokenizer_without_a_mask_token_is_one_line(copy):
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["mask_token"]
    path.write_text(json.dumps(settings))
    assert "the tokenizer has no mask token; set mask_token in the model's entry" in line_of(copy, entry=None)
    assert load_backbone(copy, entry=stock_entry("bert")).mask_id is not None, "the entry names it"


def test_a_tokenizer_of_another_checkpoint_is_one_line(copy):
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": len(tokenizer["model"]["vocab"]) + i for i in range(20)}
    path.write_text(json.dumps(tokenizer))
    assert "the tokenizer has 43 tokens, the model 24; they are not from the same checkpoint" in line_of(copy)


@pytest.mark.parametrize("kind", SPECIAL)
@torch.no_grad()
def test_a_checkpoint_with_the_special_ids_of_its_family_passes_its_tests(tmp_path, kind):
    """RoBERTa's padding is 1, and its class counts positions over tokens that are not padding."""
    backbone = load_backbone(save_with_own_ids(tmp_path, kind))
    assert (backbone.mask_id, backbone.pad_id) == (SPECIAL[kind]["mask"][1], SPECIAL[kind]["pad"][1])
    assert backbone.packable == (kind != "deberta-v2")
    tokens, layout = torch.arange(200, 224).view(2, 12), layout_of([12, 7])
    tokens[1, 7:] = backbone.pad_id
    row, position = torch.tensor([0, 0, 1]), torch.tensor([0, 11, 6])
    ours = packed_logits(backbone, backbone.hidden(tokens, layout), layout, row, position)
    stock = backbone.model(input_ids=tokens, attention_mask=(tokens != backbone.pad_id).long()).logits
    torch.testing.assert_close(ours, stock[row, position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SPECIAL)
def test_no_test_at_loading_uses_a_special_token(tmp_path, kind):
    backbone = load_backbone(save_with_own_ids(tmp_path, kind))
    special = backbone.tokenizer.all_special_ids
    assert {number for _, number in SPECIAL[kind].values()} == set(special)
    tokens = ordinary_tokens(backbone.model, 200, special)
    assert not set(tokens.tolist()) & set(special) and len(set(tokens.tolist())) == 200
    few = ordinary_tokens(SimpleNamespace(config=SimpleNamespace(vocab_size=4, pad_token_id=1, eos_token_id=[2]),
                                          parameters=backbone.model.parameters), 5, [3])  # fmt: skip
    assert few.tolist() == [0] * 5


def test_a_decoder_that_stays_causal_is_refused(tmp_path, monkeypatch):
    directory = save_stock(tmp_path, "llama")
    monkeypatch.setattr("dllm.models.load.is_bidirectional", lambda model, special: False)
    line = line_of(directory, entry=stock_entry("llama"))
    assert "LlamaForCausalLM attends to the left only although is_causal is off" in line
    assert load_backbone(directory, entry=stock_entry("llama"), causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_is_the_same_for_a_seed_and_another_for_another(bert, kind):
    entry = stock_entry(kind)
    tokenizer = load_tokenizer(bert, entry)
    one, same, other = (new_model(entry.model_copy(update={"seed": s}), tokenizer).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_new_model_leaves_the_global_random_state_alone(bert):
    entry = stock_entry("bert")
    tokenizer = load_tokenizer(bert, entry)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    new_model(entry, tokenizer)
    assert torch.equal(torch.rand(3), expected)


def test_a_new_model_has_the_tokenizers_vocabulary_and_ids(bert):
    for kind in KINDS:
        entry = stock_entry(kind)
        tokenizer = load_tokenizer(bert, entry)
        config = new_model(entry, tokenizer).config
        assert config.vocab_size == 24 and len(tokenizer) == 23
        assert config.pad_token_id == config.eos_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "bart-simpson"}, "new.model_type = 'bart-simpson' is not an architecture of transformers"),
        ({"model_type": None}, "new.model_type = None is not an architecture of transformers"),
        ({"hidden_sise": 32}, "new.hidden_sise = 32 is not a setting of bert; see its config class"),
        ({"hidden_size": 33}, "new: no bert as encoder can be made of these settings"),
        ({"hidden_size": "wide"}, "new: no bert as encoder can be made of these settings"),
        ({"hidden_act": "nonesuch"}, "new: no bert as encoder can be made of these settings"),
    ],
)
def test_an_unknown_architecture_or_setting_is_one_line(bert, changes, line):
    entry = stock_entry("bert")
    entry = entry.model_copy(update={"new": entry.new | changes})
    with pytest.raises(ValueError, match=line) as caught:
        new_model(entry, load_tokenizer(bert, entry))
    assert "\n" not in str(caught.value)


def test_a_decoder_is_no_encoder(bert):
    entry = stock_entry("llama").model_copy(update={"family": "encoder"})
    with pytest.raises(ValueError, match="new: no llama as encoder can be made") as caught:
        new_model(entry, load_tokenizer(bert, entry))
    assert "\n" not in str(caught.value)


def test_roberta_loses_the_positions_up_to_its_padding_token():
    config = SimpleNamespace(max_position_embeddings=514, pad_token_id=1, model_type="roberta")
    assert longest_row(config) == 512
    assert longest_row(SimpleNamespace(max_position_embeddings=514, pad_token_id=1, model_type="bert")) == 514


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_longest_row_is_taken_by_the_model(bert, kind):
    entry = stock_entry(kind)
    model = new_model(entry, load_tokenizer(bert, entry)).eval()
    longest = longest_row(model.config)
    assert hidden_states(model, torch.full((1, longest), 6)).isfinite().all()
    if kind == "roberta":
        with pytest.raises((IndexError, RuntimeError)):
            hidden_states(model, torch.full((1, longest + 1), 6))


def test_the_old_names_of_a_layer_norms_weights_are_read(copy):
    """The first BERT checkpoints call them gamma and beta and bring heads that a masked LM has no use for."""
    path = copy / "model.safetensors"
    saved = load_file(path)
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in saved.items()}  # fmt: skip
    old |= {"cls.seq_relationship.weight": torch.zeros(2, 32), "bert.pooler.dense.bias": torch.zeros(32)}
    assert old.keys() & saved.keys() != saved.keys()
    save_file(old, path, metadata={"format": "pt"})
    loaded = load_backbone(copy, entry=stock_entry("bert")).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
