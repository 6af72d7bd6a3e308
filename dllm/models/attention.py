"""Attention over packed rows, as one function that every stock class calls through transformers' attention interface.

A packed forward sees its rows as one long sequence [1, T]. `dllm`, registered below, is told where each row begins
(`packed=`, which the classes pass down as a keyword) and lets each row attend to itself alone: fully, causally or
within a sliding window, exactly as the stock class means it. Without `packed` it is the stock `sdpa`, masks included,
so a model is switched once, when it is loaded, and plain forwards stay what they were; a recomputed layer (activation
checkpointing) finds its rows among its own arguments.

Rows whose layout has `blocks` attend block-causally instead, whatever the stock class says of order; its windows stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from typing import Any

import torch
from torch import Tensor, nn

from dllm.models.kernel_by_row import by_row
from dllm.models.kernels import kernel_for
from dllm.models.last_layer import at_places, is_last
from dllm.models.packed_batch import PackedBatch, Window
from dllm.models.rotary import replace_rotary

NAME = "dllm"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    packed: PackedBatch | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, heads, T, size] to [1, T, heads, size].

    Without `packed` the stock `sdpa`. Raises ValueError for what packed attention does not know.
    """
    if packed is None:
        stock = _stock_attention()
        options = {"is_causal": is_causal, "sliding_window": sliding_window}
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options, **kwargs)
    for name in ("position_bias", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention does not know {name}, which {type(module).__name__} asks for")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    where = q.device.type
    if torch.is_autocast_enabled(where):  # rotary embeddings and norms may have widened some of them
        q, k, v = (x.to(torch.get_autocast_dtype(where)) for x in (q, k, v))
    given = q.dtype
    if where == "cpu" and q.requires_grad and given in (torch.bfloat16, torch.float16):
        q, k, v = (x.float() for x in (q, k, v))  # the backward of SDPA in bf16 takes up to 2.6 times as long
    window = _window_of(module, is_causal, sliding_window)
    if packed.layout.blocks is not None and window.right == 0:
        raise ValueError(
            f"{type(module).__name__} attends to the left only; block-causal attention needs a model that does not: "
            "load it with is_causal = False"
        )
    stored = None
    if packed.cache is not None:
        if k.requires_grad:
            raise ValueError("a cache of keys and values is for inference; compute under torch.no_grad()")
        stored = packed.cache.update(packed.calls, packed.layout, packed.part, k, v)
        packed.calls += 1
        if packed.part is packed.layout:
            stored = None  # everything is fresh: attend to it where it is
    shortened = packed.read is not None and is_last(module)
    computed, places = packed, packed.read
    kernel = kernel_for(packed, q, dropout, window, stored=stored is not None)
    if shortened and kernel is by_row and not q.requires_grad:
        computed, asking, places = packed.asking()
        q = q.index_select(0, asking)
    with torch.autocast(where, enabled=False):
        out = kernel(q, k, v, stored, computed, window, {"dropout_p": dropout, "scale": scaling})
    if shortened:
        return at_places(out.index_select(0, places)[None].to(given), packed.read, packed.part.tokens), None
    return out[None].to(given), None


def _window_of(module: nn.Module, is_causal: bool | None, sliding_window: int | None) -> Window:
    """What the stock masks let a query see.

    A class says with `sliding_window` that a layer slides, but each in its own units; the masks are made from the
    config alone: |q - k| <= config.sliding_window, and q - k < config.sliding_window where causal.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if sliding_window is None:
        return Window(None, 0 if causal else None)
    window: Any = module.config.sliding_window
    return Window(window - 1, 0) if causal else Window(window, window)


@once
def _stock_attention() -> Callable:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


@once
def register() -> str:
    """Make transformers know our attention; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def choose(model: nn.Module) -> bool:
    """Switch a stock model from `sdpa` to our attention, which equals it until rows are packed; False if it cannot.

    Its rotary positions are then ours, too (`models.rotary`).
    A class that computes attention by itself, or was loaded with another implementation, stays as it is.
    """
    current = model.config._attn_implementation
    if current == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(register())
        replace_rotary(model)
    return model.config._attn_implementation == NAME
