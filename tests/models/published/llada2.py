"""LLaDA2 (arXiv:2602.08676): fused queries, keys and values, half rotary, groups of experts, blocks of 32 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.published.pieces import Weights, attend, mlp, mlp_shapes, rms_norm, rotate

TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]
TOKENIZER = "fast"
MASK = 258

CONFIG = {
    "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration.LLaDA2MoeConfig", "AutoModel": "modeling.LLaDA2MoeModelLM"},
    "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 96, "max_window_layers": 28,
    "model_type": "llada2_moe", "moe_intermediate_size": 16, "moe_router_enable_expert_bias": True, "n_group": 4,
    "norm_head": False, "norm_softmax": False, "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 12,
    "num_experts_per_tok": 3, "num_hidden_layers": 3, "num_key_value_heads": 2, "num_shared_experts": 1,
    "output_dropout": 0.0, "output_router_logits": False, "pad_token_id": 257, "partial_rotary_factor": 0.25,
    "rms_norm_eps": 0.02, "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 4, "routed_scaling_factor": 2.5,
    "router_dtype": "fp32", "score_function": "sigmoid", "sliding_window": 4096, "tie_word_embeddings": False,
    "topk_group": 2, "use_bias": False, "use_cache": False, "use_qkv_bias": False, "use_rmsnorm": True,
    "use_sliding_window": False, "vocab_size": 264,
}  # fmt: skip

SIZES = {
    "LLaDA2.0-mini": (
        {
            "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512, "num_hidden_layers": 20,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "n_group": 8,
            "topk_group": 4, "num_experts_per_tok": 8, "vocab_size": 157184, "max_position_embeddings": 16384,
        },
        16.26e9,
    ),
    "LLaDA2.0-flash": (
        {
            "hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 256, "n_group": 8,
            "topk_group": 4, "num_experts_per_tok": 8, "vocab_size": 157184, "max_position_embeddings": 16384,
        },
        103e9,
    ),
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    width, head, inner = c["hidden_size"], c["head_dim"], c["moe_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (c["vocab_size"], width)}
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        heads = c["num_attention_heads"] + 2 * c["num_key_value_heads"]
        found |= {
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.attention.query_key_value.weight": (heads * head, width),
            f"{layer}.attention.query_layernorm.weight": (head,),
            f"{layer}.attention.key_layernorm.weight": (head,),
            f"{layer}.attention.dense.weight": (width, c["num_attention_heads"] * head),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
        if n < c["first_k_dense_replace"]:
            found |= mlp_shapes(f"{layer}.mlp", width, c["intermediate_size"])
            continue
        found |= {
            f"{layer}.mlp.gate.weight": (c["num_experts"], width),
            f"{layer}.mlp.gate.expert_bias": (c["num_experts"],),
        }
        found |= mlp_shapes(f"{layer}.mlp.shared_experts", width, inner * c["num_shared_experts"])
        for e in range(c["num_experts"]):
            found |= mlp_shapes(f"{layer}.mlp.experts.{e}", width, inner)
    return found | {"model.norm.weight": (width,), "lm_head.weight": (c["vocab_size"], width)}


def route(c: dict, token: Tensor, gate: Tensor, bias: Tensor) -> list[tuple[int, Tensor]]:
    """Experts of a token [D] and their weights: the bias decides who is chosen, not how much it counts."""
    score = (gate @ token).sigmoid()
    choice = score + bias
    groups = choice.view(c["n_group"], -1)
    best = groups.topk(2, -1).values.sum(-1).topk(c["topk_group"]).indices.tolist()
    size = groups.shape[1]
    candidates = sorted((e for g in best for e in range(g * size, (g + 1) * size)), key=lambda e: -choice[e])
    chosen = candidates[: c["num_experts_per_tok"]]
    total = torch.stack([score[e] for e in chosen]).sum()
    return [(e, score[e] / total * c["routed_scaling_factor"]) for e in chosen]


def logits(c: dict, weights: Weights, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
    epsilon, heads, keys = c["rms_norm_eps"], c["num_attention_heads"], c["num_key_value_heads"]
    x = weights["model.word_embeddings.weight"][tokens]
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], epsilon)
        fused = (normed @ weights[f"{layer}.attention.query_key_value.weight"].T).unflatten(-1, (heads + 2 * keys, -1))
        query, key, value = fused.split([heads, keys, keys], -2)
        query = rms_norm(query, weights[f"{layer}.attention.query_layernorm.weight"], epsilon)
        key = rms_norm(key, weights[f"{layer}.attention.key_layernorm.weight"], epsilon)
        query, key = (rotate(part, c["rope_theta"], c["partial_rotary_factor"]) for part in (query, key))
        x = x + attend(query, key, value, allowed) @ weights[f"{layer}.attention.dense.weight"].T
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], epsilon)
        x = x + _feed(c, weights, f"{layer}.mlp", normed)
    return rms_norm(x, weights["model.norm.weight"], epsilon) @ weights["lm_head.weight"].T


def _feed(c: dict, weights: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.gate.weight" not in weights:
        return mlp(weights, name, x)
    out = mlp(weights, f"{name}.shared_experts", x)
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[tuple(place)]
        for e, weight in route(c, token, weights[f"{name}.gate.weight"], weights[f"{name}.gate.expert_bias"]):
            out[tuple(place)] += weight * mlp(weights, f"{name}.experts.{e}", token)
    return out
