"""Keyed noise: uniform numbers that are a pure function of integers.

A number depends on its key and counters only (a seed, an epoch, a sample id, a position, a pass), never on the shape of
the tensor it is in, on the order of calls or on the device. Batch size, packing, world size and resume therefore
do not change an experiment. Source: the SplitMix64 finaliser, Steele et al. 2014 (doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from numpy import ndarray
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def keyed_uniform(key: int | Tensor, *counters: int | Tensor) -> Tensor:
    """Uniform float32 numbers in [0, 1) with 24 random bits, one per element of the broadcast key and counters.

    key and counters are integers or long tensors whose shapes broadcast, e.g. key [B, 1] and a position [L].
    """
    return _shift_right(keyed_hash(key, *counters), 40).float() * 2.0**-24


def keyed_hash(key: int | Tensor, *counters: int | Tensor) -> Tensor:
    """A 64-bit hash, as long integers, of the key and counters, in this order; shapes broadcast.

    h = mix(key + gamma), then h = mix(gamma h + mix(counter + gamma)) for each counter, modulo 2^64.
    """
    given = (key, *counters)
    if not any(isinstance(value, Tensor) and value.device.type != "cpu" for value in given):
        with numpy.errstate(over="ignore"):
            h = _hash([_unsigned(value) for value in given], numpy.uint64(_GAMMA), _mix_unsigned)
        return torch.from_numpy(numpy.asarray(h).view(numpy.int64))
    hashed: Tensor = _hash([_long(value) for value in given], _signed(_GAMMA), _mix)
    return hashed


def _hash(values: list[Any], gamma: int | numpy.uint64, mix: Callable[[Any], Any]) -> Any:
    h = mix(values[0] + gamma)
    for counter in values[1:]:
        h = mix(h * gamma + mix(counter + gamma))
    return h


def token_hash(tokens: Tensor, where: Tensor | None = None) -> Tensor:
    """A 64-bit hash of the tokens [..., L] and their positions, as long integers [...].

    Only positions in `where` [..., L] count, so that right padding does not change the hash.
    """
    each = keyed_hash(torch.arange(tokens.shape[-1], device=tokens.device), tokens)
    return keyed_hash((each if where is None else each * where).sum(-1))


def _mix_unsigned(z: ndarray) -> ndarray:
    """As `_mix`, on the host, where numpy has the right type and is several times as fast."""
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(_MULTIPLIER_1)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(_MULTIPLIER_2)
    mixed: ndarray = z ^ (z >> numpy.uint64(31))
    return mixed


def _unsigned(value: int | Tensor) -> ndarray:
    if isinstance(value, Tensor):
        return value.long().numpy().view(numpy.uint64)
    return numpy.array(value % 2**64, dtype=numpy.uint64)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLIER_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLIER_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift without copying the sign bit: torch has no unsigned 64-bit arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _long(value: int | Tensor) -> Tensor:
    return value.long() if isinstance(value, Tensor) else torch.tensor(_signed(value))


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
