"""The one interface: what the trainer, the sampler and the evaluation ask of an algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.batch import Batch, LossTerms, Noise
from dllm.core.canvas import Canvas, Score
from dllm.models.load import Backbone

Rows = Sequence[Sequence[int]]
"""Token ids, one sequence per request."""


class Algorithm(ABC):
    """An algorithm has no state but its frozen settings; its subclasses are final."""

    @abstractmethod
    def training_loss(
        self, model: nn.Module, batch: Batch, noise: Noise, *, mask_id: int, denominator: float
    ) -> LossTerms:
        """The loss of a micro-batch, with its gradient; `noise` is keyed by sample, and nothing else is random.

        denominator counts the global batch, so that accumulation and the number of devices do not change the loss.
        """

    @abstractmethod
    def denoise(
        self,
        backbone: Backbone,
        canvas: Canvas,
        settings: GenerateSettings,
        *,
        row_seeds: Tensor | None = None,
        finished: Callable[[Canvas], Tensor] | None = None,
    ) -> Iterator[Canvas]:
        """The given canvas, then the canvas after every change. Sampling, infilling and chat are this loop.

        row_seeds [B] long, a hash of the given tokens by default; `finished` says which rows [B] may stop early.
        """

    @abstractmethod
    def nelbo(self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[Score]:
        """One bound on -log p(target | prompt) per request, in nats, with its standard error and passes."""

    @abstractmethod
    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """Whether greedy decoding of exactly the target's length gives the target, for each request."""
