"""LLaDA (arXiv:2502.09992): a Llama without causal mask, in the names of OLMo."""

from __future__ import annotations

from torch import Tensor

from tests.models.published.pieces import Weights, attend, rms_norm, rotate, swiglu

TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TOKENIZER = "fast"
MASK = 258

CONFIG = {
    "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"], "attention_layer_norm": False,
    "auto_map": {"AutoConfig": "configuration.LLaDAConfig", "AutoModelForCausalLM": "modeling.LLaDAModelLM"},
    "block_type": "llama", "d_model": 32, "embedding_size": 264, "eos_token_id": 257, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
    "mask_token_id": MASK, "max_sequence_length": 96, "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada",
    "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "pad_token_id": 257,
    "rms_norm_eps": 0.02, "rope": True, "rope_theta": 500000.0, "scale_logits": False, "vocab_size": 264,
    "weight_tying": False,
}  # fmt: skip

SIZES = {
    "LLaDA-8B": (
        {
            "d_model": 4096, "embedding_size": 126464, "eos_token_id": 126081, "mask_token_id": 126336,
            "max_sequence_length": 4096, "mlp_hidden_size": 12288, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
            "pad_token_id": 126081, "vocab_size": 126464,
        },
        16_031_162_368 / 2,  # bytes of bfloat16 tensors, as model.safetensors.index.json states them
    )
}  # fmt: skip


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    width, inner = c["d_model"], c["mlp_hidden_size"]
    keys = width // c["n_heads"] * c["n_kv_heads"]
    found = {"wte.weight": (c["embedding_size"], width)}
    for n in range(c["n_layers"]):
        found |= {
            f"blocks.{n}.attn_norm.weight": (width,),
            f"blocks.{n}.q_proj.weight": (width, width),
            f"blocks.{n}.k_proj.weight": (keys, width),
            f"blocks.{n}.v_proj.weight": (keys, width),
            f"blocks.{n}.attn_out.weight": (width, width),
            f"blocks.{n}.ff_norm.weight": (width,),
            f"blocks.{n}.ff_proj.weight": (inner, width),
            f"blocks.{n}.up_proj.weight": (inner, width),
            f"blocks.{n}.ff_out.weight": (width, inner),
        }
    found |= {"ln_f.weight": (width,), "ff_out.weight": (c["embedding_size"], width)}
    return {f"model.transformer.{name}": shape for name, shape in found.items()}


def logits(c: dict, weights: Weights, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
    def w(name: str) -> Tensor:
        return weights[f"model.transformer.{name}.weight"]

    x = w("wte")[tokens]
    for n in range(c["n_layers"]):
        block = f"blocks.{n}"
        normed = rms_norm(x, w(f"{block}.attn_norm"), c["rms_norm_eps"])
        query, key, value = (
            (normed @ w(f"{block}.{part}_proj").T).unflatten(-1, (heads, -1))
            for part, heads in (("q", c["n_heads"]), ("k", c["n_kv_heads"]), ("v", c["n_kv_heads"]))
        )
        query, key = (rotate(part, c["rope_theta"]) for part in (query, key))
        x = x + attend(query, key, value, allowed) @ w(f"{block}.attn_out").T
        normed = rms_norm(x, w(f"{block}.ff_norm"), c["rms_norm_eps"])
        x = x + swiglu(normed, w(f"{block}.ff_proj"), w(f"{block}.up_proj"), w(f"{block}.ff_out"))
    return rms_norm(x, w("ln_f"), c["rms_norm_eps"]) @ w("ff_out").T
