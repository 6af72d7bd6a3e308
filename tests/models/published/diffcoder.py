"""Stable-DiffCoder: a Llama in blocks of 4; position i scores token i."""

from __future__ import annotations

from functools import partial

from tests.models.published import qwen_like

END = "<[end▁of▁sentence]>"
TOKENS = ["<[begin▁of▁sentence]>", "<[PAD▁TOKEN]>", END, "<[MASK_TOKEN]>"]
TOKENIZER = "fast"
MASK = 259

CONFIG = {
    "architectures": ["StableDiffcoderForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    "bos_token_id": 256, "eos_token_id": 258, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.009882118,
    "intermediate_size": 48, "max_position_embeddings": 96, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 257,
    "rms_norm_eps": 0.02, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "use_cache": True,
    "vocab_size": 272,
}  # fmt: skip

SIZES = {
    "Stable-DiffCoder-8B": (
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 155136, "max_position_embeddings": 8192,
        },
        8.25e9,
    )
}  # fmt: skip

shapes = partial(qwen_like.dense_shapes, bias=False, norm=False)
logits = qwen_like.dense_logits
