"""From request ids to packed batches: targets or blocks of them, their masked versions, each different one once.

Requests with the same prompt share their random orders, equal inputs are forwarded once (the four letters of a question
need one pass), and rows are sorted by length and packed without padding up to a token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dllm.config import LikelihoodSettings
from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import Layout, block_layout, layout_of
from dllm.likelihood.designs import Design, likelihood_design
from dllm.likelihood.policy import estimator_for

Rows = Sequence[Sequence[int]]

CHUNK_ROWS = 16384
"""Rows laid out at a time, so that memory does not grow with the number of requests."""


@dataclass(frozen=True)
class Targets:
    """What is scored: N targets, or blocks of them, each behind a prefix (a prompt, and the clean blocks before).

    prefixes [C, P] long, padded on the right, and their lengths [C]; target_ids: the tokens of N targets; request and
    prefix [N]: the request and the prefix of each; key [N] long: of its random numbers. Where the model attends
    block-causally: origin [C], from where its blocks are counted, and text [C], a prefix that begins with this one.
    """

    prefixes: Tensor
    lengths: Tensor
    target_ids: list[Sequence[int]]
    request: numpy.ndarray
    prefix: numpy.ndarray
    key: Tensor
    origin: numpy.ndarray
    text: numpy.ndarray


def targets_of(prompts: Rows, targets: Rows, settings: LikelihoodSettings, rule: BlockRule | None) -> Targets:
    """The targets, or their blocks, of some requests.

    Those with the same prompt and place have the same key, whatever their lengths and the blocks before them.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    text: dict[int, int] = {}
    target_ids, request, prefix, prompt_of = [], [], [], []
    block_of: list[int] = []
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        prompt = tuple(prompt)
        origin, bounds = _blocks(len(prompt), len(target), settings.block_size, rule)
        own = [numbers.setdefault((origin, (*prompt, *target[:low])), len(numbers)) for low, _ in bounds]
        target_ids += [target[low:high] for low, high in bounds]
        request += [number] * len(bounds)
        prompt_of += [own[0]] * len(bounds)
        block_of += range(len(bounds))
        prefix += own
        text |= dict.fromkeys(own, own[-1])
    lengths = torch.tensor([len(tokens) for _, tokens in numbers], dtype=torch.long)
    prefixes = pad_sequence([torch.tensor(tokens, dtype=torch.long) for _, tokens in numbers], batch_first=True)
    hashes = token_hash(prefixes, torch.arange(prefixes.shape[1]) < lengths[:, None])
    return Targets(
        prefixes,
        lengths,
        target_ids,
        request=numpy.array(request),
        prefix=numpy.array(prefix),
        key=keyed_hash(settings.seed, hashes[prompt_of], torch.tensor(block_of)),
        origin=numpy.array([origin for origin, _ in numbers]),
        text=numpy.array([text[number] for number in range(len(numbers))]),
    )


def _blocks(prompt: int, target: int, size: int | None, rule: BlockRule | None) -> tuple[int, list[tuple[int, int]]]:
    """From where the blocks of a row are counted, and where the blocks of its target begin and end."""
    if rule is None:
        size = size or target
        return 0, [(low, min(low + size, target)) for low in range(0, target, size)]
    origin, bounds, low = int(rule.starts(numpy.array(prompt))), [], 0
    while low < target:
        high = int(rule.end(numpy.array(prompt + low), numpy.array(origin))) - prompt
        bounds.append((low, min(high, target)))
        low = high
    return origin, bounds


@dataclass(frozen=True)
class Group:
    """G targets with their designs, padded to the longest target L, and the inputs that these need, each once.

    request [G]: of each target; target_ids [G, L]; design with leading dimension G; inputs: U different masked targets
    [U, L], their lengths `size` [U] and prefixes [U]; row [G, S]: which input each pass is; passes [G]: inputs that no
    earlier target has.
    """

    request: numpy.ndarray
    target_ids: Tensor
    design: Design
    inputs: Tensor
    size: Tensor
    prefix: Tensor
    row: Tensor
    passes: numpy.ndarray


def chunks_of(targets: Targets, settings: LikelihoodSettings, mask_id: int) -> Iterator[list[Group]]:
    """All targets in groups, and these in chunks of about `CHUNK_ROWS` inputs."""
    chunk, rows = [], 0
    for group in _groups(targets, settings, mask_id):
        chunk.append(group)
        rows += len(group.inputs)
        if rows >= CHUNK_ROWS:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk


def _groups(targets: Targets, settings: LikelihoodSettings, mask_id: int) -> Iterator[Group]:
    """The targets by length, those with the same prefix together, short prefixes first.

    Designs that are made for many lengths at once share a group.
    """
    size = numpy.array([len(target) for target in targets.target_ids])
    order = numpy.lexsort((targets.prefix, targets.lengths.numpy()[targets.prefix], size))
    kinds = {length: _kind(settings, length) for length in set(size.tolist())}
    for (own, _), same in groupby(order.tolist(), key=lambda number: kinds[int(size[number])]):
        members = numpy.array(list(same))
        prefix, low = targets.prefix[members], 0
        most = max(1, CHUNK_ROWS // _passes(int(size[members].max()), own))
        while low < len(members):
            high = min(low + most, len(members))
            while high < len(members) and prefix[high] == prefix[high - 1]:
                high += 1
            yield _group(targets, members[low:high], own, mask_id)
            low = high


def _kind(settings: LikelihoodSettings, length: int) -> tuple[LikelihoodSettings, int]:
    """How a target is estimated, and its length, 0 where any lengths go together: what the targets of a group share."""
    name = estimator_for(length, settings)
    return settings.model_copy(update={"estimator": name}), 0 if name == "lattice" and length > 1 else length


@lru_cache(maxsize=4096)
def _passes(length: int, settings: LikelihoodSettings) -> int:
    return likelihood_design(length, torch.tensor(0), settings).masked.shape[0]


def _group(targets: Targets, members: numpy.ndarray, settings: LikelihoodSettings, mask_id: int) -> Group:
    target_ids = pad_sequence([torch.tensor(targets.target_ids[n]) for n in members.tolist()], batch_first=True)
    length = torch.tensor([len(targets.target_ids[n]) for n in members.tolist()])
    design = _designs(length, targets.key[members], settings)
    member, step = design.masked.any(-1).nonzero(as_tuple=True)  # an arrangement may end in empty passes
    inputs = torch.where(design.masked, mask_id, target_ids[:, None])[member, step]
    prefix, size = torch.from_numpy(targets.prefix[members])[member], length[member]
    # equal inputs by a hash of 64 bits: of 16384 rows, two different ones share it with probability 1e-11
    inside = torch.arange(inputs.shape[1]) < size[:, None]
    _, first, number = numpy.unique(
        keyed_hash(prefix, size, token_hash(inputs, inside)).numpy(), return_index=True, return_inverse=True
    )
    row = torch.zeros(design.masked.shape[:2], dtype=torch.long)
    row[member, step] = torch.from_numpy(number.reshape(-1))
    passes = numpy.bincount(member[first].numpy(), minlength=len(members))
    request = targets.request[members]
    return Group(request, target_ids, design, inputs[first], size[first], prefix[first], row, passes)


def _designs(length: Tensor, key: Tensor, settings: LikelihoodSettings) -> Design:
    """The designs of targets of these lengths [G] under these keys [G]; equal ones are made once."""
    pairs, number = torch.unique(torch.stack([key, length], 1), dim=0, return_inverse=True)
    key, length = pairs.unbind(1)
    of_all = int(length[0]) if bool((length == length[0]).all()) else length
    return likelihood_design(of_all, key, settings).of(number)


@dataclass(frozen=True)
class PackedBatch:
    """One forward batch: tokens [B, L] and their layout; what is read of it; whose nll that is.

    row and position [M]: the places whose logits are read, ascending; place [N], ascending, and token [N]: which of the
    M places, and which token, each nll is of; order [N]: which nll of the chunk it is (see `packed_batches`).
    """

    tokens: Tensor
    layout: Layout
    row: Tensor
    position: Tensor
    place: Tensor
    token: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Inputs:
    """R masked targets [R, most] in the order in which they are forwarded, with sizes, prefixes, their lengths [R]."""

    tokens: Tensor
    size: Tensor
    prefix: Tensor
    start: Tensor

    def taken(self, rows: Tensor | slice) -> _Inputs:
        return _Inputs(self.tokens[rows], self.size[rows], self.prefix[rows], self.start[rows])


def packed_batches(
    targets: Targets, groups: list[Group], batch_tokens: int, rule: BlockRule | None, pad_id: int
) -> Iterator[PackedBatch]:
    """What a chunk's groups need, in as few batches as the token budget allows.

    The nll of a chunk are in the order of its groups, and of each group in that of its masked positions.
    """
    most = max(group.target_ids.shape[1] for group in groups)
    size, prefix = (torch.cat([getattr(group, name) for group in groups]) for name in ("size", "prefix"))
    tokens = torch.cat([pad(group.inputs, (0, most - group.inputs.shape[1])) for group in groups])
    inputs = _Inputs(tokens, size, prefix, targets.lengths[prefix])
    order, cost = _forward_order(targets, inputs, rule)
    inputs = inputs.taken(order)
    rank = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))

    width, below, places, scored = targets.prefixes.shape[1] + most, 0, [], []
    for group in groups:
        member, step, position = group.design.masked.nonzero(as_tuple=True)
        row = rank[group.row[member, step] + below]
        places.append(row * width + inputs.start[row] + position)
        scored.append(group.target_ids[member, position])
        below += len(group.inputs)
    place, of_place = torch.unique(torch.cat(places), return_inverse=True)
    token, by_place = torch.cat(scored), of_place.argsort(stable=True)

    for low, high in token_batches(cost, batch_tokens):
        begin, end = torch.searchsorted(place, torch.tensor([low * width, high * width])).tolist()
        first, last = torch.searchsorted(of_place[by_place], torch.tensor([begin, end])).tolist()
        asked, row, position = by_place[first:last], place[begin:end] // width - low, place[begin:end] % width
        rows = inputs.taken(slice(low, high))
        if rule is None:
            tokens, layout = _whole_rows(targets, rows, pad_id)
        else:
            tokens, layout, row, position = _shared_rows(targets, rows, row, position, rule, pad_id)
        yield PackedBatch(tokens, layout, row, position, of_place[asked] - begin, token[asked], asked)


def _forward_order(targets: Targets, inputs: _Inputs, rule: BlockRule | None) -> tuple[Tensor, numpy.ndarray]:
    """In which order inputs are forwarded, short rows first, and how many tokens each then adds to a batch."""
    lengths = inputs.start + inputs.size
    if rule is None:
        order = lengths.argsort(stable=True)
        return order, lengths[order].numpy()
    # the clean tokens of a text are forwarded once, with the first of its inputs
    text = targets.text[inputs.prefix.numpy()]
    of_text = targets.lengths.numpy()[text]
    by_text = numpy.lexsort((inputs.start.numpy(), text, of_text))
    opens = numpy.diff(text[by_text], prepend=-1) != 0
    return torch.from_numpy(by_text), inputs.size.numpy()[by_text] + opens * of_text[by_text]


def token_batches(lengths: numpy.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of rows of ascending `lengths` with at most `batch_tokens` tokens in all, one row at least."""
    total = numpy.cumsum(lengths)
    low = 0
    while low < len(lengths):
        before = int(total[low - 1]) if low else 0
        high = max(low + 1, int(numpy.searchsorted(total, before + batch_tokens, side="right")))
        yield low, high
        low = high


def _whole_rows(targets: Targets, rows: _Inputs, pad_id: int) -> tuple[Tensor, Layout]:
    """Each masked target behind its prefix: tokens [R, L] and their layout."""
    lengths = rows.start + rows.size
    tokens = torch.full((len(lengths), int(lengths.max())), pad_id)
    head = min(tokens.shape[1], targets.prefixes.shape[1])
    before = torch.arange(head) < rows.start[:, None]
    tokens[:, :head] = torch.where(before, targets.prefixes[rows.prefix, :head], tokens[:, :head])
    inside = torch.arange(rows.tokens.shape[1]) < rows.size[:, None]
    line, column = inside.nonzero(as_tuple=True)
    tokens[line, column + rows.start[line]] = rows.tokens[inside]
    return tokens, layout_of(lengths.tolist(), tokens.shape[1])


def _shared_rows(
    targets: Targets, rows: _Inputs, row: Tensor, position: Tensor, rule: BlockRule, pad_id: int
) -> tuple[Tensor, Layout, Tensor, Tensor]:
    """All masked blocks of a text behind one copy of its clean tokens: tokens [B, L], their layout.

    And where the places went, given as the number of a masked block and a position in the text: row and place in it.
    """
    size, start = rows.size.numpy(), rows.start.numpy()
    texts, line, counts = numpy.unique(targets.text[rows.prefix.numpy()], return_inverse=True, return_counts=True)
    origin = targets.origin[texts]
    first = rule.begin(start, origin[line])  # a block may begin with the end of the prompt
    clean = numpy.zeros_like(counts)
    numpy.maximum.at(clean, line, first)
    # rows of a text are together, but maybe in another order than the texts' numbers
    order = numpy.argsort(line, kind="stable")
    blocks = BlockRows(rule, origin, clean, counts, first[order], (start + size - first)[order])
    layout = block_layout(blocks)
    tokens = torch.full((layout.rows, layout.width), pad_id)
    head = int(clean.max())
    tokens[:, :head] = targets.prefixes[torch.from_numpy(texts), :head]
    ends = blocks.count.cumsum()
    inner = (ends - blocks.count) - (ends - blocks.count)[(counts.cumsum() - counts)[line[order]]]
    shift = numpy.empty_like(start)  # where position 0 of the text would be, counted from a masked block
    shift[order] = clean[line[order]] + inner - first[order]
    for number in range(len(size)):
        at, low = int(line[number]), int(shift[number])
        known = slice(int(first[number]), int(start[number]))
        tokens[at, low + known.start : low + known.stop] = targets.prefixes[rows.prefix[number], known]
        tokens[at, low + known.stop : low + known.stop + int(size[number])] = rows.tokens[number, : int(size[number])]
    return tokens, layout, torch.from_numpy(line)[row], torch.from_numpy(shift)[row] + position
