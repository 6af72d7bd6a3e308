"""Nothing that makes the host wait for a device: `with forbid_synchronisation(): ...` fails on the first such operator.

It works on any device, the CPU included, because it looks at the operators and not at the clock.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense: ".item(), .tolist(), int(), bool() or a tensor as an index of Python",
    aten.is_nonzero: "bool() of a tensor",
    aten.equal: "torch.equal",
    aten.nonzero: "nonzero or torch.where with one argument",
    aten.masked_select: "masked_select",
    aten.unique_dim: "unique",
    aten._unique2: "unique",
    aten.unique_consecutive: "unique_consecutive",
    aten.bincount: "bincount",
}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class forbid_synchronisation(TorchDispatchMode):  # noqa: N801 (reads as a statement)
    """Raises AssertionError at an operator whose result the host has to wait for (data-dependent shapes or values)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = func.overloadpacket
        if operator in WAITING:
            raise AssertionError(f"{func}: the host waits for the device ({WAITING[operator]})")
        if operator in BY_INDEX and any(_is_mask(index) for index in args[1]):
            raise AssertionError(f"{func}: indexing with a bool tensor makes the host wait for the device")
        if operator is aten.repeat_interleave and not (kwargs or {}).get("output_size"):
            raise AssertionError(f"{func}: repeat_interleave without output_size makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
