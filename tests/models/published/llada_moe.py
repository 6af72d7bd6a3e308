"""LLaDA-MoE (arXiv:2509.24389): experts weighted by their share of all probability, not renormalised."""

from __future__ import annotations

from torch import Tensor

from tests.models.published import qwen_like
from tests.models.published.pieces import Weights, mlp, mlp_shapes, softmax_experts

TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"]
TOKENIZER = "fast"
MASK = 258

CONFIG = {
    "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration.LLaDAConfig", "AutoModel": "modeling.LLaDAMoEModelLM"},
    "clip_qkv": None, "dense_intermediate_size": 40, "eos_token_id": 257, "expert_intermediate_size": 16,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "max_position_embeddings": 96,
    "model_type": "llada", "moe_layer_freq": [0, 1, 1], "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax", "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "num_key_value_heads": 4, "output_router_logits": False, "pad_token_id": 257,
    "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 0.02, "rope_scaling": None, "rope_theta": 50000,
    "routed_scaling_factor": 1, "router_aux_loss_coef": 0.01, "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False, "use_cache": False, "vocab_size": 264,
}  # fmt: skip

SIZES = {
    "LLaDA-MoE-7B-A1B": (
        {
            "hidden_size": 2048, "dense_intermediate_size": 8192, "expert_intermediate_size": 1024,
            "num_hidden_layers": 16, "moe_layer_freq": [1] * 16, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 157184, "max_position_embeddings": 8192,
        },
        7.36e9,
    )
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    width, found = c["hidden_size"], qwen_like.outer_shapes(c)
    for n, sparse in enumerate(c["moe_layer_freq"]):
        found |= qwen_like.attention_shapes(c, n, head=width // c["num_attention_heads"], bias=False, norm=True)
        if not sparse:
            found |= mlp_shapes(f"model.layers.{n}.mlp", width, c["dense_intermediate_size"])
            continue
        found[f"model.layers.{n}.mlp.gate.weight"] = (c["num_experts"], width)
        for e in range(c["num_experts"]):
            found |= mlp_shapes(f"model.layers.{n}.mlp.experts.{e}", width, c["expert_intermediate_size"])
    return found


def logits(c: dict, weights: Weights, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
    def feed(n: int, x: Tensor) -> Tensor:
        name = f"model.layers.{n}.mlp"
        if not c["moe_layer_freq"][n]:
            return mlp(weights, name, x)
        return softmax_experts(weights, name, x, c["num_experts_per_tok"], renormalise=False)

    return qwen_like.logits(c, weights, tokens, feed, allowed=allowed)
