"""The last layer, computed only where its output is read.

Nobody sees what the last layer makes of a position that is not read, except through its keys and values. So the last
attention hands on its output at the places that are read, and all that follows in the layer has that many rows. Stock
classes are not changed: between attention and the residual sum the rows are a `Rows`, which meets the layer's T rows in
two ways only, and takes the same places of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_last(module: nn.Module) -> bool:
    """Whether an attention module is that of the last layer; false for a class that does not number its layers."""
    config: Any = module.config
    return getattr(module, "layer_idx", None) == config.num_hidden_layers - 1


def at_places(values: Tensor, places: Tensor, total: int) -> Tensor:
    """values [1, N, ...] of places [N] long among T = total: `Rows`, until others [1, T, ...] are added to them."""
    rows = values.as_subclass(Rows)
    rows.places, rows.total = places, total
    return rows


class Rows(Tensor):
    """Rows [1, N, ...] in a function that was written for T rows.

    A shape [1, T, ...] that is asked for becomes [1, N, ...]. Together with other rows [1, T, ...], these are taken at
    the same places, and the result is a plain tensor: from the residual sum on, everything has N rows.
    """

    places: Tensor
    total: int

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        rows = next(x for x in args if isinstance(x, cls))
        if function in (Tensor.reshape, Tensor.view):
            shape = list(args[1] if len(args) == 2 else args[1:])
            shape[1:2] = [len(rows.places)] if shape[:2] == [1, rows.total] else shape[1:2]
            args = (rows, shape)
        others = [isinstance(x, Tensor) and not isinstance(x, cls) and x.shape[:2] == (1, rows.total) for x in args]
        args = [x.index_select(1, rows.places) if other else x for x, other in zip(args, others, strict=True)]
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        if any(others):
            return out.as_subclass(Tensor)
        out = out.as_subclass(cls)
        out.places, out.total = rows.places, rows.total
        return out
