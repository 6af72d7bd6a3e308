"""Sampling of hybrid noise: its reverse process, in which masks are revealed and tokens replaced until none is noise.

In a pass from noise level r to a lower one s, every token z of a response becomes v, independently, with probability

    q(v | z, x_hat) = q_r|s(z | v) q_s(v | x_hat) / q_r(z | x_hat),

x_hat the model's distribution of the clean token: it stays, or it jumps, where random tokens are more. A wrong token is
so replaced as soon as the model sees that it does not fit. Levels are evenly spaced; the last pass leads to level 0,
where all is text. Source: von Ruette et al. 2025 (arXiv:2503.04482), eq. 4; the process is in `core.hybrid`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.canvas import Canvas, Completion, Ended, first_position
from dllm.core.hybrid import HybridNoise
from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from dllm.core.packing import layout_of
from dllm.models.backbone import Backbone
from dllm.models.hybrid_loss import text_log_p
from dllm.sampling.reveal import most_probable, nucleus, propose_tokens
from dllm.sampling.rows import NO_REVISING, check_context, reject_options
from dllm.sampling.sampler import MaskedSampler, Sampler

_START_STREAM, _JUMP_STREAM, _TOKEN_STREAM = range(3)

_HEAD_ROWS = 4096
"""Most tokens scored at once: their logits are all held."""


def noise_of(backbone: Backbone) -> HybridNoise:
    """The process that a backbone was trained with, by its sidecar; that of masks, if it says nothing."""
    share = backbone.sidecar.get("uniform_share", 0.0)
    return HybridNoise(share, backbone.vocab_size - 1, backbone.mask_id)


@dataclass(frozen=True)
class HybridSampler(Sampler):
    """Takes noise away, pass by pass, from all masks of a canvas at once. A model trained without random tokens is
    sampled as any masked one (`MaskedSampler`)."""

    def denoise(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Canvas]:
        """See `Sampler.denoise`; the masks of a row take `settings.steps` passes (None: as many as they are).

        Tokens are drawn from the model's distribution at `temperature` within its nucleus; at temperature 0 only when a
        token changes is random. With `early_stop` a row at temperature 0 is done when no token up to its end is a mask
        or other than the model's first choice. `ended` is not asked: until level 0 no token is final. Raises ValueError
        for a row longer than the model's context, and for options that concern masks.
        """
        process = noise_of(backbone)
        if process.share == 0:
            yield from MaskedSampler().denoise(backbone, canvas, settings, ended=ended)
            return
        allowed = {
            "reveal_rule": ("confidence",),
            "reuse": ("none",),
            "ahead": ("auto",),
            "guidance": (0.0,),
        } | NO_REVISING
        reject_options("hybrid", settings, allowed)
        check_context(canvas, backbone.max_length)
        yield canvas
        yield from _canvases(backbone, process, canvas, settings)

    def complete(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Completion]:
        """See `Sampler.complete`."""
        if noise_of(backbone).share == 0:
            return MaskedSampler().complete(backbone, canvas, settings, ended=ended)
        return super().complete(backbone, canvas, settings, ended=ended)


@torch.no_grad()
def _canvases(backbone: Backbone, process: HybridNoise, canvas: Canvas, settings: GenerateSettings) -> Iterator[Canvas]:
    """The canvas after every pass. Rows that are done are not computed any more."""
    noisy, given = canvas.masked, canvas.valid & ~canvas.masked
    keys = keyed_hash(settings.seed, token_hash(canvas.tokens, given))[:, None]
    masks = noisy.sum(1)
    steps = masks if settings.steps is None else torch.where(masks > 0, settings.steps, 0)
    if process.share == 1:  # there are no masks at its start, only random tokens
        start = process.random(keyed_hash(keys, canvas.positions, _START_STREAM))
        canvas = replace(canvas, tokens=torch.where(noisy, start, canvas.tokens), masked=torch.zeros_like(noisy))
    for step in range(int(steps.max())):
        rows = (~canvas.done).nonzero()[:, 0]
        if not len(rows):
            return
        own = canvas.taken(rows, canvas.tokens.device)
        level, lower = (1 - at / steps[rows].float() for at in (step, step + 1))
        jump, draw = (keyed_uniform(keys[rows], canvas.positions, step, s) for s in (_JUMP_STREAM, _TOKEN_STREAM))
        tokens, sure, settled = _pass(
            backbone, process, own, noisy[rows], level, lower.clamp(min=0), jump, draw, settings
        )
        done = step + 1 >= steps[rows]
        if settings.early_stop and settings.temperature == 0:
            eos = first_position(noisy[rows] & (tokens == backbone.eos_id))[:, None]
            fixed = (settled | (canvas.positions > eos)).all(1) & ~done
            ended = fixed[:, None] & noisy[rows] & (canvas.positions > eos)
            tokens, sure, done = tokens.masked_fill(ended, backbone.eos_id), sure.masked_fill(ended, 1.0), done | fixed
        canvas = replace(
            canvas,
            tokens=canvas.tokens.index_copy(0, rows, tokens),
            masked=canvas.masked.index_copy(0, rows, noisy[rows] & (tokens == backbone.mask_id)),
            confidence=canvas.confidence.index_copy(0, rows, sure),
            done=canvas.done.index_copy(0, rows, done),
            step=canvas.step + 1,
            nfe=canvas.nfe + 1,
            computed=canvas.computed + int(own.length.sum()),
        )
        yield canvas


def _pass(
    backbone: Backbone,
    process: HybridNoise,
    canvas: Canvas,
    noisy: Tensor,
    level: Tensor,
    lower: Tensor,
    jump: Tensor,
    draw: Tensor,
    settings: GenerateSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and confidence [B, L] after one pass from levels to lower ones [B]; and where nothing is left to be done.

    Settled [B, L] bool: given tokens, and text that is the model's first choice; jump and draw [B, L] are uniform.
    """
    layout = layout_of(canvas.length.tolist(), canvas.tokens.shape[1], device=canvas.tokens.device)
    tokens, sure, settled = canvas.tokens.clone(), canvas.confidence.clone(), ~noisy
    row, position = noisy.nonzero(as_tuple=True)
    hidden = backbone.hidden_at(canvas.tokens, layout, row, position)
    for here in torch.arange(len(row), device=row.device).split(_HEAD_ROWS):
        at = row[here], position[here]
        log_p = text_log_p(backbone, backbone.head_logits(hidden[here]))
        x_hat = _tempered(log_p, settings)
        z = canvas.tokens[at]
        new = _reverse(process, z, x_hat, level[at[0]], lower[at[0]], jump[at], draw[at])
        tokens[at], settled[at] = new, (new == z) & (z == most_probable(log_p))
        kept = torch.where(new == z, sure[at], log_p.gather(1, new[:, None])[:, 0].exp())
        sure[at] = kept.masked_fill(new == process.mask_id, 0.0)
    return tokens, sure, settled


def _tempered(log_p: Tensor, settings: GenerateSettings) -> Tensor:
    """x_hat [N, V]: the distribution that clean tokens are drawn from, from log p [N, V]."""
    if settings.temperature == 0:
        return torch.zeros_like(log_p).scatter(1, log_p.argmax(-1, keepdim=True), 1.0)
    p = torch.softmax(log_p / settings.temperature, -1)
    if settings.top_p < 1:
        p = nucleus(p, settings.top_p)
        p = p / p.sum(-1, keepdim=True)
    return p


def _reverse(
    process: HybridNoise, z: Tensor, x_hat: Tensor, level: Tensor, lower: Tensor, jump: Tensor, draw: Tensor
) -> Tensor:
    """Tokens [N] at lower levels [N], drawn from q(v | z, x_hat) with two uniform numbers each, jump and draw [N].

    z [N] at levels [N]; x_hat [N, V].
    """
    (alpha, masks, uniform), (alpha_s, masks_s, uniform_s) = process.shares(level), process.shares(lower)
    kept = alpha / alpha_s  # q_r|s(z | v) = kept 1[z = v] + into
    masked = z == process.mask_id
    into = torch.where(masked, masks - kept * masks_s, (uniform - kept * uniform_s) / process.tokens).clamp(min=0)
    text_s = alpha_s[:, None] * x_hat + (uniform_s / process.tokens)[:, None]
    own = text_s.gather(1, z[:, None])[:, 0]
    of_z = torch.where(masked, masks_s, own)
    to_text = into * torch.where(masked, alpha_s + uniform_s, alpha_s + uniform_s - own)
    to_mask = into.masked_fill(masked, 0.0) * masks_s
    stay = (kept + into) * of_z
    at = jump * (stay + to_mask + to_text)
    # the token of a jump: neither a mask nor the old one
    excluded = torch.stack([z, torch.full_like(z, process.mask_id)], 1)
    token = propose_tokens(text_s.scatter(1, excluded, 0.0).log(), draw, temperature=1.0)
    return torch.where(at < stay, z, torch.where(at < stay + to_mask, process.mask_id, token))
