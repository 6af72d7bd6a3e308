"""Scoring targets with a masked diffusion model: the bound on their likelihood, and whether greedy decoding gives them.

Request ids become targets with designs, these packed batches, these nll, and these scores (`likelihood.requests`,
`likelihood.designs`). The LM head runs once at each masked position, in fp32. A score does not depend on the other
requests, up to float rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import Tensor

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.attention_pattern import BlockRule
from dllm.core.canvas import Progress, Score, canvas_for
from dllm.likelihood.designs import Design, estimate
from dllm.likelihood.racing import Estimates, Question, Verdict, race, scores_of
from dllm.likelihood.requests import (
    PackedBatch,
    Rows,
    Targets,
    chunks_of,
    packed_batches,
    row_lengths,
    targets_of,
    token_batches,
)
from dllm.models.backbone import Backbone
from dllm.sampling.rows import block_rule
from dllm.sampling.sampler import MaskedSampler

HOST_TOKENS = 4096
"""Most tokens of a forward batch on a CPU, whatever the budget: with more, activations fall out of its cache."""

HEAD_LOGITS = 2**25
"""Most logits held at once (128 MiB)."""


class LikelihoodScorer(ABC):
    """The one interface of scoring. A scorer has no state but its frozen settings; its subclasses are final."""

    @abstractmethod
    def estimates(
        self,
        backbone: Backbone,
        prompts: Rows,
        targets: Rows,
        settings: LikelihoodSettings,
        like: Rows | None = None,
        between: Callable[[], object] | None = None,
    ) -> Estimates:
        """Nats [N], their noise [N, E] and passes [N] of some requests.

        Those of like prompts share random numbers; like: other prompts than their own that decide it. Raises ValueError
        for an empty target, a target with the mask token, a row longer than the model's context, a budget too small for
        the estimator, and for settings that mean nothing to it.
        """

    @abstractmethod
    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """Whether greedy decoding gives the target: on a canvas of its length, with one pass for each of its tokens.

        Raises ValueError as `estimates`.
        """

    def nelbo(
        self,
        backbone: Backbone,
        prompts: Rows,
        targets: Rows,
        settings: LikelihoodSettings,
        *,
        between: Callable[[], object] | None = None,
    ) -> list[Score]:
        """A bound on -log p(target | prompt) per request, in nats.

        between: called after every forward batch, so that others can use the model, too. Raises ValueError as
        `estimates`.
        """
        return scores_of(*self.estimates(backbone, prompts, targets, settings, between=between))

    def race(
        self,
        backbone: Backbone,
        prompts: Rows,
        targets: Rows,
        questions: Sequence[Question],
        settings: LikelihoodSettings,
    ) -> tuple[list[Score], list[Verdict]]:
        """`nelbo` of the choices of questions, in rounds, as precise as is needed to know the best ones (`race`)."""
        return race(partial(self.estimates, backbone), prompts, targets, questions, settings)


@dataclass(frozen=True)
class MaskedScorer(LikelihoodScorer):
    """Scores of masked diffusion, of whole texts or block by block.

    With `settings.block_size`, the sum over the target's blocks of their bounds, each given the prompt and the clean
    blocks before it: the bound of a decoder that finishes block after block, with block size 1 the left-to-right chain
    rule, at the target's length the plain bound. A model that attends block-causally is always scored so, in its own
    blocks; all passes of a request then share one pass over its clean tokens.

    rule: how rows are cut into blocks by a model that attends block-causally, from a backbone and `block_size` of the
    settings; None: the model attends to the whole text.
    """

    rule: Callable[[Backbone, int | None], BlockRule] | None = None

    def estimates(
        self,
        backbone: Backbone,
        prompts: Rows,
        targets: Rows,
        settings: LikelihoodSettings,
        like: Rows | None = None,
        between: Callable[[], object] | None = None,
    ) -> Estimates:
        """See `LikelihoodScorer.estimates`, and `estimate` and `targets_of`."""
        check_requests(backbone, prompts, targets)
        if not len(prompts):
            return numpy.zeros(0), numpy.zeros((0, 0)), numpy.zeros(0, dtype=numpy.int64)
        batch_tokens = forward_tokens(backbone, settings)
        rule = self.rule and self.rule(backbone, settings.block_size)
        every = targets_of(prompts, targets, settings, rule, like)
        nats, passes = numpy.zeros(len(prompts)), numpy.zeros(len(prompts), dtype=numpy.int64)
        noise = numpy.zeros((len(prompts), int(every.block.max()) + 1, 0))
        for chunk in chunks_of(every, settings):
            owner, nll = _forward(backbone, every, chunk, batch_tokens, rule, between)
            numpy.add.at(passes, every.request[owner], 1)
            for (members, design), values in zip(chunk, nll, strict=True):
                value, error = estimate(design, values)
                numpy.add.at(nats, every.request[members], value.numpy())
                wider = max(0, error.shape[-1] - noise.shape[-1])
                noise = numpy.pad(noise, ((0, 0), (0, 0), (0, wider)))
                noise[every.request[members], every.block[members], : error.shape[-1]] = error.numpy()
        return nats, noise.reshape(len(nats), -1), passes

    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """See `LikelihoodScorer.greedy_match`; the most confident token is first."""
        check_requests(backbone, prompts, targets)
        rule = self.rule and self.rule(backbone, settings.block_size)
        matches = numpy.zeros(len(prompts), dtype=bool)
        lengths = row_lengths(prompts, targets)
        order = lengths.argsort(kind="stable")
        for low, high in token_batches(lengths[order], settings.batch_tokens):
            some = order[low:high]
            matches[some] = _greedy_batch(backbone, [prompts[r] for r in some], [targets[r] for r in some], rule)
        return matches.tolist()


def block_scorer() -> MaskedScorer:
    """The scorer of models that attend block-causally, in the blocks that they were trained with."""
    return MaskedScorer(block_rule)


def forward_tokens(backbone: Backbone, settings: LikelihoodSettings) -> int:
    """Most tokens of a forward batch on the device of a model."""
    return min(settings.batch_tokens, HOST_TOKENS) if backbone.device.type == "cpu" else settings.batch_tokens


def _greedy_batch(backbone: Backbone, prompts: Rows, targets: Rows, rule: BlockRule | None) -> numpy.ndarray:
    """[B] bool. A row leaves the batch at the first token that differs."""
    counts = [len(target) for target in targets]
    canvas = canvas_for(prompts, counts, mask_id=backbone.mask_id, pad_id=backbone.pad_id, device=backbone.device)

    def differs(row: Progress) -> bool:
        pairs = zip(row.response, targets[row.number], strict=True)
        return any(token not in (wanted, backbone.mask_id) for token, wanted in pairs)

    settings = GenerateSettings(max_new_tokens=max(counts), block_size=max(counts), early_stop=False)
    sampler = MaskedSampler() if rule is None else MaskedSampler(lambda *_: rule)
    *_, last = sampler.denoise(backbone, canvas, settings, ended=differs)
    pairs = zip(last.responses(), targets, strict=True)
    return numpy.array([response == list(target) for response, target in pairs])


@torch.no_grad()
def _forward(
    backbone: Backbone,
    targets: Targets,
    chunk: list[tuple[numpy.ndarray, Design]],
    batch_tokens: int,
    rule: BlockRule | None,
    between: Callable[[], object] | None,
) -> tuple[numpy.ndarray, list[Tensor]]:
    """For which target each input was forwarded; the nll [G, S, L] float64 of each group, 0 where not masked."""
    per_batch: list[Tensor] = []
    order, owner = [], []
    for batch in packed_batches(targets, chunk, batch_tokens, rule, backbone.mask_id, backbone.pad_id):
        per_batch.append(_nll(backbone, batch))
        order.append(batch.order)
        owner.append(batch.owner)
        if between is not None:
            between()
    nll = torch.cat(per_batch).cpu().double()  # there are devices without float64
    nll = torch.empty_like(nll).index_copy(0, torch.cat(order), nll)
    parts = torch.split(nll, [int(design.masked.sum()) for _, design in chunk])
    each = [torch.zeros_like(d.weight).masked_scatter(d.masked, v) for (_, d), v in zip(chunk, parts, strict=True)]
    return numpy.concatenate(owner), each


def _nll(backbone: Backbone, batch: PackedBatch) -> Tensor:
    """-log p [N] of what a batch asks for, on the device: fp32, without the mask token."""
    device = backbone.device
    layout = batch.layout.to(device)
    height, places = max(1, HEAD_LOGITS // backbone.vocab_size), len(batch.row)
    bounds = torch.searchsorted(batch.place, torch.arange(0, places + height, height)).tolist()
    moved = (x.to(device, non_blocking=True) for x in (batch.row, batch.position, batch.place, batch.token))
    row, position, place, token = moved
    hidden = backbone.hidden_at(batch.tokens.to(device, non_blocking=True), layout, row, position)
    parts = []
    for low, begin, end in zip(range(0, places, height), bounds, bounds[1:], strict=False):
        logits = backbone.head_logits(hidden[low : low + height])
        logits[:, backbone.mask_id] = -torch.inf
        number = place[begin:end] - low
        parts.append(logits.logsumexp(-1)[number] - logits[number, token[begin:end]])
    return torch.cat(parts)


def check_requests(backbone: Backbone, prompts: Rows, targets: Rows) -> None:
    """Raise ValueError for a request without a target, beyond the model's context, or with masks for text."""
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
            raise ValueError(
                f"request {request}: the target holds the mask token {backbone.mask_id}, which is not text"
            )
