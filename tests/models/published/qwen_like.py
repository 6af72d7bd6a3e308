"""The layer that Dream, RND1 and LLaDA-MoE share; they differ in biases, norms of queries and keys, and the MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tests.models.published.pieces import Weights, attend, mlp, mlp_shapes, rms_norm, rotate

NORMS = ("input", "post_attention")


def attention_shapes(c: dict, n: int, *, head: int, bias: bool, norm: bool) -> dict[str, tuple[int, ...]]:
    width, layer = c["hidden_size"], f"model.layers.{n}"
    rows = {"q": c["num_attention_heads"] * head, "k": c["num_key_value_heads"] * head}
    rows["v"] = rows["k"]
    found: dict[str, tuple[int, ...]] = {
        f"{layer}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")
    }
    found |= {f"{layer}.self_attn.{part}_proj.weight": (size, width) for part, size in rows.items()}
    found[f"{layer}.self_attn.o_proj.weight"] = (width, rows["q"])
    if bias:
        found |= {f"{layer}.self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
    if norm:
        found |= {f"{layer}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
    return found


def outer_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"]),
        "model.norm.weight": (c["hidden_size"],),
        "lm_head.weight": (c["vocab_size"], c["hidden_size"]),
    }


def dense_shapes(c: dict, *, bias: bool, norm: bool) -> dict[str, tuple[int, ...]]:
    found = outer_shapes(c)
    head = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    for n in range(c["num_hidden_layers"]):
        found |= attention_shapes(c, n, head=head, bias=bias, norm=norm)
        found |= mlp_shapes(f"model.layers.{n}.mlp", c["hidden_size"], c["intermediate_size"])
    return found


def dense_logits(c: dict, weights: Weights, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
    return logits(c, weights, tokens, lambda n, x: mlp(weights, f"model.layers.{n}.mlp", x), allowed=allowed)


def logits(
    c: dict, weights: Weights, tokens: Tensor, feed: Callable[[int, Tensor], Tensor], *, allowed: Tensor | None = None
) -> Tensor:
    """feed: layer and normed input [B, L, D] -> output of its MLP."""
    epsilon = c["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens]
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], epsilon)
        parts = {}
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            name = f"{layer}.self_attn.{part}"
            parts[part] = normed @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0.0)
            parts[part] = parts[part].unflatten(-1, (c[heads], -1))
            if f"{name}_norm.weight" in weights:
                parts[part] = rms_norm(parts[part], weights[f"{name}_norm.weight"], epsilon)
        mixed = attend(rotate(parts["q"], c["rope_theta"]), rotate(parts["k"], c["rope_theta"]), parts["v"], allowed)
        x = x + mixed @ weights[f"{layer}.self_attn.o_proj.weight"].T
        x = x + feed(n, rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], epsilon))
    return rms_norm(x, weights["model.norm.weight"], epsilon) @ weights["lm_head.weight"].T
