"""LM heads of stock classes: logits where they are asked for, and their cross-entropy within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear

from dllm.core.memory import logits_at_once

HEADS: dict[str, Callable] = {
    "albert": lambda model: (
        lambda rows: model.predictions.LayerNorm(model.predictions.activation(model.predictions.dense(rows))),
        model.predictions.decoder,
    ),
    "bert": lambda model: (model.cls.predictions.transform, model.cls.predictions.decoder),
    "deberta-v2": lambda model: (model.cls.predictions.transform, model.cls.predictions.decoder),
    "distilbert": lambda model: (
        lambda rows: model.vocab_layer_norm(model.activation(model.vocab_transform(rows))),
        model.vocab_projector,
    ),
    "electra": lambda model: (model.generator_predictions, model.generator_lm_head),
    "modernbert": lambda model: (model.head, model.decoder),
    "roberta": lambda model: (
        lambda rows: model.lm_head.layer_norm(gelu(model.lm_head.dense(rows))),
        model.lm_head.decoder,
    ),
}
"""LM head of masked-LM classes whose head is more than a linear layer: model type -> model -> (what comes before the
last linear layer, that layer)."""

LIKE: dict[str, tuple[str, ...]] = {
    "bert": ("cls.predictions.transform", "cls.predictions.decoder"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    "modernbert": ("head.dense", "head.norm", "decoder"),
}
"""Further classes whose head has the layers of a known one: model type -> names of the layers. Whether it is the same
head is found by comparing logits when a checkpoint is loaded."""


def head_logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits [N, V] of hidden rows [N, D], in the head's own precision.

    Raises ValueError for a class whose head is not known.
    """
    transform, last = _head(model)
    return _capped(last(transform(rows)), _cap(model))


def head_nll(model: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    """-log p [N], fp32 nats, of `targets` [N] under the logits of hidden rows [N, D].

    Logits are kept for the backward pass where they fit into `core.memory.LOGITS_BYTES`, else computed again there.
    """
    transform, last = _head(model)
    rows, kind = transform(rows), rows.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else last.weight.dtype
    height = logits_at_once(last.weight.shape[0], compute.itemsize, kind)
    return _HeadNLL.apply(rows, last.weight, last.bias, targets, compute, _cap(model), height)


def _head(model: Any) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    """What comes before the last linear layer of a model's LM head, and that layer."""
    known = HEADS.get(model.config.model_type) or next((HEADS[kind] for kind in LIKE if _is_like(model, kind)), None)
    if known is not None:
        return known(model)
    last = model.get_output_embeddings()
    if last is None:
        raise ValueError(
            f"model_type = {model.config.model_type!r} has no known LM head; allowed: {', '.join(sorted(HEADS))} or a "
            "class whose head is its output embedding; add a line to dllm.models.heads.HEADS"
        )
    return nn.Identity(), last


def _is_like(model: nn.Module, kind: str) -> bool:
    """Whether a model has all layers of the LM head of a kind."""
    try:
        return all(isinstance(model.get_submodule(name), nn.Module) for name in LIKE[kind])
    except AttributeError:
        return False


def _cap(model: nn.Module) -> float | None:
    """Some classes bend their logits: cap * tanh(logits / cap)."""
    return getattr(model.config, "final_logit_softcapping", None)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _HeadNLL(torch.autograd.Function):
    """Cross-entropy [N], fp32, of a linear layer, `height` rows of logits at a time, in the precision `compute`.

    If that is all rows, their logits are kept for the backward pass, and nothing else of their size: the stock operator
    also keeps fp32 log-probabilities, fills a gradient with zeros and converts it, which is most of the time of the
    head in bf16. Otherwise the backward pass computes the logits once more, since the weight's gradient needs that of
    every nll. Few rows at a time go through fp32, few enough on a CPU to stay in its cache.

    A fused kernel (Liger, cut cross-entropy) would replace this where it is faster on the device at hand and passes the
    same tests, nll per row and all gradients.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, targets, compute: torch.dtype, cap: float | None, height: int) -> Tensor:
        ctx.compute, ctx.cap, ctx.height = compute, cap, height
        top, rest, of_targets = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(3))
        logits = None
        for here in _slices(len(rows), height):
            logits = _HeadNLL.logits(ctx, rows[here], weight, bias)
            of_targets[here] = logits.gather(1, targets[here, None])[:, 0].float()
            for low, part in _few_rows(logits, here.start):
                part = part.float()
                top[low] = part.amax(-1)
                rest[low] = (part - top[low, None]).exp_().sum(-1).log_()
        ctx.save_for_backward(rows, weight, bias, targets, top + rest, logits if len(rows) <= height else None)
        return rest + (top - of_targets)

    @staticmethod
    def logits(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            bias = None if bias is None else bias.to(ctx.compute)
            return _capped(linear(rows.to(ctx.compute), weight.to(ctx.compute), bias), ctx.cap)

    @staticmethod
    def change(ctx, logits: Tensor, normaliser: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
        """The gradient of logits before they are capped."""
        change = torch.empty_like(logits)
        for here, part in _few_rows(logits):
            wide = (part - normaliser[here, None]).exp_()
            wide.scatter_add_(1, targets[here, None], wide.new_full((len(wide), 1), -1.0))
            change[here] = wide.mul_(upstream[here, None])
        return change if ctx.cap is None else change.mul_(1 - (logits / ctx.cap) ** 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        rows, weight, bias, targets, normaliser, kept = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(ctx.compute, torch.float32)  # what is summed over several slices
        of_rows = torch.empty_like(rows) if need_rows else None
        of_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        of_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        with torch.autocast(rows.device.type, enabled=False):
            for here in _slices(len(rows), ctx.height):
                logits = _HeadNLL.logits(ctx, rows[here], weight, bias) if kept is None else kept
                change = _HeadNLL.change(ctx, logits, normaliser[here], targets[here], upstream[here])
                if need_bias:
                    of_bias += change.sum(0)
                if need_rows:
                    of_rows[here] = change @ weight.to(ctx.compute)
                if need_weight and ctx.compute == wide:
                    of_weight.addmm_(change.T, rows[here].to(wide))
                elif need_weight:
                    of_weight += change.T @ rows[here].to(ctx.compute)
        of_weight = of_weight.to(weight.dtype) if need_weight else None
        of_bias = of_bias.to(bias.dtype) if need_bias else None
        return of_rows, of_weight, of_bias, None, None, None, None


def _slices(count: int, height: int) -> list[slice]:
    """0 .. count in slices of `height`."""
    return [slice(low, min(count, low + height)) for low in range(0, count, height)]


def _few_rows(logits: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of logits at a time, and where they are if the first one is number `first`."""
    height = max(1, (1 << 19 if logits.device.type == "cpu" else 1 << 27) // logits.shape[1])
    for here in _slices(len(logits), height):
        yield slice(first + here.start, first + here.stop), logits[here]
