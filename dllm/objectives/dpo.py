"""Direct preference optimisation (DPO) of masked diffusion: chosen answers become likelier than rejected ones.

The log-likelihood of an answer is minus its bound, an average over masks. Its noise does not average out, as it goes
through a logarithm. What keeps it small: many masks, each at a level of its own; and the same ones for the model and
for the start that it is compared with (`likelihood.answers.bound`).

Rows with one answer, as test rows are, are evaluated as masked diffusion.
Sources: Rafailov et al. 2023 (arXiv:2305.18290); Zhu et al. 2025 (arXiv:2505.19223), VRPO, for masked diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dllm.config import PreferenceSettings, Recipe
from dllm.core.batch import Batch, LossTerms, MaskedInputs, Noise
from dllm.core.policy import preference_terms
from dllm.objectives.grpo import log_likelihoods
from dllm.objectives.mdlm import MDLM
from dllm.objectives.objective import Objective


@dataclass(frozen=True)
class DPO(Objective):
    """The loss of pairs of answers, and the bound of rows with one."""

    recipe: Recipe = Recipe()
    preferences: PreferenceSettings = PreferenceSettings()

    def corrupt(self, batch: Batch, noise: Noise, *, mask_id: int) -> MaskedInputs:
        """Rows with one answer, as masked diffusion takes them."""
        return MDLM(self.recipe).corrupt(batch, noise, mask_id=mask_id)

    def loss(self, model: nn.Module, inputs: Any, *, denominator: float) -> LossTerms:
        """The loss of pairs, as `PolicyInputs`, model as `grpo.trained_module` gives it; of other rows, their bound.

        In `LossTerms`, masked is the number of pairs and nll the sum of the bounds of the chosen answers, per token;
        `sums` has those of the margins of the rewards, beta times a log-likelihood above that of the start, and of the
        pairs whose margin is positive.
        """
        if isinstance(inputs, MaskedInputs):
            return super().loss(model, inputs, denominator=denominator)
        new = log_likelihoods(model, inputs)
        terms = preference_terms(new, inputs, beta=self.preferences.beta, denominator=denominator)
        known = new.detach()
        return LossTerms(terms.loss, -known[::2].sum(), len(known) // 2, known, terms.sums)
