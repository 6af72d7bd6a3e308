"""Scoring targets with a masked diffusion model: the bound on their likelihood, and whether greedy decoding gives them.

The passes of all requests are laid out together: requests with the same prompt and target length share their masks,
identical inputs are forwarded once (the four letters of a question need one pass), rows are batched by length within
a token budget, and the LM head runs at scored positions only. A score does not depend on the other requests, up to
float rounding. The designs are in `core.likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.algorithms.denoising import denoise_masked
from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.canvas import Canvas, Score, canvas_for
from dllm.core.likelihood import Design, estimate, likelihood_design
from dllm.core.noise import keyed_hash, token_hash
from dllm.models.forward import hidden_states, logits_at
from dllm.models.load import Backbone

Rows = Sequence[Sequence[int]]

_CHUNK_ROWS = 16384
"""Rows laid out at a time, so that memory does not grow with the number of requests."""

_HEAD_ROWS = 4096
"""Most positions whose logits are held at once, unless a single row has more."""


def nelbo_masked(backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[Score]:
    """A bound on -log p(target | prompt) per request, in nats.

    Raises ValueError for an empty target, a target with the mask token, or a row longer than the model's context.
    """
    _check(backbone, prompts, targets)
    scores: list[Score | None] = [None] * len(prompts)
    for groups in _chunks(_groups(backbone, prompts, targets, settings)):
        nll = _forward(backbone, groups, settings.batch_tokens)
        for group, values in zip(groups, nll, strict=True):
            for number, request in enumerate(group.requests):
                nats, error = estimate(group.design, values[number])
                scores[request] = Score(nats, error, int(group.passes[number]))
    return scores


def greedy_match_masked(backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[bool]:
    """Whether greedy decoding gives the target: a canvas of its length, one token per pass, the most confident first.

    A row leaves its batch at the first token that differs. Raises ValueError as `nelbo_masked`.
    """
    _check(backbone, prompts, targets)
    matches = [False] * len(prompts)
    order = _by_length(prompts, targets)
    lengths = [len(prompts[r]) + len(targets[r]) for r in order]
    for low, high in _batches(lengths, settings.batch_tokens):
        requests = order[low:high]
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
class _Group:
    """G requests with the same prompt and the same target length, and so the same design.

    targets [G, L]; inputs: U different rows [U, P + L]; row [G, S]: which input each pass of a request is; passes [G]:
    inputs that no earlier request of the group has.
    """

    requests: list[int]
    targets: Tensor
    design: Design
    inputs: Tensor
    row: Tensor
    passes: Tensor


def _groups(backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> Iterator[_Group]:
    """The requests by prompt and target length, shortest rows first."""
    for _, same in groupby(_by_length(prompts, targets), key=lambda r: (len(targets[r]), tuple(prompts[r]))):
        requests = list(same)
        prompt = torch.tensor(list(prompts[requests[0]]), dtype=torch.long)
        target = torch.tensor([list(targets[r]) for r in requests])
        length = target.shape[1]
        key = keyed_hash(settings.seed, token_hash(prompt), length)
        yield _group(requests, prompt, target, likelihood_design(length, key, settings), backbone.mask_id)


def _group(requests: list[int], prompt: Tensor, targets: Tensor, design: Design, mask_id: int) -> _Group:
    inputs = torch.where(design.masked, mask_id, targets[:, None])
    unique, first, row = numpy.unique(inputs.flatten(0, 1).numpy(), axis=0, return_index=True, return_inverse=True)
    unique, owner = torch.from_numpy(unique), torch.from_numpy(first) // len(design.masked)
    return _Group(
        requests=requests,
        targets=targets,
        design=design,
        inputs=torch.cat([prompt.expand(len(unique), -1), unique], 1),
        row=torch.from_numpy(row.reshape(inputs.shape[:2])),
        passes=torch.bincount(owner, minlength=len(requests)),
    )


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


def _forward(backbone: Backbone, groups: list[_Group], batch_tokens: int) -> list[Tensor]:
    """The nll [G, S, L] of each group, 0 where not scored, from as few forward batches as the token budget allows."""
    rows = [row for group in groups for row in group.inputs]
    queries = [_queries(group) for group in groups]
    first = [0, *accumulate(len(group.inputs) for group in groups)]
    row = torch.cat([query[0] + below for query, below in zip(queries, first[:-1], strict=True)])
    position, token = (torch.cat([query[part] for query in queries]) for part in (1, 2))
    order = row.argsort(stable=True)
    row, position, token = row[order], position[order], token[order]
    nll = torch.zeros(len(row), dtype=torch.float64)
    for low, high in _batches([len(r) for r in rows], batch_tokens):
        begin, end = torch.searchsorted(row, torch.tensor([low, high])).tolist()
        part = slice(begin, end)
        nll[part] = _nll(backbone, rows[low:high], row[part] - low, position[part], token[part])
    nll = torch.zeros_like(nll).index_copy(0, order, nll)
    found = []
    for group, part in zip(groups, nll.split([len(query[0]) for query in queries]), strict=True):
        scored = group.design.scored.expand(len(group.requests), -1, -1)
        found.append(torch.zeros(scored.shape, dtype=torch.float64).masked_scatter(scored, part))
    return found


def _queries(group: _Group) -> tuple[Tensor, Tensor, Tensor]:
    """Which (row, position, token) the scored nll of a group are, in the order of [G, S, L]."""
    request, step, place = group.design.scored.expand(len(group.requests), -1, -1).nonzero(as_tuple=True)
    prompt = group.inputs.shape[1] - group.targets.shape[1]
    return group.row[request, step], place + prompt, group.targets[request, place]


@torch.no_grad()
def _nll(backbone: Backbone, rows: list[Tensor], row: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """-log p of tokens [N] at (row, position) [N], by row, of one forward batch: fp32, without the mask token."""
    device = backbone.device
    tokens = pad_sequence(rows, batch_first=True, padding_value=backbone.pad_id)
    attention = torch.arange(tokens.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    where = torch.zeros_like(attention)
    where[row, position] = True
    hidden = hidden_states(backbone.model, tokens.to(device), attention.to(device))
    height = max(1, _HEAD_ROWS // int(where.sum(1).max()))
    parts = []
    for low in range(0, len(rows), height):
        begin, end = torch.searchsorted(row, torch.tensor([low, low + height])).tolist()
        part = where[low : low + height]
        place = (part.flatten().cumsum(0) - 1).view_as(part)[row[begin:end] - low, position[begin:end]].to(device)
        logits = logits_at(backbone.model, hidden[low : low + height], part.to(device), backbone.prediction).float()
        logits[:, backbone.mask_id] = -torch.inf
        parts.append(logits.logsumexp(-1)[place] - logits[place, token[begin:end].to(device)])
    return torch.cat(parts).double().cpu()


def _by_length(prompts: Rows, targets: Rows) -> list[int]:
    """Request numbers, shortest row first; those with the same prompt and target length stand together."""
    return sorted(
        range(len(prompts)), key=lambda r: (len(prompts[r]) + len(targets[r]), len(targets[r]), tuple(prompts[r]))
    )


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of ascending `lengths` whose padded size stays within `batch_tokens`, one row at least."""
    low = 0
    for high, length in enumerate(lengths):
        if high > low and (high - low + 1) * length > batch_tokens:
            yield low, high
            low = high
    if low < len(lengths):
        yield low, len(lengths)


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
