"""Sampling with masks that grow and vanish: a text's hole finds its own length while it is filled.

In a pass, the surest mask of each row is revealed. If its token is that for expansion, two masks take its place; if it
is EOS, the position is deleted; otherwise the token stays. So a pass changes the length of a row by one at most, and a
row ends when no mask is left. Where a row may not grow any more, expansion has no chance.
Source: DreamOn (Wu et al. 2026, arXiv:2602.01326), and the generation code beside its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.algorithms import resolved
from dllm.choices import REVEAL_RULES
from dllm.config import GenerateSettings
from dllm.core.canvas import Canvas, Ended
from dllm.core.noise import keyed_hash, token_hash
from dllm.core.packing import layout_of
from dllm.models.backbone import Backbone
from dllm.sampling.reveal import choose_positions, position_noise, propose_tokens, token_confidence, token_noise
from dllm.sampling.rows import NO_REVISING, check_context, reject_options
from dllm.sampling.sampler import Sampler

_HEAD_ROWS = 1024
"""Most tokens scored at once: their logits are all held."""


def framed(backbone: Backbone, row: list[int]) -> list[int]:
    """A text with holes between start and EOS, if the model was trained to fill holes so; else as it is."""
    if "expand_id" not in backbone.sidecar:
        return row
    start = backbone.tokenizer.bos_token_id
    return [*([] if start is None else [start]), *row, backbone.eos_id]


@dataclass(frozen=True)
class ExpandingSampler(Sampler):
    """Fills masks one by one, in rows that grow and shrink. Blocks and early ends mean nothing to it.

    A checkpoint's sidecar says which token stands for two masks (`expand_id`).
    """

    def denoise(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Canvas]:
        """The canvas, then the canvas after every pass, as wide as its longest row.

        `settings.max_new_tokens` is the most that takes the place of all masks of a row (or as many as there are, if
        they are more), within the model's context. `ended` is not asked: text behind a hole is given. Raises ValueError
        for a row longer than the model's context, and for options that concern blocks or passes.
        """
        allowed: dict[str, tuple] = {"reveal_rule": ("confidence", "margin", "entropy"), "steps": (None,)}
        allowed |= {"reuse": ("none",), "ahead": ("auto",), "guidance": (0.0,)} | NO_REVISING
        reject_options("expand", settings, allowed)
        check_context(canvas, backbone.max_length)
        return _canvases(backbone, canvas, settings)


@dataclass(eq=False)
class _Row:
    """A row on its way: its tokens with what is masked and how sure each was; how long and how often it may grow."""

    tokens: list[int]
    masked: list[bool]
    confidence: list[float]
    most: int
    expansions: int = field(init=False)

    def __post_init__(self) -> None:
        first = self.masked.index(True) if True in self.masked else self.most
        self.expansions = 2 * (self.most - first)  # as published

    @property
    def full(self) -> bool:
        """Whether it may not grow."""
        return len(self.tokens) >= self.most or self.expansions == 0

    def reveal(self, place: int, token: int, sure: float, *, expand: int, delete: int, mask: int) -> None:
        """What becomes of the mask at a place whose token is known."""
        here = slice(place, place + 1)
        if token == expand:
            self.tokens[here], self.masked[here], self.confidence[here] = [mask] * 2, [True] * 2, [0.0] * 2
            self.expansions -= 1
        elif token == delete:
            self.tokens[here], self.masked[here], self.confidence[here] = [], [], []
        else:
            self.tokens[place], self.masked[place], self.confidence[place] = token, False, sure


@torch.no_grad()
def _canvases(backbone: Backbone, canvas: Canvas, settings: GenerateSettings) -> Iterator[Canvas]:
    ids = {"expand": backbone.sidecar["expand_id"], "delete": backbone.eos_id, "mask": backbone.mask_id}
    keys = keyed_hash(settings.seed, token_hash(canvas.tokens, canvas.valid & ~canvas.masked))
    lengths, masks = canvas.length.tolist(), canvas.masked.sum(1).tolist()
    parts = (canvas.tokens.tolist(), canvas.masked.tolist(), canvas.confidence.tolist())
    rows = [
        _Row(tokens[:n], masked[:n], sure[:n], min(n - m + max(m, settings.max_new_tokens), backbone.max_length))
        for tokens, masked, sure, n, m in zip(*parts, lengths, masks, strict=True)
    ]
    yield canvas
    while not canvas.done.all():
        open_rows = (~canvas.done).nonzero()[:, 0]
        part = canvas.taken(open_rows, canvas.tokens.device)
        full = torch.tensor([rows[number].full for number in open_rows.tolist()], device=part.tokens.device)
        places, tokens, sure = _surest(backbone, part, keys[open_rows], canvas.step, full, ids["expand"], settings)
        chosen = zip(open_rows.tolist(), places.tolist(), tokens.tolist(), sure.tolist(), strict=True)
        for number, place, token, confidence in chosen:
            rows[number].reveal(place, token, confidence, **ids)
        canvas = _shown(canvas, rows, backbone.pad_id, computed=int(part.length.sum()))
        yield canvas


def _surest(
    backbone: Backbone,
    canvas: Canvas,
    keys: Tensor,
    step: int,
    full: Tensor,
    expand: int,
    settings: GenerateSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The position of the surest mask of each row [B], its token and that one's probability; full [B] bool."""
    layout = layout_of(canvas.length.tolist(), canvas.tokens.shape[1], device=canvas.tokens.device)
    rule = REVEAL_RULES[settings.reveal_rule]
    score = torch.full(canvas.tokens.shape, -torch.inf, device=canvas.tokens.device)
    token, sure = torch.zeros_like(canvas.tokens), torch.zeros_like(score)
    row, position = canvas.masked.nonzero(as_tuple=True)
    hidden = backbone.hidden_at(canvas.tokens, layout, row, position)
    for here in torch.arange(len(row), device=row.device).split(_HEAD_ROWS):
        at = row[here], position[here]
        logits = backbone.head_logits(hidden[here])
        logits[:, backbone.mask_id] = -torch.inf
        logits[:, expand].masked_fill_(full[at[0]], -torch.inf)
        key = keys[at[0]]
        noise = token_noise(key, at[1], step) if settings.temperature > 0 else None
        new = propose_tokens(logits, noise, temperature=settings.temperature, top_p=settings.top_p)
        probability = token_confidence(logits, new)
        order = position_noise(key, at[1], step) if rule.noise else None
        token[at], sure[at] = new, probability
        score[at] = resolved(rule.score)(logits, probability, order)
    one = torch.ones_like(canvas.length)
    place = choose_positions(score, canvas.masked, one).float().argmax(1)
    at_place = place[:, None]
    return place, token.gather(1, at_place)[:, 0], sure.gather(1, at_place)[:, 0]


def _shown(canvas: Canvas, rows: list[_Row], pad_id: int, computed: int) -> Canvas:
    """The canvas after a pass, from its rows."""
    device = canvas.tokens.device

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        each = [torch.tensor(getattr(row, name), dtype=dtype) for row in rows]
        return pad_sequence(each, batch_first=True, padding_value=fill).to(device)

    masked = padded("masked", False, torch.bool)
    return replace(
        canvas,
        tokens=padded("tokens", pad_id, torch.long),
        masked=masked,
        confidence=padded("confidence", 1.0, torch.float32),
        length=torch.tensor([len(row.tokens) for row in rows], device=device),
        done=~masked.any(1),
        step=canvas.step + 1,
        nfe=canvas.nfe + 1,
        computed=canvas.computed + computed,
    )
