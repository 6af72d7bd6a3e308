"""Renoised canvases: the tokens of a response are replaced by random ones, and the model learns to say the clean ones.

A response is cut into canvases, `block_size` tokens each, at a level of noise of its own; a canvas is predicted from
itself, in both directions, and from the clean text before it, which an encoder reads causally. Half of the rows are
told what a first pass without gradient predicts (self-conditioning), since sampling tells it, too.
`weight: elbo` trains the bound that scores are, `likelihood.renoise`, at a level n drawn from 1..N; `weight: uniform`
trains the cross-entropy of all tokens of a response at times drawn from [0, 1), which is the published loss. The
published recipe adds the encoder's next-token loss; that is left out here, as the bound does not contain it.
Sources: gemma.diffusion, which Google DeepMind publishes to fine-tune DiffusionGemma (times, corruption, cross-entropy,
self-conditioning); Austin et al. 2021 (arXiv:2107.03006) for the bound; Chen et al. 2022 (arXiv:2208.04202).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy import ndarray
from torch import Tensor

from dllm.config import Recipe, RunConfig
from dllm.core.batch import Batch, Inputs, LossTerms, Noise
from dllm.core.corrupt import block_levels
from dllm.core.losses import row_shares
from dllm.core.noise import keyed_uniform
from dllm.models.backbone import Backbone
from dllm.models.renoise_loss import RenoiseLoss
from dllm.objectives.objective import Objective

CONDITIONED = 0.5
"""Share of the rows that are told their own first prediction."""

_TOKEN, _CONDITION = range(2)


@dataclass(frozen=True, eq=False)
class RenoiseInputs(Inputs):
    """Clean rows for the encoder, noised responses for the decoder, and M targets.

    given [B, E], start, count [B], seen [B, T], conditioned [B], row, place, targets, level [M]: as in
    `models.renoise_loss.RenoiseLoss`; share [B]: what one nat of a row counts in the loss before the denominator.
    """

    given: Tensor
    start: Tensor
    count: Tensor
    seen: Tensor
    conditioned: Tensor
    row: Tensor
    place: Tensor
    targets: Tensor
    level: Tensor
    share: Tensor


@dataclass(frozen=True)
class Renoise(Objective):
    """Renoised canvases of `block_size` tokens, the recipe's.

    passes: N, steps of the process whose bound it is; bos_id: what the encoder reads before a text without a prompt.
    """

    recipe: Recipe = Recipe()
    vocab_size: int = 2
    passes: int = 48
    bos_id: int = 0

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> RenoiseInputs:
        """The batch with random tokens among its targets; see `Objective.corrupt`.

        The levels of a row's canvases are spread evenly, in random order (`core.corrupt.block_levels`).
        """
        size, length = self.recipe.block_size, batch.tokens.shape[1]
        count = batch.maskable.sum(-1)
        first = batch.attention.sum(-1) - count
        width = max(1, int(count.max()))
        column = (first[:, None] + torch.arange(width)).clamp(max=length - 1)
        clean, valid = batch.tokens.gather(1, column), torch.arange(width) < count[:, None]
        level, time = self._levels(block_levels(noise, valid[:, ::size]))
        canvas = torch.arange(width) // size
        keys = noise.keys
        drawn = (keyed_uniform(keys[:, None], torch.arange(width), _TOKEN) * self.vocab_size).long()
        replaced = valid & (noise.place.gather(1, column) < time[:, canvas])
        row, place = valid.nonzero(as_tuple=True)
        given, start = self._given(batch.tokens, first, count)
        return RenoiseInputs(
            given=given,
            start=start,
            count=count,
            seen=torch.where(replaced, drawn, clean),
            conditioned=keyed_uniform(keys, 0, _CONDITION) < CONDITIONED,
            row=row,
            place=place,
            targets=clean[row, place],
            level=level[:, canvas][row, place],
            share=row_shares(torch.ones(len(count)), count, self.recipe.normalisation),
        )

    def loss(self, model, inputs: RenoiseInputs, *, denominator: float) -> LossTerms:
        """The bound or the cross-entropy, as the recipe weights it; see `Objective.loss`.

        model is what `trained_module` gives. In `LossTerms`, nll counts -log p of the clean tokens in either case.
        """
        steps = self.passes if self.recipe.weight == "elbo" else 0
        inside = {name: value for name, value in vars(inputs).items() if name != "share"}
        nats, nll = model(**inside, steps=steps)
        place = inputs.row * inputs.seen.shape[1] + inputs.place  # every place once
        bounds = nats.new_zeros(inputs.seen.numel()).index_copy(0, place, nats).view_as(inputs.seen).sum(-1)
        return LossTerms(
            loss=(bounds * inputs.share).sum() / denominator,
            nll=nll.detach().sum(),
            masked=len(inputs.targets),
            rows=bounds.detach(),
        )

    def forward_lengths(self, lengths: ndarray, prompts: ndarray) -> ndarray:
        """What the encoder reads, all before the last canvas, and the response."""
        targets = lengths - prompts
        before = (targets - 1).clip(0) // self.recipe.block_size * self.recipe.block_size
        return (prompts + before).clip(1) + targets

    def _levels(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Levels n and times t of canvases, from numbers in [0, 1), all [B, K]; the published loss knows no levels."""
        level = (drawn.double() * self.passes).long().clamp(max=self.passes - 1) + 1
        return level, level / self.passes if self.recipe.weight == "elbo" else drawn

    def _given(self, tokens: Tensor, first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder reads [B, E], and where in it responses begin [B]: behind a start token if at 0."""
        alone = (first == 0).long()
        size = self.recipe.block_size
        longest = max(1, int((first + alone + (count - 1).clamp(min=0) // size * size).max()))
        place = torch.arange(longest) - alone[:, None]
        given = tokens.gather(1, place.clamp(0, tokens.shape[1] - 1))
        return torch.where(place < 0, self.bos_id, given), first + alone


def trained_module(config: RunConfig, backbone: Backbone) -> RenoiseLoss:
    """The module that is trained.

    Raises ValueError, one line, for a model without an encoder and a decoder, and if the recipe's blocks are not its
    canvases.
    """
    if backbone.twins is None:
        raise ValueError(
            f"{config.name}: algorithm = 'renoise' needs a DiffusionGemma, and {config.init} is a "
            f"{type(backbone.model).__name__}; random tokens in place of some masks are algorithm: hybrid"
        )
    size = backbone.sidecar["block_size"]
    if config.recipe.block_size != size:
        raise ValueError(
            f"{config.name}: block_size = {config.recipe.block_size} of the recipe, but the model's canvases have "
            f"{size} tokens; set block_size: {size} in a recipe of its own"
        )
    return RenoiseLoss(backbone)
