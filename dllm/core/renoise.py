"""Uniform noise in equal steps: what one step of a predicted process loses to the true one.

With alpha(t) = 1 - t, q(x_t | x_0) keeps a token with probability alpha(t) and else draws one of V uniformly. A step
from t = n/N to s = (n - 1)/N draws a token from q(x_s | x_t, x_0) if x_0 is known, and from the mean of that over a
model's p(x_0 | x_t) if not. N times the divergence of the two at a level n drawn uniformly from 1..N, added up over the
tokens of a text, has a bound on -log p(text) as its mean.
Source: Austin et al. 2021 (arXiv:2107.03006), eqs. 1 to 4, uniform transitions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_divergence(logits: Tensor, seen: Tensor, target: Tensor, level: Tensor, steps: int) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) [M] of tokens in nats, in the precision of their logits.

    logits [M, V] predict x_0 from x_t, which are `target` and `seen` [M]; level [M]: n, in 1..steps.
    With u = (1 - alpha) / V and [..] 1 where true: q(x_s = j | x_t = z, x_0 = x) =
    f_j (alpha_s [j = x] + u_s) / (alpha_t [x = z] + u_t), where f_j, the probability of z after j, is in the model's
    distribution too.
    """
    vocabulary = logits.shape[-1]
    p, level = logits.softmax(-1), level.to(logits.dtype)
    alpha_t, alpha_s = 1 - level / steps, 1 - (level - 1) / steps
    u_t, u_s = (1 - alpha_t) / vocabulary, (1 - alpha_s) / vocabulary
    kept, drawn = alpha_t / alpha_s, (1 - alpha_t / alpha_s) / vocabulary  # f_j at j = z is their sum, else `drawn`
    unchanged = seen == target
    p_seen = p.gather(1, seen[:, None])[:, 0]
    any_other = u_s * (p_seen / (alpha_t + u_t) + (1 - p_seen) / u_t)
    model_seen = (alpha_s * p_seen / (alpha_t + u_t) + any_other).log()
    model = ((alpha_s / u_t)[:, None] * p + any_other[:, None]).log().scatter(1, seen[:, None], model_seen[:, None])
    model_target = model.gather(1, target[:, None])[:, 0]
    reached = alpha_t * unchanged + u_t
    low, high = u_s / reached, (alpha_s + u_s) / reached
    log_low = torch.where(low > 0, low, 1.0).log()  # at s = 0 no token but the target is left, and none counts
    # every token as if it were neither, and then what the target and the token that is seen have more
    divergence = drawn * low * (log_low[:, None] - model).sum(-1)
    at_target = (kept * unchanged + drawn) * high * (high.log() - model_target)
    divergence = divergence + at_target - drawn * low * (log_low - model_target)
    return divergence + ~unchanged * kept * low * (log_low - model_seen)
