"""Tiny random models of stock classes, whose attention matters and whose windows are shorter than the test rows."""

from __future__ import annotations

import torch
from torch import nn

VOCAB = 64
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_MODERN = {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 8, "global_attn_every_n_layers": 2}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}

ENCODERS = {
    "bert": _COMMON,
    "roberta": _COMMON,
    "modernbert": _COMMON | _MODERN,
    "distilbert": {
        "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "pad_token_id": 0,
        "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2,
    },
}  # fmt: skip
DECODERS = {
    "llama": _GROUPED,
    "qwen2": _GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": _GROUPED | {"head_dim": 8},
    "qwen3_moe": _GROUPED | _EXPERTS | {"head_dim": 8},
    "mistral": _GROUPED | {"sliding_window": 4},
    "gemma3_text": _GROUPED | _WINDOWS | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
CASES = [*ENCODERS, *DECODERS, *(f"{kind}-causal" for kind in DECODERS)]
"""A decoder is bidirectional unless its name says otherwise."""


def stock_model(case: str, **settings) -> nn.Module:
    """The model of a case, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    kind = case.removesuffix("-causal")
    config = AutoConfig.for_model(kind, **(ENCODERS | DECODERS | {"deberta-v2": _COMMON})[kind] | settings)
    if kind in DECODERS and kind == case:
        config.is_causal = False
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForMaskedLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
    return model


def ragged(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, L], 0 as padding, and which of them are real [B, L] bool."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCAB, (len(lengths), max(lengths)), generator=generator)
    attention = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(attention, tokens, 0), attention
