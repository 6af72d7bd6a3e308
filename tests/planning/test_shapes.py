"""Parameters and FLOPs from sizes, against the classes of transformers and against torch's own counter."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
)

from dllm.config import ModelEntry, Shape, load_project
from dllm.planning.shapes import (
    active_parameters,
    differences,
    forward_flops,
    head_flops,
    is_known,
    muon_flops,
    parameters,
    shape_of,
    translated,
)

ROOT = Path(__file__).parent.parent.parent
PAPER = load_project(ROOT / "config", ROOT / "config/paper.yaml").models
PAPER = {name: entry for name, entry in PAPER.items() if entry.shape}
LAPTOP = load_project(ROOT / "config", ROOT / "config/laptop.yaml").models
LAPTOP = {name: entry for name, entry in LAPTOP.items() if entry.new}
ENTRIES = {
    **{"llada": "llada-8b-base", "llada_moe": "llada-moe-7b-instruct", "llada2": "llada2-mini"},
    **{"dream": "dream-7b-base", "rnd1": "rnd1-base"},
}
LEADERBOARD = load_project(ROOT / "config", ROOT / "config/leaderboard.yaml").models
each_published = pytest.mark.parametrize("name", PAPER)


def stock_config(shape: Shape):
    """The configuration of transformers that a shape stands for."""
    common = {"vocab_size": shape.vocabulary, "pad_token_id": 0, "tie_word_embeddings": shape.tied}
    if shape.model_type == "gpt2":
        sizes = {"n_layer": shape.layers, "n_embd": shape.width, "n_head": shape.heads, "n_positions": shape.positions}
        return AutoConfig.for_model("gpt2", **common, **sizes, n_inner=shape.intermediate)
    sizes = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
    }
    if shape.kv_heads or shape.model_type in ("llama", "qwen2", "qwen3", "mistral"):
        sizes["num_key_value_heads"] = shape.kv_heads or shape.heads
    if shape.token_types:
        sizes["type_vocab_size"] = shape.token_types
    if shape.model_type == "modernbert":
        sizes |= {"local_attention": shape.window, "global_attn_every_n_layers": shape.global_every}
    if shape.experts:
        sizes |= {
            "head_dim": shape.head_width,
            "num_experts": shape.experts,
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.active_experts,
            "moe_intermediate_size": shape.expert_intermediate,
            "num_key_value_heads": shape.kv_heads or shape.heads,
        }
    if shape.model_type == "glm4_moe":
        sizes |= {
            "n_routed_experts": shape.experts,
            "n_shared_experts": shape.shared_experts,
            "first_k_dense_replace": shape.dense_layers,
            "use_qk_norm": True,
        }
    return AutoConfig.for_model(shape.model_type, **common, **sizes)


def stock_model(shape: Shape, device: str = "meta"):
    encoder = shape.model_type in ("bert", "roberta", "modernbert")
    auto = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    config = stock_config(shape)
    config._attn_implementation = "eager"
    with torch.device(device):
        return auto.from_config(config)


def counted(model) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@each_published
def test_a_published_shape_has_the_parameters_of_its_class_and_of_the_entry(name):
    entry = PAPER[name]
    total = parameters(entry.shape).total
    assert is_known(entry.shape)
    assert total == counted(stock_model(entry.shape))
    assert total == pytest.approx(entry.parameters, rel=0.02)


@pytest.mark.parametrize("name", [name for name, entry in PAPER.items() if entry.shape.experts])
def test_a_token_passes_the_chosen_experts_alone(name):
    """A model with as many experts as one token passes, all of them chosen, costs as much."""
    shape = PAPER[name].shape
    small = shape.model_copy(update={"experts": shape.active_experts})
    assert active_parameters(shape) == parameters(small) and forward_flops(shape, 64) == forward_flops(small, 64)
    assert active_parameters(shape).layers < parameters(shape).layers / 3
    dense = PAPER["llada-8b-base"].shape
    assert active_parameters(dense) == parameters(dense)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_config_of_a_published_family_states_the_shape_of_its_entry(name):
    published = import_module(f"tests.models.published.{name}")
    sizes, _ = next(iter(published.SIZES.values()))
    assert differences(PAPER[ENTRIES[name]].shape, translated(published.CONFIG | sizes)) == []


def test_sizes_of_experts_are_stated_together():
    shape = PAPER["llada2-mini"].shape.model_dump()
    for wrong in ({"active_experts": 0}, {"expert_intermediate": 0}, {"active_experts": 257}, {"experts": None}):
        with pytest.raises(ValueError, match="state all three or none"):
            Shape.model_validate(shape | wrong)


@pytest.mark.parametrize("name", LAPTOP)
def test_a_new_models_shape_has_the_parameters_of_the_model_that_is_made(name):
    entry = LAPTOP[name]
    shape = shape_of(entry).model_copy(update={"vocabulary": 896})
    config = AutoConfig.for_model(**{**entry.new, "vocab_size": 896, "pad_token_id": 0})
    with torch.device("meta"):
        auto = AutoModelForMaskedLM if entry.family == "encoder" else AutoModelForCausalLM
        assert parameters(shape).total == counted(auto.from_config(config))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoders_with_fewer_key_heads_are_counted_exactly(kind, tied):
    sizes = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "intermediate": 96, "vocabulary": 200}
    shape = Shape(model_type=kind, positions=32, tied=tied, head_width=16 if kind == "qwen3" else None, **sizes)
    config = stock_config(shape)
    if kind == "qwen3":
        config.head_dim = 16
    with torch.device("meta"):
        assert parameters(shape).total == counted(AutoModelForCausalLM.from_config(config))


@each_published
def test_a_published_config_is_read_as_the_shape_it_was_written_for(name):
    shape = PAPER[name].shape
    assert differences(shape, translated(stock_config(shape).to_dict())) == []


def test_differences_name_the_size_and_both_values():
    shape = PAPER["bert-base"].shape
    wrong = shape.model_copy(update={"layers": 11})
    assert differences(wrong, shape) == ["layers = 11, not 12"]


@pytest.mark.parametrize(("kind", "length"), [("bert", 48), ("modernbert", 48), ("gpt2", 48), ("qwen2", 48)])
def test_forward_flops_are_what_torch_counts(kind, length):
    shape = Shape(
        model_type=kind, layers=3, width=128, heads=2, intermediate=256, vocabulary=500, positions=64
    ).model_copy(update={"window": 128, "global_every": 3} if kind == "modernbert" else {})
    model = stock_model(shape, "cpu").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, length, dtype=torch.long))
    predicted = 2 * length * (forward_flops(shape, length) + head_flops(shape))
    # biases and norms are counted as if they were multiplied: below 2 % at this width
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_local_layer_stops_growing_at_its_window_and_a_causal_row_sees_half():
    wide = PAPER["bert-large"].shape
    local = PAPER["modernbert-large"].shape
    quadratic = [forward_flops(wide, n) - forward_flops(wide, 0) for n in (512, 1024)]
    assert quadratic[1] == 2 * quadratic[0] == 2 * 4 * 24 * 1024 * 512
    flat = [forward_flops(local, n) - forward_flops(local, 0) for n in (512, 1024)]
    assert flat[0] < flat[1] < 2 * flat[0]
    assert flat[1] - flat[0] == 4 * 10 * 1024 * 512  # 10 of the 28 layers see everything
    assert forward_flops(wide, 512, causal=True) - forward_flops(wide, 0) == quadratic[0] / 2


def test_muon_flops_are_those_of_its_iterations():
    shape = Shape(model_type="modernbert", layers=2, width=32, heads=2, intermediate=48, vocabulary=100, positions=64)

    def iterations(rows: int, columns: int) -> int:
        x = torch.randn(min(rows, columns), max(rows, columns))
        with FlopCounterMode(display=False) as counter:
            for _ in range(5):
                a = x @ x.T
                x = 0.1 * x + (0.1 * a + 0.1 * a @ a) @ x
        return counter.get_total_flops()

    model = stock_model(shape.model_copy(update={"window": 16, "global_every": 2}), "cpu")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    assert muon_flops(shape) == sum(iterations(*p.shape) for p in matrices)


def test_a_hub_model_without_a_shape_has_none_and_an_unknown_class_is_a_guess():
    assert shape_of(ModelEntry(hub="a/b", revision="0" * 40)) is None
    assert not is_known(translated({"model_type": "something-new", "hidden_size": 64, "num_attention_heads": 2}))


def test_diffusion_gemma_has_the_parameters_of_its_class_and_of_what_was_published():
    """Encoder and decoder share their weights, and of the vision tower, which the plan leaves out, 572,792,112 are."""
    shape = LEADERBOARD["diffusiongemma-26b-a4b-it"].shape
    text = {
        "hidden_size": 2816, "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "intermediate_size": 2112,
        "moe_intermediate_size": 704, "num_experts": 128, "top_k_experts": 8, "sliding_window": 1024,
    }  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72,
    }  # fmt: skip
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(text_config=text, vision_config=vision))
    written = sum(p.numel() for name, p in model.named_parameters() if "vision" not in name)
    assert parameters(shape).total == written
    assert counted(model) == LEADERBOARD["diffusiongemma-26b-a4b-it"].parameters
    stated = translated({"model_type": "diffusion_gemma", "text_config": text | {"vocab_size": 262144}})
    assert stated == shape.model_copy(update={"positions": stated.positions}) and is_known(shape)
    assert active_parameters(shape).total < 4e9
