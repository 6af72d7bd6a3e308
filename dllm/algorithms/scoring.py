"""Scoring targets with a masked diffusion model: the bound on their likelihood, and whether greedy decoding gives them.

The passes of all requests are laid out together: requests with the same prompt share their random orders, identical
inputs are forwarded once (the four letters of a question need one pass), rows are sorted by length and packed without
padding up to a token budget, and the LM head runs once at each scored position, in fp32. A score does not depend on the
other requests, up to float rounding. The designs are in `core.likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.algorithms.denoising import denoise_masked
from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import Canvas, Score, canvas_for
from dllm.core.likelihood import Design, estimate, likelihood_design
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import layout_of
from dllm.models.forward import packed_hidden, packed_logits
from dllm.models.load import Backbone

Rows = Sequence[Sequence[int]]

_CHUNK_ROWS = 16384
"""Rows laid out at a time, so that memory does not grow with the number of requests."""

_HEAD_LOGITS = 2**25
"""Most logits held at once (128 MiB)."""


def nelbo_masked(backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[Score]:
    """A bound on -log p(target | prompt) per request, in nats.

    With `settings.block_size`, the sum over the target's blocks of their bounds, each given the prompt and the clean
    blocks before it: the bound of a decoder that finishes block after block, with block size 1 the left-to-right chain
    rule, at the target's length the plain bound. Raises ValueError for an empty target, a target with the mask token, a
    row longer than the model's context, or a budget too small for the estimator.
    """
    _check(backbone, prompts, targets)
    if not len(prompts):
        return []
    parts = _parts(prompts, targets, settings)
    nats, variance = numpy.zeros(len(prompts)), numpy.zeros(len(prompts))
    passes = numpy.zeros(len(prompts), dtype=numpy.int64)
    for groups in _chunks(_groups(parts, settings, backbone.mask_id)):
        for group, nll in zip(groups, _forward(backbone, parts, groups, settings.batch_tokens), strict=True):
            value, error = estimate(group.design, nll)
            numpy.add.at(nats, group.owner, value.numpy())
            numpy.add.at(variance, group.owner, (error**2).numpy())
            numpy.add.at(passes, group.owner, group.passes)
    error = numpy.sqrt(variance)
    return [Score(*score) for score in zip(nats.tolist(), error.tolist(), passes.tolist(), strict=True)]


def greedy_match_masked(backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[bool]:
    """Whether greedy decoding gives the target: a canvas of its length, one token per pass, the most confident first.

    A row leaves its batch at the first token that differs. Raises ValueError as `nelbo_masked`.
    """
    _check(backbone, prompts, targets)
    matches = [False] * len(prompts)
    lengths = numpy.array([len(p) + len(t) for p, t in zip(prompts, targets, strict=True)], dtype=numpy.int64)
    order = lengths.argsort(kind="stable")
    for low, high in _batches(lengths[order], settings.batch_tokens):
        requests = order[low:high].tolist()
        found = _greedy_batch(backbone, [prompts[r] for r in requests], [targets[r] for r in requests])
        for request, match in zip(requests, found.tolist(), strict=True):
            matches[request] = match
    return matches


def _greedy_batch(backbone: Backbone, prompts: Rows, targets: Rows) -> Tensor:
    """[B] bool."""
    counts = [len(target) for target in targets]
    ids = {"mask_id": backbone.mask_id, "pad_id": backbone.pad_id, "device": backbone.device}
    canvas = canvas_for(prompts, counts, **ids)
    wanted = pad_sequence([torch.tensor([*p, *t]) for p, t in zip(prompts, targets, strict=True)], batch_first=True)
    wanted = wanted.to(canvas.tokens.device)

    def differs(canvas: Canvas) -> Tensor:
        return (canvas.valid & ~canvas.masked & (canvas.tokens != wanted)).any(1)

    settings = GenerateSettings(max_new_tokens=max(counts), block_size=max(counts), early_stop=False)
    *_, last = denoise_masked(backbone, canvas, settings, finished=differs)
    return ~differs(last)


@dataclass(frozen=True)
class _Parts:
    """What is scored: targets, or blocks of them, each in a context (a prompt, and the clean blocks before).

    contexts [C, P] long, padded on the right, and their lengths [C]; targets: the tokens of N parts; owner and context
    [N]: the request and the context of each; key [N] long: of its random numbers.
    """

    contexts: Tensor
    lengths: Tensor
    targets: list[Sequence[int]]
    owner: numpy.ndarray
    context: numpy.ndarray
    key: Tensor


def _parts(prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> _Parts:
    """Parts with the same prompt and place have the same key, whatever their lengths and the blocks before them."""
    numbers: dict[tuple[int, ...], int] = {}
    rows, owner, context, prompt, block = [], [], [], [], []
    for request, (given, target) in enumerate(zip(prompts, targets, strict=True)):
        given = tuple(given)
        first = numbers.setdefault(given, len(numbers))
        size = settings.block_size or len(target)
        for low in range(0, len(target), size):
            before = numbers.setdefault((*given, *target[:low]), len(numbers)) if low else first
            rows.append(target[low : low + size])
            owner.append(request)
            context.append(before)
            prompt.append(first)
            block.append(low // size)
    lengths = torch.tensor([len(tokens) for tokens in numbers], dtype=torch.long)
    contexts = pad_sequence([torch.tensor(tokens, dtype=torch.long) for tokens in numbers], batch_first=True)
    hashes = token_hash(contexts, torch.arange(contexts.shape[1]) < lengths[:, None])
    key = keyed_hash(settings.seed, hashes[prompt], torch.tensor(block))
    return _Parts(contexts, lengths, rows, numpy.array(owner), numpy.array(context), key)


@dataclass(frozen=True)
class _Group:
    """G parts of one length L, their designs, and the inputs they need, each once.

    owner [G]: the request of each; targets [G, L]; design with leading dimension G; inputs: U different masked targets
    [U, L], of contexts [U]; row [G, S]: which input each pass is; passes [G]: inputs that no earlier part has.
    """

    owner: numpy.ndarray
    targets: Tensor
    design: Design
    inputs: Tensor
    context: Tensor
    row: Tensor
    passes: numpy.ndarray


def _groups(parts: _Parts, settings: LikelihoodSettings, mask_id: int) -> Iterator[_Group]:
    """The parts by target length, those with the same context together, short contexts first."""
    size = numpy.array([len(target) for target in parts.targets])
    order = numpy.lexsort((parts.context, parts.lengths.numpy()[parts.context], size))
    for length, same in groupby(order.tolist(), key=lambda part: int(size[part])):
        members = list(same)
        passes = likelihood_design(length, 0, settings).masked.shape[0]
        most = max(1, _CHUNK_ROWS // passes)
        context = parts.context[members]
        low = 0
        while low < len(members):
            high = min(low + most, len(members))
            while high < len(members) and context[high] == context[high - 1]:
                high += 1
            yield _group(parts, numpy.array(members[low:high]), settings, mask_id)
            low = high


def _group(parts: _Parts, members: numpy.ndarray, settings: LikelihoodSettings, mask_id: int) -> _Group:
    targets = torch.tensor([list(parts.targets[part]) for part in members.tolist()], dtype=torch.long)
    key, of_key = parts.key[members].unique(return_inverse=True)
    design = likelihood_design(targets.shape[1], key, settings).of(of_key)
    inputs = torch.where(design.masked, mask_id, targets[:, None])
    part, step = design.scored.any(-1).nonzero(as_tuple=True)  # an arrangement may end in empty passes
    inputs = inputs[part, step]
    context = torch.from_numpy(parts.context[members])[part]
    # equal inputs by a hash of 64 bits: of 16384 rows, two different ones share it with probability 1e-11
    same = keyed_hash(context, token_hash(inputs)).numpy()
    _, first, inverse = numpy.unique(same, return_index=True, return_inverse=True)
    row = torch.zeros(design.scored.shape[:2], dtype=torch.long)
    row[part, step] = torch.from_numpy(inverse.reshape(-1))
    first = torch.from_numpy(first)
    passes = torch.bincount(part[first], minlength=len(members)).numpy()
    return _Group(parts.owner[members], targets, design, inputs[first], context[first], row, passes)


def _chunks(groups: Iterator[_Group]) -> Iterator[list[_Group]]:
    chunk, rows = [], 0
    for group in groups:
        chunk.append(group)
        rows += len(group.inputs)
        if rows >= _CHUNK_ROWS:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk


@torch.no_grad()
def _forward(backbone: Backbone, parts: _Parts, groups: list[_Group], batch_tokens: int) -> Iterator[Tensor]:
    """The nll [G, S, L] of each group, 0 where not scored, from as few forward batches as the token budget allows."""
    most = max(group.targets.shape[1] for group in groups)
    inputs = torch.cat([torch.nn.functional.pad(group.inputs, (0, most - group.inputs.shape[1])) for group in groups])
    size = torch.cat([torch.full((len(group.inputs),), group.targets.shape[1]) for group in groups])
    context = torch.cat([group.context for group in groups])
    start = parts.lengths[context]
    order = (start + size).argsort(stable=True)
    inputs, size, context, start = inputs[order], size[order], context[order], start[order]
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))

    # what is scored, as (row, position) and token, in the order of the groups
    width, below, place, token, counts = parts.contexts.shape[1] + most, 0, [], [], []
    for group in groups:
        part, step, position = group.design.scored.nonzero(as_tuple=True)
        row = rank[group.row[part, step] + below]
        place.append(row * width + start[row] + position)
        token.append(group.targets[part, position])
        counts.append(len(part))
        below += len(group.inputs)
    place, of_place = torch.cat(place).unique(return_inverse=True)
    token, by_place = torch.cat(token), of_place.argsort(stable=True)

    found = []
    for low, high in _batches((start + size).numpy(), batch_tokens):
        lengths = (start + size)[low:high]
        tokens = torch.full((high - low, int(lengths.max())), backbone.pad_id)
        head = min(tokens.shape[1], parts.contexts.shape[1])
        before = torch.arange(head) < start[low:high, None]
        tokens[:, :head] = torch.where(before, parts.contexts[context[low:high], :head], tokens[:, :head])
        inside = torch.arange(most) < size[low:high, None]
        line, column = inside.nonzero(as_tuple=True)
        tokens[line, column + start[low:high][line]] = inputs[low:high][inside]
        begin, end = torch.searchsorted(place, torch.tensor([low * width, high * width])).tolist()
        first, last = torch.searchsorted(of_place[by_place], torch.tensor([begin, end])).tolist()
        asked = by_place[first:last]
        scored = place[begin:end]
        found.append(
            _nll(
                backbone,
                tokens,
                lengths.tolist(),
                torch.stack([scored // width - low, scored % width]),
                torch.stack([of_place[asked] - begin, token[asked]]),
            )
        )
    nll = torch.empty(len(token), dtype=torch.float64).index_copy(0, by_place, torch.cat(found).double().cpu())
    for group, values in zip(groups, nll.split(counts), strict=True):
        scored = group.design.scored
        yield torch.zeros(scored.shape, dtype=torch.float64).masked_scatter(scored, values)


def _nll(backbone: Backbone, tokens: Tensor, lengths: list[int], place: Tensor, asked: Tensor) -> Tensor:
    """-log p [N] of tokens at scored places of one forward batch, on the device: fp32, without the mask token.

    tokens [B, L]; place [2, M]: row and position of what is scored, ascending; asked [2, N]: which place, ascending,
    and which token.
    """
    device = backbone.device
    layout = layout_of(lengths, tokens.shape[1]).to(device)
    hidden = packed_hidden(backbone.model, tokens.to(device, non_blocking=True), layout)
    height = max(1, _HEAD_LOGITS // backbone.vocab_size)
    bounds = torch.searchsorted(asked[0].contiguous(), torch.arange(0, place.shape[1] + height, height)).tolist()
    place, asked = place.to(device, non_blocking=True), asked.to(device, non_blocking=True)
    found = []
    for low, begin, end in zip(range(0, place.shape[1], height), bounds, bounds[1:], strict=False):
        row, position = place[:, low : low + height]
        logits = packed_logits(backbone.model, hidden, layout, row, position, backbone.prediction)
        logits[:, backbone.mask_id] = -torch.inf
        number, token = asked[0, begin:end] - low, asked[1, begin:end]
        found.append(logits.logsumexp(-1)[number] - logits[number, token])
    return torch.cat(found)


def _batches(lengths: numpy.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of rows of ascending `lengths` with at most `batch_tokens` tokens in all, one row at least."""
    total = numpy.cumsum(lengths)
    low = 0
    while low < len(lengths):
        before = int(total[low - 1]) if low else 0
        high = max(low + 1, int(numpy.searchsorted(total, before + batch_tokens, side="right")))
        yield low, high
        low = high


def _check(backbone: Backbone, prompts: Rows, targets: Rows) -> None:
    if len(prompts) != len(targets):
        raise ValueError(f"{len(prompts)} prompts and {len(targets)} targets; a request is one of each")
    for request, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if not len(target):
            raise ValueError(f"request {request}: the target is empty; a likelihood needs at least one target token")
        if len(prompt) + len(target) > backbone.max_length:
            raise ValueError(
                f"request {request}: prompt ({len(prompt)} tokens) and target ({len(target)}) exceed the model's "
                f"{backbone.max_length} positions; shorten the prompt"
            )
        if backbone.mask_id in target:
            raise ValueError(f"request {request}: the target holds the mask token {backbone.mask_id}, which is no text")
