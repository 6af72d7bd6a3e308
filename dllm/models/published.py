"""Published diffusion language models as stock classes of transformers: a config translation and a name map each.

LLaDA is a Llama, Dream a Qwen2 that predicts one ahead, RND1 and LLaDA-MoE are Qwen3-MoEs, LLaDA2 is a GLM4-MoE; all
attend in both directions. The code beside such checkpoints is never run. A row of PUBLISHED is a family:

| family | stock class | prediction | mask token | end | end of turn | attention |
|---|---|---|---|---|---|---|
| LLaDA | llama | in place | `<|mdm_mask|>` 126336 | `<|endoftext|>` 126081 | `<|eot_id|>` 126348 | full |
| LLaDA-MoE | qwen3_moe | in place | `<|mask|>` 156895 | `<|endoftext|>` 156892 | `<|role_end|>` | full |
| LLaDA2 | glm4_moe | in place | `<|mask|>` 156895 | `<|endoftext|>` 156892 | `<|role_end|>` | blocks of 32 |
| Dream | qwen2 | one ahead | `<|mask|>` 151666 | `<|endoftext|>` 151643 | `<|im_end|>` 151645 | full |
| RND1 | qwen3_moe | one ahead | `<|mask|>` 151669 | `<|endoftext|>` 151643 | `<|im_end|>` 151645 | full |

Sources: arXiv:2502.09992 (LLaDA), arXiv:2509.24389 (LLaDA-MoE), the LLaDA2.0 technical report and arXiv:2602.08676
(LLaDA2), arXiv:2508.15487 (Dream), the RND1 report, and the config files beside the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dllm.config import ModelEntry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Names = dict[str, str | tuple[str, ...]]
"""Published tensor name -> stock name; `*` is a layer's or expert's number, several names share the rows in order."""

SIDECAR = "dllm.json"
"""What training notes beside a checkpoint."""

EDITED = re.compile(r"LLaDA-?2\.[12](?!\d)", re.IGNORECASE)
"""Names of checkpoints whose authors edit what is revealed."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer's or expert's number in a tensor name."""


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
    also: Callable[[dict], dict] = lambda raw: {}
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

    def entry(self) -> ModelEntry:
        """What an entry of config/models.yaml would say of a checkpoint of this family."""
        return ModelEntry(
            new={}, tokenizer="saved", family="decoder", prediction=self.prediction, mask_token=self.mask_token,
            end_token=self.end_token, end_of_turn=self.end_of_turn, chat_template="own",
        )  # fmt: skip

    def sidecar(self) -> dict:
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


SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_word_embeddings",
}
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

PUBLISHED = (LLADA, LLADA_MOE, LLADA2, DREAM, RND1)


# --------------------------------------------------------------------------------------------------------------------
# config.json


def published_config(directory: str | Path) -> dict:
    """What a checkpoint's config.json says, as it is; empty if there is none that can be read."""
    try:
        raw = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def family_of(directory: str | Path) -> Family | None:
    """The family that a checkpoint's config.json names as its architecture; None for any other checkpoint."""
    stated = published_config(directory).get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else None
    return next((family for family in PUBLISHED if first in family.architectures), None)


def is_encoder(directory: str | Path) -> bool:
    """Whether a checkpoint's config.json names a masked-LM class."""
    stated = published_config(directory).get("architectures")
    return isinstance(stated, list) and any("MaskedLM" in str(name) for name in stated)


def refuse_edited(family: Family, place: str | Path) -> None:
    """Raise ValueError, one line, for a checkpoint of LLaDA2.1 or 2.2, which have the classes of LLaDA2.0.

    place: its hub id or directory. Their config.json does not tell them apart, so the names do: of the place, in
    config.json, in the manifest of a download, in the title of the card.
    """
    names, directory = [str(place)], Path(place)
    if directory.is_dir():
        names = [directory.name, str(published_config(directory).get("_name_or_path"))]
        for name, pattern in (("manifest.json", r'"hub": "(.*)"'), ("README.md", r"^# *(.*)")):
            try:
                named = re.search(pattern, (directory / name).read_text(encoding="utf-8"), re.MULTILINE)
            except (OSError, UnicodeDecodeError):
                continue
            names += [named[1]] if named else []
    if family.name == "LLaDA2" and any(EDITED.search(name) for name in names):
        raise ValueError(
            f"{place}: LLaDA2.1 and 2.2 are decoded with edits of revealed tokens, which dllm does not do, so that "
            "their scores would not be the published ones; take LLaDA2.0"
        )


def stock_config(family: Family, raw: dict):
    """The stock configuration that does what a published config.json says.

    Raises ValueError, one line, for a setting that is missing or that the stock class cannot follow.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    for key, value in family.requires.items():
        if raw.get(key, value) != value and (raw[key] or value):  # null, false and [] all say no
            raise ValueError(
                f"config.json: {key} = {raw[key]!r} is not a {family.name} setting that {family.stock} can follow; "
                f"allowed: {value!r}"
            )
    missing = [key for key, stock in family.settings.items() if raw.get(key) is None and stock not in family.fixed]
    if missing:
        raise ValueError(f"config.json: {missing[0]} is missing; a {family.name} needs it: fetch the checkpoint again")
    settings = {stock: raw[key] for key, stock in family.settings.items() if raw.get(key) is not None}
    tokens = {key: raw[key] for key in ("eos_token_id", "pad_token_id") if raw.get(key) is not None}
    try:
        return AutoConfig.for_model(family.stock, **family.fixed | settings | family.also(raw) | tokens)
    except (StrictDataclassError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json: cannot be used ({reason[:200]}); fetch the checkpoint again") from None


# --------------------------------------------------------------------------------------------------------------------
# Tensors


def stock_tensors(family: Family, config, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Published tensors under their stock names, each split where the stock class holds several.

    A name that the family does not know stays as it is, for the loader to complain about.
    """
    renamed = {}
    for name, tensor in tensors:
        targets = _renamed(name, family.names)
        if len(targets) == 1:
            renamed[targets[0]] = tensor
        else:
            renamed |= zip(targets, tensor.split(_query_key_value_rows(config)), strict=True)
    return renamed


def published_tensors(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stock_tensors`."""
    from torch import cat

    joined = {targets: name for name, targets in family.names.items() if isinstance(targets, tuple)}
    names: Names = {target: name for name, target in family.names.items() if isinstance(target, str)}
    names |= {part: name for parts, name in joined.items() for part in parts}
    renamed: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_position_in(joined)):
        renamed.setdefault(_renamed(name, names)[0], []).append(tensors[name])
    return {name: parts[0] if len(parts) == 1 else cat(parts) for name, parts in renamed.items()}


def read_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint's safetensors files, mapped from disk one after another.

    Raises ValueError, one line, if a file that the index names is not there.
    """
    from safetensors import safe_open

    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for name in files:
        if not (directory / name).exists():
            raise ValueError(f"{directory}: {name} is missing; fetch the checkpoint again")
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                yield key, file.get_tensor(key)


def save_published(model: PreTrainedModel, directory: str | Path, *, like: str | Path) -> None:
    """Write a stock model as a checkpoint of the family that `like` belongs to: its tensor names, its config.json.

    Raises ValueError, one line, if `like` is not a published checkpoint, or has other sizes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    family = family_of(like)
    if family is None:
        known = ", ".join(f.name for f in PUBLISHED)
        raise ValueError(f"{like}: not a published checkpoint; allowed: a directory of {known}")
    stated = (Path(like) / "config.json").read_bytes()  # `like` may be `directory`
    config = stock_config(family, published_config(like))
    for setting in ("model_type", *family.settings.values()):
        if setting not in ("rope_theta", "partial_rotary_factor") and getattr(config, setting) != getattr(
            model.config, setting
        ):
            raise ValueError(
                f"{setting} = {getattr(model.config, setting)!r} of the model is not that of {like} "
                f"({getattr(config, setting)!r}); give the checkpoint that it was loaded from"
            )
    # transformers' own classes hold the experts of a layer in one tensor and save them one by one
    tensors = published_tensors(family, revert_weight_conversion(model, model.state_dict()))
    model.save_pretrained(directory, state_dict=tensors, save_original_format=False)
    (Path(directory) / "config.json").write_bytes(stated)


def _renamed(name: str, names: Names) -> tuple[str, ...]:
    """The name or names that a map gives a tensor; its own if the map has none."""
    targets = names.get(NUMBER.sub("*", name), name)
    targets = (targets,) if isinstance(targets, str) else targets
    return tuple(target.replace("*", "{}").format(*NUMBER.findall(name)) for target in targets)


def _query_key_value_rows(config) -> list[int]:
    keys = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, keys, keys]


def _position_in(joined: dict[tuple[str, ...], str]) -> Callable[[str], int]:
    """Sorts the parts of a joined tensor into their order."""
    order = {part: position for parts in joined for position, part in enumerate(parts)}
    return lambda name: order.get(NUMBER.sub("*", name), 0)
