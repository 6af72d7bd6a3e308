"""What the architectures share: RMSNorm, rotary positions, attention, SwiGLU, a checkpoint of seeded weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def rotate(x: Tensor, base: float, share: float = 1.0) -> Tensor:
    """Rotary positions of x [B, L, H, D]: dimension j turns with j + D'/2 by position * base^(-2j/D'), D' = share D."""
    width = int(x.shape[-1] * share)
    speed = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed).float()[None, :, None]
    first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention of [B, L, H, D] over [B, L, H', D], H' dividing H; allowed [L, L]. Returns [B, L, H D]."""
    rows, length, heads, width = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / math.sqrt(width)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value).reshape(rows, length, heads * width)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate.T
    return (gated * gated.sigmoid() * (x @ up.T)) @ down.T


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    return swiglu(x, *(weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")))


def mlp_shapes(name: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (inner, width),
        f"{name}.up_proj.weight": (inner, width),
        f"{name}.down_proj.weight": (width, inner),
    }


def softmax_experts(weights: Weights, name: str, x: Tensor, chosen: int, *, renormalise: bool) -> Tensor:
    """Token by token: the most probable experts, weighted by their probabilities (renormalised to one or not)."""
    out = torch.zeros_like(x)
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])):
        token = x[tuple(place)]
        probability, expert = (weights[f"{name}.gate.weight"] @ token).softmax(0).topk(chosen)
        if renormalise:
            probability = probability / probability.sum()
        for p, e in zip(probability, expert.tolist(), strict=True):
            out[tuple(place)] += p * mlp(weights, f"{name}.experts.{e}", token)
    return out


def block_causal(length: int, block: int) -> Tensor:
    """[L, L]: a token sees its own block of tokens and all before it."""
    number = torch.arange(length) // block
    return number[:, None] >= number[None]


def make_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Seeded weights that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[-1])
        weights[name] = noise * scale + (1.0 if "norm" in name or name.endswith("ln_f.weight") else 0.0)
    return weights


def save_checkpoint(directory: Path, config: dict, weights: Weights, *, shards: int = 2) -> Path:
    """A checkpoint as it is published: config.json, safetensors in shards, code beside it that must never run."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    for code in ("configuration", "modeling", "tokenization"):
        (directory / f"{code}.py").write_text('raise SystemExit("code beside a checkpoint was run")\n')
    names, index = list(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name].contiguous() for name in names[number::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def save_byte_tokenizer(
    directory: Path, special: list[str], *, kind: str, template: str | None = None, end: str = "<|endoftext|>"
) -> None:
    """A byte-level tokenizer in the published form: `fast` a tokenizer.json, `qwen2` vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    settings = {
        "eos_token": end,
        "pad_token": end,
        "chat_template": template,
        "added_tokens_decoder": {
            str(len(vocabulary) + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                       "single_word": False, "special": True}
            for i, token in enumerate(special)
        },
    }  # fmt: skip
    if kind == "qwen2":
        (directory / "vocab.json").write_text(json.dumps(vocabulary))
        (directory / "merges.txt").write_text("#version: 0.2\n")
        settings |= {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization.DreamTokenizer", None]},
            "mask_token": "<|mask|>" if "<|mask|>" in special else None,
        }
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.save(str(directory / "tokenizer.json"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "trust_remote_code": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
