"""Parameters and FLOPs of a model from the sizes of its architecture, for the stock classes of transformers.

A multiplication of a matrix with a vector is 2 FLOPs per entry, so a token costs 2 N forward and 6 N in training, N
the matrices it passes (Kaplan et al. 2020, arXiv:2001.08361); attention adds 4 n d per layer forward, n the positions
seen and d the width of all heads together, 12 n d in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dllm.config import ModelEntry, Shape
from dllm.families import FAMILIES

TRAINING = 3
"""Forward and backward cost this many forwards: each matrix is used once forward and twice backward."""

UNKNOWN_VOCABULARY = 1024
"""Vocabulary of a new model whose tokenizer is not there yet: about that of the synthetic world."""


@dataclass(frozen=True)
class Parameters:
    """Parameters by their use: looked up, in layers, in the head; `shared` of the head are the embedding once more."""

    embedding: int
    layers: int
    head: int
    shared: int

    @property
    def total(self) -> int:
        """Each parameter once."""
        return self.embedding + self.layers + self.head - self.shared


def parameters(shape: Shape) -> Parameters:
    """Parameters of the masked-LM or causal-LM class of a shape; unknown architectures are counted as a Llama."""
    return COUNTS.get(shape.model_type, _llama)(shape)


def active_parameters(shape: Shape) -> Parameters:
    """Those that a token passes: of the experts, only the chosen ones."""
    return parameters(shape if shape.experts is None else shape.model_copy(update={"experts": shape.active_experts}))


def is_known(shape: Shape) -> bool:
    """Whether the count of this architecture is exact."""
    return shape.model_type in COUNTS


def is_gated(shape: Shape) -> bool:
    """Whether the feed-forward part multiplies two inner projections."""
    return shape.model_type not in ("bert", "roberta", "gpt2")


def forward_flops(shape: Shape, length: float, *, causal: bool = False) -> float:
    """FLOPs of one token through all layers, forward, in a row of `length` tokens; the head is not in it.

    Local layers see `window` positions at most; a causal row sees half of its length on average.
    """
    seen = length / 2 if causal else length
    wide = global_layers(shape)
    local = shape.layers - wide
    near = head_width(shape) * min(seen, shape.window or seen)
    attention = 4 * shape.heads * (wide * (shape.global_head_width or head_width(shape)) * seen + local * near)
    return 2 * active_parameters(shape).layers + attention


def head_flops(shape: Shape) -> float:
    """FLOPs of the head at one scored position, forward."""
    return 2 * parameters(shape).head


def global_layers(shape: Shape) -> int:
    """Layers that see every position: the first of every `global_every`."""
    return -(-shape.layers // shape.global_every) if shape.window else shape.layers


def head_width(shape: Shape) -> int:
    """Size of one head."""
    return shape.head_width or shape.width // shape.heads


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """Sizes (out, in) of the matrices of one layer, as a Llama, a BERT or a ModernBERT has them."""
    d, i, inner = shape.width, shape.intermediate, head_width(shape) * shape.heads
    keys = head_width(shape) * (shape.kv_heads or shape.heads)
    if shape.model_type == "modernbert":
        return [(3 * d, d), (d, d), (2 * i, d), (d, i)]
    return [(inner, d), (keys, d), (keys, d), (d, inner), *[(i, d)] * (2 if is_gated(shape) else 1), (d, i)]


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Parameters of LoRA adapters beside every matrix inside layers."""
    return shape.layers * rank * sum(m + n for m, n in matrices(shape))


def muon_flops(shape: Shape) -> float:
    """FLOPs of one Muon step: five Newton-Schulz iterations on every matrix of m x n, m <= n, in layers.

    Each iteration is A = X X^T, B = b A + c A A, X = a X + B X: 2 m^2 (2 n + m) (Jordan et al. 2024).
    """

    def matrix(a: int, b: int) -> float:
        m, n = sorted((a, b))
        return 5 * 2 * m * m * (2 * n + m)

    return shape.layers * sum(matrix(m, n) for m, n in matrices(shape))


# --------------------------------------------------------------------------------------------------------------------
# Counting, class by class


def _bert(shape: Shape) -> Parameters:
    d, i, v = shape.width, shape.intermediate, shape.vocabulary
    embedding = (v + shape.positions + shape.token_types) * d + 2 * d
    layer = 4 * (d * d + d) + (2 * d * i + i + d) + 4 * d
    return Parameters(embedding, shape.layers * layer, d * d + d + 2 * d + v * d + v, v * d)


def _modernbert(shape: Shape) -> Parameters:
    d, i, v = shape.width, shape.intermediate, shape.vocabulary
    layers = shape.layers * (4 * d * d + 3 * d * i + 2 * d) - d + d  # no norm before the first layer, one at the end
    return Parameters(v * d + d, layers, d * d + d + v * d + v, v * d)


def _gpt2(shape: Shape) -> Parameters:
    d, i, v = shape.width, shape.intermediate, shape.vocabulary
    layer = 4 * (d * d + d) + (2 * d * i + i + d) + 4 * d
    return Parameters((v + shape.positions) * d, shape.layers * layer + 2 * d, v * d, v * d)


def _llama(shape: Shape) -> Parameters:
    d, i, v = shape.width, shape.intermediate, shape.vocabulary
    queries, keys = head_width(shape) * shape.heads, head_width(shape) * (shape.kv_heads or shape.heads)
    layer = 2 * d * queries + 2 * d * keys + 3 * d * i + 2 * d
    if shape.model_type == "qwen2":
        layer += queries + 2 * keys
    if shape.model_type == "qwen3":
        layer += 2 * head_width(shape)
    return Parameters(v * d, shape.layers * layer + d, v * d, v * d if shape.tied else 0)


def _experts(shape: Shape) -> Parameters:
    """A Llama whose feed-forward parts, after the dense ones, are experts with a router."""
    d, sparse = shape.width, shape.layers - shape.dense_layers
    queries, keys = head_width(shape) * shape.heads, head_width(shape) * (shape.kv_heads or shape.heads)
    attention = 2 * d * queries + 2 * d * keys + 2 * head_width(shape) + 2 * d
    chosen = (shape.experts or 0) * (3 * d * shape.expert_intermediate + d)
    shared = shape.shared_experts * 3 * d * shape.expert_intermediate
    layers = shape.layers * attention + shape.dense_layers * 3 * d * shape.intermediate + sparse * (chosen + shared) + d
    head = shape.vocabulary * d
    return Parameters(head, layers, head, head if shape.tied else 0)


def _diffusion_gemma(shape: Shape) -> Parameters:
    """The text part: a dense and a sparse feed-forward part in each layer, and what conditions a canvas on the last.

    Encoder and decoder share their weights; the vision tower is not counted.
    """
    d, inner, wide = shape.width, 3 * shape.width * shape.intermediate, global_layers(shape)
    near, far = head_width(shape), shape.global_head_width or head_width(shape)
    attention = 2 * d * near * (shape.heads + (shape.kv_heads or shape.heads)) + 2 * near
    globally = d * far * (2 * shape.heads + (shape.global_kv_heads or shape.kv_heads or shape.heads)) + 2 * far
    experts = (shape.experts or 0) * (3 * d * shape.expert_intermediate + d + 1) + d
    layers = (shape.layers - wide) * attention + wide * globally + shape.layers * (inner + experts + 7 * d)
    head = shape.vocabulary * d
    return Parameters(head, layers + d + inner + d, head, head if shape.tied else 0)


COUNTS: dict[str, Callable[[Shape], Parameters]] = {
    "bert": _bert,
    "roberta": _bert,
    "modernbert": _modernbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "qwen3_moe": _experts,
    "glm4_moe": _experts,
    "diffusion_gemma": _diffusion_gemma,
}

# --------------------------------------------------------------------------------------------------------------------
# From the names of transformers

NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_width": ("head_dim",),
    "intermediate": ("intermediate_size", "n_inner", "mlp_hidden_size"),
    "vocabulary": ("embedding_size", "vocab_size"),
    "positions": ("max_position_embeddings", "n_positions", "max_sequence_length"),
    "token_types": ("type_vocab_size",),
    "window": ("local_attention", "sliding_window"),
    "tied": ("tie_word_embeddings", "weight_tying"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "active_experts": ("num_experts_per_tok", "top_k_experts"),
    "expert_intermediate": ("moe_intermediate_size",),
    "shared_experts": ("n_shared_experts",),
    "dense_layers": ("first_k_dense_replace",),
    "global_head_width": ("global_head_dim",),
    "global_kv_heads": ("num_global_key_value_heads",),
}
"""Our name of a size: what configurations of transformers, and that of LLaDA, call it."""

STANDARD: dict[str, dict[str, Any]] = {
    "bert": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072, "positions": 512, "token_types": 2},
    "roberta": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072, "positions": 512, "token_types": 2},
    "modernbert": {"layers": 22, "width": 768, "heads": 12, "intermediate": 1152, "positions": 8192}
    | {"window": 128, "global_every": 3},
    "gpt2": {"layers": 12, "width": 768, "heads": 12, "positions": 1024},
    "llama": {"layers": 32, "width": 4096, "heads": 32, "intermediate": 11008, "positions": 2048, "tied": False},
    "mistral": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "tied": False},
    "qwen2": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "intermediate": 22016, "tied": False},
    "qwen3": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "head_width": 128, "intermediate": 22016}
    | {"tied": False},
    "qwen3_moe": {"layers": 24, "width": 2048, "heads": 32, "kv_heads": 4, "intermediate": 6144, "tied": False}
    | {"experts": 128, "active_experts": 8, "expert_intermediate": 768},
    "glm4_moe": {"layers": 46, "width": 4096, "heads": 96, "kv_heads": 8, "head_width": 128, "intermediate": 10944}
    | {"tied": False, "experts": 128, "active_experts": 8, "expert_intermediate": 1408, "shared_experts": 1}
    | {"dense_layers": 1},
    "diffusion_gemma": {"layers": 30, "width": 2304, "heads": 8, "kv_heads": 4, "head_width": 256, "intermediate": 9216}
    | {"positions": 131_072, "window": 512, "global_every": 6, "global_head_width": 512},
}
"""What the configuration classes of transformers take for a size that is not stated."""


def translated(config: dict[str, Any]) -> Shape:
    """The shape that a configuration of transformers (`config.json`, or `new` of an entry) states.

    A published family is read as its stock class. Sizes left out are those of the class. A vocabulary that is not
    stated is a guess.
    """
    config = _stock(config)
    kind = str(config.get("model_type", "unknown"))
    sizes: dict[str, Any] = {"layers": 12, "width": 768, "heads": 12, "positions": 2048, "model_type": kind}
    sizes |= STANDARD.get(kind, {})
    for ours, theirs in NAMES.items():
        stated = next((config[name] for name in theirs if config.get(name) is not None), None)
        if stated is not None and _has(kind, ours):
            sizes[ours] = stated
    sizes.setdefault("intermediate", 4 * sizes["width"])
    sizes.setdefault("vocabulary", UNKNOWN_VOCABULARY)
    if "window" in sizes and config.get("layer_types"):
        wide = config["layer_types"].count("full_attention")
        sizes["global_every"] = max(1, round(len(config["layer_types"]) / max(1, wide)))
    if kind == "modernbert" and config.get("global_attn_every_n_layers"):
        sizes["global_every"] = config["global_attn_every_n_layers"]
    if sizes.get("experts") and isinstance(sizes["experts"], int):
        sizes["active_experts"] = min(sizes["active_experts"], sizes["experts"])
    return Shape.model_validate(sizes)


def _stock(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the stock class that a published family is read as; any other as it is."""
    first = next(iter(config.get("architectures") or []), None)
    family = next((family for family in FAMILIES.values() if first in family.architectures), None)
    if family is None:
        text: dict[str, Any] = config.get("text_config") or {}
        return {**config, **text, "model_type": config.get("model_type", "unknown")}
    stated = {stock: config[name] for name, stock in family.settings.items() if config.get(name) is not None}
    return family.fixed | stated | family.also(config) | {"model_type": family.stock}


def _has(kind: str, size: str) -> bool:
    """Whether a size means something of an architecture."""
    gemma = "diffusion_gemma"
    only: dict[str, tuple[str, ...]] = {"window": ("modernbert", gemma), "token_types": ("bert", "roberta")}
    only |= {"global_head_width": (gemma,), "global_kv_heads": (gemma,)}
    experts = ("experts", "active_experts", "expert_intermediate", "shared_experts", "dense_layers")
    return kind in only.get(size, ("qwen3_moe", "glm4_moe", gemma) if size in experts else (kind,))


def differences(stated: Shape, measured: Shape) -> list[str]:
    """Sizes that count for the plan and differ, as `layers = 12, not 24`."""
    names = (
        *("model_type", "layers", "width", "heads", "intermediate", "vocabulary", "positions", "window", "tied"),
        *("experts", "active_experts", "expert_intermediate"),
    )
    pairs = [(name, getattr(stated, name), getattr(measured, name)) for name in names]
    return [f"{name} = {ours!r}, not {theirs!r}" for name, ours, theirs in pairs if ours != theirs]


def shape_of(entry: ModelEntry) -> Shape | None:
    """The shape of an entry: stated, or that of its `new` model; None for a hub model that states no shape."""
    if entry.shape is not None:
        return entry.shape
    return translated(entry.new) if entry.new is not None else None
