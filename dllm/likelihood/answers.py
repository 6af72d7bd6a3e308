"""Log-likelihoods of answers that a model has drawn itself, as forward passes with a gradient.

Three ways, with one form: some masked versions of an answer are forwarded, and each log-likelihood is a weighted sum of
the log-probabilities of masked tokens.

sampled    each token as it was drawn: log p at the sampler's temperature, given the canvas of its pass. Their sum is
           the log-probability of all that the sampler drew, if the choice of positions does not depend on the tokens;
           a random order adds a constant. One log-likelihood per drawn token.
bound      minus the bound on -log p(answer | prompt), over its tokens: one log-likelihood per answer. The masks are
           those of the estimator `lattice`, the same for old and new weights, whose ratio they so do not blur, and for
           the answers of a group.
d1         log p of each token with the whole answer masked and some of the prompt, averaged over `passes` draws of
           that. One log-likelihood per token; together they are the likelihood of independent tokens.
Sources: Zhao et al. 2025 (arXiv:2504.12216), section 3.2, for `d1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.algorithms import resolved
from dllm.choices import POLICY_LIKELIHOODS
from dllm.config import LikelihoodSettings, PolicySettings, PreferenceSettings
from dllm.core.corrupt import apply_mask
from dllm.core.noise import keyed_hash, keyed_uniform
from dllm.core.packing import layout_of
from dllm.core.policy import PolicyInputs
from dllm.likelihood.designs import lattice

_PROMPT_STREAM, _DESIGN_STREAM = 11, 12


@dataclass(frozen=True)
class Answers:
    """B prompts with the answers that were drawn to them.

    tokens [B, L] long; prompts, ends [B] long: where an answer begins, and where what counts of it ends; visible
    [B, L] long: how many of the row's first positions the sampler saw in the pass that drew a token there; drawn [B, L]
    long: the number of that pass, -1 where no token was drawn; keys [B] long: of an answer; groups [B] long: of its
    prompt.
    """

    tokens: Tensor
    prompts: Tensor
    ends: Tensor
    visible: Tensor
    drawn: Tensor
    keys: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def taken(self, rows: Tensor) -> Answers:
        """Some of the answers, by number."""
        return Answers(*(part[rows] for part in vars(self).values()))

    @property
    def positions(self) -> Tensor:
        """[1, L] long."""
        return torch.arange(self.tokens.shape[1])[None]

    @property
    def targets(self) -> Tensor:
        """[B, L] bool: the tokens of the answers that count."""
        return (self.positions >= self.prompts[:, None]) & (self.positions < self.ends[:, None])


@dataclass(frozen=True)
class Forwards:
    """S versions of B answers and what is read of them.

    masked [B, S, L] bool: what each version hides; read [B, S, L] bool: the masked tokens that count, with weight
    [B, S, L]; length [B, S] long: how many positions are forwarded, 0 for no version; value [B, L] long: to which
    of the row's log-likelihoods a position adds; counts [B] long: how many these are, each of `tokens` [B] / counts
    tokens.
    """

    masked: Tensor
    read: Tensor
    weight: Tensor
    length: Tensor
    value: Tensor
    counts: Tensor

    def taken(self, rows: Tensor) -> Forwards:
        """Those of some of the answers, by number."""
        return Forwards(*(part[rows] for part in vars(self).values()))


def sampled(answers: Answers, iteration: int, settings: PolicySettings) -> Forwards:
    """Every pass of the sampler, with the tokens that it drew.

    An answer without alternatives, of which nothing was drawn, has log-likelihood 0 and no gradient: its first token is
    read and counts nothing.
    """
    certain = (answers.drawn < 0).all(-1, keepdim=True)
    drawn = torch.where(certain & (answers.positions == answers.prompts[:, None]), 0, answers.drawn)
    order = drawn >= 0
    drawn, number = drawn[:, None], torch.arange(int(drawn.max()) + 1)[None, :, None]
    read = drawn == number
    length = (answers.visible[:, None] * read).amax(-1)
    response = answers.positions[:, None] >= answers.prompts[:, None, None]
    masked = response & ((drawn < 0) | (drawn >= number))
    return Forwards(masked, read, (read & ~certain[:, None]).float(), length, order.cumsum(-1) - 1, order.sum(-1))


def bound(answers: Answers, iteration: int, settings: PolicySettings | PreferenceSettings) -> Forwards:
    """The masked versions of `lattice` with `passes` passes, drawn anew in every iteration."""
    lengths = answers.ends - answers.prompts
    design = lattice(
        lengths.clamp(min=2),
        keyed_hash(answers.groups, _DESIGN_STREAM, iteration),
        LikelihoodSettings(estimator="lattice", budget=settings.passes),
    )
    masked, weight = design.masked.clone(), design.weight.clone()
    single = lengths == 1  # everything masked is all there is
    masked[single], weight[single] = False, 0.0
    masked[single, 0, 0], weight[single, 0, 0] = True, 1.0
    weight = (weight / lengths[:, None, None]).float()
    place = answers.positions - answers.prompts[:, None]  # of the target, by position of the row
    inside = answers.targets
    at = place.clamp(0, masked.shape[-1] - 1)[:, None].expand(-1, masked.shape[1], -1)
    masked = masked.gather(-1, at) & inside[:, None]
    length = answers.ends[:, None] * masked.any(-1)
    ones = torch.ones_like(lengths)
    return Forwards(masked, masked, weight.gather(-1, at), length, torch.zeros_like(answers.tokens), ones)


def d1(answers: Answers, iteration: int, settings: PolicySettings) -> Forwards:
    """The whole answer masked, and each time other tokens of the prompt."""
    draw = iteration * settings.passes + torch.arange(settings.passes)[None, :, None]
    noise = keyed_uniform(answers.keys[:, None, None], _PROMPT_STREAM, draw, answers.positions[:, None])
    prompt = answers.positions < answers.prompts[:, None]
    inside = answers.targets
    masked = inside[:, None] | (prompt[:, None] & (noise < settings.p_mask_prompt))
    read = inside[:, None].expand_as(masked)
    length = answers.ends[:, None].expand(-1, settings.passes)
    value = (answers.positions - answers.prompts[:, None]).clamp(min=0)
    return Forwards(masked, read, read / settings.passes, length, value, inside.sum(-1))


def forwards_of(answers: Answers, iteration: int, settings: PolicySettings) -> Forwards:
    """The forwards of the likelihood that the settings name; iteration: of the steps on these answers."""
    make: Callable[..., Forwards] = resolved(POLICY_LIKELIHOODS[settings.likelihood])
    return make(answers, iteration, settings)


def counted_tokens(answers: Answers, settings: PolicySettings) -> Tensor:
    """How many tokens of each answer its log-likelihoods are of [B]."""
    return (answers.drawn >= 0).sum(-1) if settings.likelihood == "sampled" else answers.ends - answers.prompts


def policy_inputs(
    answers: Answers,
    forwards: Forwards,
    *,
    advantages: Tensor,
    shares: Tensor,
    mask_id: int,
    temperature: float,
) -> PolicyInputs:
    """What a step forwards of some answers; advantages [B], and what one token of each counts in the loss, shares [B].

    The log-likelihoods stand answer by answer, in the order of the positions.
    """
    answer, version = (forwards.length > 0).nonzero(as_tuple=True)
    length = forwards.length[answer, version]
    width = int(length.max())
    tokens = apply_mask(answers.tokens[answer], forwards.masked[answer, version], mask_id)[:, :width]
    read = forwards.read[answer, version]
    row, position = read.nonzero(as_tuple=True)
    owner = answer[row]
    first = forwards.counts.cumsum(0) - forwards.counts
    value = first[owner] + forwards.value[owner, position]
    # terms of one log-likelihood are numbered in the order in which they are met
    order = value.argsort(stable=True)
    run = torch.arange(len(value)) - torch.searchsorted(value[order], value[order])
    term = torch.empty_like(run).index_copy(0, order, run)
    terms = int(term.max()) + 1
    number = torch.repeat_interleave(torch.arange(len(answers)), forwards.counts)
    each = forwards.read.any(1).sum(-1) / forwards.counts.clamp(min=1)  # tokens that a log-likelihood stands for
    return PolicyInputs(
        tokens=tokens,
        layout=layout_of(length.tolist(), width),
        row=row,
        position=position,
        targets=answers.tokens[owner, position],
        place=value * terms + term,
        weight=forwards.weight[answer, version][row, position],
        width=terms,
        temperature=temperature,
        advantage=advantages[number],
        share=(shares * each)[number],
    )
