"""How much memory a computation may take for what it could compute again, and may keep; torch-free, for plans."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

LOGITS_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Most bytes of logits that are kept from the forward pass to the backward pass, per kind of device.

Logits that fit are kept. Others are computed in pieces of this size, and again in the backward pass. On a CPU that
costs 20 to 40 % more time in the LM head (fp32, vocabulary 50,368, 200 to 2,000 rows).
"""


def logits_at_once(vocabulary: int, element: int, device: str) -> int:
    """How many rows of logits, of `element` bytes each, are held at a time on a kind of device; at least 1."""
    return max(1, LOGITS_BYTES.get(device, LOGITS_BYTES["cpu"]) // (vocabulary * element))


REUSED_BYTES = 2**30
"""Arrays of up to so many bytes, and so many bytes together, are used again when a computation on a CPU frees them."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def reuse_memory(device: str) -> None:
    """Let this process keep memory that is freed, for the next arrays, if it computes on a CPU.

    By default the C library of Linux returns large arrays to the system, and gets each of their pages anew, zeroed, by
    a page fault. Logits of 50,000 tokens make that a quarter of a training step. Other systems and libraries are left
    as they are.
    """
    if device != "cpu" or sys.platform != "linux":
        return
    with suppress(AttributeError):  # a C library that has no such choice
        change = ctypes.CDLL(None).mallopt
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            change(threshold, REUSED_BYTES)
