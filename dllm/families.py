"""Published diffusion language models as stock classes of transformers: a config translation and a name map each.

LLaDA is a Llama, Dream a Qwen2 that predicts one ahead, RND1 and LLaDA-MoE are Qwen3-MoEs, LLaDA2 is a GLM4-MoE, SDAR a
Qwen3, Fast-dLLM v2 a Qwen2 that predicts one ahead, Stable-DiffCoder a Llama; all attend in both directions, at least
within their block. The code beside such checkpoints is never run. DiffusionGemma is a class of transformers itself,
with a loader of its own (`OWN_CLASS`). A new family is a `Family` here:

| family | stock class | prediction | mask token | end | end of turn | attention |
|---|---|---|---|---|---|---|
| LLaDA | llama | in place | `<|mdm_mask|>` 126336 | `<|endoftext|>` 126081 | `<|eot_id|>` 126348 | full |
| LLaDA-MoE | qwen3_moe | in place | `<|mask|>` 156895 | `<|endoftext|>` 156892 | `<|role_end|>` | full |
| LLaDA2 | glm4_moe | in place | `<|mask|>` 156895 | `<|endoftext|>` 156892 | `<|role_end|>` | blocks of 32 |
| Dream | qwen2 | one ahead | `<|mask|>` 151666 | `<|endoftext|>` 151643 | `<|im_end|>` 151645 | full |
| RND1 | qwen3_moe | one ahead | `<|mask|>` 151669 | `<|endoftext|>` 151643 | `<|im_end|>` 151645 | full |
| SDAR | qwen3 | in place | `<|MASK|>` 151669 | `<|endoftext|>` 151643 | `<|im_end|>` 151645 | blocks of 4 |
| Fast-dLLM v2 | qwen2 | one ahead | `|<MASK>|` 151665 | `<|endoftext|>` 151643 | `<|im_end|>` 151645 | blocks of 32 |
| Stable-DiffCoder | llama | in place | `<[MASK_TOKEN]>` 5 | `<[end▁of▁sentence]>` 2 | the same | blocks of 4 |

Sources: arXiv:2502.09992 (LLaDA), arXiv:2509.24389 (LLaDA-MoE), the LLaDA2.0 technical report and arXiv:2602.08676
(LLaDA2), arXiv:2508.15487 (Dream), the RND1 report, arXiv:2510.06303 (SDAR), arXiv:2509.26328 (Fast-dLLM v2), the
Stable-DiffCoder report, and the config files and generation code beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Names = dict[str, str | tuple[str, ...]]
"""Published tensor name -> stock name; `*` is a layer's or expert's number, several names share the rows in order."""


@dataclass(frozen=True)
class Family:
    """How one family of checkpoints was published, in terms of a stock class."""

    name: str
    architectures: tuple[str, ...]
    stock: str
    settings: dict[str, str]
    """Published setting -> stock setting; all must be in config.json unless `fixed` has a value for them."""
    mask_token: str
    end_token: str
    end_of_turn: str
    fixed: dict[str, Any] = field(default_factory=dict)
    """Stock settings that the published class has built in, or that a config.json may leave out."""
    requires: dict[str, Any] = field(default_factory=dict)
    """Published settings that may only have this value: the stock class can do no other."""
    also: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: {}
    """Stock settings that take more than a new name: published settings -> stock settings."""
    names: Names = field(default_factory=dict)
    """Tensors that are named otherwise than in the stock class."""
    prediction: Literal["in_place", "next"] = "in_place"
    algorithm: str = "mdlm"
    block_size: int | None = None
    """Tokens per block of a model that attends block-causally; None: every token attends to every other."""
    tokenizer: str = "PreTrainedTokenizerFast"
    """Tokenizer class of transformers that reads its files."""
    template: str | None = None
    """Our chat template, where the published one cannot write a finished conversation; None: its own."""
    decoding: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the sampler that some of its checkpoints were published with, by a part of their name."""
    expand_token: str | None = None
    """A token that stands for two masks; a checkpoint whose tokenizer has it is sampled by `expand`."""
    loader: str | None = None
    """What makes a backbone of a checkpoint whose class transformers has under the family's own name."""

    def sidecar(self) -> dict[str, Any]:
        """What training would have noted beside a checkpoint of this family."""
        return {
            "algorithm": self.algorithm,
            "family": "decoder",
            "prediction": self.prediction,
            "response_end": "fill" if self.block_size is None else "block",
            "block_size": self.block_size,
            "block_anchor": "row",
            "special_tokens": {"mask": self.mask_token, "eos": self.end_token, "end_of_turn": self.end_of_turn},
            "chat_template": "own",
        }


SIZES = {name: name for name in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)}  # fmt: skip
EXPERTS = {"num_experts_per_tok": "num_experts_per_tok", "moe_intermediate_size": "moe_intermediate_size"}
PLAIN = {"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "use_sliding_window": False}

LLADA = Family(
    name="LLaDA",
    architectures=("LLaDAModelLM",),
    stock="llama",
    settings={
        "d_model": "hidden_size",
        "mlp_hidden_size": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "weight_tying": "tie_word_embeddings",
    },
    requires={
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
    },
    names={
        "model.transformer.wte.weight": "model.embed_tokens.weight",
        "model.transformer.blocks.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
        "model.transformer.blocks.*.q_proj.weight": "model.layers.*.self_attn.q_proj.weight",
        "model.transformer.blocks.*.k_proj.weight": "model.layers.*.self_attn.k_proj.weight",
        "model.transformer.blocks.*.v_proj.weight": "model.layers.*.self_attn.v_proj.weight",
        "model.transformer.blocks.*.attn_out.weight": "model.layers.*.self_attn.o_proj.weight",
        "model.transformer.blocks.*.ff_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "model.transformer.blocks.*.ff_proj.weight": "model.layers.*.mlp.gate_proj.weight",
        "model.transformer.blocks.*.up_proj.weight": "model.layers.*.mlp.up_proj.weight",
        "model.transformer.blocks.*.ff_out.weight": "model.layers.*.mlp.down_proj.weight",
        "model.transformer.ln_f.weight": "model.norm.weight",
        "model.transformer.ff_out.weight": "lm_head.weight",
    },
    mask_token="<|mdm_mask|>",
    end_token="<|endoftext|>",
    end_of_turn="<|eot_id|>",
    template="llada",  # the published one ends every text with the header of a further answer
)

LLADA_MOE = Family(
    name="LLaDA-MoE",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    stock="qwen3_moe",  # and not olmoe: queries and keys are normalised per head
    settings={k: v for k, v in SIZES.items() if k != "intermediate_size"}
    | {
        "dense_intermediate_size": "intermediate_size",
        "expert_intermediate_size": "moe_intermediate_size",
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok",
    },
    fixed={"tie_word_embeddings": False, "norm_topk_prob": False, "decoder_sparse_step": 1},
    requires=PLAIN
    | {
        "qk_layernorm": True,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "shared_expert_intermediate_size": None,
        "partial_rotary_factor": 1,
        "clip_qkv": None,
    },
    also=lambda raw: {
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
        "mlp_only_layers": [layer for layer, moe in enumerate(raw.get("moe_layer_freq") or []) if not moe],
    },
    mask_token="<|mask|>",
    end_token="<|endoftext|>",
    end_of_turn="<|role_end|>",
)

LLADA2 = Family(
    name="LLaDA2",
    architectures=("LLaDA2MoeModelLM",),
    stock="glm4_moe",
    settings=SIZES
    | EXPERTS
    | {
        "head_dim": "head_dim",
        "partial_rotary_factor": "partial_rotary_factor",
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "n_group": "n_group",
        "topk_group": "topk_group",
        "routed_scaling_factor": "routed_scaling_factor",
        "first_k_dense_replace": "first_k_dense_replace",
    },
    fixed={"tie_word_embeddings": False, "use_qk_norm": True, "norm_topk_prob": True, "num_mtp_layers": 0},
    requires={
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
    },
    names={
        "model.word_embeddings.weight": "model.embed_tokens.weight",
        "model.layers.*.attention.query_key_value.weight": (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
        "model.layers.*.attention.query_layernorm.weight": "model.layers.*.self_attn.q_norm.weight",
        "model.layers.*.attention.key_layernorm.weight": "model.layers.*.self_attn.k_norm.weight",
        "model.layers.*.attention.dense.weight": "model.layers.*.self_attn.o_proj.weight",
        "model.layers.*.mlp.gate.expert_bias": "model.layers.*.mlp.gate.e_score_correction_bias",
    },
    mask_token="<|mask|>",
    end_token="<|endoftext|>",
    end_of_turn="<|role_end|>",
    algorithm="bd3lm",
    block_size=32,
    # the quality mode of the card, with 16 passes for edits, as GenerateSettings has them
    decoding={"LLaDA2.1": {"reveal_rule": "threshold", "threshold": 0.7, "edit_threshold": 0.5}},
)

DREAM = Family(
    name="Dream",
    architectures=("DreamModel",),
    stock="qwen2",
    settings=SIZES,
    fixed={"tie_word_embeddings": False},
    requires={k: v for k, v in PLAIN.items() if k != "attention_bias"} | {"use_mrope": False},
    prediction="next",
    mask_token="<|mask|>",
    end_token="<|endoftext|>",
    end_of_turn="<|im_end|>",
    expand_token="<|expand|>",  # of DreamOn
    tokenizer="Qwen2Tokenizer",
)

RND1 = Family(
    name="RND1",
    architectures=("RND1LM",),
    stock="qwen3_moe",
    settings=SIZES | EXPERTS | {"head_dim": "head_dim", "num_experts": "num_experts"},
    fixed={"tie_word_embeddings": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
    requires=PLAIN | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    prediction="next",
    mask_token="<|mask|>",
    end_token="<|endoftext|>",
    end_of_turn="<|im_end|>",
    tokenizer="Qwen2Tokenizer",
)

DIFFUSION_GEMMA = Family(
    name="DiffusionGemma",
    architectures=("DiffusionGemmaForBlockDiffusion",),
    stock="diffusion_gemma",
    settings={},
    mask_token="<mask>",  # of the tokenizer; the model was not trained with it
    end_token="<eos>",
    end_of_turn="<turn|>",
    algorithm="renoise",
    block_size=256,
    tokenizer="GemmaTokenizer",
    loader="dllm.models.diffusion_gemma:load",
)

RENOISING_PASSES = 48
"""Most passes of a canvas, of a DiffusionGemma whose generation_config.json does not say. As in transformers."""

SDAR = Family(
    name="SDAR",
    architectures=("SDARForCausalLM",),
    stock="qwen3",
    settings=SIZES | {"head_dim": "head_dim"},
    fixed={"tie_word_embeddings": False},
    requires=PLAIN | {"block_size": 4},  # variants with larger blocks say so in their names
    mask_token="<|MASK|>",
    end_token="<|endoftext|>",
    end_of_turn="<|im_end|>",
    tokenizer="Qwen2Tokenizer",
    algorithm="bd3lm",
    block_size=4,
)

FAST_DLLM = Family(
    name="Fast-dLLM v2",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    stock="qwen2",
    settings=SIZES,
    fixed={"tie_word_embeddings": False},
    requires={k: v for k, v in PLAIN.items() if k != "attention_bias"} | {"bd_size": 32},
    prediction="next",  # the first token of a block, too, from the last of the block before
    mask_token="|<MASK>|",
    end_token="<|endoftext|>",
    end_of_turn="<|im_end|>",
    tokenizer="Qwen2Tokenizer",
    algorithm="bd3lm",
    block_size=32,
)

DIFFCODER = Family(
    name="Stable-DiffCoder",
    architectures=("StableDiffcoderForCausalLM",),
    stock="llama",
    settings=SIZES,
    fixed={"tie_word_embeddings": False},
    requires=PLAIN | {"mlp_bias": False},
    mask_token="<[MASK_TOKEN]>",
    end_token="<[end▁of▁sentence]>",
    end_of_turn="<[end▁of▁sentence]>",
    algorithm="bd3lm",
    block_size=4,
)

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLADA, LLADA_MOE, LLADA2, DREAM, RND1, SDAR, FAST_DLLM, DIFFCODER)
}
"""The families by name."""

OWN_CLASS: dict[str, Family] = {family.name: family for family in (DIFFUSION_GEMMA,)}
"""Families whose class is one of transformers under their own name: nothing of a checkpoint is translated."""
