"""How much memory a computation may take for what it could compute again; torch-free, since plans read it too."""

from __future__ import annotations

LOGITS_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Most bytes of logits that are kept from the forward pass to the backward pass, per kind of device.

Logits that fit are kept. Others are computed in pieces of this size, and again in the backward pass. On a CPU that
costs 20 to 40 % more time in the LM head (fp32, vocabulary 50,368, 200 to 2,000 rows).
"""


def logits_at_once(vocabulary: int, element: int, device: str) -> int:
    """How many rows of logits, of `element` bytes each, are held at a time on a kind of device; at least 1."""
    return max(1, LOGITS_BYTES.get(device, LOGITS_BYTES["cpu"]) // (vocabulary * element))
