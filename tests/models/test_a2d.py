"""Any stock causal language model becomes a diffusion model from an entry: what changes, and what does not."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dllm.config import DataPart, DatasetEntry, GenerateSettings, LikelihoodSettings, ModelEntry, PrepareConfig
from dllm.data.prepare import prepare
from dllm.language_model import load
from dllm.models.load import load_backbone
from dllm.models.tokenizers import load_tokenizer
from dllm.provenance import write_record
from dllm.training.trainer import train
from tests.plain_forward import hidden_states, logits_at
from tests.training.conftest import run_config

KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "gemma3_text", "gpt2")
WORDS = ["<eos>", "<unk>", *"the a cat dog sun moon sees likes red blue one two who ?".split()]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SETTINGS = {
    "mistral": SIZES | {"sliding_window": 4},
    "qwen3_moe": SIZES | EXPERTS | {"moe_intermediate_size": 16},
    "olmoe": SIZES | EXPERTS,
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
}
ENTRY = ModelEntry(
    new={}, tokenizer="saved", family="decoder", mask_token="<|mask|>", end_token="<eos>", end_of_turn="<eos>",
    chat_template="own",
)  # fmt: skip
NEXT = ENTRY.model_copy(update={"prediction": "next"})
SAME = {"atol": 1e-5, "rtol": 1e-5}
"""The same sums in another order."""


def save_autoregressive(directory, kind, *, rows=None):
    """A tiny stock causal model as it is published: no mask token, `rows` of embeddings (one a token)."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    tokens = {"vocab_size": rows or len(WORDS), "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SETTINGS.get(kind, SIZES) | tokens)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("autoregressive")
    return {kind: save_autoregressive(root / kind, kind) for kind in KINDS}


def rows():
    return torch.randint(2, len(WORDS), (2, 9), generator=torch.Generator().manual_seed(3))


def everywhere(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_kept_causal_is_the_original(saved, kind):
    backbone = load_backbone(saved[kind], entry=ENTRY, causal=True)
    original = AutoModelForCausalLM.from_pretrained(saved[kind]).eval()
    assert torch.equal(backbone.model(rows()).logits, original(rows()).logits)
    assert backbone.vocab_size == len(WORDS) and backbone.tokenizer.mask_token is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_after_the_switch_the_first_token_sees_the_last(saved, kind):
    model = load_backbone(saved[kind], entry=ENTRY).model
    tokens, other = rows()[:, :3], rows()[:, :3].clone()  # within every sliding window
    other[:, -1] = (other[:, -1] - 1) % 8 + 2
    mask = everywhere(tokens)
    mask[1, -1] = False
    for attention in (None, mask):
        before, after = (hidden_states(model, t, attention) for t in (tokens, other))
        assert (before - after)[0, 0].abs().max() > 1e-3
        if attention is not None:  # padding is not seen
            torch.testing.assert_close(before[1, 0], after[1, 0], **SAME)
    assert model.config.is_causal is False


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_at_step_0_a_conversion_that_predicts_one_ahead_scores_what_the_original_predicts(saved, kind):
    """The switch put back, the converted model's score of token i is the original's of token i given those before."""
    original = AutoModelForCausalLM.from_pretrained(saved[kind]).eval()
    backbone = load_backbone(saved[kind], entry=NEXT)
    backbone.model.config.is_causal = True
    tokens = rows()
    found = logits_at(backbone.model, hidden_states(backbone.model, tokens), everywhere(tokens), backbone.prediction)
    found = found.view(*tokens.shape, -1)[:, 1:, : len(WORDS)]
    torch.testing.assert_close(found, original(tokens).logits[:, :-1], **SAME)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_new_mask_token_is_the_mean_of_all_tokens_and_the_old_are_untouched(saved, kind):
    backbone = load_backbone(saved[kind], entry=ENTRY)
    original = AutoModelForCausalLM.from_pretrained(saved[kind])
    assert backbone.mask_id == len(WORDS) and backbone.tokenizer.mask_token == "<|mask|>"
    assert backbone.vocab_size == backbone.model.config.vocab_size == 24 and len(backbone.tokenizer) == 17
    for ours, theirs in (
        (backbone.model.get_input_embeddings(), original.get_input_embeddings()),
        (backbone.model.get_output_embeddings(), original.get_output_embeddings()),
    ):
        assert torch.equal(ours.weight[: len(WORDS)], theirs.weight)
        expected = theirs.weight.mean(0).expand(24 - len(WORDS), -1)
        torch.testing.assert_close(ours.weight[len(WORDS) :], expected)


@torch.no_grad()
def test_rows_to_spare_are_used_before_the_embedding_grows(tmp_path):
    """Qwen3 has 151936 rows for 151669 tokens: the mask token takes the next of them."""
    directory = save_autoregressive(tmp_path, "qwen3", rows=32)
    before = AutoModelForCausalLM.from_pretrained(directory).get_input_embeddings().weight
    backbone = load_backbone(directory, entry=ENTRY)
    after = backbone.model.get_input_embeddings().weight
    assert backbone.vocab_size == 32 and backbone.mask_id == 16
    torch.testing.assert_close(after[16], before[:16].mean(0))
    assert torch.equal(after[17:], before[17:]) and torch.equal(after[:16], before[:16])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", [ENTRY, NEXT], ids=["in_place", "next"])
@torch.no_grad()
def test_a_converted_model_survives_saving_through_our_sidecar(saved, kind, entry, tmp_path):
    backbone = load_backbone(saved[kind], entry=entry)
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    sidecar = {
        "algorithm": "mdlm", "family": "decoder", "prediction": entry.prediction,
        "special_tokens": {"mask": entry.mask_token, "eos": entry.end_token, "end_of_turn": entry.end_of_turn},
    }  # fmt: skip
    (tmp_path / "dllm.json").write_text(json.dumps(sidecar))
    again = load_backbone(tmp_path)
    assert torch.equal(hidden_states(again.model, rows()), hidden_states(backbone.model, rows()))
    assert (again.mask_id, again.eos_id, again.prediction) == (backbone.mask_id, backbone.eos_id, entry.prediction)
    assert load_tokenizer(tmp_path).mask_token_id == backbone.mask_id


def test_a_foreign_autoregressive_model_without_an_entry_is_one_line(saved):
    with pytest.raises(ValueError, match="the tokenizer has no mask token; set mask_token in the model's entry"):
        load_backbone(saved["llama"])


def test_a_tokenizer_that_has_another_mask_token_is_not_given_a_second(saved, tmp_path):
    tokenizer = load_tokenizer(saved["llama"])
    tokenizer.add_special_tokens({"mask_token": "<own>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no token '<\|mask\|>' \(mask_token\); set mask_token .*: .*<own>"):
        load_tokenizer(tmp_path, ENTRY)


def test_an_end_token_is_never_invented(saved):
    with pytest.raises(ValueError, match=r"no token '\[PAD\]' \(end_token\); set end_token"):
        load_tokenizer(saved["llama"], ENTRY.model_copy(update={"end_token": "[PAD]"}))


@pytest.mark.parametrize(("kind", "entry"), [("qwen3", ENTRY), ("gemma3_text", NEXT)], ids=["qwen3", "gemma3"])
def test_a_converted_model_trains_samples_and_scores(tmp_path, kind, entry):
    save_autoregressive(tmp_path / "downloads" / "start", kind)
    write_record(tmp_path / "downloads" / "start", kind="model", name="start", config_digest="", inputs={})
    raw = tmp_path / "downloads" / "toy" / "text"
    raw.mkdir(parents=True)
    texts = ["the cat sees a dog", "who likes one red sun"] * 40
    (raw / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_record(raw.parent, kind="dataset", name="toy", config_digest="", inputs={})
    part = DataPart(name="text", path="downloads/toy", entry=DatasetEntry(world="text", kind="text", test_share=0.2))
    prepare(
        PrepareConfig(
            name="text", parts=[part], model_path="downloads/start", model=entry, length=24, split="disjoint"
        ),
        tmp_path,
    )
    config = run_config(
        init="start", init_path="downloads/start", model=entry, data="text", data_path="data/text", steps=40
    )
    target = train(config, tmp_path, quiet=True)
    losses = [
        row["loss"] for row in map(json.loads, (target / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]
    assert losses[-1] < losses[0]
    model = load(target / "model", device="cpu")
    assert model.backbone.prediction == entry.prediction and model.backbone.mask_id == 16
    assert model.generate(["the cat"], GenerateSettings(max_new_tokens=4, block_size=4, steps=4))
    seen, unseen = model.nelbo(["the cat", "the cat"], [" sees a dog", " sun who ?"], LikelihoodSettings(budget=5))
    assert seen.nats < unseen.nats
