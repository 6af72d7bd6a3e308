"""From request ids to packed batches: targets or blocks of them, their masked versions, each different one once.

Requests with the same prompt share their random orders, equal inputs are forwarded once (the four letters of a question
need one pass), and rows are sorted by length and packed without padding up to a token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from dllm.likelihood.policy import estimator_for, likelihood_passes

Rows = Sequence[Sequence[int]]

CHUNK_ROWS = 16384
"""Rows laid out at a time, so that memory does not grow with the number of requests."""


@dataclass(frozen=True)
class Targets:
    """What is scored: N targets, or blocks of them, each behind a prefix (a prompt, and the clean blocks before).

    prefixes [C, P] long, padded on the right, and their lengths [C]; target_ids: the tokens of N targets; request,
    block and prefix [N]: the request of each, which of its blocks it is, its prefix; key [N] long: of its random
    numbers. Where the model attends block-causally: origin [C], from where its blocks are counted, and text [C], a
    prefix that begins with this one.
    """

    prefixes: Tensor
    lengths: Tensor
    target_ids: list[Sequence[int]]
    request: numpy.ndarray
    block: numpy.ndarray
    prefix: numpy.ndarray
    key: Tensor
    origin: numpy.ndarray
    text: numpy.ndarray


def targets_of(
    prompts: Rows,
    targets: Rows,
    settings: LikelihoodSettings,
    rule: BlockRule | None,
    like: Rows | None = None,
) -> Targets:
    """The targets, or their blocks, of some requests.

    Those with the same prompt and place have the same key, whatever their lengths and the blocks before them. like: the
    prompt that counts for the key of each request, if not its own.
    """
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    text: dict[int, int] = {}
    target_ids, request, prefix = [], [], []
    block: list[int] = []
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        prompt = tuple(prompt)
        origin, bounds = _blocks(len(prompt), len(target), settings.block_size, rule)
        own = [numbers.setdefault((origin, (*prompt, *target[:low])), len(numbers)) for low, _ in bounds]
        target_ids += [target[low:high] for low, high in bounds]
        request += [number] * len(bounds)
        block += range(len(bounds))
        prefix += own
        text |= dict.fromkeys(own, own[-1])
    lengths = torch.tensor([len(tokens) for _, tokens in numbers], dtype=torch.long)
    prefixes = pad_sequence([torch.tensor(tokens, dtype=torch.long) for _, tokens in numbers], batch_first=True)
    return Targets(
        prefixes,
        lengths,
        target_ids,
        request=numpy.array(request),
        block=numpy.array(block),
        prefix=numpy.array(prefix),
        key=keyed_hash(settings.seed, prompt_hashes(like or prompts)[request], torch.tensor(block)),
        origin=numpy.array([origin for origin, _ in numbers]),
        text=numpy.array([text[number] for number in range(len(numbers))]),
    )


def prompt_hashes(prompts: Rows) -> Tensor:
    """[N] long: a hash of each prompt, from which the random numbers of its requests follow."""
    every = list(map(tuple, prompts))
    hashes = {prompt: int(token_hash(torch.tensor(prompt, dtype=torch.long))) for prompt in dict.fromkeys(every)}
    return torch.tensor([hashes[prompt] for prompt in every], dtype=torch.long)


def row_lengths(prompts: Rows, targets: Rows) -> numpy.ndarray:
    """[N]: tokens of each prompt and its target together."""
    return numpy.array([len(p) + len(t) for p, t in zip(prompts, targets, strict=True)], dtype=numpy.int64)


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


def chunks_of(targets: Targets, settings: LikelihoodSettings) -> Iterator[list[tuple[numpy.ndarray, Design]]]:
    """All targets in chunks of about `CHUNK_ROWS` passes; a chunk is groups of targets [G] with their designs [G, ...].

    Targets go by length, then prefix, short ones first; those with the same of both are never parted, because they may
    share inputs. Targets of an estimator that makes designs for many lengths at once share a group.
    """
    size = numpy.array([len(target) for target in targets.target_ids])
    order = numpy.lexsort((targets.prefix, targets.lengths.numpy()[targets.prefix], size))
    estimators = {length: estimator_for(length, settings) for length in set(size.tolist())}
    rows = {length: likelihood_passes(length, settings) for length in estimators}
    opens = (numpy.diff(size[order], prepend=0) != 0) | (numpy.diff(targets.prefix[order], prepend=-1) != 0)
    number = numpy.cumsum([rows[length] for length in size[order].tolist()]) // CHUNK_ROWS
    number = number[numpy.maximum.accumulate(numpy.where(opens, numpy.arange(len(order)), 0))]

    def kind(target: int) -> tuple[str, int]:
        length = int(size[target])
        name = estimators[length]
        return name, 0 if name == "lattice" and length > 1 else length

    for part in numpy.split(order, numpy.flatnonzero(numpy.diff(number)) + 1):
        chunk = []
        for (name, _), same in groupby(part.tolist(), key=kind):
            members = numpy.array(list(same))
            own = settings.model_copy(update={"estimator": name})
            chunk.append((members, _designs(torch.from_numpy(size[members]), targets.key[members], own)))
        yield chunk


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
    owner: the target for which each input of the batch is forwarded first.
    """

    tokens: Tensor
    layout: Layout
    row: Tensor
    position: Tensor
    place: Tensor
    token: Tensor
    order: Tensor
    owner: numpy.ndarray


def packed_batches(
    targets: Targets,
    chunk: list[tuple[numpy.ndarray, Design]],
    batch_tokens: int,
    rule: BlockRule | None,
    mask_id: int,
    pad_id: int,
) -> Iterator[PackedBatch]:
    """What a chunk needs, each different input once, in as few batches as the token budget allows.

    The nll of a chunk are in the order of its groups, and of each group in that of its masked positions.
    """
    most = max(design.masked.shape[-1] for _, design in chunk)
    versions = [design.masked.any(-1) for _, design in chunk]  # a design may have passes without a mask
    masked = torch.cat(
        [pad(d.masked[some], (0, most - d.masked.shape[-1])) for (_, d), some in zip(chunk, versions, strict=True)]
    )
    of = numpy.concatenate([numpy.repeat(m, some.sum(1)) for (m, _), some in zip(chunk, versions, strict=True)])
    known = pad_sequence([torch.tensor(targets.target_ids[n]) for n in of.tolist()], batch_first=True)
    start, prefix = targets.lengths[targets.prefix[of]], torch.from_numpy(targets.prefix[of])
    size = torch.tensor([len(targets.target_ids[n]) for n in of.tolist()])
    tokens = torch.where(masked, mask_id, known)
    # equal inputs by a hash of 64 bits: of 16384 rows, two different ones share it with probability 1e-11
    content = token_hash(tokens, torch.arange(most) < size[:, None])
    _, first, number = numpy.unique(keyed_hash(prefix, size, content).numpy(), return_index=True, return_inverse=True)
    forward, cost = _forward_order(targets, prefix[first], size[first], rule)
    rank = numpy.empty_like(forward)
    rank[forward] = numpy.arange(len(forward))
    first = first[forward]

    width = targets.prefixes.shape[1] + most
    version, position = masked.nonzero(as_tuple=True)
    row = torch.from_numpy(rank[number.reshape(-1)])[version]
    place, of_place = torch.unique(row * width + start[version] + position, return_inverse=True)
    token, by_place = known[version, position], of_place.argsort(stable=True)
    for low, high in token_batches(cost, batch_tokens):
        begin, end = torch.searchsorted(place, torch.tensor([low * width, high * width])).tolist()
        one, last = torch.searchsorted(of_place[by_place], torch.tensor([begin, end])).tolist()
        asked, row, position = by_place[one:last], place[begin:end] // width - low, place[begin:end] % width
        some = first[low:high]
        inputs = tokens[some], prefix[some], start[some], size[some]
        if rule is None:
            batch, layout = _whole_rows(targets, *inputs, pad_id)
        else:
            batch, layout, row, position = _shared_rows(targets, *inputs, row, position, rule, pad_id)
        yield PackedBatch(batch, layout, row, position, of_place[asked] - begin, token[asked], asked, of[some])


def _forward_order(
    targets: Targets, prefix: Tensor, size: Tensor, rule: BlockRule | None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """In which order inputs [R] are forwarded, short rows first, and how many tokens each then adds to a batch."""
    start, added = targets.lengths[prefix].numpy(), size.numpy()
    if rule is None:
        order = (start + added).argsort(kind="stable")
        return order, (start + added)[order]
    # the clean tokens of a text are forwarded once, with the first of its inputs
    text = targets.text[prefix.numpy()]
    of_text = targets.lengths.numpy()[text]
    order = numpy.lexsort((start, text, of_text))
    opens = numpy.diff(text[order], prepend=-1) != 0
    return order, added[order] + opens * of_text[order]


def token_batches(lengths: numpy.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of rows of ascending `lengths` with at most `batch_tokens` tokens in all, one row at least."""
    total = numpy.cumsum(lengths)
    low = 0
    while low < len(lengths):
        before = int(total[low - 1]) if low else 0
        high = max(low + 1, int(numpy.searchsorted(total, before + batch_tokens, side="right")))
        yield low, high
        low = high


def _whole_rows(
    targets: Targets, inputs: Tensor, prefix: Tensor, start: Tensor, size: Tensor, pad_id: int
) -> tuple[Tensor, Layout]:
    """Each masked target [R, T] behind its prefix: tokens [R, L] and their layout."""
    lengths = start + size
    tokens = torch.full((len(lengths), int(lengths.max())), pad_id)
    head = min(tokens.shape[1], targets.prefixes.shape[1])
    before = torch.arange(head) < start[:, None]
    tokens[:, :head] = torch.where(before, targets.prefixes[prefix, :head], tokens[:, :head])
    inside = torch.arange(inputs.shape[1]) < size[:, None]
    line, column = inside.nonzero(as_tuple=True)
    tokens[line, column + start[line]] = inputs[inside]
    return tokens, layout_of(lengths.tolist(), tokens.shape[1])


def _shared_rows(
    targets: Targets,
    inputs: Tensor,
    prefix: Tensor,
    begins: Tensor,
    sizes: Tensor,
    row: Tensor,
    position: Tensor,
    rule: BlockRule,
    pad_id: int,
) -> tuple[Tensor, Layout, Tensor, Tensor]:
    """All masked blocks of a text behind one copy of its clean tokens: tokens [B, L], their layout.

    And where the places went, given as the number of a masked block and a position in the text: row and place in it.
    """
    size, start = sizes.numpy(), begins.numpy()
    texts, line, counts = numpy.unique(targets.text[prefix.numpy()], return_inverse=True, return_counts=True)
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
        tokens[at, low + known.start : low + known.stop] = targets.prefixes[prefix[number], known]
        tokens[at, low + known.stop : low + known.stop + int(size[number])] = inputs[number, : int(size[number])]
    return tokens, layout, torch.from_numpy(line)[row], torch.from_numpy(shift)[row] + position
