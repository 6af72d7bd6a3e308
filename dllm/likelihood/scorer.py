"""Scores of masked diffusion: the bound on a target's likelihood, and whether greedy decoding gives the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dllm.config import LikelihoodSettings
from dllm.core.blocks import BlockRule
from dllm.core.canvas import Score
from dllm.likelihood._masked import Rows, greedy_match_masked, nelbo_masked
from dllm.models.load import Backbone


@dataclass(frozen=True)
class MaskedScorer:
    """rule: how rows are cut into blocks of a model that attends block-causally, from a backbone and `block_size` of
    the settings; None: the model attends to the whole text."""

    rule: Callable[[Backbone, int | None], BlockRule] | None = None

    def nelbo(self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings) -> list[Score]:
        """One bound on -log p(target | prompt) per request; see `likelihood._masked.nelbo_masked`."""
        rule = self.rule and self.rule(backbone, settings.block_size)
        return nelbo_masked(backbone, prompts, targets, settings, rule=rule)

    def greedy_match(
        self, backbone: Backbone, prompts: Rows, targets: Rows, settings: LikelihoodSettings
    ) -> list[bool]:
        """Whether greedy decoding gives each target; see `likelihood._masked.greedy_match_masked`."""
        rule = self.rule and self.rule(backbone, settings.block_size)
        return greedy_match_masked(backbone, prompts, targets, settings, rule=rule)
