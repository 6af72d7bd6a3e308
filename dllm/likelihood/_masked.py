"""Scoring targets with a masked diffusion model: the bound on their likelihood, and whether greedy decoding gives them.

The passes of all requests are laid out together: requests with the same prompt share their random orders, identical
inputs are forwarded once (the four letters of a question need one pass), rows are sorted by length and packed without
padding up to a token budget, and the LM head runs once at each scored position, in fp32. A score does not depend on the
other requests, up to float rounding. The designs are in `core.likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.blocks import BlockRows, BlockRule
from dllm.core.canvas import Progress, Score, canvas_for
from dllm.core.likelihood import (
    WITH_EFFORT,
    Design,
    budget_for,
    estimate,
    estimator_for,
    everything_masked,
    likelihood_design,
)
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import Layout, block_layout, layout_of, part_of
from dllm.core.spans import SpanRows
from dllm.models.forward import packed_hidden, packed_logits, packs
from dllm.models.load import Backbone
from dllm.sampling.sampler import MaskedSampler

Rows = Sequence[Sequence[int]]

_CHUNK_ROWS = 16384
"""Rows laid out at a time, so that memory does not grow with the number of requests."""

_HOST_TOKENS = 4096
"""Most tokens of a forward batch on a CPU, whatever the budget: with more, activations fall out of its cache."""

_HEAD_LOGITS = 2**25
"""Most logits held at once (128 MiB)."""

_SPAN_TOKENS = 2048
"""Tokens in spans behind one copy of a row, about; with more, another copy costs less than what attention would."""


def nelbo_masked(
    backbone: Backbone,
    prompts: Rows,
    targets: Rows,
    settings: LikelihoodSettings,
    *,
    rule: BlockRule | None = None,
) -> list[Score]:
    """A bound on -log p(target | prompt) per request, in nats.

    With `settings.block_size`, the sum over the target's blocks of their bounds, each given the prompt and the clean
    blocks before it: the bound of a decoder that finishes block after block, with block size 1 the left-to-right chain
    rule, at the target's length the plain bound.

    rule: how rows are cut into blocks of a model that attends block-causally. Its targets are always scored so, in its
    own blocks; all passes of a request then share one pass over its clean tokens.

    The passes of a score are forwarded rows of its context and target; what `multilevel` computes of less than a row is
    counted by its tokens.

    Raises ValueError for an empty target, a target with the mask token, a row longer than the model's context, a
    budget too small for the estimator, or `multilevel` of a model that cannot compute parts of rows.
    """
    _check(backbone, prompts, targets)
    if settings.estimator == "multilevel":
        _check_spans(backbone, rule)
    if not len(prompts):
        return []
    if backbone.device.type == "cpu":
        settings = settings.model_copy(update={"batch_tokens": min(settings.batch_tokens, _HOST_TOKENS)})
    parts = _parts(prompts, targets, settings, rule)
    nats, variance = numpy.zeros(len(prompts)), numpy.zeros(len(prompts))
    passes = numpy.zeros(len(prompts), dtype=numpy.int64)
    first, budget = None, numpy.full(len(parts.targets), settings.budget)
    if settings.effort is not None and settings.estimator in WITH_EFFORT:
        first = _everything_masked(backbone, parts, settings, rule, passes)
        budget = budget_for(numpy.array([float(nll.sum()) for nll in first]), settings)
    for groups in _chunks(_groups(parts, settings, budget, first, backbone.mask_id)):
        exact = _forward(backbone, parts, groups, settings.batch_tokens, rule)
        cheap = _forward_spans(backbone, parts, groups, settings.batch_tokens, passes)
        for group, nll, beside in zip(groups, exact, cheap, strict=True):
            if beside is not None:
                nll = nll.index_copy(1, group.design.partial.nonzero()[:, 0], beside)
            value, error = estimate(group.design, nll)
            numpy.add.at(nats, group.owner, value.numpy())
            numpy.add.at(variance, group.owner, (error**2).numpy())
            numpy.add.at(passes, group.owner, group.passes)
    error = numpy.sqrt(variance)
    return [Score(*score) for score in zip(nats.tolist(), error.tolist(), passes.tolist(), strict=True)]


def greedy_match_masked(
    backbone: Backbone,
    prompts: Rows,
    targets: Rows,
    settings: LikelihoodSettings,
    *,
    rule: BlockRule | None = None,
) -> list[bool]:
    """Whether greedy decoding gives the target: a canvas of its length, one token per pass, the most confident first.

    A row leaves its batch at the first token that differs. Raises ValueError as `nelbo_masked`.
    """
    _check(backbone, prompts, targets)
    matches = [False] * len(prompts)
    lengths = numpy.array([len(p) + len(t) for p, t in zip(prompts, targets, strict=True)], dtype=numpy.int64)
    order = lengths.argsort(kind="stable")
    for low, high in _batches(lengths[order], settings.batch_tokens):
        requests = order[low:high].tolist()
        found = _greedy_batch(backbone, [prompts[r] for r in requests], [targets[r] for r in requests], rule)
        for request, match in zip(requests, found.tolist(), strict=True):
            matches[request] = match
    return matches


def _greedy_batch(backbone: Backbone, prompts: Rows, targets: Rows, rule: BlockRule | None) -> Tensor:
    """[B] bool."""
    counts = [len(target) for target in targets]
    ids = {"mask_id": backbone.mask_id, "pad_id": backbone.pad_id, "device": backbone.device}
    canvas = canvas_for(prompts, counts, **ids)

    def differs(row: Progress) -> bool:
        pairs = zip(row.response, targets[row.number], strict=True)
        return any(token not in (wanted, backbone.mask_id) for token, wanted in pairs)

    settings = GenerateSettings(max_new_tokens=max(counts), block_size=max(counts), early_stop=False)
    *_, last = MaskedSampler(rule and (lambda *_: rule)).denoise(backbone, canvas, settings, ended=differs)
    pairs = zip(last.responses(), targets, strict=True)
    return torch.tensor([response == list(target) for response, target in pairs])


@dataclass(frozen=True)
class _Parts:
    """What is scored: targets, or blocks of them, each in a context (a prompt, and the clean blocks before).

    contexts [C, P] long, padded on the right, and their lengths [C]; targets: the tokens of N parts; owner and context
    [N]: the request and the context of each; key [N] long: of its random numbers. Where the model attends
    block-causally: origin [C], from where its blocks are counted, and line [C], a context that begins with this one.
    """

    contexts: Tensor
    lengths: Tensor
    targets: list[Sequence[int]]
    owner: numpy.ndarray
    context: numpy.ndarray
    key: Tensor
    origin: numpy.ndarray
    line: numpy.ndarray


def _parts(prompts: Rows, targets: Rows, settings: LikelihoodSettings, rule: BlockRule | None) -> _Parts:
    """Parts with the same prompt and place have the same key, whatever their lengths and the blocks before them."""
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    line: dict[int, int] = {}
    rows, owner, context, prompt, number = [], [], [], [], []
    for request, (given, target) in enumerate(zip(prompts, targets, strict=True)):
        given, size = tuple(given), settings.block_size or len(target)
        origin, low, block = 0, 0, 0
        if rule is not None:
            origin, size = int(rule.starts(numpy.array(len(given)))), rule.size
        first = numbers.setdefault((origin, given), len(numbers))
        own = []
        while low < len(target):
            high = low + size
            if rule is not None:
                high = int(rule.end(numpy.array(len(given) + low), numpy.array(origin))) - len(given)
            own.append(numbers.setdefault((origin, (*given, *target[:low])), len(numbers)) if low else first)
            rows.append(target[low:high])
            owner.append(request)
            prompt.append(first)
            number.append(block)
            low, block = high, block + 1
        context += own
        line |= dict.fromkeys(own, own[-1])
    lengths = torch.tensor([len(tokens) for _, tokens in numbers], dtype=torch.long)
    contexts = pad_sequence([torch.tensor(tokens, dtype=torch.long) for _, tokens in numbers], batch_first=True)
    hashes = token_hash(contexts, torch.arange(contexts.shape[1]) < lengths[:, None])
    key = keyed_hash(settings.seed, hashes[prompt], torch.tensor(number))
    return _Parts(
        contexts,
        lengths,
        rows,
        owner=numpy.array(owner),
        context=numpy.array(context),
        key=key,
        origin=numpy.array([origin for origin, _ in numbers]),
        line=numpy.array([line[context] for context in range(len(numbers))]),
    )


@dataclass(frozen=True)
class _Group:
    """G parts with their designs, padded to the longest target L, and the inputs they need, each once.

    members and owner [G]: the number and the request of each; targets [G, L]; design with leading dimension G; asked
    [G, S, L] bool: what it scores and is not known, known [G, S, L] the nll of the rest; inputs: U different masked
    targets [U, L], their lengths `size` [U] and contexts [U]; row [G, S]: which input each pass is; passes [G]: inputs
    that no earlier part has.
    """

    members: numpy.ndarray
    owner: numpy.ndarray
    targets: Tensor
    design: Design
    asked: Tensor
    known: Tensor
    inputs: Tensor
    size: Tensor
    context: Tensor
    row: Tensor
    passes: numpy.ndarray


def _everything_masked(
    backbone: Backbone, parts: _Parts, settings: LikelihoodSettings, rule: BlockRule | None, passes: numpy.ndarray
) -> list[Tensor]:
    """The nll [L] of every part with all of it masked; counts its passes, of each request, in `passes`."""
    found = [torch.empty(0)] * len(parts.targets)
    for groups in _chunks(_groups(parts, settings, None, None, backbone.mask_id)):
        for group, nll in zip(groups, _forward(backbone, parts, groups, settings.batch_tokens, rule), strict=True):
            numpy.add.at(passes, group.owner, group.passes)
            for part, values in zip(group.members.tolist(), nll[:, 0], strict=True):
                found[part] = values[: len(parts.targets[part])]
    return found


def _groups(
    parts: _Parts,
    settings: LikelihoodSettings,
    budget: numpy.ndarray | None,
    first: list[Tensor] | None,
    mask_id: int,
) -> Iterator[_Group]:
    """The parts by estimator, budget [N] and target length, those with the same context together, short contexts first.

    Designs that are made for many lengths at once share a group. Without a budget only the pass with everything masked;
    `first` is what such a pass gave.
    """
    size = numpy.array([len(target) for target in parts.targets])
    most_passes = numpy.ones_like(size) if budget is None else budget
    order = numpy.lexsort((parts.context, parts.lengths.numpy()[parts.context], size, most_passes))
    kind = partial(_kind, settings) if budget is not None else lambda length, passes: (None, 0)
    known = {
        (length, passes): kind(length, passes)
        for length, passes in set(zip(size.tolist(), most_passes.tolist(), strict=True))
    }
    for (own, _), same in groupby(order.tolist(), key=lambda part: known[int(size[part]), int(most_passes[part])]):
        members = numpy.array(list(same))
        context, low = parts.context[members], 0
        most = max(1, _CHUNK_ROWS // _rows(int(size[members].max()), own))
        while low < len(members):
            high = min(low + most, len(members))
            while high < len(members) and context[high] == context[high - 1]:
                high += 1
            yield _group(parts, members[low:high], own, first, mask_id)
            low = high


def _kind(settings: LikelihoodSettings, length: int, passes: int) -> tuple[LikelihoodSettings, int]:
    """How a part is estimated, and its length, 0 where any lengths go together: what the parts of a group share."""
    own = settings.model_copy(update={"budget": passes})
    name = estimator_for(length, own)
    return own.model_copy(update={"estimator": name}), 0 if name == "lattice" and length > 1 else length


@lru_cache(maxsize=4096)
def _rows(length: int, settings: LikelihoodSettings | None) -> int:
    """Passes of a design; without settings, that of everything masked."""
    return 1 if settings is None else likelihood_design(length, torch.tensor(0), settings).masked.shape[0]


def _design(length: Tensor, key: Tensor, settings: LikelihoodSettings | None) -> Design:
    """The designs of targets of these lengths [G] under these keys [G]; equal ones are made once."""
    if settings is None:
        return everything_masked(length)
    pairs, number = torch.stack([key, length], 1).unique(dim=0, return_inverse=True)
    key, length = pairs.unbind(1)
    of_all = int(length[0]) if bool((length == length[0]).all()) else length
    return likelihood_design(of_all, key, settings).of(number)


def _group(
    parts: _Parts,
    members: numpy.ndarray,
    settings: LikelihoodSettings | None,
    first: list[Tensor] | None,
    mask_id: int,
) -> _Group:
    targets = pad_sequence([torch.tensor(parts.targets[part]) for part in members.tolist()], batch_first=True)
    length = torch.tensor([len(parts.targets[part]) for part in members.tolist()])
    design = _design(length, parts.key[members], settings)
    asked = design.scored & ~design.partial[:, None]
    known = torch.zeros((), dtype=torch.float64).expand(asked.shape)
    if first is not None:
        whole = (design.masked.sum(-1) == length[:, None])[..., None] & asked
        known = whole * pad_sequence([first[part] for part in members.tolist()], batch_first=True)[:, None]
        asked = asked & ~whole
    inputs = torch.where(design.masked, mask_id, targets[:, None])
    part, step = asked.any(-1).nonzero(as_tuple=True)  # an arrangement may end in empty passes
    inputs = inputs[part, step]
    context, size = torch.from_numpy(parts.context[members])[part], length[part]
    # equal inputs by a hash of 64 bits: of 16384 rows, two different ones share it with probability 1e-11
    inside = torch.arange(inputs.shape[1]) < size[:, None]
    row = torch.zeros(design.scored.shape[:2], dtype=torch.long)
    place, row[part, step] = _different(keyed_hash(context, size, token_hash(inputs, inside)))
    passes = torch.bincount(part[place], minlength=len(members)).numpy()
    owner, inputs, size, context = parts.owner[members], inputs[place], size[place], context[place]
    return _Group(members, owner, targets, design, asked, known, inputs, size, context, row, passes)


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
def _forward(
    backbone: Backbone, parts: _Parts, groups: list[_Group], batch_tokens: int, rule: BlockRule | None
) -> Iterator[Tensor]:
    """The nll [G, S, L] of each group, 0 where not scored, from as few forward batches as the token budget allows."""
    if not any(len(group.inputs) for group in groups):
        yield from (group.known for group in groups)
        return
    most = max(group.targets.shape[1] for group in groups)
    inputs = torch.cat([torch.nn.functional.pad(group.inputs, (0, most - group.inputs.shape[1])) for group in groups])
    size = torch.cat([group.size for group in groups])
    context = torch.cat([group.context for group in groups])
    start = parts.lengths[context]
    order = (start + size).argsort(stable=True)
    if rule is not None:
        line = torch.from_numpy(parts.line)[context]
        order = torch.from_numpy(numpy.lexsort((start, line, parts.lengths[line])))
    inputs, size, context, start = inputs[order], size[order], context[order], start[order]
    cost = start + size
    if rule is not None:  # the clean tokens of a text are forwarded once
        line = line[order]
        opens = torch.ones_like(line, dtype=torch.bool)
        opens[1:] = line[1:] != line[:-1]
        cost = size + opens * parts.lengths[line]
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))

    # what is scored, as (row, position) and token, in the order of the groups
    width, below, place, token, counts = parts.contexts.shape[1] + most, 0, [], [], []
    for group in groups:
        part, step, position = group.asked.nonzero(as_tuple=True)
        row = rank[group.row[part, step] + below]
        place.append(row * width + start[row] + position)
        token.append(group.targets[part, position])
        counts.append(len(part))
        below += len(group.inputs)
    place, of_place = torch.cat(place).unique(return_inverse=True)
    token, by_place = torch.cat(token), of_place.argsort(stable=True)

    found = []
    for low, high in _batches(cost.numpy(), batch_tokens):
        here = slice(low, high)
        rows = _Inputs(inputs[here], size[here], context[here], start[here])
        begin, end = torch.searchsorted(place, torch.tensor([low * width, high * width])).tolist()
        first, last = torch.searchsorted(of_place[by_place], torch.tensor([begin, end])).tolist()
        asked = by_place[first:last]
        scored = place[begin:end]
        scored = torch.stack([scored // width - low, scored % width])
        if rule is None:
            tokens, layout = _whole_rows(parts, rows, backbone.pad_id)
        else:
            tokens, layout, scored = _shared_rows(parts, rows, scored, rule, backbone.pad_id)
        wanted = torch.stack([of_place[asked] - begin, token[asked]])
        found.append(_nll(backbone, tokens, layout, scored, wanted))
    nll = torch.empty(len(token), dtype=torch.float64).index_copy(0, by_place, torch.cat(found).double().cpu())
    for group, values in zip(groups, nll.split(counts), strict=True):
        yield group.known.masked_scatter(group.asked, values)


@dataclass(frozen=True)
class _Inputs:
    """R masked targets [R, most] with their sizes, contexts and the lengths of these [R]."""

    tokens: Tensor
    size: Tensor
    context: Tensor
    start: Tensor


def _whole_rows(parts: _Parts, rows: _Inputs, pad_id: int) -> tuple[Tensor, Layout]:
    """Each masked target behind its context: tokens [R, L] and their layout."""
    lengths = rows.start + rows.size
    tokens = torch.full((len(lengths), int(lengths.max())), pad_id)
    head = min(tokens.shape[1], parts.contexts.shape[1])
    before = torch.arange(head) < rows.start[:, None]
    tokens[:, :head] = torch.where(before, parts.contexts[rows.context, :head], tokens[:, :head])
    inside = torch.arange(rows.tokens.shape[1]) < rows.size[:, None]
    line, column = inside.nonzero(as_tuple=True)
    tokens[line, column + rows.start[line]] = rows.tokens[inside]
    return tokens, layout_of(lengths.tolist(), tokens.shape[1])


def _shared_rows(
    parts: _Parts, rows: _Inputs, scored: Tensor, rule: BlockRule, pad_id: int
) -> tuple[Tensor, Layout, Tensor]:
    """All masked blocks of a text behind one copy of its clean tokens: tokens [B, L], their layout.

    And where the places `scored` [2, M] (number of the masked target, position) went: row and place in it.
    """
    size, start = rows.size.numpy(), rows.start.numpy()
    lines, row, counts = numpy.unique(parts.line[rows.context.numpy()], return_inverse=True, return_counts=True)
    origin = parts.origin[lines]
    first = rule.begin(start, origin[row])  # a block may begin with the end of the prompt
    clean = numpy.zeros_like(counts)
    numpy.maximum.at(clean, row, first)
    # rows of a line stand together, but maybe in another order than the lines' numbers
    order = numpy.argsort(row, kind="stable")
    blocks = BlockRows(rule, origin, clean, counts, first[order], (start + size - first)[order])
    layout = block_layout(blocks)
    tokens = torch.full((layout.rows, layout.width), pad_id)
    head = int(clean.max())
    tokens[:, :head] = parts.contexts[torch.from_numpy(lines), :head]
    ends = blocks.count.cumsum()
    inner = (ends - blocks.count) - (ends - blocks.count)[(counts.cumsum() - counts)[row[order]]]
    slot = numpy.empty_like(start)  # where position 0 of the text would stand, counted from a masked block
    slot[order] = clean[row[order]] + inner - first[order]
    for number in range(len(size)):
        at, low = int(row[number]), int(slot[number])
        known = slice(int(first[number]), int(start[number]))
        tokens[at, low + known.start : low + known.stop] = parts.contexts[rows.context[number], known]
        tokens[at, low + known.stop : low + known.stop + int(size[number])] = rows.tokens[number, : int(size[number])]
    place = torch.from_numpy(slot)[scored[0]] + scored[1]
    return tokens, layout, torch.stack([torch.from_numpy(row)[scored[0]], place])


# ----------------------------------------------------------------------------------------------------------------------
# Spans behind a clean row


def _check_spans(backbone: Backbone, rule: BlockRule | None) -> None:
    name, instead = type(backbone.model).__name__, "take estimator = 'auto'"
    if rule is not None:
        raise ValueError(f"estimator = 'multilevel' scores whole texts, and this model works block by block; {instead}")
    if hasattr(backbone.model, "dllm_hidden") or not packs(backbone.model):
        raise ValueError(
            "estimator = 'multilevel' needs a class that calls transformers' attention interface, and "
            f"{name} computes attention in a way of its own; {instead}"
        )


@dataclass(frozen=True)
class _Spans:
    """The cheap passes of a group: W different rows, each with spans, V in all, which score M positions.

    tokens [W, most] and length [W]: the rows, clean; row [V], ascending, and count [V]: row and size of each span;
    position and token [sum of count]: what stands in the spans; scored [3, M]: the span, the place in `position` from
    where each token is predicted, and the token; of [G, S', L]: which of the M each cheap nll of the group is, M where
    not scored; passes [G]: what no earlier part has computed, in rows of the part's length, rounded up.
    """

    tokens: Tensor
    length: Tensor
    row: Tensor
    count: Tensor
    position: Tensor
    token: Tensor
    scored: Tensor
    of: Tensor
    passes: numpy.ndarray


def _spans(parts: _Parts, group: _Group, mask_id: int, prediction: str) -> _Spans:
    """Equal rows, and equal versions of a row, once.

    Where a token is predicted from the place before it, that place belongs to the span, too: in the clean row, it has
    seen the token.
    """
    design, length = group.design, group.targets.shape[1]
    context = torch.from_numpy(parts.context[group.members])
    masked, asked = (x[:, design.partial] for x in (design.masked, design.scored))
    of_row = keyed_hash(context, token_hash(group.targets))
    opens, row = _different(of_row)
    version = keyed_hash(row[:, None], token_hash(masked.long()))
    place, of_version = _different(version.flatten())
    part, step = place // masked.shape[1], place % masked.shape[1]
    by_row = row[part].argsort(stable=True)
    of_version = by_row.argsort()[of_version].view(version.shape)
    part, step = part[by_row], step[by_row]
    masked, asked = masked[part, step], asked[part, step]

    # slots: the last token of the context, and the target
    start, targets = parts.lengths[context], group.targets
    last = parts.contexts[context, (start - 1).clamp(min=0)] if parts.contexts.shape[1] else torch.zeros_like(start)
    slots = torch.cat([last[part, None], torch.where(masked, mask_id, targets[part])], 1)
    member = torch.nn.functional.pad(masked, (1, 0))
    if prediction == "next":
        member = member | torch.nn.functional.pad(asked, (0, 1))
        member[:, 0] &= start[part] > 0
    number, slot = member.nonzero(as_tuple=True)
    at = torch.zeros(member.shape, dtype=torch.long)
    at[number, slot] = torch.arange(len(number))
    span, target = asked.nonzero(as_tuple=True)
    read = at[span, target + 1]
    if prediction == "next":
        first = (target == 0) & (start[part[span]] == 0)  # it has no token before it, and reads itself
        read = torch.where(first, read, at[span, target])
    found = torch.full(masked.shape, len(span))
    found[span, target] = torch.arange(len(span))

    count = member.sum(1)
    cost = torch.zeros(len(context)).index_add_(0, part, count.float())
    cost[opens] += (start + length)[opens].float()
    heads = parts.contexts[context[opens]]
    rows = torch.nn.functional.pad(heads, (0, length))
    column = start[opens, None] + torch.arange(length)
    return _Spans(
        tokens=rows.scatter(1, column, targets[opens]),
        length=start[opens] + length,
        row=row[part],
        count=count,
        position=start[part[number]] - 1 + slot,
        token=slots[number, slot],
        scored=torch.stack([span, read, targets[part[span], target]]),
        of=found[of_version],
        passes=(cost / (start + length)).ceil().long().numpy(),
    )


def _different(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where each different value is first, in ascending order of the values, and which of them each value is."""
    _, first, inverse = numpy.unique(values.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(inverse.reshape(-1))


def _inverse(order: numpy.ndarray) -> numpy.ndarray:
    """Where each element went in this order."""
    place = numpy.empty_like(order)
    place[order] = numpy.arange(len(order))
    return place


@torch.no_grad()
def _forward_spans(
    backbone: Backbone, parts: _Parts, groups: list[_Group], batch_tokens: int, passes: numpy.ndarray
) -> Iterator[Tensor | None]:
    """The nll [G, S', L] of each group's cheap passes, 0 where not scored, or None; counts them in `passes`."""
    every = [_spans(parts, group, backbone.mask_id, backbone.prediction) for group in groups if group.design.cheap]
    found = iter(_span_nll(backbone, every, batch_tokens) if every else ())
    every = iter(every)
    for group in groups:
        if not group.design.cheap:
            yield None
            continue
        spans, nll = next(every), next(found)
        numpy.add.at(passes, group.owner, spans.passes)
        yield torch.nn.functional.pad(nll, (0, 1))[spans.of]


def _span_nll(backbone: Backbone, every: list[_Spans], batch_tokens: int) -> tuple[Tensor, ...]:
    """The nll [M] of what each group's spans score, from as few forward batches as the token budget allows.

    A line is a clean row and some of its spans, as a rule all of them.
    """
    width = max(spans.tokens.shape[1] for spans in every)
    clean = torch.cat([torch.nn.functional.pad(spans.tokens, (0, width - spans.tokens.shape[1])) for spans in every])
    rows, versions, tokens = (
        numpy.cumsum([0, *(len(x) for x in xs)])
        for xs in zip(*((spans.length, spans.count, spans.position) for spans in every), strict=True)
    )
    row = torch.cat([spans.row + int(base) for spans, base in zip(every, rows, strict=False)]).numpy()
    count = torch.cat([spans.count for spans in every]).numpy()
    position, token = (torch.cat([getattr(spans, x) for spans in every]) for x in ("position", "token"))
    moves = [torch.tensor([[int(v)], [int(t)], [0]]) for v, t in zip(versions, tokens, strict=False)]
    span, read, target = torch.cat([spans.scored + move for spans, move in zip(every, moves, strict=False)], 1)
    length = torch.cat([spans.length for spans in every]).numpy()

    # lines, from short ones to long ones, and their spans, tokens and scored places in this order
    before = count.cumsum() - count
    before = before - before[numpy.searchsorted(row, row)]
    opens = numpy.ones(len(row), dtype=bool)
    opens[1:] = (row[1:] != row[:-1]) | (before[1:] // _SPAN_TOKENS != before[:-1] // _SPAN_TOKENS)
    line = opens.cumsum() - 1
    of_line = row[opens]
    size = numpy.bincount(line, weights=count).astype(numpy.int64)
    order = numpy.lexsort((size, length[of_line] + size))
    rank = _inverse(order)
    of_line, size, cost = of_line[order], size[order], (length[of_line] + size)[order]
    by_line = numpy.argsort(rank[line], kind="stable")
    spans_in = numpy.bincount(rank[line], minlength=len(order))
    count_by_line = count[by_line]
    number = numpy.repeat(numpy.arange(len(count)), count)  # the span of each token
    tokens_by_line = numpy.argsort(_inverse(by_line)[number], kind="stable")
    position, token = position[tokens_by_line], token[tokens_by_line]
    read = torch.from_numpy(_inverse(tokens_by_line))[read]
    by_read = read.argsort(stable=True)
    read, target = read[by_read], target[by_read]
    ends, span_ends = size.cumsum(), spans_in.cumsum()

    found = []
    for low, high in _batches(cost, batch_tokens):
        begin, end = int(ends[low] - size[low]), int(ends[high - 1])
        here = slice(int(span_ends[low] - spans_in[low]), int(span_ends[high - 1]))
        lengths = length[of_line[low:high]]
        blocks = SpanRows(lengths, spans_in[low:high], count_by_line[here], position[begin:end].numpy())
        layout = block_layout(blocks)
        batch = torch.full((layout.rows, layout.width), backbone.pad_id)
        head = int(lengths.max())
        inside = torch.arange(head) < torch.from_numpy(lengths)[:, None]
        batch[:, :head] = torch.where(inside, clean[of_line[low:high], :head], batch[:, :head])
        at_row = torch.from_numpy(numpy.repeat(numpy.arange(high - low), size[low:high]))
        first = torch.from_numpy(lengths - (ends[low:high] - size[low:high] - begin))
        column = torch.arange(end - begin) + first[at_row]
        batch[at_row, column] = token[begin:end]
        scored = slice(*torch.searchsorted(read, torch.tensor([begin, end])).tolist())
        where = read[scored] - begin
        places = torch.stack([at_row[where], column[where]])
        wanted = torch.stack([torch.arange(len(where)), target[scored]])
        found.append(_nll(backbone, batch, layout, places, wanted))
    nll = torch.empty(len(read), dtype=torch.float64).index_copy(0, by_read, torch.cat(found).double().cpu())
    return nll.split([spans.scored.shape[1] for spans in every])


# ----------------------------------------------------------------------------------------------------------------------


def _nll(backbone: Backbone, tokens: Tensor, layout: Layout, place: Tensor, asked: Tensor) -> Tensor:
    """-log p [N] of tokens at scored places of one forward batch, on the device: fp32, without the mask token.

    tokens [B, L]; place [2, M]: row and place in the row of what is scored, or with spans, from where it is predicted;
    asked [2, N]: which place, ascending, and which token.
    """
    device, prediction = backbone.device, backbone.prediction
    layout = layout.to(device)
    part = None
    if isinstance(layout.blocks, SpanRows):
        part, prediction = part_of(layout, layout.blocks.clean.tolist(), layout.lengths), "in_place"
    if layout.blocks is None:  # of each row, what lies between the first and the last place that is read
        read = (place[1] - int(backbone.prediction == "next")).clamp(min=0)
        begin = torch.full((layout.rows,), layout.width).scatter_reduce(0, place[0], read, "amin")
        end = torch.zeros(layout.rows, dtype=torch.long).scatter_reduce(0, place[0], read + 1, "amax")
        part = part_of(layout, begin.tolist(), end.tolist())
    hidden = packed_hidden(backbone.model, tokens.to(device, non_blocking=True), layout, part=part)
    height = max(1, _HEAD_LOGITS // backbone.vocab_size)
    bounds = torch.searchsorted(asked[0].contiguous(), torch.arange(0, place.shape[1] + height, height)).tolist()
    place, asked = place.to(device, non_blocking=True), asked.to(device, non_blocking=True)
    found = []
    for low, begin, end in zip(range(0, place.shape[1], height), bounds, bounds[1:], strict=False):
        row, position = place[:, low : low + height]
        logits = packed_logits(backbone.model, hidden, part or layout, row, position, prediction)
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
