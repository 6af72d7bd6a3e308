"""The one interface of training: what the trainer asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from numpy import ndarray
from torch import Tensor, nn

from dllm.core.batch import Batch, Inputs, LossTerms, Noise, weighted_terms


class Objective(ABC):
    """An objective has no state but its frozen settings, of which the first is the recipe. Its subclasses are final."""

    @abstractmethod
    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> Inputs:
        """What the loss needs of a CPU batch: everything random, integer or of unknown size is settled here.

        `noise` is keyed by sample, and nothing else is random. It runs on the host, ahead of the step.
        """

    def loss(self, model: nn.Module, inputs: Any, *, denominator: float) -> LossTerms:
        """The loss of a micro-batch, with its gradient; the host never waits for the device.

        Here the nll of every target times its share, summed and divided by `denominator`, that of the global batch
        (`core.losses.denominator`), so that accumulation and the number of devices do not change the loss. The LM head
        runs at the targets only; values and gradients equal those of the textbook's loss, which runs it everywhere.
        model: the module that is trained (`models.backbone.TokenNLL`, or what the algorithm's row names), or a wrapper;
        inputs: what `corrupt` made of the micro-batch, on the device.
        """
        nll = model(inputs.tokens, inputs.layout, inputs.row, inputs.position, inputs.targets)
        return weighted_terms(nll, inputs, denominator)

    def target_counts(self, targets: Tensor, prompts: Tensor) -> Tensor:
        """How many of each row's targets [B] the loss counts, given the lengths of the prompts [B]; long [B]."""
        return targets

    def forward_lengths(self, lengths: ndarray, prompts: ndarray) -> ndarray:
        """How many tokens go through the model for rows with these lengths and prompts [B]: [B]."""
        return lengths


def part_of_state(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state of a submodule, by its own names."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
