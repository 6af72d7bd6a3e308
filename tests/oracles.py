"""Denoisers whose distributions are known: a random table for any mask pattern, and an exact Markov chain.

Both are modules with `logits_of`, which `tests.toys.ToyBackbone` takes for hidden states.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from dllm.core.noise import keyed_hash, keyed_uniform, token_hash
from tests.toys import ToyBackbone

IMPOSSIBLE = -1e4


class TabularDenoiser(nn.Module):
    """Logits that are a random function of (the whole row without its padding, the position): any mask pattern differs.

    The mask token gets a large logit, which samplers and scores must ignore. `forwarded` counts rows.
    """

    def __init__(self, vocab_size: int, mask_id: int, seed: int = 0, scale: float = 3.0):
        super().__init__()
        self.vocab_size, self.mask_id, self.seed, self.scale = vocab_size, mask_id, seed, scale
        self.forwarded = 0

    def logits_of(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        self.forwarded += len(tokens)
        rows = keyed_hash(self.seed, token_hash(tokens, attention))
        position = torch.arange(tokens.shape[1])[:, None]
        logits = self.scale * keyed_uniform(rows[:, None, None], position, torch.arange(self.vocab_size))
        logits[..., self.mask_id] = 2 * self.scale
        return logits


class MarkovDenoiser(nn.Module):
    """Exact conditionals p(x_i | the observed positions) of a Markov chain, by forward-backward messages.

    initial [V] and transition [V, V] are probabilities; tokens from V up (mask, padding) are not observed.
    """

    def __init__(self, initial: Tensor, transition: Tensor, extra_tokens: int = 3):
        super().__init__()
        self.initial, self.transition, self.extra_tokens = initial.double(), transition.double(), extra_tokens

    def logits_of(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        states = len(self.initial)
        seen = tokens < states if attention is None else (tokens < states) & attention
        allowed = torch.where(seen[..., None], torch.arange(states) == tokens[..., None], True).double()
        before, after = torch.empty_like(allowed), torch.empty_like(allowed)
        before[:, 0], after[:, -1] = self.initial, 1.0
        for i in range(1, tokens.shape[1]):
            before[:, i] = (before[:, i - 1] * allowed[:, i - 1]) @ self.transition
            after[:, -1 - i] = (after[:, -i] * allowed[:, -i]) @ self.transition.T
        logits = (before * after).log().clamp(min=IMPOSSIBLE)
        return nn.functional.pad(logits, (0, self.extra_tokens), value=IMPOSSIBLE)

    def log_probability(self, row: list[int]) -> float:
        """log p of a complete row; 0 for an empty one."""
        if not row:
            return 0.0
        steps = sum(self.transition[a, b].log().item() for a, b in itertools.pairwise(row))
        return self.initial[row[0]].log().item() + steps


def tabular_backbone(text_tokens: int = 4, seed: int = 0, **changes) -> ToyBackbone:
    mask, eos, pad = text_tokens, text_tokens + 1, text_tokens + 2
    model = TabularDenoiser(text_tokens + 3, mask, seed)
    return ToyBackbone(model, mask, eos, pad, text_tokens + 3, **changes)


def markov_backbone(states: int = 3, seed: int = 0) -> ToyBackbone:
    noise = keyed_uniform(seed, torch.arange(states + 1)[:, None], torch.arange(states)).double() + 0.05
    p = noise / noise.sum(-1, keepdim=True)
    return ToyBackbone(MarkovDenoiser(p[0], p[1:]), states, states + 1, states + 2, states + 3)


def enumerated_nelbo(backbone: ToyBackbone, prompt: list[int], target: list[int]) -> float:
    """sum over k of g_k, straight from its definition: a mean over all subsets of each size."""
    total = 0.0
    for k in range(1, len(target) + 1):
        means = []
        for subset in itertools.combinations(range(len(target)), k):
            row = [*prompt, *(backbone.mask_id if i in subset else token for i, token in enumerate(target))]
            logits = backbone.model.logits_of(torch.tensor([row]))[0].double()
            logits[:, backbone.mask_id] = -torch.inf
            log_p = logits.log_softmax(-1)
            means.append(sum(-log_p[len(prompt) + i, target[i]].item() for i in subset) / k)
        total += sum(means) / len(means)
    return total
