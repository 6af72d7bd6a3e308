"""What tests change in the samplers: rows that are told apart by their number, and blocks without their cache."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def numbered_rows():
    """Each row is keyed by its number in place of its tokens, so that equal prompts give independent samples."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("decoding", "edit_flows"):
            numbers = lambda tokens, where=None: torch.arange(len(tokens), device=tokens.device)  # noqa: E731
            patch.setattr(f"dllm.algorithms.{module}.token_hash", numbers)
        yield


@contextmanager
def no_cache():
    """Every pass computes whole rows: the plain version of keys and values that are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.algorithms.decoding.KeyValues", lambda: None)
        yield
