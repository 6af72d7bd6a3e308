"""Where bf16 is fast, which weights it needs there, and how to compute in fp32 with bf16 weights where it is not."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 matrix products; elsewhere they are emulated, many times slower.

    Read from the hardware's own description and never timed, so that the same machine always computes the same bytes.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        if platform.machine().lower() in ("x86_64", "amd64"):
            return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "mps"  # the first Apple chips emulate it, and PyTorch does not say which chip it is


def hold_products_in_bf16(model: nn.Module, layers: nn.Module) -> None:
    """Hold in bf16, in place, what only matrix products of `layers` read; every other weight of the model in fp32.

    These are linear layers and stacks of experts [E, D, D']. Autocast rounds the weights of linear layers to bf16 in
    every pass, so their results are the same bits, in half the memory and without that work. Grouped products of
    experts it leaves alone: they take the type of their weights.
    """
    products = {
        parameter
        for module in layers.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, nn.Linear) or parameter.dim() == 3
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if parameter in products else torch.float32)


class WidenedWeights(nn.Module):
    """A module whose bf16 weights are read as fp32 in its forward pass; their gradients come back in bf16.

    Everything between the weights is computed in fp32. The weights themselves stay in bf16, so training rounds every
    update to bf16, as it does without this wrapper.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        wide = {name: p.float() if p.dtype == torch.bfloat16 else p for name, p in self.inner.named_parameters()}
        result: Tensor = functional_call(self.inner, wide, inputs, named)
        return result
