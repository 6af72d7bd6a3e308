"""Blocks: semi-autoregressive order, and how many tokens a pass reveals.

A response is cut into blocks of equal size, counted from its start. The leftmost block with masks is active; what
stands right of it stays masked and visible. Source: Nie et al. 2025 (arXiv:2502.09992), section 2.4 and the authors'
sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_index(start: Tensor, length: int, block_size: int) -> Tensor:
    """Which block each position belongs to, [B, L] long from 0; positions before `start` [B] count as block 0."""
    positions = torch.arange(length, device=start.device)
    return ((positions - start[:, None]) // block_size).clamp(min=0)


def leftmost_block(masked: Tensor, block: Tensor) -> Tensor:
    """The leftmost block with masks in each row of `masked` [B, L]; 0 where nothing is masked. Returns [B] long."""
    beyond = block.shape[1] + 1
    first = torch.where(masked, block, beyond).amin(1)
    return first.masked_fill(first == beyond, 0)


def block_passes(masked: Tensor, block: Tensor, steps: int | None) -> Tensor:
    """How many passes each block gets, [B, K] long: at most one per mask, 0 for a block without masks.

    `steps` is the total of a row, spread evenly over its blocks with masks, the first ones taking the remainder and
    what a short block cannot use; none means one token per pass. masked and block [B, L].
    Raises ValueError if `steps` is smaller than a row's number of blocks.
    """
    masks = torch.zeros(block.shape[0], block.shape[1] + 1, dtype=torch.long, device=block.device)
    masks.scatter_add_(1, block, masked.long())
    if steps is None:
        return masks
    occupied = masks > 0
    blocks = occupied.sum(1, keepdim=True)
    if (blocks > steps).any():
        raise ValueError(
            f"steps = {steps} is less than the {int(blocks.max())} blocks of the canvas, each of which needs a pass. "
            "Take more steps or a larger block_size"
        )
    ordinal = occupied.cumsum(1) - 1
    share = steps // blocks.clamp(min=1) + (ordinal < steps % blocks.clamp(min=1))
    passes = torch.minimum(share, masks)
    room = masks - passes
    unused = steps - passes.sum(1, keepdim=True)
    return passes + (unused - (room.cumsum(1) - room)).clamp(min=0).minimum(room)


def transfer_counts(masks: Tensor, passes: Tensor) -> Tensor:
    """How many of the remaining `masks` [B] a pass reveals when `passes` [B] are left: ceil(masks / passes).

    Over K passes of n masks this is n // K each, and one more in the first n % K (the quotas of Nie et al. 2025).
    """
    passes = passes.clamp(min=1)
    return (masks + passes - 1) // passes
