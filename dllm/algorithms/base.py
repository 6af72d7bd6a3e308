"""The one interface: what the trainer, the sampler and the evaluation ask of an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy import ndarray
from torch import Tensor, nn

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.batch import Batch, Inputs, LossTerms, Noise
from dllm.core.canvas import Canvas, Completion, Score, first_position
from dllm.models.forward import Scores
from dllm.models.load import Backbone

Rows = Sequence[Sequence[int]]
"""Token ids, one sequence per request."""


def part_of_state(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state of a submodule, by its own names."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


class Algorithm(ABC):
    """An algorithm has no state but its frozen settings; its subclasses are final."""

    front: ClassVar[int] = 0
    """Positions of the model's context that a row takes beside its tokens."""

    def scores(self, model: nn.Module, prediction: str, chunk: int | None = None) -> nn.Module:
        """The module that is trained and that `loss` is given: a backbone as `model`, and whatever else learns.

        Wrappers such as DistributedDataParallel only see what goes through its `forward`.
        """
        return Scores(model, prediction, chunk)

    def save(self, scores: nn.Module, weights: dict[str, Tensor], directory: Path) -> dict[str, Any]:
        """Write what a checkpoint needs beside its stock model; returns what its sidecar says of it.

        weights: the state of `scores`, whose own parameters may be shards.
        """
        return {}

    @abstractmethod
    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> Inputs:
        """What the loss needs of a CPU batch: everything random, integer or of unknown size is settled here.

        `noise` is keyed by sample, and nothing else is random. It runs on the host, ahead of the step.
        """

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Inputs, *, denominator: float) -> LossTerms:
        """The loss of a micro-batch, with its gradient; the host never waits for the device.

        model is what `scores` gave or a wrapper of it. denominator is that of the global batch
        (`core.losses.denominator`), so that accumulation and the number of devices do not change the loss.
        """

    def counted(self, targets: Tensor, prompts: Tensor) -> Tensor:
        """How many of each row's targets [B] the loss counts, given the lengths of the prompts [B]; long [B]."""
        return targets

    def forwarded(self, lengths: ndarray, prompts: ndarray) -> ndarray:
        """How many tokens go through the model for rows with these lengths and prompts [B]: [B]."""
        return lengths

    @abstractmethod
    def denoise(
        self,
        backbone: Backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        finished: Callable[[Canvas], Tensor] | None = None,
    ) -> Iterator[Canvas]:
        """The given canvas, then the canvas after every change. Sampling, infilling and chat are this loop.

        `finished` says which rows [B] may stop early.
        """

    def complete(
        self,
        backbone: Backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        ended: Callable[[list[int], int], bool] | None = None,
    ) -> Iterator[Completion]:
        """Every row of a canvas, which may be many and on the host, in the order in which they are done.

        `ended` says whether a response ends early, given its tokens up to its first mask, the last n of which are new.
        Here one batch of `settings.batch_size` rows follows the other; an algorithm whose rows can take each other's
        places does better.
        """
        order = canvas.length.argsort(descending=True, stable=True)
        for rows in order.split(settings.batch_size):
            batch = canvas.taken(rows, backbone.device)
            finished = None if ended is None else finished_by(ended)
            frames = self.denoise(backbone, batch, settings, finished=finished)
            last = next(frames)
            passes, done = torch.zeros_like(last.start), last.done
            for last in frames:
                passes, done = torch.where(done, passes, last.nfe), last.done
            share = last.computed // len(rows)
            for row, response, nfe in zip(rows.tolist(), last.responses(), passes.tolist(), strict=True):
                yield Completion(row, response, nfe, share)

    @abstractmethod
    def nelbo(self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[Score]:
        """One bound on -log p(target | prompt) per request, in nats, with its standard error and passes."""

    @abstractmethod
    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """Whether greedy decoding of exactly the target's length gives the target, for each request."""


def refuse(algorithm: str, settings: GenerateSettings, allowed: dict[str, tuple]) -> None:
    """Raise ValueError, one line, for a sampler's option with a value that an algorithm has no use for.

    allowed: the values of each option that mean something to it.
    """
    for name, values in allowed.items():
        if (value := getattr(settings, name)) not in values:
            raise ValueError(
                f"{name} = {value!r} means nothing to algorithm = {algorithm!r}; allowed: "
                f"{', '.join(map(str, values))}; leave it out"
            )


def finished_by(ended: Callable[[list[int], int], bool]) -> Callable[[Canvas], Tensor]:
    """`ended` of `Algorithm.complete` as `finished` of `Algorithm.denoise`: rows [B] are asked when they have grown."""
    seen: dict[int, int] = {}

    def finished(canvas: Canvas) -> Tensor:
        known = first_position(canvas.masked).minimum(canvas.length).tolist()
        found = [False] * len(known)
        rows = zip(canvas.start.tolist(), known, canvas.done.tolist(), strict=True)
        for row, (start, end, done) in enumerate(rows):
            if not done and end > seen.get(row, start):
                response = canvas.tokens[row, start:end].tolist()
                found[row] = ended(response, end - seen.get(row, start))
                seen[row] = end
        return torch.tensor(found)

    return finished
