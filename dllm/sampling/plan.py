"""Plan: semi-autoregressive order, and how many tokens a pass reveals.

A response is cut into blocks of equal size, counted from its start. The leftmost block with masks is active; what
is right of it stays masked. All of this is arithmetic on counts that the host knows in advance, so it is done
there, in numpy, and the device is never asked. Source: Nie et al. 2025 (arXiv:2502.09992), section 2.4 and the
authors' sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
from numpy import ndarray


@dataclass
class BlockPlan:
    """The blocks with masks of R rows, K at most, from left to right, and where each row is in them.

    places: the masked positions of all rows, one after another; first [R, K]: where a block's begin in it; masks,
    passes [R, K]: how many a block has and in how many passes they are revealed; begin, end [R, K]: its positions;
    blocks [R]: how many a row has. Everything is int64.

    What changes: block [R], the active one; left, passes_left [R]: masks and passes left in it; step [R]: passes made.
    """

    places: ndarray
    first: ndarray
    masks: ndarray
    passes: ndarray
    begin: ndarray
    end: ndarray
    blocks: ndarray
    block: ndarray = field(init=False)
    left: ndarray = field(init=False)
    passes_left: ndarray = field(init=False)
    step: ndarray = field(init=False)

    def __post_init__(self):
        self.block = numpy.zeros_like(self.blocks)
        self.step = numpy.zeros_like(self.blocks)
        self.left, self.passes_left = self.masks[:, 0].copy(), self.passes[:, 0].copy()

    @property
    def open(self) -> ndarray:
        """[R] bool: rows with masks."""
        return self.left > 0

    def window(self, rows: ndarray) -> tuple[ndarray, ndarray]:
        """The originally masked positions of the active block of some rows [B]: [B, S], and how many each has [B].

        Behind a row's own positions, the value has no meaning.
        """
        block = self.block[rows]
        masks = self.masks[rows, block]
        at = self.first[rows, block][:, None] + numpy.arange(masks.max())
        return self.places[numpy.minimum(at, len(self.places) - 1)], masks

    def counts(self, rows: ndarray) -> ndarray:
        """How many tokens the next pass reveals at least, ceil(masks left / passes left): [B].

        Over K passes of n masks this is n // K each, and one more in the first n % K (the quotas of Nie et al. 2025).
        """
        return -(-self.left[rows] // self.passes_left[rows].clip(1))

    def advance(self, rows: ndarray, revealed: ndarray) -> ndarray:
        """Note how many tokens a pass revealed in some rows [B]; returns [B] bool: rows that ended their block."""
        self.step[rows] += 1
        self.left[rows] -= revealed
        self.passes_left[rows] -= 1
        ended = self.left[rows] == 0
        moving = rows[ended & (self.block[rows] + 1 < self.blocks[rows])]
        self.block[moving] += 1
        self.left[moving] = self.masks[moving, self.block[moving]]
        self.passes_left[moving] = self.passes[moving, self.block[moving]]
        return ended


def plan_blocks(masked: ndarray, start: ndarray, block_size: int, steps: int | None) -> BlockPlan:
    """The plan of rows with these masks [R, L] bool and first response positions [R]; see `block_passes`.

    Positions before `start` count as the first block.
    """
    row, place = masked.nonzero()
    number = numpy.maximum((place - start[row]) // block_size, 0)
    begins = numpy.ones(len(row), dtype=bool)
    begins[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    first = begins.nonzero()[0]
    owner = row[first]
    blocks = numpy.bincount(owner, minlength=len(masked))
    ordinal = numpy.arange(len(first)) - (blocks.cumsum() - blocks)[owner]

    def table(values: ndarray) -> ndarray:
        by_block = numpy.zeros((len(masked), max(1, blocks.max(initial=0))), dtype=numpy.int64)
        by_block[owner, ordinal] = values
        return by_block

    masks = table(numpy.diff(numpy.append(first, len(row))))
    left = start[owner] + number[first] * block_size
    return BlockPlan(
        places=place,
        first=table(first),
        masks=masks,
        passes=block_passes(masks, steps),
        begin=table(numpy.where(number[first] > 0, left, numpy.minimum(left, place[first]))),
        end=table(left + block_size),
        blocks=blocks,
    )


def block_passes(masks: ndarray, steps: int | None) -> ndarray:
    """How many passes each block gets, [R, K]: at most one per mask, 0 for a block without masks.

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
    passes = numpy.minimum(share, masks)
    room = masks - passes
    unused = steps - passes.sum(1, keepdims=True)
    return passes + numpy.minimum((unused - (room.cumsum(1) - room)).clip(0), room)
