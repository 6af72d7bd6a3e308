"""Sampling with models that renoise: a canvas of random tokens, of which each pass keeps what it is sure of.

A response is written canvas by canvas, and a canvas has the length that the model was trained with. It starts as tokens
drawn uniformly from the vocabulary. A pass predicts every token of it, from the whole canvas, from all that is before
it (the encoder reads it once, and keeps keys and values) and from the prediction of the pass before
(self-conditioning). The surest positions take a token drawn from the prediction, as many as a bound on their entropies
allows; all others are drawn anew from the vocabulary. So nothing is final before the canvas is: it ends when its most
probable tokens stay the same and their mean entropy is small, or when its passes are used up, and then says its most
probable tokens.
Sources: DiffusionGemmaForBlockDiffusion of transformers, whose `generate` takes the same decisions with its own random
numbers; Ben-Hamu et al. 2025 (arXiv:2505.24857) for the entropy bound; Chen et al. 2022 (arXiv:2208.04202) for
self-conditioning.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from dllm.config import GenerateSettings
from dllm.core.canvas import Canvas, Completion, Ended, Progress
from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from dllm.models.backbone import Backbone
from dllm.models.diffusion_gemma import Prefix, process_steps
from dllm.sampling.reveal import most_probable, propose_tokens, token_confidence, token_noise
from dllm.sampling.rows import NO_REVISING, reject_options
from dllm.sampling.sampler import Sampler

NO_TOKEN = -1
"""What stands in a canvas where nothing is known yet: these models have no mask token."""

_START_STREAM, _NEW_STREAM = 16, 17

STABLE_PASSES, MEAN_ENTROPY = 1, 0.005
"""Of a model whose generation_config.json does not say: for how many passes the most probable tokens of a canvas must
stay the same, and what their mean entropy (nats) must be below, for it to end early. As in transformers."""


@dataclass(frozen=True)
class Renoising:
    """How a canvas is denoised: most passes, temperatures of the first pass and of the end, when tokens are accepted.

    cold is reached linearly, one pass after the last. entropy_bound in nats; a canvas ends early once its most probable
    tokens were the same for `stable` passes before and their mean entropy is below `mean_entropy` nats.
    """

    passes: int
    hot: float
    cold: float
    entropy_bound: float
    top_p: float
    stable: int
    mean_entropy: float

    @classmethod
    def of(cls, backbone: Backbone, settings: GenerateSettings, canvases: int) -> Renoising:
        """As settings and checkpoint say: temperature T falls to T / 2; `steps` are shared by a row's canvases.

        Raises ValueError, one line, if there are fewer steps than canvases.
        """
        stated: Any = getattr(backbone.model, "generation_config", None)

        def said(name: str, otherwise: float) -> Any:
            value = getattr(stated, name, None)
            return otherwise if value is None else value

        if settings.steps is not None and settings.steps < canvases:
            raise ValueError(f"steps = {settings.steps} is less than the {canvases} canvases of a row; give one each")
        return cls(
            passes=process_steps(backbone) if settings.steps is None else settings.steps // canvases,
            hot=settings.temperature,
            cold=settings.temperature / 2,
            entropy_bound=settings.entropy_bound,
            top_p=settings.top_p,
            stable=said("stability_threshold", STABLE_PASSES),
            mean_entropy=said("confidence_threshold", MEAN_ENTROPY),
        )

    def tempered(self, logits: Tensor, step: int) -> Tensor:
        """Logits [S, V] at the temperature of a pass; at 0 the limit, in which only the most probable token is left."""
        if self.hot == 0:
            return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        return logits / (self.cold + (self.hot - self.cold) * (self.passes - step) / self.passes)


@dataclass(frozen=True)
class _Draft:
    """A row after a pass: tokens and confidences of its response, NO_TOKEN and 0 where nothing is accepted.

    final: how many of the tokens belong to finished canvases.
    """

    tokens: list[int]
    confidence: list[float]
    final: int
    passes: int
    computed: int
    done: bool


@dataclass(frozen=True)
class RenoisedCanvas(Canvas):
    """A canvas that knows what of it stays; final [B]: the position before which nothing of a row changes any more."""

    final: Tensor | None = None


@dataclass(frozen=True)
class RenoisingSampler(Sampler):
    """Writes canvas after canvas, each row by itself.

    `reveal_rule` is the model's own. `early_stop` ends a row at the first EOS of a finished canvas, and `ended` is
    asked whenever a canvas is finished; what follows in the row is EOS. Both members raise ValueError if prompt and
    canvases, the last of them whole, exceed the model's context.
    """

    def denoise(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Canvas]:
        """See `Sampler.denoise`. Tokens that a pass accepts are shown, and may be gone after the next."""
        rows = self._rows(backbone, canvas, settings, ended)
        yield canvas
        canvas = RenoisedCanvas(**vars(canvas))
        last: list[_Draft | None] = [None] * len(rows)
        for drafts in zip_longest(*(row.drafts() for row in rows)):
            last = [new or old for new, old in zip(drafts, last, strict=True)]
            canvas = _shown(canvas, last)
            yield canvas

    def complete(
        self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, *, ended: Ended | None = None
    ) -> Iterator[Completion]:
        """See `Sampler.complete`: one row after the other."""
        for row in self._rows(backbone, canvas, settings, ended):
            *_, last = [_Draft([], [], 0, 0, 0, done=True), *row.drafts()]
            yield Completion(row.number, last.tokens, last.passes, last.computed)

    def _rows(self, backbone: Backbone, canvas: Canvas, settings: GenerateSettings, ended: Ended | None) -> list[_Row]:
        allowed: dict[str, tuple] = {"reuse": ("none",), "ahead": ("auto",), "guidance": (0,)} | NO_REVISING
        allowed["reveal_rule"] = ("confidence", "entropy_bound")  # the first is what is set where nothing is
        reject_options("renoise", settings, allowed)
        starts, lengths = canvas.start.tolist(), canvas.length.tolist()
        size = backbone.sidecar["block_size"]
        for start, length in zip(starts, lengths, strict=True):
            whole = start + math.ceil((length - start) / size) * size
            if whole > backbone.max_length:
                raise ValueError(
                    f"a prompt and its canvases of {size} tokens take {whole} positions, the model has "
                    f"{backbone.max_length}. Shorten the prompt or max_new_tokens"
                )
        keys = keyed_hash(settings.seed, token_hash(canvas.tokens, canvas.valid & ~canvas.masked)).tolist()
        rows = zip(canvas.tokens.tolist(), starts, lengths, keys, strict=True)
        return [
            _Row(number, backbone, tokens[:start], length - start, key, settings, ended)
            for number, (tokens, start, length, key) in enumerate(rows)
        ]


class _Row:
    """One row: its prompt, the room for its response, and how it is denoised."""

    def __init__(
        self,
        number: int,
        backbone: Backbone,
        prompt: list[int],
        room: int,
        key: int,
        settings: GenerateSettings,
        ended: Ended | None,
    ):
        self.number, self.backbone, self.prompt, self.room, self.key = number, backbone, prompt, room, key
        self.size = backbone.sidecar["block_size"]
        self.canvases = math.ceil(room / self.size)
        self.how = Renoising.of(backbone, settings, max(1, self.canvases))
        self.early_stop, self.ended = settings.early_stop, ended
        self.passes = self.computed = 0

    def drafts(self) -> Iterator[_Draft]:
        """The response after every pass of the decoder; nothing for a row without room."""
        prefix = Prefix(self.backbone)
        finished: list[int] = []
        confidence: list[float] = []
        unread = self.prompt
        for number in range(self.canvases):
            read = prefix.read(unread)
            self.passes, self.computed = self.passes + bool(read), self.computed + read
            for tokens, sure, final in self._canvas(prefix, len(self.prompt) + len(finished)):
                if not final:
                    yield self._draft(finished + tokens, confidence + sure, len(finished), done=False)
            unread = tokens
            known = finished + tokens
            finished, confidence = self._cut(known, confidence + sure)
            done = number + 1 == self.canvases or finished != known or self._stops(finished, len(tokens))
            yield self._draft(finished, confidence, len(finished), done=done)
            if done:
                return

    def _canvas(self, prefix: Prefix, start: int) -> Iterator[tuple[list[int], list[float], bool]]:
        """(tokens, confidences, whether that is the end) of a canvas at position `start` after every pass."""
        how = self.how
        positions = torch.arange(start, start + self.size, device=self.backbone.device)
        tokens, logits = self._uniform(positions, _START_STREAM, 0), None
        earlier: deque[Tensor] = deque(maxlen=how.stable)
        for step in range(how.passes):
            raw = prefix.predict(tokens[None], None if logits is None else logits[None])[0]
            self.passes, self.computed = self.passes + 1, self.computed + self.size
            logits = how.tempered(raw, step)
            best = most_probable(logits)
            entropy = _entropy(logits)
            stable = len(earlier) == how.stable and all(torch.equal(best, other) for other in earlier)
            if step + 1 == how.passes or (stable and bool(entropy.mean() < how.mean_entropy)):
                yield best.tolist(), token_confidence(raw, best).tolist(), True
                return
            earlier.append(best)
            drawn = propose_tokens(logits, token_noise(self._key, positions, step), temperature=1.0, top_p=how.top_p)
            accepted = _accepted(entropy, how.entropy_bound)
            shown = torch.where(accepted, drawn, NO_TOKEN)
            yield shown.tolist(), torch.where(accepted, token_confidence(raw, drawn), 0.0).tolist(), False
            tokens = torch.where(accepted, drawn, self._uniform(positions, _NEW_STREAM, step))

    @property
    def _key(self) -> Tensor:
        return torch.tensor(self.key, device=self.backbone.device)

    def _uniform(self, positions: Tensor, stream: int, step: int) -> Tensor:
        """Tokens [S] drawn uniformly from the vocabulary."""
        noise = keyed_uniform(self._key, positions, step, stream)
        return (noise * self.backbone.vocab_size).long().to(positions.device)

    def _cut(self, tokens: list[int], confidence: list[float]) -> tuple[list[int], list[float]]:
        """A response up to its first EOS, if that ends it."""
        eos = self.backbone.eos_id
        if not self.early_stop or eos not in tokens:
            return tokens, confidence
        end = tokens.index(eos) + 1
        return tokens[:end], confidence[:end]

    def _stops(self, tokens: list[int], new: int) -> bool:
        if self.ended is None:
            return False
        known = tokens[: self.room]
        response = known + [NO_TOKEN] * (self.room - len(known))
        return self.ended(Progress(self.number, response, len(known), min(new, len(known))))

    def _draft(self, tokens: list[int], confidence: list[float], final: int, *, done: bool) -> _Draft:
        missing = max(0, self.room - len(tokens))
        fill, sure = (self.backbone.eos_id, 1.0) if done else (NO_TOKEN, 0.0)
        return _Draft(
            tokens[: self.room] + [fill] * missing,
            confidence[: self.room] + [sure] * missing,
            self.room if done else min(final, self.room),
            self.passes,
            self.computed,
            done,
        )


def _entropy(logits: Tensor) -> Tensor:
    """Entropies [S] of distributions [S, V], nats."""
    p = torch.softmax(logits, -1)
    return -torch.special.xlogy(p, p).sum(-1)


def _accepted(entropy: Tensor, bound: float) -> Tensor:
    """[S] bool: the positions of the lowest entropies [S] whose sum, without the largest, is at most the bound."""
    ranked, order = entropy.sort(stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, ranked.cumsum(0) - ranked <= bound)


def _shown(canvas: RenoisedCanvas, drafts: list[_Draft | None]) -> RenoisedCanvas:
    """The canvas with rows as their drafts say (None: as they are)."""
    tokens, confidence, done = canvas.tokens.clone(), canvas.confidence.clone(), canvas.done.clone()
    final = canvas.start.clone()
    for row, draft in enumerate(drafts):
        if draft is not None:
            place = slice(int(canvas.start[row]), int(canvas.length[row]))
            tokens[row, place] = torch.tensor(draft.tokens, device=tokens.device)
            confidence[row, place] = torch.tensor(draft.confidence, device=tokens.device)
            done[row], final[row] = draft.done, canvas.start[row] + draft.final
    known = [draft for draft in drafts if draft is not None]
    return replace(
        canvas,
        tokens=tokens,
        masked=canvas.valid & (tokens == NO_TOKEN),
        confidence=confidence,
        done=done,
        step=canvas.step + 1,
        nfe=max(draft.passes for draft in known),
        computed=sum(draft.computed for draft in known),
        final=final,
    )
