"""RND1 (Radical Numerics 2025): a Qwen3-30B-A3B without causal mask; position i still scores token i + 1."""

from __future__ import annotations

from torch import Tensor

from tests.models.published import qwen_like
from tests.models.published.pieces import Weights, mlp_shapes, softmax_experts

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER = "qwen2"
MASK = 259
"""The tokenizer is Qwen3's; the mask token is the id behind its last."""

CONFIG = {
    "architectures": ["RND1LM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration.RND1Config", "AutoModelForMaskedLM": "modeling.RND1LM"},
    "decoder_sparse_step": 1, "eos_token_id": 258, "head_dim": 12, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 48, "is_causal": False, "mask_token_id": MASK,
    "max_position_embeddings": 96, "max_window_layers": 2, "mlp_only_layers": [], "model_type": "rnd1",
    "moe_backend": "hf", "moe_intermediate_size": 16, "norm_topk_prob": True, "num_attention_heads": 4,
    "num_diffusion_steps": 256, "num_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "output_router_logits": False, "pad_token_id": 256, "rms_norm_eps": 0.02,
    "rope_scaling": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": False,
    "tie_word_embeddings": False, "use_cache": False, "use_sliding_window": False, "vocab_size": 272,
}  # fmt: skip

SIZES = {
    "RND1-Base-0910": (
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "vocab_size": 151936, "max_position_embeddings": 40960,
        },
        30.5e9,
    )
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    found = qwen_like.outer_shapes(c)
    for n in range(c["num_hidden_layers"]):
        found |= qwen_like.attention_shapes(c, n, head=c["head_dim"], bias=False, norm=True)
        found[f"model.layers.{n}.mlp.gate.weight"] = (c["num_experts"], c["hidden_size"])
        for e in range(c["num_experts"]):
            found |= mlp_shapes(f"model.layers.{n}.mlp.experts.{e}", c["hidden_size"], c["moe_intermediate_size"])
    return found


def logits(c: dict, weights: Weights, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
    def feed(n: int, x: Tensor) -> Tensor:
        return softmax_experts(weights, f"model.layers.{n}.mlp", x, c["num_experts_per_tok"], renormalise=True)

    return qwen_like.logits(c, weights, tokens, feed, allowed=allowed)
