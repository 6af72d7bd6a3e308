"""Packing: ragged rows laid end to end, so that nothing is computed for padding.

A layout is made on the host from integers, where the rows' lengths are known anyway, and only its index tensors travel
to the device: packing, unpacking and looking a position up never make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy
import torch
from torch import Tensor

from dllm.core.attention_pattern import BlockRows


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows [B, L] padded on the right, laid end to end without their padding: T = sum(lengths) tokens.

    lengths: host integers, one per row, 0 allowed; width: L; flat [T] long: row * L + position of each packed token;
    positions [T] long: position within its row; cu_seqlens [B + 1] int32: where each row begins in the packed order,
    and T at the end. A part of the rows (`part_of`) begins at position begins[row] of each row instead of 0.
    """

    lengths: tuple[int, ...]
    width: int
    flat: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    begins: tuple[int, ...]
    shift: Tensor
    """[B] long: place of a row's position 0 in the packed order, had it one: cu_seqlens - begins."""
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What attention has worked out for this layout on this device; made once, shared by all layers."""
    blocks: BlockRows | None = None
    """Rows that attend block-causally; None: as their model says."""
    before: Tensor | None = None
    """[T] long: place in the packed order of the token before each (the first token: itself), where `blocks` has spans
    and it is not simply the one to the left. `positions` are then those in the text, several tokens at each."""

    @property
    def rows(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """T, a host integer."""
        return len(self.flat)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Layout:
        """The same layout on a device."""
        device = torch.device(device)
        if device.type == self.flat.device.type and device.index in (None, self.flat.device.index):
            return self  # with the plans it has
        return self._with(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        """The same layout in page-locked memory: a copy from there to a CUDA device does not block."""
        return self._with(lambda x: x.pin_memory())

    def pack(self, values: Tensor) -> Tensor:
        """values [B, L, ...] at the layout's positions: [T, ...]."""
        return values.flatten(0, 1).index_select(0, self.flat)

    def unpack(self, values: Tensor, fill: float = 0) -> Tensor:
        """values [T, ...] as rows [B, L, ...], with `fill` elsewhere."""
        rows = values.new_full((self.rows * self.width, *values.shape[1:]), fill)
        return torch.unflatten(rows.index_copy(0, self.flat, values), 0, (self.rows, self.width))

    def index(self, row: Tensor, position: Tensor) -> Tensor:
        """Place [N] long in the packed order of the tokens at `position` [N] of `row` [N], which the layout has."""
        return self.shift.index_select(0, row) + position

    def places_in(self, layout: Layout) -> Tensor:
        """Places [T] long of these positions in the packed order of a layout that has all of them."""
        return layout.index(torch.div(self.flat, self.width, rounding_mode="floor"), self.positions)

    def _with(self, move: Callable[[Tensor], Tensor]) -> Layout:
        names = ("flat", "positions", "cu_seqlens", "shift", *(() if self.before is None else ("before",)))
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in names}
        return replace(self, plans={}, **moved)


def layout_of(lengths: Sequence[int], width: int | None = None, device: torch.device | str = "cpu") -> Layout:
    """The layout of rows with these lengths (host integers), padded to `width` (default: the longest).

    Raises ValueError for a length below 0 or above the width, or if there is no token at all.
    """
    lengths = [int(length) for length in lengths]
    width = max(lengths, default=0) if width is None else int(width)
    return _layout([0] * len(lengths), lengths, width, device)


def block_layout(blocks: BlockRows, width: int | None = None, device: torch.device | str = "cpu") -> Layout:
    """The layout of rows with spans: clean tokens first and then, row by row, the spans; see `layout_of`.

    Rows [B, L], `index` and `unpack` count places within such a row, whatever the positions in the text.
    """
    layout = replace(layout_of(blocks.lengths.tolist(), width), blocks=blocks)
    if len(blocks.count):
        pattern = blocks.pattern
        place = numpy.arange(len(pattern.row))
        follows = (numpy.diff(pattern.span, prepend=-1) == 0) & (numpy.diff(pattern.position, prepend=-1) == 1)
        before = numpy.where(follows, place - 1, place - pattern.slot + pattern.position - 1)  # in its span, or clean
        before = numpy.where(pattern.position == 0, place, before)
        positions = torch.from_numpy(pattern.position)
        layout = replace(layout, positions=positions, before=torch.from_numpy(before))
    return layout.to(device)


def part_of(layout: Layout, begin: Sequence[int], end: Sequence[int]) -> Layout:
    """The positions from begin[row] (included) to end[row] (excluded) of each row of a layout; equal ones: none.

    The result is a layout too: it packs, unpacks and indexes rows [B, L] at these positions only.
    Raises ValueError for a range outside its row, or if no token is left.
    """
    lengths = []
    for row, (first, last, length) in enumerate(zip(begin, end, layout.lengths, strict=True)):
        if not 0 <= first <= last <= length:
            raise ValueError(f"part of row {row} = {first}..{last} must lie within 0..{length}, the tokens it has")
        lengths.append(int(last) - int(first))
    return _layout([int(first) for first in begin], lengths, layout.width, layout.flat.device)


def _layout(begins: list[int], lengths: list[int], width: int, device: torch.device | str) -> Layout:
    for number, length in enumerate(lengths):
        if not 0 <= length <= width:
            raise ValueError(f"lengths[{number}] = {length} must lie between 0 and the width of the batch, {width}")
    total = sum(lengths)
    if not total:
        raise ValueError(f"lengths = {lengths[:8]}: a layout needs at least one token; leave empty batches out")
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths), output_size=total)
    shift = cu_seqlens[:-1] - torch.tensor(begins)
    positions = torch.arange(total) - shift[row]
    layout = Layout(
        lengths=tuple(lengths),
        width=width,
        flat=row * width + positions,
        positions=positions,
        cu_seqlens=cu_seqlens.int(),
        begins=tuple(begins),
        shift=shift,
    )
    return layout.to(device)
