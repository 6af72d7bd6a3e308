"""Fast-dLLM v2 (arXiv:2509.26328): a Qwen2.5 in blocks of 32; position i still scores token i + 1."""

from __future__ import annotations

from tests.models.published import dream

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|"]
TOKENIZER = "qwen2"
MASK = 259

CONFIG = {k: v for k, v in dream.CONFIG.items() if k not in ("mask_token_id", "use_mrope")} | {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenModel",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 32,
    "layer_types": ["full_attention", "full_attention"],
    "model_type": "Fast_dLLM_Qwen",
}

SIZES = {"Fast_dLLM_v2_7B": dream.SIZES["Dream-v0-7B"]}
"""Those of Qwen2.5-7B-Instruct, as of Dream."""

shapes, logits = dream.shapes, dream.logits
