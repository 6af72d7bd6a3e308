"""A denoiser that is a table of parameters, and answers to it: every canvas of a few tokens has logits of its own."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from dllm.config import GenerateSettings, PolicySettings
from dllm.core.policy import PolicyInputs
from dllm.likelihood.answers import Answers, counted_tokens, forwards_of, policy_inputs
from tests.toys import ToyBackbone

TEXT, MASK, EOS, PAD = 2, 2, 3, 4
"""Two text tokens, then mask, EOS and padding."""


class TableDenoiser(nn.Module):
    """Logits [canvases, L, V] for every canvas of `length` tokens; a shorter row is another canvas."""

    def __init__(self, length: int, seed: int = 0, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        logits = scale * torch.randn((PAD + 1) ** length, length, PAD + 1, generator=generator)
        logits[..., EOS:] = -1e9  # text is all that it writes
        self.table = nn.Parameter(logits)

    def logits_of(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        seen = tokens if attention is None else tokens.masked_fill(~attention, PAD)
        seen = nn.functional.pad(seen, (0, self.length - seen.shape[1]), value=PAD)
        number = (seen * (PAD + 1) ** torch.arange(self.length)).sum(-1)
        return self.table[number][:, : tokens.shape[1]]


def table_backbone(length: int = 4, seed: int = 0, **changes) -> ToyBackbone:
    return ToyBackbone(TableDenoiser(length, seed), MASK, EOS, PAD, PAD + 1, **changes)


def policy_settings(**changes) -> PolicySettings:
    generation = GenerateSettings(
        max_new_tokens=3, block_size=3, steps=3, reveal_rule="entropy", temperature=1.0, early_stop=False
    )
    return PolicySettings(**({"reward_funcs": ["number"], "generation": generation} | changes))


def answers_of(prompt: list[int], responses: list[list[int]], drawn: list[list[int]] | None = None) -> Answers:
    """Answers to one prompt; drawn: the pass of each token (all in one by default)."""
    tokens = torch.tensor([[*prompt, *response] for response in responses])
    rows, length = tokens.shape
    passes = torch.tensor(drawn) if drawn else torch.zeros(rows, length - len(prompt), dtype=torch.long)
    return Answers(
        tokens=tokens,
        prompts=torch.full((rows,), len(prompt)),
        ends=torch.full((rows,), length),
        visible=torch.full((rows, length), length),
        drawn=nn.functional.pad(passes, (len(prompt), 0), value=-1),
        keys=torch.arange(rows),
        groups=torch.zeros(rows, dtype=torch.long),
    )


def inputs_of(answers: Answers, settings: PolicySettings, advantages=None, iteration: int = 0) -> PolicyInputs:
    """The inputs of all answers together, under the loss `grpo`."""
    counted = counted_tokens(answers, settings)
    return policy_inputs(
        answers,
        forwards_of(answers, iteration, settings),
        advantages=torch.ones(len(answers)) if advantages is None else torch.tensor(advantages),
        shares=1 / counted,
        mask_id=MASK,
        temperature=settings.generation.temperature if settings.likelihood == "sampled" else 1.0,
    )


def trajectories(backbone: ToyBackbone, prompt: list[int], length: int, temperature: float, per_pass: int = 1):
    """Every way in which the rule `entropy` may write `length` tokens: (tokens, pass of each, probability)."""

    def grown(canvas: list[int], drawn: list[int], number: int, p: float):
        if MASK not in canvas:
            yield canvas, drawn, p
            return
        logits = backbone.model.logits_of(torch.tensor([[*prompt, *canvas]]))[0, len(prompt) :].detach()
        logits[:, MASK] = -torch.inf
        q = logits.softmax(-1)
        entropy = -torch.special.xlogy(q, q).sum(-1)
        order = sorted((i for i, token in enumerate(canvas) if token == MASK), key=lambda i: entropy[i].item())
        q = (logits.double() / temperature).softmax(-1)
        for tokens in itertools.product(range(TEXT), repeat=len(order[:per_pass])):
            new, passes, chance = list(canvas), list(drawn), p
            for place, token in zip(order, tokens, strict=False):
                new[place], passes[place], chance = token, number, chance * q[place, token].item()
            yield from grown(new, passes, number + 1, chance)

    yield from grown([MASK] * length, [-1] * length, 0, 1.0)
