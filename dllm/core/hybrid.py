"""Hybrid noise: a token becomes a mask, or a random token; masks alone and random tokens alone are the two ends.

At noise level r in [0, 1] a token x is, independently of all others,

    q_r(z | x) = alpha 1[z = x] + masks 1[z = mask] + (uniform / N) 1[z is not the mask],
    alpha = (1 - r) / C,  masks = r / C,  uniform = c / C,  c = B sqrt(r (1 - r)),  C = 1 + c,  B = 2 p / (1 - p),

with N tokens that are not the mask. p, the `share`, is that of random tokens in the middle, r = 1/2; both ends, the
clean text and the masks, are those of masked diffusion, which p = 0 is. With p = 1 there are no masks:
alpha = 1 - r, uniform = r. A model x_hat of the clean tokens has the bound

    -log p(x) <= integral over r of E[ sum over i of w(z_i) (KL(q_r(. | x_i) || q_r(. | x_hat_i)) + IS(z_i)) ] dr,
    IS(z) = y - log y - 1,  y = q_r(z | x) / q_r(z | x_hat),   w(z) = (rate of jumps into z) / q_r(z | x),

and w is, with kappa = 1/2 (p < 1) or 1 (p = 1) and rho = (uniform / N) / alpha,

    1 / (r (1 - r)) of a mask,  kappa / (r (1 - r)) of a wrong token,  that times rho / (1 + rho) of the right one.

At a mask IS is 0, and without random tokens w KL is nll / r: the bound of masked diffusion. It is least where x_hat_i
is p(x_i | all z but z_i). Sources: von Ruette et al. 2025 (arXiv:2503.04482), theorem 3.1 and section 4; Austin et al.
2021 (arXiv:2107.03006) for p = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST, MOST = 1e-6, 1 - 1e-5
"""Noise levels at which the bound is computed: at 0 and 1 themselves, weights are infinite and what they count is 0."""


LEAST_RHO = 1e-35
"""What stands for a rho of 0, whose logarithm is asked for."""


@dataclass(frozen=True)
class HybridNoise:
    """The process for N `tokens` beside the mask; share: p of the module's docstring."""

    share: float
    tokens: int
    mask_id: int

    @property
    def kappa(self) -> float:
        """How a jump to a random token depends on the level, as a power; see the module's docstring."""
        return 1.0 if self.share == 1 else 0.5

    def shares(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, masks and uniform at levels r, each of their shape."""
        if self.share == 1:
            return 1 - level, torch.zeros_like(level), level
        extra = 2 * self.share / (1 - self.share) * (level * (1 - level)).sqrt()
        return (1 - level) / (1 + extra), level / (1 + extra), extra / (1 + extra)

    def odds(self, level: Tensor) -> Tensor:
        """rho at levels r: how probable one random token is, over alpha."""
        alpha, _, uniform = self.shares(level)
        return uniform / self.tokens / alpha

    def corrupted(self, x_0: Tensor, where: Tensor, level: Tensor, place: Tensor, draw: Tensor) -> Tensor:
        """z [B, L] long: the tokens x_0 [B, L] with noise of levels [B] wherever `where` [B, L].

        place [B, L] in [0, 1) decides what becomes of a token, draw [B, L] long, any integers, which random token.
        """
        _, masks, uniform = (part[:, None] for part in self.shares(level))
        z = torch.where(place < masks, self.mask_id, torch.where(place < masks + uniform, self.random(draw), x_0))
        return torch.where(where, z, x_0)

    def random(self, draw: Tensor) -> Tensor:
        """Tokens that are not the mask, from integers."""
        token = draw.remainder(self.tokens)
        return token + (token >= self.mask_id).long()

    def weights(self, level: Tensor, seen: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """w alpha, of `divergences`' KL / alpha, and w, of its IS, by level: all [N], of tokens seen and meant."""
        alpha, rho = self.shares(level)[0], self.odds(level)
        masked, right = seen == self.mask_id, seen == target
        weight = torch.where(masked, 1.0, self.kappa * torch.where(right, rho / (1 + rho), 1.0))
        weight = weight / (level * (1 - level))
        return weight * alpha, weight.masked_fill(masked, 0.0)


def divergences(
    at_target: Tensor, at_seen: Tensor, right: Tensor, spread: Tensor, rho: Tensor
) -> tuple[Tensor, Tensor]:
    """KL / alpha and IS of the bound, in nats, from log p of the clean token and of the seen one: see the module.

    right: whether these are the same token (of a mask, whose log p is -inf, IS means nothing); spread: the sum over all
    tokens v of log(1 + p_v / rho). Shapes broadcast. Where rho is 0, KL / alpha is the nll. The formulas are those of
    the docstring divided by alpha, and do not lose digits where rho is large.
    """
    rho = rho.clamp(min=LEAST_RHO)
    log_rho = rho.log()
    kl = rho.log1p() - torch.logaddexp(at_target, log_rho) + rho * ((1 / rho).log1p() - spread)
    over = (right.to(rho.dtype) - at_seen.exp()) / (at_seen.exp() + rho)  # y - 1
    log_y = torch.where(right, rho.log1p(), log_rho) - torch.logaddexp(at_seen, log_rho)
    return kl, torch.where(over.abs() < 1e-3, over**2 * (0.5 - over / 3), over - log_y)


def spread_of(log_p: Tensor, rho: Tensor) -> Tensor:
    """The sum over tokens v of log(1 + p_v / rho): [N] from log p [N, V] and rho [N]."""
    return torch.nn.functional.softplus(log_p - rho.clamp(min=LEAST_RHO).log()[:, None]).sum(-1)
