"""Policy gradients in pure tensors: advantages of a group, the clipped surrogate, and what a step hands to them.

Preferences between two answers are learnt from the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dllm.core.batch import Inputs
from dllm.core.packing import Layout


@dataclass(frozen=True, eq=False)
class PolicyInputs(Inputs):
    """R rows that are forwarded for B answers, and how M log-likelihoods come of their N chosen tokens.

    tokens [R, L] long, as the model sees them; layout: the rows without their padding; row, position, targets [N] long;
    place, weight [N]: where a target's log-probability, times its weight, stands in a table [M, W] whose rows add up
    to the log-likelihoods; temperature: of the distributions.
    advantage, share [M] fp32: of each log-likelihood's answer, and what it counts in the loss before the denominator.
    old, reference [M] fp32: the log-likelihoods under the weights that drew the answers, and under those of the start;
    None: those weights are the ones that are trained, or are not asked for.
    """

    tokens: Tensor
    layout: Layout
    row: Tensor
    position: Tensor
    targets: Tensor
    place: Tensor
    weight: Tensor
    width: int
    temperature: float
    advantage: Tensor
    share: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    def log_likelihoods(self, log_p: Tensor) -> Tensor:
        """[M] from the log-probabilities [N] of the targets; every sum has a fixed order on every device."""
        values = len(self.advantage)
        table = log_p.new_zeros(values * self.width).index_copy(0, self.place, log_p * self.weight)
        return table.view(values, self.width).sum(-1)


@dataclass(frozen=True)
class PolicyTerms:
    """loss: the normalised surrogate (scalar, differentiable); sums: over the M log-likelihoods, of what is logged."""

    loss: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


def policy_terms(
    new: Tensor, inputs: PolicyInputs, *, epsilon: float | None, beta: float, denominator: float
) -> PolicyTerms:
    """The clipped surrogate of log-likelihoods `new` [M], and beta times the divergence from the reference.

        - share (min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) - beta (exp(d) - d - 1)),   r = exp(new - old),
        d = reference - new, summed over the log-likelihoods and divided by `denominator`

    Where `old` is None it is `new` itself, so that r is exactly 1 and the gradient that of share A new. Without epsilon
    there is no ratio: in place of the minimum stands A new, A being the weight of an answer (`weighed_advantages`).
    Sources: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; Shao et al. 2024 (arXiv:2402.03300), eq. 3 and 4.
    """
    advantage = inputs.advantage
    if epsilon is None:
        gain, sums = new * advantage, {"clipped": new.new_zeros(())}
    else:
        old = new.detach() if inputs.old is None else inputs.old
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        sums = {"clipped": (clipped * advantage < ratio * advantage).float().sum()}
    if inputs.reference is not None:
        distance = inputs.reference - new
        divergence = distance.exp() - distance - 1
        gain = gain - beta * divergence
        sums["kl"] = divergence.detach().sum()
    return PolicyTerms(-(inputs.share * gain).sum() / denominator, sums)


def preference_margins(new: Tensor, inputs: PolicyInputs) -> Tensor:
    """How much further a chosen answer is above its reference than the rejected one behind it, in nats: [M / 2].

    The answers of a pair are neighbours, with advantage 1 and -1; share times a log-likelihood is that of the answer.
    Equal weights give exactly 0. Source: Zhu et al. 2025 (arXiv:2505.19223), the preference score.
    """
    assert inputs.reference is not None
    return (inputs.share * inputs.advantage * (new - inputs.reference)).view(-1, 2).sum(-1)


def preference_terms(new: Tensor, inputs: PolicyInputs, *, beta: float, denominator: float) -> PolicyTerms:
    """- log sigmoid(beta x margin), summed over the pairs and divided by `denominator`.

    A tie counts as half a pair that is put right. Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.
    """
    margins = preference_margins(new, inputs)
    right = (margins.detach().sign() + 1) / 2
    sums = {"reward_margin": beta * margins.detach().sum(), "accuracy": right.sum()}
    return PolicyTerms(-nn.functional.logsigmoid(beta * margins).sum() / denominator, sums)


def group_advantages(rewards: Tensor, groups: int, scale: Literal["group", "none"]) -> Tensor:
    """What each reward [N] is above the mean of its group, N / groups answers in a row each; scaled by its deviation.

    An answer whose reward is NaN counts in no mean and has advantage 0. Source: Shao et al. 2024 (arXiv:2402.03300);
    without the scale: Liu et al. 2025 (arXiv:2503.20783), as the mean is the only baseline that keeps the gradient's
    direction.
    """
    table = rewards.double().view(groups, -1)
    known = ~table.isnan()
    count = known.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(known, table - table.nansum(-1, keepdim=True) / count, 0.0)
    if scale == "group":
        deviation = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation + 1e-4)
    return centred.flatten().float()


def weighed_advantages(advantages: Tensor, known: Tensor, groups: int) -> Tensor:
    """What wd1 weighs log-likelihoods with [N]: softmax(A) - softmax(-A) in each group, times its size.

    Better answers are imitated and worse ones made less likely; those that are not `known` [N] bool count nothing.
    Times the size, as losses are means over answers. Source: Tang et al. 2025 (arXiv:2507.08838), the two terms of its
    loss, with temperature 1.
    """
    table, left_out = advantages.double().view(groups, -1), ~known.view(groups, -1)
    up, down = ((sign * table).masked_fill(left_out, -torch.inf).softmax(-1) for sign in (1, -1))
    return (table.shape[1] * (up - down)).nan_to_num(0.0).flatten().float()


def token_shares(
    tokens: Tensor, loss_type: Literal["grpo", "dapo", "dr_grpo", "wd1"], most: int
) -> tuple[Tensor, float]:
    """What a token of each answer counts [N], and the denominator of the whole batch.

    tokens [N]: how many of each answer are counted, over the whole global batch; most: tokens that an answer can have.
    `grpo`: the mean over answers of their means; `dapo`: the mean over tokens; `dr_grpo`: the sum over `most`; `wd1`:
    the mean over answers of their sums.
    """
    one = torch.ones(len(tokens))
    if loss_type == "dapo":
        return one, float(tokens.sum().clamp(min=1))
    shares = {"grpo": one / tokens.clamp(min=1), "dr_grpo": one / most, "wd1": one}
    return shares[loss_type], float(len(tokens))
