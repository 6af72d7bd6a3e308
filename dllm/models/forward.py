"""The forward pass as algorithms see it: hidden states once, the LM head only where it is asked for.

This is the only place that knows how a stock class is put together, and the only one that shifts predictions: for
every backbone, the logits returned for position i score token i.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, gelu, linear

from dllm.core.packing import Layout, layout_of, part_of
from dllm.models.attention import KeysAndValues, KeyValues, Probe, Reach, Rows, block_seen, choose

HEADS: dict[str, Callable] = {
    "bert": lambda model: (model.cls.predictions.transform, model.cls.predictions.decoder),
    "deberta-v2": lambda model: (model.cls.predictions.transform, model.cls.predictions.decoder),
    "distilbert": lambda model: (
        lambda rows: model.vocab_layer_norm(model.activation(model.vocab_transform(rows))),
        model.vocab_projector,
    ),
    "modernbert": lambda model: (model.head, model.decoder),
    "roberta": lambda model: (
        lambda rows: model.lm_head.layer_norm(gelu(model.lm_head.dense(rows))),
        model.lm_head.decoder,
    ),
}
"""LM head of masked-LM classes whose head is more than a linear layer: model type -> model -> (what comes before the
last linear layer, that layer)."""

COUNTS_FROM_PADDING = {"roberta"}
"""Model types that count positions from pad_token_id + 1, over tokens that are not their padding token, which is our
EOS and may stand inside a row; they are told the positions."""

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_matrix_products: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()
_last: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on, compute the matrix products of the layers in `dtype`; hidden states come out in fp32.

    The LM head is not one of the layers: scores are as precise as their hidden states.
    """
    _matrix_products[_unwrapped(model)] = dtype


def _precision(inner: nn.Module, kind: str) -> torch.autocast | nullcontext:
    dtype = _matrix_products.get(inner)
    return nullcontext() if dtype is None else torch.autocast(kind, dtype)


def _finished(inner: nn.Module, hidden: Tensor) -> Tensor:
    return hidden.float() if inner in _matrix_products else hidden


def hidden_states(model: nn.Module, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
    """Last hidden states [B, L, D] of tokens [B, L]; attention [B, L] bool marks real tokens (None: all are real).

    Padding may only stand on the right, so that positions count from the row's start.
    """
    inner = _unwrapped(model)
    if hasattr(inner, "dllm_hidden"):
        return inner.dllm_hidden(tokens, attention)
    mask = None if attention is None or bool(attention.all()) else attention
    return _padded_forward(inner, mask, input_ids=tokens)


def packed_hidden(
    model: nn.Module, tokens: Tensor, layout: Layout, *, cache: KeyValues | None = None, part: Layout | None = None
) -> Tensor:
    """Last hidden states [T, D] of the real tokens of `tokens` [B, L], laid end to end, at no cost for padding.

    part (`core.packing.part_of`): the result is of these positions only, in the part's order. With a cache, which keeps
    every layer's keys and values, nothing else is computed: they attend to the others as the cache holds them, and the
    rest of `tokens` is not read. Without one the result is exact, and what the last layer need not compute is saved.
    A class that cannot be packed (it does not use transformers' attention interface, or mixes tokens in another way;
    found once by comparing numbers) takes the padded forward instead, whole, as if the cache were always fresh.

    Raises ValueError if tokens and layout disagree, or for a part that the cache cannot complete.
    """
    if tokens.shape != (layout.rows, layout.width):
        raise ValueError(f"tokens {list(tokens.shape)} are not the {layout.rows} rows x {layout.width} of the layout")
    part = part or layout
    inner = _unwrapped(model)
    toy = hasattr(inner, "dllm_hidden")
    if toy and layout.blocks is not None:
        return _block_by_block(inner, tokens, layout, part)
    if not toy and packs(inner):
        if cache is None and part is not layout:
            return _narrowed_forward(inner, layout, part, input_ids=layout.pack(tokens)[None])
        return _packed_forward(inner, Rows(layout, part, cache), input_ids=part.pack(tokens)[None])
    if layout.blocks is not None:
        raise ValueError(
            f"{type(inner).__name__} computes attention in a way of its own, and block-causal attention needs a class "
            "that calls transformers' attention interface: take another architecture or algorithm"
        )
    attention = torch.arange(layout.width, device=tokens.device) < layout.offsets.diff()[:, None]
    if toy:
        return part.pack(inner.dllm_hidden(tokens, attention))
    full = min(layout.lengths) == layout.width
    return part.pack(_padded_forward(inner, None if full else attention, input_ids=tokens))


def block_hidden(model: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    """Last hidden states [T, D] of rows with blocks, by the stock class with a mask of four dimensions.

    The plain version of `packed_hidden` for a layout with `blocks`: all L x L scores of each padded row are computed.
    """
    inner, device = _unwrapped(model), tokens.device
    place = torch.arange(layout.width).expand(layout.rows, -1)
    length = torch.tensor(layout.lengths)[:, None]
    start = length.cumsum(0) - length
    real, itself = (place < length)[:, None], torch.eye(layout.width, dtype=torch.bool)

    def mask(window: int | None) -> Tensor:
        return ((block_seen(layout, start + place, start + place, Reach(window, window)) & real) | itself)[:, None]

    # a class whose layers are all of one kind takes one mask, and others a mask for each kind
    kinds, window = set(getattr(inner.config, "layer_types", None) or ()), getattr(inner.config, "sliding_window", None)
    masks = {kind: mask(None if kind == "full_attention" else window).to(device) for kind in kinds or {"all"}}
    positions = layout.unpack(layout.positions) + _first_position(inner)
    (*_, last) = masks.values()
    chosen = masks if len(masks) > 1 else last
    with _precision(inner, device.type):
        hidden = _base(inner)(
            input_ids=tokens, position_ids=positions, attention_mask=chosen, **_no_cache(inner)
        ).last_hidden_state
    return layout.pack(_finished(inner, hidden))


def _block_by_block(toy: nn.Module, tokens: Tensor, layout: Layout, part: Layout) -> Tensor:
    """[T, D] of a toy, which says itself what it makes of a row: each block behind all that it sees."""
    rows, taken, sight, base = [], [], layout.blocks.sight, 0
    for row, (first, count) in enumerate(zip(part.begins, part.lengths, strict=True)):
        if count:
            low = first
            limit, span = (x[base : base + layout.lengths[row]] for x in (sight.limit, sight.span))
            while low < first + count:
                high = low + 1
                while high < first + count and limit[high] == limit[low] and span[high] == span[low]:
                    high += 1
                seen, behind = tokens[row, : limit[low]], tokens[row, low:high]
                rows.append(seen if span[low] < 0 else torch.cat([seen, behind]))
                taken.append((low, high) if span[low] < 0 else (int(limit[low]), len(rows[-1])))
                low = high
        base += layout.lengths[row]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    hidden = toy.dllm_hidden(padded, torch.arange(padded.shape[1], device=tokens.device) < lengths[:, None])
    return torch.cat([states[low:high] for states, (low, high) in zip(hidden, taken, strict=True)])


def head_logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits [N, V] of hidden rows [N, D]."""
    inner = _unwrapped(model)
    if hasattr(inner, "dllm_logits"):
        return inner.dllm_logits(rows)
    transform, last = _head(inner)
    cap = _cap(inner)
    logits = last(transform(rows))
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits_at(model: nn.Module, hidden: Tensor, where: Tensor, prediction: str = "in_place") -> Tensor:
    """fp32 logits [N, V] for the positions marked in `where` [B, L], in row-major order.

    prediction: `in_place` reads position i, `next` reads position i - 1 (the first position then has no prediction
    of its own and reads itself).
    """
    row, position = where.nonzero(as_tuple=True)
    if prediction == "next":
        position = (position - 1).clamp(min=0)
    return head_logits(model, hidden[row, position]).float()


def packed_logits(
    model: nn.Module, hidden: Tensor, layout: Layout, row: Tensor, position: Tensor, prediction: str = "in_place"
) -> Tensor:
    """fp32 logits [N, V] that score the tokens at `position` [N] of `row` [N], of packed hidden states [T, D]."""
    return head_logits(model, hidden.index_select(0, _place(layout, row, position, prediction))).float()


def target_nll(
    model: nn.Module,
    hidden: Tensor,
    layout: Layout,
    row: Tensor,
    position: Tensor,
    targets: Tensor,
    prediction: str = "in_place",
    *,
    chunk: int | None = None,
) -> Tensor:
    """-log p [N], fp32 nats, of `targets` [N] at `position` [N] of `row` [N], from packed hidden states [T, D].

    chunk: at most so many rows of logits exist at a time, in the forward and in the backward, which computes them once
    more; the numbers are the same. It saves memory, not time: take it when logits [N, V] do not fit.
    """
    inner = _unwrapped(model)
    if hasattr(inner, "dllm_logits"):
        logits = packed_logits(inner, hidden, layout, row, position, prediction)
        return cross_entropy(logits, targets, reduction="none")
    if chunk is None:
        logits = head_logits(inner, hidden.index_select(0, _place(layout, row, position, prediction)))
        return _KeptNll.apply(logits, targets)
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1 row of logits; leave it out to compute all at once")
    transform, last = _head(inner)
    rows = transform(hidden.index_select(0, _place(layout, row, position, prediction)))
    return _ChunkedNll.apply(rows, last.weight, last.bias, targets, chunk, _cap(inner))


class _KeptNll(torch.autograd.Function):
    """Cross-entropy [N], fp32, of logits [N, V] that are kept in their own precision, and nothing else of their size.

    The stock operator keeps fp32 log-probabilities, fills a gradient with zeros and converts it: most of the time of
    the head in bf16. Here a few rows at a time go through fp32, few enough on a CPU to stay in its cache.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor):
        top, rest = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
        for here in _KeptNll.slices(logits):
            part = logits[here].float()
            top[here] = part.amax(-1)
            rest[here] = (part - top[here, None]).exp_().sum(-1).log_()
        ctx.save_for_backward(logits, targets, top + rest)
        return rest + (top - logits.gather(1, targets[:, None])[:, 0].float())

    @staticmethod
    def slices(logits: Tensor) -> list[slice]:
        height = max(1, (1 << 19 if logits.device.type == "cpu" else 1 << 27) // logits.shape[1])
        return [slice(low, low + height) for low in range(0, len(logits), height)]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, targets, normaliser = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        for here in _KeptNll.slices(logits):
            change = (logits[here] - normaliser[here, None]).exp_()
            change.scatter_add_(1, targets[here, None], change.new_full((len(change), 1), -1.0))
            of_logits[here] = change.mul_(upstream[here, None])
        return of_logits, None


class _ChunkedNll(torch.autograd.Function):
    """Cross-entropy of a linear layer, a chunk of rows at a time, without keeping logits.

    The weight's gradient needs the gradient of every row's nll, which only the backward knows: so the logits are made
    again there, a third more work in the head than keeping them. It is summed in fp32. A fused kernel (Liger, cut
    cross-entropy) would replace this where it is faster on the device at hand and passes the same tests, nll per row
    and all gradients.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, cap: float | None):
        kind = rows.device.type
        ctx.compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.chunk, ctx.cap = chunk, cap
        normaliser = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        chosen = torch.empty_like(normaliser)
        with torch.autocast(kind, enabled=False):
            matrix, shift = _ChunkedNll.layer(ctx, weight, bias)
            for low in range(0, len(rows), chunk):
                here = slice(low, low + chunk)
                logits = _ChunkedNll.logits(ctx, rows[here], matrix, shift)
                normaliser[here] = logits.logsumexp(-1)
                chosen[here] = logits.gather(1, targets[here, None])[:, 0]
        ctx.save_for_backward(rows, weight, bias, targets, normaliser)
        return normaliser - chosen

    @staticmethod
    def layer(ctx, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)

    @staticmethod
    def logits(ctx, rows: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
        logits = linear(rows.to(ctx.compute), matrix, shift).float()
        return logits if ctx.cap is None else ctx.cap * torch.tanh(logits / ctx.cap)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        rows, weight, bias, targets, normaliser = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        of_rows = torch.empty_like(rows) if need_rows else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        with torch.autocast(rows.device.type, enabled=False):
            matrix, shift = _ChunkedNll.layer(ctx, weight, bias)
            for low in range(0, len(rows), ctx.chunk):
                here = slice(low, low + ctx.chunk)
                logits = _ChunkedNll.logits(ctx, rows[here], matrix, shift)
                slope = None if ctx.cap is None else 1 - (logits / ctx.cap) ** 2
                change, aim = logits.sub_(normaliser[here, None]).exp_(), targets[here, None]
                change.scatter_(1, aim, change.gather(1, aim) - 1)
                change *= upstream[here, None] if slope is None else upstream[here, None] * slope
                if need_bias:
                    of_bias += change.sum(0)
                change = change.to(ctx.compute)
                if need_rows:
                    of_rows[here] = change @ matrix
                if need_weight and ctx.compute == torch.float32:
                    of_weight.addmm_(change.T, rows[here].float())
                elif need_weight:
                    of_weight += change.T @ rows[here].to(ctx.compute)
        of_weight = of_weight.to(weight.dtype) if need_weight else None
        of_bias = of_bias.to(bias.dtype) if need_bias else None
        return of_rows, of_weight, of_bias, None, None, None


class Scores(nn.Module):
    """A backbone whose `forward` returns the nll of targets at chosen positions.

    Wrappers such as DistributedDataParallel only see what goes through `forward`, so training calls this and
    everything else calls the functions above.
    """

    def __init__(self, model: nn.Module, prediction: str = "in_place", chunk: int | None = None):
        super().__init__()
        self.model = model
        self.prediction = prediction
        self.chunk = chunk

    def forward(self, tokens: Tensor, layout: Layout, row: Tensor, position: Tensor, targets: Tensor) -> Tensor:
        hidden = packed_hidden(self.model, tokens, layout)
        return target_nll(self.model, hidden, layout, row, position, targets, self.prediction, chunk=self.chunk)


def packs(model: nn.Module) -> bool:
    """Whether a model's forward can be packed; switches it to our attention the first time it is asked.

    Its class must take positions and call transformers' attention interface, and a packed forward must give the numbers
    of the padded one: the comparison, on rows longer than a narrow sliding window, is made once per model.
    """
    inner = _unwrapped(model)
    if inner not in _packs:
        base = _base(inner)
        takes = set(inspect.signature(base.forward).parameters)
        fits = set(getattr(inner.config, "layer_types", None) or ()) <= PACKABLE_LAYERS
        fits = fits and {"position_ids", "inputs_embeds", "attention_mask"} <= takes
        _packs[inner] = fits and choose(inner) and _packed_equals_padded(inner)
        if _packs[inner] and next(inner.parameters()).device.type == "cpu":
            _last_layer(inner)
    return _packs[inner]


@contextmanager
def _evaluating(inner: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module is then as it was."""
    training = [module for module in inner.modules() if module.training]
    inner.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _packed_equals_padded(inner: nn.Module) -> bool:
    embedding, parameter = inner.get_input_embeddings(), next(inner.parameters())
    if parameter.is_meta or not isinstance(getattr(embedding, "embedding_dim", None), int):
        return False
    window = getattr(inner.config, "sliding_window", None) or 0
    lengths = (3, window + 3 if window <= 128 else 7)
    layout = layout_of(lengths, device=parameter.device)
    generator = torch.Generator().manual_seed(0)
    # embedded rows rather than tokens: hooks on the embedding, which expect the caller's batch, stay out of it
    embedded = torch.randn(2, layout.width, embedding.embedding_dim, generator=generator)
    embedded = embedded.to(parameter.device, parameter.dtype)
    attention = (
        torch.arange(layout.width, device=parameter.device) < torch.tensor(lengths).to(parameter.device)[:, None]
    )
    try:
        with _evaluating(inner), torch.autocast(parameter.device.type, enabled=False):
            padded = layout.pack(_padded_forward(inner, attention, inputs_embeds=embedded)).float()
            packed = _packed_forward(inner, Rows(layout, layout), inputs_embeds=layout.pack(embedded)[None]).float()
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False  # it does not take the arguments of a packed forward, or their shapes
    tolerance = 5e-3 if parameter.dtype == torch.float32 else 5e-2  # TF32 and half precision differ by shapes
    return packed.shape == padded.shape and bool((packed - padded).abs().max() <= tolerance * padded.abs().max())


def _padded_forward(inner: nn.Module, attention: Tensor | None, **inputs: Tensor) -> Tensor:
    """[B, L, D] of input_ids [B, L] or inputs_embeds; attention [B, L] bool or None."""
    (given,) = inputs.values()
    options = {}
    if inner.config.model_type in COUNTS_FROM_PADDING:
        options["position_ids"] = torch.arange(given.shape[1], device=given.device)[None] + _first_position(inner)
    mask = None if attention is None else attention.long()
    with _precision(inner, given.device.type):
        hidden = _base(inner)(**inputs, attention_mask=mask, **options, **_no_cache(inner)).last_hidden_state
    return _finished(inner, hidden)


def _packed_forward(inner: nn.Module, rows: Rows, **inputs: Tensor) -> Tensor:
    """[T, D] of input_ids [1, T] or inputs_embeds."""
    (given,) = inputs.values()
    # stock classes pass a mask of four dimensions on as it is, and our attention does not read it
    passed = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=given.device)
    positions = rows.part.positions[None] + _first_position(inner)
    options = {"attention_mask": passed, "position_ids": positions, "rows": rows}
    with _precision(inner, given.device.type):
        hidden = _base(inner)(**inputs, **options, **_no_cache(inner)).last_hidden_state[0]
    return _finished(inner, hidden)


def _narrowed_forward(inner: nn.Module, layout: Layout, part: Layout, **inputs: Tensor) -> Tensor:
    """[N, D] at the part's positions of input_ids [1, T] or inputs_embeds, the last layer being computed only there.

    Nothing sees what the last layer makes of the other positions; only their keys and values are needed. On a CPU,
    without gradients; elsewhere, and for a class in which the last layer cannot be told apart, everything is computed
    and the part taken; likewise where a row has nothing in the part, or rows attend block-causally: their masks are
    planned for whole rows.
    """
    (given,) = inputs.values()
    places, last = _places(layout, part), None
    plain = given.device.type == "cpu" and not torch.is_grad_enabled()
    if plain and layout.blocks is None and min(part.lengths) > 0:
        last = _last_layer(inner)
    if last is None:
        return _packed_forward(inner, Rows(layout, layout), **inputs).index_select(0, places)
    return _cut_short(inner, last, Rows(layout, layout), Rows(layout, part), places, inputs)


def _places(layout: Layout, part: Layout) -> Tensor:
    """[N] long: where the part's positions stand in the packed order of the layout."""
    return layout.index(torch.div(part.flat, part.width, rounding_mode="floor"), part.positions)


def _cut_short(
    inner: nn.Module, last: nn.Module, whole: Rows, narrow: Rows, places: Tensor, inputs: dict[str, Tensor]
) -> Tensor:
    """A packed forward whose last layer gets what is given to it at `places` [N] only, beside everybody's keys."""
    total = len(whole.layout.flat)

    def at_places(given):
        if isinstance(given, Tensor):
            return given.index_select(1, places) if given.dim() > 1 and given.shape[:2] == (1, total) else given
        if isinstance(given, tuple):
            return tuple(at_places(part) for part in given)
        return given

    def enter(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        try:
            layer.forward(*args, **kwargs | {"rows": Probe(whole.layout, whole.layout)})
        except KeysAndValues as found:
            narrow.beside = (found.key, found.value)
        return at_places(args), {name: at_places(given) for name, given in kwargs.items()} | {"rows": narrow}

    hook = last.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        return _packed_forward(inner, whole, **inputs)
    finally:
        hook.remove()


def _last_layer(inner: nn.Module) -> nn.Module | None:
    """The module of a stock class whose output is, normalised, its last hidden states; None if cutting it short is not
    known to give the same numbers, which is tried once per model."""
    if inner not in _last:
        layers = getattr(inner.config, "num_hidden_layers", None)
        lists = [m for m in _base(inner).modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        _last[inner] = lists[0][-1] if len(lists) == 1 else None
        if _last[inner] is not None and not _short_equals_whole(inner):
            _last[inner] = None
    return _last[inner]


@torch.no_grad()
def _short_equals_whole(inner: nn.Module) -> bool:
    embedding, parameter = inner.get_input_embeddings(), next(inner.parameters())
    window = getattr(inner.config, "sliding_window", None) or 0
    lengths = (3, window + 9 if window <= 128 else 9, 5)
    layout = layout_of(lengths)
    part = part_of(layout, (1, 2, 0), (3, lengths[1] - 2, 5))
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(1, layout.tokens, embedding.embedding_dim, generator=generator).to(parameter.dtype)
    places = _places(layout, part)
    try:
        with _evaluating(inner), torch.autocast("cpu", enabled=False):
            rows, given = Rows(layout, layout), {"inputs_embeds": embedded}
            short = _cut_short(inner, _last[inner], rows, Rows(layout, part), places, given)
            whole = _packed_forward(inner, Rows(layout, layout), **given).index_select(0, places)
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError):
        return False  # its layers are called in a way of their own
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 5e-2
    return short.shape == whole.shape and bool((short - whole).abs().max() <= tolerance * whole.abs().max())


def _first_position(inner: nn.Module) -> int:
    return inner.config.pad_token_id + 1 if inner.config.model_type in COUNTS_FROM_PADDING else 0


def _no_cache(inner: nn.Module) -> dict[str, bool]:
    """Decoders would build a cache of their own for generating from left to right."""
    return {"use_cache": False} if "use_cache" in inspect.signature(_base(inner).forward).parameters else {}


def _base(inner: nn.Module) -> nn.Module:
    return getattr(inner, inner.base_model_prefix)


def _head(inner: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """What comes before the last linear layer of a model's LM head, and that layer."""
    known = HEADS.get(inner.config.model_type)
    if known is not None:
        return known(inner)
    last = inner.get_output_embeddings()
    if last is None:
        raise ValueError(
            f"model_type = {inner.config.model_type!r} has no known LM head; allowed: {', '.join(sorted(HEADS))} or a "
            "class whose head is its output embedding; add a line to dllm.models.forward.HEADS"
        )
    return nn.Identity(), last


def _cap(inner: nn.Module) -> float | None:
    """Some classes bend their logits: cap * tanh(logits / cap)."""
    return getattr(inner.config, "final_logit_softcapping", None)


def _place(layout: Layout, row: Tensor, position: Tensor, prediction: str) -> Tensor:
    """Place [N] in the packed order of the hidden state that scores each token."""
    if prediction == "next" and layout.before is not None:
        return layout.before.index_select(0, layout.index(row, position))
    if prediction == "next":
        position = (position - 1).clamp(min=0)
    return layout.index(row, position)


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, Scores) or hasattr(model, "module"):
        model = model.model if isinstance(model, Scores) else model.module
    return model


def is_bidirectional(model: nn.Module, vocab_size: int) -> bool:
    """Whether the first logits move when the last token changes, with padding in the batch; a start-up self-test."""
    device = next(model.parameters()).device
    tokens = torch.arange(1, 17, device=device).remainder(vocab_size).view(2, 8)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 7) % vocab_size
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[1, 5:] = False
    with torch.no_grad():
        before, after = (hidden_states(model, t, attention)[0, 0] for t in (tokens, other))
    return not torch.equal(before, after)
