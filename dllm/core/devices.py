"""Which device a job takes: the one that is named; else CUDA, else an accelerator that passes a test, else the CPU.

An accelerator other than CUDA (`mps`, `xpu`) may lack an operation, or compute it wrongly: what a job needs is tried on
a few numbers and compared with the CPU. These devices never see float64, page-locked memory, a fused optimiser or a
generator of their own, whatever they could do; bf16 is decided in `precision`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from dllm.core.noise import keyed_uniform

Probe = Callable[[torch.device], Tensor]


def _integers(device: torch.device) -> Tensor:
    """Noise: 64-bit products that wrap around."""
    return keyed_uniform(7, torch.arange(64, device=device))


def _attention(device: torch.device) -> Tensor:
    rows = keyed_uniform(1, torch.arange(2 * 2 * 8 * 16)).view(2, 2, 8, 16).to(device)
    seen = (torch.arange(8)[:, None] >= torch.arange(8)[None]).to(device)
    return functional.scaled_dot_product_attention(rows, rows.flip(-1), rows, attn_mask=seen)


def _sorting(device: torch.device) -> Tensor:
    values = keyed_uniform(2, torch.arange(6 * 40)).view(6, 40).to(device)
    order = values.argsort(dim=-1, stable=True)
    top = values.log_softmax(-1).topk(5, dim=-1)
    return torch.cat([order.float(), order.cumsum(-1).float(), top.values, top.indices.float()], -1)


def _scattering(device: torch.device) -> Tensor:
    place = torch.tensor([3, 1, 3, 0], device=device)
    zeros = torch.zeros(5, 2, device=device)
    added = zeros.index_put((place,), torch.ones(4, 2, device=device), accumulate=True)
    copied = zeros.index_copy(0, place[1:], torch.arange(6.0, device=device).view(3, 2))
    return torch.cat([added, copied, added.masked_fill(copied > 1, 7.0)])


def _training(device: torch.device) -> Tensor:
    """Three steps of AdamW on an embedding, a norm and a tied head, clipped."""
    table = torch.nn.Parameter(keyed_uniform(3, torch.arange(12 * 8)).view(12, 8).to(device))
    norm = torch.nn.LayerNorm(8, device=device)
    optimizer = torch.optim.AdamW([table, *norm.parameters()], lr=0.1, fused=False)
    ids = torch.tensor([1, 5, 5, 11], device=device)
    for _ in range(3):
        logits = functional.gelu(norm(functional.embedding(ids, table))) @ table.T
        torch.autograd.backward([functional.cross_entropy(logits, ids.roll(1))])
        torch.nn.utils.clip_grad_norm_([table, *norm.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return table.detach()


PROBES: dict[str, Probe] = {
    "64-bit integers": _integers,
    "attention": _attention,
    "sorting": _sorting,
    "scattering": _scattering,
    "training": _training,
}
"""What is tried, by name; `training` only where something is to be trained."""


@cache
def missing(device: torch.device, *, training: bool = False) -> str | None:
    """The first of PROBES that a device cannot do, or does otherwise than the CPU; None if there is none."""
    for name, probe in PROBES.items():
        if name == "training" and not training:
            continue
        try:
            found = probe(device).cpu()
        except (RuntimeError, NotImplementedError, TypeError, AssertionError):
            return name
        if not torch.allclose(found, probe(torch.device("cpu")), rtol=1e-3, atol=1e-4):
            return name
    return None


def best_device(*, training: bool = False) -> torch.device:
    """CUDA, or another accelerator that passes the test, or else the CPU, which is said in one line."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type == "cuda":
        return found or torch.device("cpu")
    lacks = missing(found, training=training)
    if lacks is None:
        return found
    print(f"{found.type}: {lacks} does not work there, so the CPU is used", file=sys.stderr)
    return torch.device("cpu")


def known_device(name: str) -> torch.device:
    """The device of this name. Raises ValueError, one line, for a name that is not a device, and for one that this
    machine lacks."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device; allowed: cpu, cuda, cuda:1, mps") from None
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}: this machine does not have one; leave --device out")
    return device


def peak_gib(device: str | torch.device) -> float | None:
    """Most memory that this process's tensors took on an accelerator, in GiB; None where none of it was used."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
