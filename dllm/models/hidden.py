"""Last hidden states of stock classes, for padded rows and for packed ones.

This is the only place that knows how a stock class is called.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dllm.models.packed_batch import PackedBatch

COUNTS_FROM_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet"}
COUNTS_FROM_PADDING |= {"roberta-prelayernorm"}
"""Model types that count positions from pad_token_id + 1, over tokens that are not their padding token, which is our
EOS and may occur inside a row; they are told the positions."""


def padded_hidden(
    model: nn.Module, attention: Tensor | None = None, *, compute: torch.dtype | None = None, **inputs: Tensor
) -> Tensor:
    """Last hidden states [B, L, D] of `input_ids` [B, L] or `inputs_embeds` [B, L, D].

    attention [B, L] bool marks real tokens (None: all are real); padding may only be on the right, so that positions
    count from the row's start. compute: the layers' matrix products; hidden states are then fp32.
    """
    (given,) = inputs.values()
    options = {}
    if model.config.model_type in COUNTS_FROM_PADDING:
        options["position_ids"] = torch.arange(given.shape[1], device=given.device)[None] + first_position(model)
    mask = None if attention is None else attention.long()
    return last_hidden(model, compute, **inputs, attention_mask=mask, **options)


def packed_hidden(
    model: nn.Module, batch: PackedBatch, *, compute: torch.dtype | None = None, **inputs: Tensor
) -> Tensor:
    """Last hidden states [T, D] of `input_ids` [1, T] or `inputs_embeds` [1, T, D], the positions of `batch.part`.

    Of a batch with `read`, for which the model must have passed `self_tests.can_shorten`, those places: [N, D].
    The model must have our attention (`models.attention.choose`). compute: as in `padded_hidden`.
    """
    (given,) = inputs.values()
    # stock classes pass a mask of four dimensions on as it is, and our attention does not read it
    passed = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=given.device)
    positions = batch.part.positions[None] + first_position(model)
    return last_hidden(model, compute, **inputs, attention_mask=passed, position_ids=positions, packed=batch)[0]


def last_hidden(model: nn.Module, compute: torch.dtype | None, **arguments) -> Tensor:
    """What the layers of a model make of the arguments of its stock class."""
    base = base_of(model)
    if "use_cache" in inspect.signature(base.forward).parameters:
        arguments["use_cache"] = False  # decoders would build a cache of their own for generating from left to right
    kind = next(x for x in arguments.values() if x is not None).device.type
    with nullcontext() if compute is None else torch.autocast(kind, compute):
        hidden = base(**arguments).last_hidden_state
    return hidden if compute is None else hidden.float()


def base_of(model: nn.Module) -> nn.Module:
    """A model without its LM head."""
    prefix: Any = model.base_model_prefix
    return getattr(model, prefix)


def first_position(model: nn.Module) -> int:
    """The number that a model's first position has in its own table of positions."""
    config: Any = model.config
    return config.pad_token_id + 1 if config.model_type in COUNTS_FROM_PADDING else 0
