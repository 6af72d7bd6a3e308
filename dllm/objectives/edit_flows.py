"""Edit Flows: texts are grown and corrected by insertions, deletions and substitutions.

A text x_1 is aligned with a start x_0 (nothing, masks, or the text with faults); at time t each edit between them has
been made with probability kappa(t). The model sees x_t and t and gives, per token, normalised rates to insert right of
it, to delete it and to substitute it, and what to put there. Its loss is the Bregman divergence of its rates, times
w(t), from those of the edits still to be made:

    w(t) (sum of all rates at x_t  -  sum over outstanding edits e of log(rate(e) Q(token of e))) ,
    w(t) = kappa'(t) / (1 - kappa(t)) , t uniform in [0, time_ceiling) .

At its minimum a rate to insert is the expected number of tokens still missing right of a token, and a rate to delete or
substitute the probability that this is still to be done. Every row gets a front token (the mask token), so that an
insertion always has an anchor. There is no estimator of the likelihood.
Source: Havasi et al. 2025 (arXiv:2506.09018).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm.config import EditSettings, Recipe, RunConfig
from dllm.core.batch import Batch, LossTerms, Noise
from dllm.core.edits import (
    BLANK,
    Columns,
    EditInputs,
    Spans,
    align,
    align_at_random,
    edit_inputs,
    faulty_rows,
    mask_rows,
    merge,
    owners,
    span_keys,
    span_targets,
    spans_of,
    state_at,
)
from dllm.core.losses import row_shares
from dllm.core.noise import keyed_uniform
from dllm.models.backbone import Backbone
from dllm.models.edit_heads import EditLoss, new_edit_heads, save_edit_heads
from dllm.objectives.objective import Objective, part_of_state
from dllm.schedules import KAPPAS

_START_STREAM = 6


@dataclass(frozen=True)
class EditFlows(Objective):
    """Edit Flows.

    max_length: the model's context in tokens; a row that would outgrow it starts from nothing (None: no limit).
    """

    recipe: Recipe = Recipe()
    edits: EditSettings = EditSettings()
    max_length: int | None = None

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> EditInputs:
        """x_t of each row, and its outstanding edits. Targets are edited, all other tokens are context.

        Raises ValueError for a row longer than `max_length`.
        """
        spans = spans_of(batch.maskable & batch.attention)
        keys = noise.keys
        given = batch.attention & ~batch.maskable
        kinds = (keyed_uniform(keys, _START_STREAM) * len(self.edits.starts)).long()
        aligned = self._starts(batch.tokens, spans, keys, kinds, mask_id)
        columns = merge(batch.tokens, given, spans, aligned, mask_id)
        if (long := self._outgrown(columns)).any():
            aligned = self._starts(batch.tokens, spans, keys, kinds.masked_fill(long, -1), mask_id)
            columns = merge(batch.tokens, given, spans, aligned, mask_id)
        if (long := self._outgrown(columns)).any():
            raise ValueError(
                f"row {int(long.long().argmax())} of the batch takes more than the model's {self.max_length} "
                "positions, one of which is its front token; train with shorter rows"
            )
        t = noise.level * self.edits.time_ceiling
        weight = KAPPAS[self.edits.schedule].weight(t)
        targets = batch.maskable.sum(-1)
        # the model is told t: whatever times count more, the rates at the minimum are the same
        counted = weight if self.recipe.weight == "elbo" else (targets > 0).float()
        share = row_shares(counted, targets, self.recipe.normalisation)
        z_t = state_at(columns, KAPPAS[self.edits.schedule].value(t), keys)
        return edit_inputs(columns, z_t, t, weight, share, pad_id=mask_id)

    def loss(self, model, inputs: EditInputs, *, denominator: float) -> LossTerms:
        """The Bregman loss of the module's docstring over `denominator`; model is what `trained_module` gives.

        In `LossTerms`, nll and masked count the new tokens; rows are the divergences in nats, up to a constant of the
        data where several outstanding insertions are the same. See `Objective.loss`.
        """
        log_rates, nll = model(
            inputs.tokens, inputs.layout, inputs.time, inputs.place, inputs.insert, inputs.which, inputs.targets
        )
        counted = torch.stack([inputs.insertable, inputs.editable, inputs.editable], -1)
        rates = log_rates.masked_fill(~counted, -torch.inf).exp()
        per_token = (rates - inputs.edits * log_rates).sum(-1)
        missing = inputs.layout.unpack(inputs.edits.sum(-1)).sum(-1)
        rows, width = inputs.tokens.shape[0], inputs.width
        new = nll.new_zeros(rows * width).index_copy(0, inputs.slot, nll).view(rows, width).sum(-1)
        divergence = inputs.layout.unpack(per_token).sum(-1) + new
        return LossTerms(
            loss=(divergence * inputs.share).sum() / denominator,
            nll=nll.detach().sum(),
            masked=len(inputs.targets),
            rows=(divergence.detach() - missing) * inputs.weight,
        )

    def _outgrown(self, columns: Columns) -> Tensor:
        """Rows [B] whose x_t could be longer than the model's context."""
        count = torch.bincount(columns.row, minlength=columns.rows)
        return torch.zeros_like(count, dtype=torch.bool) if self.max_length is None else count > self.max_length

    def _starts(
        self, tokens: Tensor, spans: Spans, keys: Tensor, kinds: Tensor, mask_id: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The aligned columns of every span, kind of start by kind of start; kinds [B] (-1: from nothing)."""
        aligned = []
        for number, start in enumerate(["empty", *self.edits.starts], -1):
            which = kinds[spans.row] == number
            target, noise = span_targets(tokens, spans, which), span_keys(keys, spans)[which]
            if start == "empty":
                z_0, z_1, span = torch.full_like(target[0], BLANK), target[0], owners(target[1])
            elif start == "masked":
                z_0, z_1, span = align_at_random(mask_rows(noise, self.edits.masks, mask_id), target, noise)
            else:
                z_0, z_1, span = align(faulty_rows(target, noise, self.edits.fault_share), target)
            aligned.append((z_0, z_1, which.nonzero()[:, 0][span]))
        return aligned


def trained_module(config: RunConfig, backbone: Backbone) -> EditLoss:
    """The module that is trained: a backbone with its edit heads, or with new ones.

    Raises ValueError for heads of another rank than `edits.adapter_rank`.
    """
    rank = config.edits.adapter_rank
    heads: Any = backbone.edit_heads or new_edit_heads(backbone.model, rank, config.seed)
    if heads.sizes["rank"] != rank:
        raise ValueError(
            f"edits.adapter_rank = {rank}, but the edit heads of the checkpoint to start from have "
            f"{heads.sizes['rank']}; set it to that, or start from another checkpoint"
        )
    return EditLoss(backbone, heads)


def save_heads(config: RunConfig, scores: EditLoss, weights: dict[str, Tensor], directory: Path) -> dict[str, Any]:
    """Write the edit heads beside a model; returns what the checkpoint's sidecar says of them.

    weights: the state of `scores`, whose own parameters may be shards.
    """
    save_edit_heads(scores.heads, directory, part_of_state(weights, "heads"))
    return {"edits": config.edits.model_dump()}
