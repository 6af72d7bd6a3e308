"""Denoising a canvas with a masked diffusion model: sampling, infilling and greedy decoding are this loop.

One pass: score the masked positions of each row's active block, propose a token for each, reveal the best few.
Source: Nie et al. 2025 (arXiv:2502.09992), algorithm 5, with ragged rows and without a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.blocks import block_index, block_passes, leftmost_block, transfer_counts
from dllm.core.canvas import Canvas, first_position
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.reveal import (
    REVEAL_RULES,
    choose_positions,
    position_noise,
    propose_tokens,
    token_confidence,
    token_noise,
)
from dllm.models.forward import hidden_states, logits_at
from dllm.models.load import Backbone


def denoise_masked(
    backbone: Backbone,
    canvas: Canvas,
    settings: GenerateSettings,
    *,
    row_seeds: Tensor | None = None,
    finished: Callable[[Canvas], Tensor] | None = None,
) -> Iterator[Canvas]:
    """Yield the given canvas, then the canvas after every pass, until no row has a mask.

    A row's tokens depend on the model, the settings, its own given tokens and its seed only, not on its batch-mates.
    row_seeds [B] long, combined with settings.seed, is a hash of the given tokens by default. `finished` maps a canvas
    to [B] bool, rows that may stop early (a stop string in the decoded text, say); their remaining masks become EOS,
    as behind a revealed EOS. Rows that are done leave the batch; every canvas yielded has the full size.
    Raises ValueError if a row is longer than the model's context, or `steps` is less than the blocks of a row.
    """
    _check_context(canvas, backbone.max_length)
    given = canvas.valid & ~canvas.masked
    keys = keyed_hash(settings.seed, token_hash(canvas.tokens, given) if row_seeds is None else row_seeds)
    block = block_index(canvas.start, canvas.tokens.shape[1], settings.block_size)
    passes = block_passes(canvas.masked, block, settings.steps)
    hidden = _hides_ahead(backbone, canvas, given, settings)
    yield canvas
    while len(live := (~canvas.done).nonzero()[:, 0]):
        active = leftmost_block(canvas.masked[live], block[live])
        length = canvas.length[live]
        seen = torch.minimum(length, canvas.start[live] + (active + 1) * settings.block_size)
        length = torch.where(hidden[live], seen, length)
        width = int(length.max())
        part = replace(_rows_of(canvas, live, width), length=length)
        candidate = part.masked & (block[live, :width] == active[:, None])
        count = transfer_counts(candidate.sum(1), passes[live, active])
        passes[live, active] -= 1
        logits = _logits(backbone, part, candidate, given[live, :width], settings.guidance)
        canvas = _with_rows(canvas, live, _reveal(part, logits, candidate, settings, _Choice(count, keys[live])))
        canvas = _stop(canvas, _ended(canvas, given, backbone.eos_id, settings, finished), backbone.eos_id)
        yield canvas


def _hides_ahead(backbone: Backbone, canvas: Canvas, given: Tensor, settings: GenerateSettings) -> Tensor:
    """Rows [B] in which the positions right of the active block are not there yet (never if a given token is there)."""
    hidden = settings.ahead == "hidden"
    if settings.ahead == "auto":
        hidden = backbone.sidecar.get("response_end") == "block"
    beyond = canvas.positions > first_position(canvas.masked)[:, None]
    return ~(given & beyond).any(1) & hidden


@dataclass(frozen=True)
class _Choice:
    """How many tokens each row reveals in this pass, and the key of its noise: count and keys [B] long."""

    count: Tensor
    keys: Tensor


def _reveal(canvas: Canvas, logits: Tensor, candidate: Tensor, settings: GenerateSettings, choice: _Choice) -> Canvas:
    """Reveal the best candidates [B, L] of each row, and under `threshold` every sure one; logits [N, V]."""
    row, position = candidate.nonzero(as_tuple=True)
    noise = token_noise(choice.keys[row], position, canvas.step) if settings.temperature > 0 else None
    tokens = propose_tokens(logits, noise, temperature=settings.temperature, top_p=settings.top_p)
    confidence = token_confidence(logits, tokens)
    score = REVEAL_RULES[settings.reveal_rule](
        logits, confidence, position_noise(choice.keys[row], position, canvas.step)
    )
    chosen = choose_positions(_dense(score, candidate), candidate, choice.count)
    if settings.reveal_rule == "threshold":
        chosen |= candidate & (_dense(confidence, candidate) >= settings.threshold)
    return replace(
        canvas,
        tokens=torch.where(chosen, _dense(tokens, candidate), canvas.tokens),
        masked=canvas.masked & ~chosen,
        confidence=torch.where(chosen, _dense(confidence, candidate), canvas.confidence),
        step=canvas.step + 1,
        nfe=canvas.nfe + (2 if settings.guidance else 1),
    )


@torch.no_grad()
def _logits(backbone: Backbone, canvas: Canvas, where: Tensor, given: Tensor, guidance: float) -> Tensor:
    """Scores [N, V] fp32 at `where` [B, L], with no chance for the mask token.

    With guidance s: u + (s + 1)(c - u), u the scores with every given token masked (Nie et al. 2025, appendix A.2).
    """
    tokens, attention = canvas.tokens, canvas.valid
    if guidance:
        tokens = torch.cat([tokens, torch.where(given, backbone.mask_id, tokens)])
        attention, where = attention.repeat(2, 1), where.repeat(2, 1)
    hidden = hidden_states(backbone.model, tokens, attention)
    logits = logits_at(backbone.model, hidden, where, backbone.prediction).float()
    if guidance:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (guidance + 1) * (conditional - unconditional)
    return logits.index_fill(1, torch.tensor([backbone.mask_id], device=logits.device), -torch.inf)


def _ended(
    canvas: Canvas,
    given: Tensor,
    eos_id: int,
    settings: GenerateSettings,
    finished: Callable[[Canvas], Tensor] | None,
) -> Tensor:
    """Rows [B] whose answer is complete: a revealed EOS with no mask left of it, or what `finished` says."""
    ended = torch.zeros_like(canvas.done) if finished is None else finished(canvas).to(canvas.done.device)
    if settings.early_stop:
        eos = (canvas.tokens == eos_id) & ~given & ~canvas.masked & canvas.valid
        ended = ended | (first_position(eos) < first_position(canvas.masked))
    return ended


def _stop(canvas: Canvas, ended: Tensor, eos_id: int) -> Canvas:
    """The canvas with the masks of ended rows [B] filled with EOS, and rows without masks done."""
    fill = canvas.masked & ended[:, None]
    masked = canvas.masked & ~fill
    return replace(
        canvas,
        tokens=canvas.tokens.masked_fill(fill, eos_id),
        confidence=canvas.confidence.masked_fill(fill, 1.0),
        masked=masked,
        done=~masked.any(1),
    )


def _dense(values: Tensor, where: Tensor) -> Tensor:
    """Values [N] at the true positions of `where` [B, L], 0 elsewhere: [B, L]."""
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def _rows_of(canvas: Canvas, rows: Tensor, width: int) -> Canvas:
    return replace(
        canvas,
        tokens=canvas.tokens[rows, :width],
        masked=canvas.masked[rows, :width],
        confidence=canvas.confidence[rows, :width],
        start=canvas.start[rows],
        length=canvas.length[rows],
        done=canvas.done[rows],
    )


def _with_rows(canvas: Canvas, rows: Tensor, part: Canvas) -> Canvas:
    """The full canvas with `part` in the place of its rows; a yielded canvas is never changed in place."""
    width = part.tokens.shape[1]

    def merged(full: Tensor, some: Tensor) -> Tensor:
        full = full.clone()
        full[rows, :width] = some
        return full

    return replace(
        canvas,
        tokens=merged(canvas.tokens, part.tokens),
        masked=merged(canvas.masked, part.masked),
        confidence=merged(canvas.confidence, part.confidence),
        step=part.step,
        nfe=part.nfe,
    )


def _check_context(canvas: Canvas, max_length: int) -> None:
    longest = int(canvas.length.max())
    if longest > max_length:
        raise ValueError(
            f"a prompt and its new tokens take {longest} positions, the model has {max_length}. "
            "Shorten the prompt or max_new_tokens"
        )
