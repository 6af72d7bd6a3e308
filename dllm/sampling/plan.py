"""Plan: semi-autoregressive order, and how many tokens a pass reveals.

A response is cut into blocks of equal size, counted from its start. The leftmost block with masks is active; what
is right of it stays masked. All of this is arithmetic on counts that the host knows in advance, so it is done
there, in numpy, and the device is never asked. Source: Nie et al. 2025 (arXiv:2502.09992), section 2.4 and the
authors' sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy import ndarray


@dataclass(eq=False)
class BlockPlan:
    """The blocks with masks of B rows, K at most, from left to right, and where each row is in them.

    places [B, M]: the masked positions of each row, from left to right; first [B, K]: which of them a block's first is;
    masks, passes [B, K]: how many a block has and in how many passes they are revealed; begin, end [B, K]: its
    positions; blocks [B]: how many a row has. Everything is int64. Behind what a row has, values have no meaning.
    Of rows that revise (`sampling.revise`): held [B] bool: whether most of a block's passes hold its masks at a tenth;
    edits [B]: most passes that a block without masks gets for edits.

    What changes: block [B], the active one; left, passes_left, edits_left [B]: masks, passes and passes of edits left
    in it; step [B]: passes made.
    """

    places: ndarray
    first: ndarray
    masks: ndarray
    passes: ndarray
    begin: ndarray
    end: ndarray
    blocks: ndarray
    held: ndarray
    edits: ndarray
    block: ndarray
    left: ndarray
    passes_left: ndarray
    edits_left: ndarray
    step: ndarray

    @property
    def open(self) -> ndarray:
        """[B] bool: rows with masks, or with edits to be made."""
        return (self.left > 0) | (self.edits_left > 0)

    def of_block(self, values: ndarray) -> ndarray:
        """What `values` [B, K] say of the active blocks: [B]."""
        return values[numpy.arange(len(values)), self.block]

    def window(self) -> tuple[ndarray, ndarray]:
        """The originally masked positions of the active blocks: [B, S], and how many each has [B]."""
        masks = self.of_block(self.masks)
        at = self.of_block(self.first)[:, None] + numpy.arange(masks.max())
        return numpy.take_along_axis(self.places, numpy.minimum(at, self.places.shape[1] - 1), 1), masks

    def counts(self) -> ndarray:
        """By how many the next pass lowers the masks at least, ceil(masks left / passes left): [B].

        Over K passes of n masks this is n // K each, and one more in the first n % K (the quotas of Nie et al. 2025).
        Where there are more passes than masks, the masks that are left fall evenly, or as `held` says.
        """
        masks, passes = self.of_block(self.masks), self.of_block(self.passes).clip(1)
        done = 1 - (self.passes_left - 1) / passes
        share = numpy.where(self.held, held_share(done), done)
        even = masks - numpy.floor(masks * share + 1e-9).astype(numpy.int64)
        quota = -(-self.left // self.passes_left.clip(1))
        return numpy.where(self.held | (passes > masks), (self.left - even).clip(0), quota)

    def advance(self, revealed: ndarray, edited: ndarray | None = None) -> ndarray:
        """Note by how many masks a pass had fewer [B]; returns [B] bool: rows that ended their block.

        edited [B] bool: rows in which it replaced a token; a block without masks goes on as long as it is edited.
        """
        self.step += 1
        # the pass that reveals the last mask is not one of edits yet
        in_edits = self.left == 0
        self.edits_left[in_edits] -= 1
        if edited is not None:
            self.edits_left[in_edits & ~edited] = 0
        self.left -= revealed
        self.passes_left -= 1
        ended: ndarray = (self.left == 0) & (self.edits_left <= 0)
        moving = ended & (self.block + 1 < self.blocks)
        self.block += moving
        self.left[moving] = self.of_block(self.masks)[moving]
        self.passes_left[moving] = self.of_block(self.passes)[moving]
        self.edits_left[moving] = self.edits[moving]
        return ended


def plan_blocks(
    masked: ndarray, start: ndarray, block_size: int, steps: int | None, *, held: bool | None = None, edits: int = 0
) -> BlockPlan:
    """The plan of rows with these masks [B, L] bool and first response positions [B]; see `block_passes`.

    Positions before `start` count as the first block. held, edits: of rows that revise, see `BlockPlan`; with `held`
    given, a block may have more passes than masks.
    """
    row, place = masked.nonzero()
    number = numpy.maximum((place - start[row]) // block_size, 0)
    begins = numpy.ones(len(row), dtype=bool)
    begins[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    first = begins.nonzero()[0]
    owner = row[first]
    blocks = numpy.bincount(owner, minlength=len(masked))
    ordinal = numpy.arange(len(first)) - (blocks.cumsum() - blocks)[owner]
    count = numpy.bincount(row, minlength=len(masked))
    before = count.cumsum() - count

    def table(values: ndarray) -> ndarray:
        by_block = numpy.zeros((len(masked), max(1, blocks.max(initial=0))), dtype=numpy.int64)
        by_block[owner, ordinal] = values
        return by_block

    masks = table(numpy.diff(numpy.append(first, len(row))))
    passes = block_passes(masks, steps, more=held is not None)
    places = numpy.zeros((len(masked), max(1, count.max(initial=0))), dtype=numpy.int64)
    places[row, numpy.arange(len(row)) - before[row]] = place
    left = start[owner] + number[first] * block_size
    return BlockPlan(
        places=places,
        first=table(first - before[owner]),
        masks=masks,
        passes=passes,
        begin=table(numpy.where(number[first] > 0, left, numpy.minimum(left, place[first]))),
        end=table(left + block_size),
        blocks=blocks,
        held=numpy.full(len(blocks), bool(held)),
        edits=numpy.full(len(blocks), edits),
        block=numpy.zeros_like(blocks),
        left=masks[:, 0].copy(),
        passes_left=passes[:, 0].copy(),
        edits_left=numpy.where(blocks > 0, edits, 0),
        step=numpy.zeros_like(blocks),
    )


HELD_FROM, HELD_TO, HELD_AT = 0.45, 0.95, 0.9
"""Loops of Wang et al. 2025 (arXiv:2503.00307): shares of the passes between which this share is revealed."""


def held_share(done: ndarray) -> ndarray:
    """Which share of a block is revealed after a share `done` of its passes, if it is held in between."""
    return numpy.interp(done, [0, HELD_FROM, HELD_TO, 1], [0, HELD_AT, HELD_AT, 1])


def block_passes(masks: ndarray, steps: int | None, *, more: bool = False) -> ndarray:
    """How many passes each block gets, [R, K]: at most one per mask (or `more`), 0 for a block without masks.

    `steps` is the total of a row, spread evenly over its blocks with masks, the first ones taking the remainder and
    what a short block cannot use; None: one token per pass. masks [R, K] counts.
    Raises ValueError if `steps` is smaller than a row's number of blocks.
    """
    if steps is None:
        return masks.copy()
    occupied = masks > 0
    blocks = occupied.sum(1, keepdims=True)
    if (blocks > steps).any():
        raise ValueError(
            f"steps = {steps} is less than the {int(blocks.max())} blocks of the canvas, each of which needs a pass. "
            "Take more steps or a larger block_size"
        )
    ordinal = occupied.cumsum(1) - 1
    share = steps // blocks.clip(1) + (ordinal < steps % blocks.clip(1))
    if more:
        return numpy.where(occupied, share, 0)
    passes = numpy.minimum(share, masks)
    room = masks - passes
    unused = steps - passes.sum(1, keepdims=True)
    return passes + numpy.minimum((unused - (room.cumsum(1) - room)).clip(0), room)
