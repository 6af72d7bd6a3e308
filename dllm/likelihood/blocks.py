"""Scores of models that attend block-causally: the sum of their blocks' bounds, each given the clean ones before it."""

from __future__ import annotations

from dllm.likelihood.scorer import MaskedScorer
from dllm.sampling.rows import block_rule


def block_scorer() -> MaskedScorer:
    """The scorer of models that attend block-causally, in the blocks that they were trained with."""
    return MaskedScorer(block_rule)
