"""Block diffusion (BD3LM): masked diffusion inside a block, left to right from block to block.

    log p(x) >= sum over blocks b of -NELBO(x^b | x^<b)

The model attends block-causally, so one forward pass over [clean half ; corrupted half] gives the bounds of all blocks,
each at a time of its own, and the keys and values of finished blocks stay as they are. The pattern is a property of the
packed rows (`core.attention_pattern.BlockRows`); the backbone is any stock model that attends in both directions.
Source: Arriola et al. 2025 (arXiv:2503.09573).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from dllm.config import Recipe
from dllm.core.attention_pattern import BlockRows, BlockRule
from dllm.core.batch import Batch, MaskedInputs, Noise
from dllm.core.corrupt import apply_mask, block_levels, corrupted
from dllm.core.losses import row_shares
from dllm.core.packing import block_layout
from dllm.objectives.objective import Objective


class BlockInputs(MaskedInputs):
    """Rows of clean tokens and then their corrupted blocks, whose cross-entropy is taken at N masked tokens.

    As `MaskedInputs`, but for: layout, with `blocks`; row, position [N]: where in these longer rows the clean tokens
    are predicted; weight [N]: what makes nats a bound; share [N]: what a nat counts in the loss before the denominator.
    """

    def at_targets(self, values: Tensor) -> Tensor:
        """Weights or shares, which belong to the targets already: [N]."""
        return values


@dataclass(frozen=True)
class BD3LM(Objective):
    """Block diffusion with the switches of a recipe, whose `block_size` and `block_anchor` say what its blocks are."""

    recipe: Recipe = Recipe()

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> BlockInputs:
        """The batch with some targets of every block masked, each block at a time of its own; see `Objective.corrupt`.

        The times of a row's blocks are spread evenly over the recipe's range, in random order.
        """
        recipe = self.recipe
        lengths, targets = batch.attention.sum(-1), batch.maskable.sum(-1)
        rule = BlockRule(min(recipe.block_size, max(1, batch.tokens.shape[1])), recipe.block_anchor)
        blocks = BlockRows.doubled(rule, (lengths - targets).numpy(), lengths.numpy())
        chosen, weight = self._masked(batch, noise, torch.from_numpy(blocks.start), rule.size)
        weight = weight if recipe.weight == "elbo" else torch.ones_like(weight)
        share = row_shares(weight, targets[:, None], recipe.normalisation)
        layout = block_layout(blocks)
        tokens, moved = _doubled(batch.tokens, apply_mask(batch.tokens, chosen, mask_id), blocks, layout.width)
        row, position = chosen.nonzero(as_tuple=True)
        return BlockInputs(
            tokens=tokens,
            layout=layout,
            row=row,
            position=position + moved[row],
            targets=batch.tokens[row, position],
            weight=weight[row, position],
            share=share[row, position],
        )

    def forward_lengths(self, lengths: ndarray, prompts: ndarray) -> ndarray:
        """Clean and corrupted tokens."""
        rule = BlockRule(self.recipe.block_size, self.recipe.block_anchor)
        return BlockRows.doubled(rule, prompts.astype(numpy.int64), lengths.astype(numpy.int64)).lengths

    def _masked(self, batch: Batch, noise: Noise, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Which tokens are masked [B, L] bool, and the weight of the block they are in [B, L]."""
        recipe, (rows, length) = self.recipe, batch.tokens.shape
        count = -(-length // size)
        # every block as a row of its own; `place` holds the positions of its tokens
        place = start[:, None] + torch.arange(count * size)
        inside, place = place < length, place.clamp(max=length - 1)
        maskable = (batch.maskable.gather(1, place) & inside).view(-1, size)
        order = noise.place.gather(1, place).view(-1, size)
        levels = block_levels(noise, maskable.view(rows, count, size).any(-1))
        level = recipe.time_low + (recipe.time_high - recipe.time_low) * levels.flatten()
        corruption = corrupted(maskable, level, order, recipe)
        masked = torch.zeros(rows, length, dtype=torch.long)
        masked.scatter_add_(1, place, corruption.masked.view(rows, -1).long())  # places beyond the row add nothing
        number = ((torch.arange(length) - start[:, None]).clamp(min=0) // size).clamp(max=count - 1)
        weight = corruption.weight.view(rows, count).gather(1, number)
        return masked > 0, weight


def _doubled(x_0: Tensor, x_t: Tensor, blocks: BlockRows, width: int) -> tuple[Tensor, Tensor]:
    """Rows [B, width] of clean tokens and then the corrupted blocks, from x_0 and x_t [B, L].

    The second result [B]: how far a corrupted token is to the right of its position in the text.
    """
    opens = numpy.concatenate([[0], blocks.spans.cumsum()[:-1]])
    first = numpy.append(blocks.first, 0)[numpy.minimum(opens, len(blocks.first))]
    clean, moved = torch.from_numpy(blocks.clean), torch.from_numpy(blocks.clean - first)
    place = torch.arange(width).expand(len(x_0), -1)
    last = x_0.shape[1] - 1
    corrupted = x_t.gather(1, (place - moved[:, None]).clamp(0, last))
    return torch.where(place < clean[:, None], x_0.gather(1, place.clamp(max=last)), corrupted), moved
