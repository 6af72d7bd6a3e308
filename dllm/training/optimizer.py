"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dllm.config import OptimizerSettings
from dllm.core.precision import has_fast_bf16


def share_of_peak(step: int, total: int, warmup_share: float) -> float:
    """Learning rate at a step as a share of its peak: linear warm-up, then cosine to zero at `total`."""
    warmup = round(total * warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose matrix products run in fp32 on hardware without fast bf16.

    There, torch's Newton-Schulz iteration in bf16 takes most of the time of a training step. The iteration only makes
    an update's singular values roughly equal, to within half their size, so the rounding of its products has no effect
    on training. Same options and state. Source: Jordan et al. 2024; Liu et al. 2025 (arXiv:2502.16982).
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One optimisation step."""
        if has_fast_bf16(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalized(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                scale = 0.2 * math.sqrt(max(parameter.shape))  # match_rms_adamw: the size of AdamW's steps
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)
        return loss


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """The matrix [M, N] with all singular values near 1, by Newton-Schulz iteration in the matrix's own dtype.

    Each step multiplies the matrix by a polynomial in its Gram matrix G, which commutes with G. Where one side is at
    least twice the other, the steps are therefore taken on G alone, G <- p(G)^2 G, and the product of all p(G) is
    applied to the matrix at the end: fewer operations.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=epsilon)
    short = 2 * wide.shape[0] <= wide.shape[1] and wide.dtype == torch.float32
    gram = wide @ wide.T
    whole = None
    for left in reversed(range(steps)):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # p(G) - a
        if not short:
            wide = torch.addmm(wide, factor, wide, beta=a)
            gram = wide @ wide.T if left else gram
            continue
        factor.diagonal().add_(a)
        whole = factor if whole is None else whole @ factor
        gram = factor @ (gram @ factor) if left else gram
    wide = wide if whole is None else whole @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def build_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices inside layers and AdamW for the rest.

    The rest are embeddings, norms, biases and heads, the edit heads too: many of their matrices start at zero, where
    Muon's first step, which has the same size whatever the gradient, would be far too long.
    Each group carries `peak`, its peak learning rate. Muon's steps are scaled to AdamW's size (its
    `match_rms_adamw`), so both rates live on one scale. Source: Jordan et al. 2024; Liu et al. 2025 (arXiv:2502.16982).
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = settings.name == "muon" and parameter.ndim == 2 and "layers." in name.replace("layer.", "layers.")
        (matrices if inside else others).append(parameter)
    fused = others[0].device.type in ("cuda", "cpu") and others[0].is_floating_point()
    adamw = torch.optim.AdamW(
        others,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=fused,
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        rate = settings.matrix_learning_rate or settings.learning_rate
        optimizers.append(Muon(matrices, lr=rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> float:
    """Set every group to a share of its peak and return the first group's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
    return optimizers[0].param_groups[0]["lr"]
