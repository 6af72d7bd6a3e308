"""Rotary positions on a CPU, in three passes over memory instead of eight.

Stock classes turn queries and keys with a function of their module, `apply_rotary_pos_emb`: x * cos + half(x) * sin,
where half(x) is a copy of x with its halves exchanged and the first negated. On a CPU that takes a sixth of a forward
pass. Here the halves are added in place: the same numbers up to rounding. Other devices keep the stock function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import ModuleType

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
_STOCK: ContextVar[bool] = ContextVar("stock rotary positions", default=False)


def replace_rotary(model: nn.Module) -> None:
    """Replace the function in the transformers modules that define a model's classes, where it gives equal numbers.

    That is for all models of these classes in the process; another rule (such as pairs of neighbours) is left as it is.
    """
    names = {type(part).__module__ for part in model.modules()}
    for module in (sys.modules[name] for name in names if name.startswith("transformers.models.")):
        stock = getattr(module, NAME, None)
        if stock is not None and not hasattr(stock, "__wrapped__") and _turns_halves(stock):
            _replace(module, stock)


def _replace(module: ModuleType, stock: Callable) -> None:
    @wraps(stock)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        plain = not args and kwargs in ({}, {"unsqueeze_dim": 1})
        if not plain or _STOCK.get() or torch.compiler.is_compiling() or not _fits(q, k, cos, sin):
            return stock(q, k, cos, sin, *args, **kwargs)
        return turned(q, k, cos, sin)

    setattr(module, NAME, apply)


@contextmanager
def stock_rotary() -> Iterator[None]:
    """Compute as the stock classes do, for a comparison with them."""
    token = _STOCK.set(True)
    try:
        yield
    finally:
        _STOCK.reset(token)


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether all is fp32 on the CPU, [B, heads, L, size] and [B, L, size], and cos and sin are constants."""
    alike = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (q, k, cos, sin))
    sizes = {x.shape[-1] for x in (q, k, cos, sin)}
    constant = not (cos.requires_grad or sin.requires_grad)
    return alike and constant and len(sizes) == 1 and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + half(x) * sin of q and k [B, heads, L, size] for constants [B, L, size].

    Laid out as [B, L, heads, size], which is how stock classes lay out what they turn.
    """
    cos, (first, second) = cos.unsqueeze(-2), sin.unsqueeze(-2).chunk(2, -1)
    q, k = ((_Turn.apply if x.requires_grad else _turn)(x, cos, first, second, 1) for x in (q, k))
    return q, k


def _turn(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """x * cos; off its first half goes the second of x times `first`, to its second the first times `second` (sign 1).

    With the sign -1 and the other two exchanged it is its own gradient.
    """
    x = x.transpose(1, 2)
    out = x * cos
    (low, high), (left, right) = x.chunk(2, -1), out.chunk(2, -1)
    left.addcmul_(high, first, value=-sign)
    right.addcmul_(low, second, value=sign)
    return out.transpose(1, 2)


class _Turn(torch.autograd.Function):
    """`_turn` of an x that has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
        ctx.save_for_backward(cos, first, second)
        ctx.sign = sign
        return _turn(x, cos, first, second, sign)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, first, second = ctx.saved_tensors
        return _Turn.apply(grad, cos, second, first, -ctx.sign), None, None, None, None


@torch.no_grad()
def _turns_halves(stock: Callable) -> bool:
    """Whether a module's function computes what `turned` does."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, *shape, generator=generator) for shape in ((2, 3, 8), (1, 3, 8), (3, 8), (3, 8)))
    try:
        expected = stock(q, k, cos, sin)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
        return False  # it takes other arguments
    pairs = zip(turned(q, k, cos, sin), expected, strict=True)
    return all(ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)
