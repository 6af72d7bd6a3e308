"""What tests change in the samplers: rows that are told apart by their number, and blocks without their cache."""

from contextlib import contextmanager

import pytest
import torch

from dllm.core.canvas import Completion


@contextmanager
def numbered_rows():
    """Each row is keyed by its number in place of its tokens, so that equal prompts give independent samples."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("rows", "edits", "hybrid"):
            numbers = lambda tokens, where=None: torch.arange(len(tokens), device=tokens.device)  # noqa: E731
            patch.setattr(f"dllm.sampling.{module}.token_hash", numbers)
        yield


def in_batches(sampler, backbone, canvas, settings, ended=None):
    """Completions of one batch after the other: the plain version of rows that take each other's places."""
    for rows in torch.arange(len(canvas.tokens)).split(settings.batch_size):
        frames = sampler.denoise(backbone, canvas.taken(rows, "cpu"), settings, ended=ended)
        last = next(frames)
        passes, done = torch.zeros_like(last.start), last.done
        for last in frames:
            passes, done = torch.where(done, passes, last.nfe), last.done
        for row, response, nfe in zip(rows.tolist(), last.responses(), passes.tolist(), strict=True):
            yield Completion(row, response, nfe, 0)


@contextmanager
def no_cache():
    """Every pass computes whole rows: the plain version of keys and values that are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.sampling.step.KVCache", lambda: None)
        yield
