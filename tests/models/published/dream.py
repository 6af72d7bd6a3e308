"""Dream (arXiv:2508.15487): a Qwen2.5 without causal mask; position i still scores token i + 1."""

from __future__ import annotations

from functools import partial

from tests.models.published import qwen_like

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
TOKENIZER = "qwen2"
MASK = 259

CONFIG = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration.DreamConfig", "AutoModel": "modeling.DreamModel"},
    "bos_token_id": 256, "eos_token_id": 256, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "mask_token_id": MASK, "max_position_embeddings": 96, "max_window_layers": 2,
    "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 256, "rms_norm_eps": 0.02, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "use_cache": False, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 272,
}  # fmt: skip

SIZES = {
    "Dream-v0-7B": (
        {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
        },
        7.62e9,
    )
}  # fmt: skip

shapes = partial(qwen_like.dense_shapes, bias=True, norm=False)
logits = qwen_like.dense_logits
