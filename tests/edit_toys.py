"""Edit models whose rates are known: the posterior of a finite set of aligned pairs, and a table to be learnt."""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
from torch import Tensor, nn

from dllm.core.edits import BLANK
from dllm.models.edit_heads import EditLoss
from tests.toys import ToyBackbone

TINY = 1e-6


class _Table(nn.Module):
    """Hidden states are rates themselves: [T, 2V + 1], to insert each token, to delete, to substitute each token."""

    symbols: int
    forward = EditLoss.forward

    def on(self, backbone) -> _Table:
        """What is asked for rates: it needs no backbone."""
        return self

    def expected(self, text: tuple[int, ...], time: float) -> Tensor:
        """Rates [1 + length, 2V + 1] of a text behind its front token."""
        raise NotImplementedError

    def rates(self, tokens: Tensor, layout, time: Tensor) -> tuple[Tensor, Tensor]:
        known: dict = {}
        rows = []
        for row, length, t in zip(tokens.tolist(), layout.lengths, time.tolist(), strict=True):
            key = (tuple(row[1:length]), t)
            if key not in known:
                known[key] = self.expected(*key)
            rows.append(known[key])
        hidden = torch.cat(rows)
        insert, delete, substitute = hidden.split([self.symbols, 1, self.symbols], -1)
        return hidden, torch.cat([insert.sum(-1, keepdim=True), delete, substitute.sum(-1, keepdim=True)], -1).log()

    def token_logits(self, hidden: Tensor, place: Tensor, insert: Tensor) -> Tensor:
        rates = hidden[place]
        chosen = torch.where(insert[:, None], rates[:, : self.symbols], rates[:, self.symbols + 1 :])
        return nn.functional.pad(chosen.log(), (0, 3), value=-1e4)


class ExactEdits(_Table):
    """The posterior rates for pairs {(z_0, z_1): probability}, by enumerating every state of every pair."""

    def __init__(self, pairs: dict, symbols: int, kappa):
        super().__init__()
        self.symbols, self.kappa = symbols, kappa
        self.states = defaultdict(list)
        for (z_0, z_1), probability in pairs.items():
            free = [c for c in range(len(z_0)) if z_0[c] != z_1[c]]
            for made in itertools.product([False, True], repeat=len(free)):
                z_t = list(z_0)
                for column, is_made in zip(free, made, strict=True):
                    z_t[column] = z_1[column] if is_made else z_0[column]
                text = tuple(token for token in z_t if token != BLANK)
                entry = (probability, sum(made), len(free) - sum(made), self._todo(z_t, z_1, len(text)))
                self.states[text].append(entry)

    def _todo(self, z_t, z_1, length: int) -> Tensor:
        todo, place = torch.zeros(1 + length, 2 * self.symbols + 1), 0
        for now, then in zip(z_t, z_1, strict=True):
            place += now != BLANK
            if now == then:
                continue
            kind = then if now == BLANK else self.symbols if then == BLANK else self.symbols + 1 + then
            todo[place, kind] += 1
        return todo

    def probability(self, text: tuple[int, ...], time: float) -> float:
        """P(x_t = text)."""
        kappa = float(self.kappa(torch.tensor(time, dtype=torch.float64)))
        return sum(p * kappa**a * (1 - kappa) ** b for p, a, b, _ in self.states[text])

    def expected(self, text: tuple[int, ...], time: float) -> Tensor:
        if text not in self.states:
            return torch.full((1 + len(text), 2 * self.symbols + 1), TINY)
        kappa = float(self.kappa(torch.tensor(time, dtype=torch.float64)))
        weights = torch.tensor([p * kappa**a * (1 - kappa) ** b for p, a, b, _ in self.states[text]]).double()
        todo = torch.stack([entry[3] for entry in self.states[text]]).double()
        mean = (todo * (weights / weights.sum().clamp(min=1e-300))[:, None, None]).sum(0)
        return mean.float().clamp(min=TINY)


class LearntEdits(_Table):
    """A rate for each of some texts, times, places and edits, learnt as its logarithm."""

    def __init__(self, texts: list[tuple[int, ...]], times: int, symbols: int):
        super().__init__()
        self.symbols, self.times = symbols, times
        self.number = {text: n for n, text in enumerate(texts)}
        longest = max(map(len, texts))
        self.log_rate = nn.Parameter(torch.full((times, len(texts), 1 + longest, 2 * symbols + 1), -1.0))

    def expected(self, text: tuple[int, ...], time: float) -> Tensor:
        slot = min(round(time * self.times), self.times - 1)
        if text not in self.number:
            return torch.full((1 + len(text), 2 * self.symbols + 1), TINY)
        return self.log_rate[slot, self.number[text], : 1 + len(text)].exp()


class RandomEdits(_Table):
    """Rates that are a fixed random function of the text, the place and the time."""

    def __init__(self, symbols: int, seed: int = 0, scale: float = 1.0):
        super().__init__()
        self.symbols, self.seed, self.scale = symbols, seed, scale

    def expected(self, text: tuple[int, ...], time: float) -> Tensor:
        key = hash((self.seed, text, round(time, 6))) % 2**31
        noise = torch.rand(1 + len(text), 2 * self.symbols + 1, generator=torch.Generator().manual_seed(key))
        return self.scale * noise / self.symbols + TINY


def toy_backbone(model: nn.Module, **changes) -> ToyBackbone:
    """Text tokens 0..V-1, then mask, EOS and padding."""
    v = model.symbols
    return ToyBackbone(model, v, v + 1, v + 2, v + 3, edit_heads=model, **changes)
