"""SDAR (arXiv:2510.06303): a Qwen3 in blocks of 4; position i scores token i."""

from __future__ import annotations

from functools import partial

from tests.models.published import qwen_like

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
TOKENIZER = "qwen2"
MASK = 259

CONFIG = {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4, "bos_token_id": 256, "debug": False, "eos_token_id": 256, "ep_size": 1, "fuse_cross_entropy": True,
    "head_dim": 12, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "mask_token_id": MASK, "max_position_embeddings": 96, "max_window_layers": 28, "micro_forward": False,
    "model_type": "sdar", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 0.02, "rope_scaling": None, "rope_theta": 1000000, "skip_checkpoint": False, "sliding_window": None,
    "tie_word_embeddings": False, "use_cache": False, "use_deepep": False, "use_sliding_window": False,
    "vocab_size": 272,
}  # fmt: skip

SIZES = {
    "SDAR-1.7B-Chat": (
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768,
        },
        2.03e9,
    )
}  # fmt: skip
"""1.7 B, and the embedding once more: the output matrix is its own."""

shapes = partial(qwen_like.dense_shapes, bias=False, norm=True)
logits = qwen_like.dense_logits
