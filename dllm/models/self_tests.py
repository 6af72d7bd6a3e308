"""What is tried out on a model when it is loaded: each test compares numbers that have to agree, on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dllm.core.packing import Layout, layout_of
from dllm.models.attention import choose
from dllm.models.heads import head_logits
from dllm.models.hidden import base_of, packed_hidden, padded_hidden
from dllm.models.packed_batch import PackedBatch

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}

SPECIAL_IDS = ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start")
"""Names of special tokens in a model's config, before `_token_id`."""


@torch.no_grad()
def is_bidirectional(model: nn.Module, special: Collection[int] = ()) -> bool:
    """Whether the first hidden state moves when the last token changes, with padding in the batch.

    special: ids of tokens that no test uses, beside those that the model's config names.
    """
    tokens = ordinary_tokens(model, 16, special).view(2, 8)
    other = tokens.clone()
    other[0, -1] = tokens[0, -2]
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[1, 5:] = False
    before, after = (padded_hidden(model, attention, input_ids=t)[0, 0] for t in (tokens, other))
    return not torch.equal(before, after)


@torch.no_grad()
def head_is_whole(model: nn.Module, special: Collection[int] = ()) -> bool:
    """Whether our hidden states and head make the logits of the class's own forward; special as above.

    Raises FloatingPointError if those are no finite numbers.
    """
    tokens = ordinary_tokens(model, 8, special)[None]
    expected = model(input_ids=tokens).logits[0].float()
    if not expected.isfinite().all():
        raise FloatingPointError(f"the logits of {type(model).__name__} are no finite numbers")
    try:
        ours = head_logits(model, padded_hidden(model, input_ids=tokens)[0]).float()
    except (AttributeError, RuntimeError):  # no such layers, or of other sizes
        return False
    # rounding is far below, a missing layer far above
    return bool((ours - expected).abs().max() <= 0.1 * expected.std())


def ordinary_tokens(model: nn.Module, count: int, special: Collection[int] = ()) -> Tensor:
    """[count] long: tokens without a meaning of their own, on the model's device; neighbours differ.

    A padding token in a row would move the positions behind it in some classes.
    """
    config: Any = model.config
    named = [getattr(config, f"{name}_token_id", None) for name in SPECIAL_IDS]
    taken = {*special, *(x for value in named for x in (value if isinstance(value, list) else [value]))}
    ids, known = [], config.vocab_size
    for token in range(known):
        if token not in taken:
            ids.append(token)
        if len(ids) == count:
            break
    ids = ids or list(range(known))
    device = next(model.parameters()).device
    return torch.tensor([ids[number % len(ids)] for number in range(count)], device=device)


def can_pack(model: nn.Module) -> bool:
    """Whether a model's forward can be packed; if so, it has our attention from now on.

    Its class must take positions and call transformers' attention interface, and a packed forward must give the numbers
    of the padded one, on rows longer than a narrow sliding window.
    """
    takes = set(inspect.signature(base_of(model).forward).parameters)
    fits = set(getattr(model.config, "layer_types", None) or ()) <= PACKABLE_LAYERS
    fits = fits and {"position_ids", "inputs_embeds", "attention_mask"} <= takes
    return fits and choose(model) and _packed_equals_padded(model)


@torch.no_grad()
def _packed_equals_padded(model: nn.Module) -> bool:
    if (drawn := _drawn_rows(model)) is None:
        return False
    layout, embedded = drawn
    attention = torch.arange(layout.width, device=embedded.device) < layout.cu_seqlens.diff()[:, None]
    try:
        with _evaluating(model), torch.autocast(embedded.device.type, enabled=False):
            padded = layout.pack(padded_hidden(model, attention, inputs_embeds=embedded)).float()
            batch = PackedBatch(layout, layout)
            packed = packed_hidden(model, batch, inputs_embeds=layout.pack(embedded)[None]).float()
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False  # it does not take the arguments of a packed forward, or their shapes
    return _agree(packed, padded, embedded.dtype)


@torch.no_grad()
def can_shorten(model: nn.Module) -> bool:
    """Whether the last layer of a model that packs can be computed where it is read alone (`models.last_layer`)."""
    if (drawn := _drawn_rows(model)) is None:
        return False
    layout, embedded = drawn
    packed, places = layout.pack(embedded)[None], torch.tensor([1, layout.tokens - 1, 4], device=embedded.device)
    try:
        with _evaluating(model), torch.autocast(embedded.device.type, enabled=False):
            whole = packed_hidden(model, PackedBatch(layout, layout), inputs_embeds=packed).float()
            batch = PackedBatch(layout, layout, read=places)
            short = packed_hidden(model, batch, inputs_embeds=packed).float()
    except (TypeError, ValueError, IndexError, RuntimeError, StopIteration):
        return False  # its layers are put together in another way
    return _agree(short, whole.index_select(0, places), embedded.dtype)


def _drawn_rows(model: nn.Module) -> tuple[Layout, Tensor] | None:
    """Two rows, one longer than a narrow sliding window, as embeddings [2, L, D]; None for a model without weights.

    Embedded rows rather than tokens: hooks on the embedding, which expect the caller's batch, stay out of it.
    """
    embedding, parameter = model.get_input_embeddings(), next(model.parameters())
    if parameter.is_meta or not isinstance(getattr(embedding, "embedding_dim", None), int):
        return None
    window = getattr(model.config, "sliding_window", None) or 0
    layout = layout_of((3, window + 3 if window <= 128 else 7), device=parameter.device)
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(2, layout.width, embedding.embedding_dim, generator=generator)
    return layout, embedded.to(parameter.device, parameter.dtype)


def _agree(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2  # TF32 and half precision differ by shapes
    return ours.shape == expected.shape and bool((ours - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; at the end every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
