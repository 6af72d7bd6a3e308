"""Group-relative policy optimisation (GRPO): answers that are better than others to the same prompt become likelier.

One training step:

1. several answers to each prompt, drawn with the current weights, and their rewards (`training.rollouts`);
2. advantages: what a reward is above the mean of its group (`core.policy.group_advantages`);
3. log-likelihoods of the answers, in one of three ways (`likelihood.answers`), and their ratios to those under the
   weights that drew them;
4. the clipped surrogate, and the divergence from the start (`core.policy.policy_terms`).

Rows with an answer of their own, as test rows are, are evaluated as masked diffusion.
Sources: Shao et al. 2024 (arXiv:2402.03300); Zhao et al. 2025 (arXiv:2504.12216) for masked diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.config import PolicySettings, Recipe, RunConfig
from dllm.core.batch import Batch, LossTerms, MaskedInputs, Noise
from dllm.core.memory import logits_at_once
from dllm.core.policy import PolicyInputs, policy_terms
from dllm.models.backbone import Backbone
from dllm.objectives.mdlm import MDLM
from dllm.objectives.objective import Objective


@dataclass(frozen=True)
class GRPO(Objective):
    """The surrogate of answers with rewards, and the bound of rows with answers of their own."""

    recipe: Recipe = Recipe()
    policy: PolicySettings = PolicySettings(reward_funcs=["number"])

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """Rows with answers of their own, as masked diffusion takes them."""
        return MDLM(self.recipe).corrupt(batch, noise, mask_id=mask_id)

    def loss(self, model: nn.Module, inputs: Any, *, denominator: float) -> LossTerms:
        """The surrogate of `PolicyInputs`, model being what `trained_module` gives; of other rows, their bound.

        In `LossTerms`, nll is minus the sum of the log-likelihoods and masked their number; `sums` has those of the
        clipped ratios and of the divergence from the start.
        """
        if isinstance(inputs, MaskedInputs):
            return super().loss(model, inputs, denominator=denominator)
        new = log_likelihoods(model, inputs)
        policy = self.policy
        epsilon = None if policy.loss_type == "wd1" else policy.epsilon
        terms = policy_terms(new, inputs, epsilon=epsilon, beta=policy.beta, denominator=denominator)
        return LossTerms(terms.loss, -new.detach().sum(), len(new), new.detach(), terms.sums)


def log_likelihoods(model: nn.Module, inputs: PolicyInputs) -> Tensor:
    """The log-likelihoods [M] of the answers of a micro-batch, in nats; differentiable."""
    where = (inputs.layout, inputs.row, inputs.position, inputs.targets)
    return inputs.log_likelihoods(-model(inputs.tokens, *where, temperature=inputs.temperature))


class SampledNLL(nn.Module):
    """A backbone as the module that is trained: the nll of tokens as the sampler draws them.

    That is without the mask token and at the sampler's temperature. Layers drop nothing out: answers are drawn by the
    very network that is trained.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone, self.model = backbone, backbone.model
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                setattr(module, "attention_dropout", 0.0)  # noqa: B010  (an attribute of some classes)

    def forward(
        self,
        tokens: Tensor,
        layout: Any,
        row: Tensor,
        position: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """-log p [N], fp32 nats, of `targets` [N] at `position` [N] of `row` [N] of `tokens` [B, L].

        Logits that exceed the budget of memory are computed in pieces, and again in the backward pass.
        """
        backbone = self.backbone
        rows = backbone.hidden_at(tokens, layout, row, position)

        def nll(some: Tensor, wanted: Tensor) -> Tensor:
            logits = backbone.head_logits(some) / temperature
            barred = torch.arange(logits.shape[-1], device=logits.device) == backbone.mask_id
            return nn.functional.cross_entropy(logits.masked_fill(barred, -torch.inf), wanted, reduction="none")

        height = logits_at_once(backbone.vocab_size, 4, rows.device.type)
        if len(rows) <= height:
            return nll(rows, targets)
        pieces = zip(rows.split(height), targets.split(height), strict=True)
        return torch.cat([checkpoint(nll, some, wanted, use_reentrant=False) for some, wanted in pieces])


def trained_module(config: RunConfig, backbone: Backbone) -> SampledNLL:
    """The module that is trained."""
    return SampledNLL(backbone)
