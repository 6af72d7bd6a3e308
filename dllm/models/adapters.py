"""LoRA adapters: small trained matrices beside frozen ones, which may be held in four bits (QLoRA).

The layers are injected into the stock model in place, so that everything that knows its class goes on to work.
Sources: Hu et al. 2021 (arXiv:2106.09685); Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dllm.config import AdapterSettings
from dllm.models.backbone import Backbone
from dllm.models.self_tests import is_bidirectional

ADAPTER = "default"
"""Name of the one adapter, as peft wants one."""

NEW_TOKENS = "new_tokens.safetensors"
"""Beside an adapter: embeddings of tokens that its start was given, the mask token for instance."""


class NewRows(nn.Module):
    """An embedding [V, D] whose rows of new tokens train while the others are frozen."""

    def __init__(self, weight: Tensor, first: int, end: int):
        super().__init__()
        self.first, self.end = first, end
        self.rows = nn.Parameter(weight[first:end].detach().float().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([weight[: self.first], self.rows.to(weight.dtype), weight[self.end :]])


def attach_adapter(
    backbone: Backbone,
    settings: AdapterSettings,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    bf16: bool = False,
    causal: bool = False,
) -> Backbone:
    """The backbone with a seeded adapter that changes nothing yet; what trains is in fp32, everything else is frozen.

    Tokens that the model was given when it was loaded train their embeddings too. `qlora` first quantizes the layers
    that are targets, one by one on the device, where the model then is (nf4, double quantization); bf16: their
    products. Of two parts that share their weights (`Backbone.twins`) both have the same adapter, and no other part
    has one. Raises ValueError, one line, for targets that the model has not, for a missing package, and if the model is
    not bidirectional.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = backbone.model
    first_twin, other_twin = backbone.twins or ("", "")
    names = target_names(model, settings.targets, inside=first_twin)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if settings.kind == "qlora":
        _quantize(model, names, device or backbone.device, torch.bfloat16 if bf16 else torch.float32)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    for name in names if backbone.twins else ():
        _replace(model, other_twin + name.removeprefix(first_twin), model.get_submodule(name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    first, end = backbone.new_tokens
    if end > first:
        _train_rows(model, first, end)
    if not causal and not backbone.twins and not is_bidirectional(model, backbone.tokenizer.all_special_ids):
        raise ValueError(f"{type(model).__name__} attends to the left only with an adapter; train without one")
    return backbone


def target_names(model: nn.Module, targets: list[str] | None, *, inside: str = "") -> list[str]:
    """Full names of the linear layers inside a model's layers that `targets` name by their ends; None: all of them.

    inside: the part of the model that is looked at. Raises ValueError, one line, for a target that is not one of them.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(inside) and any(part.isdigit() for part in name.split("."))
    ]
    known = sorted({_end(name) for name in linear})
    if not known:
        raise ValueError(f"{type(model).__name__} has no linear layer for an adapter")
    for target in targets or []:
        if target not in known:
            raise ValueError(
                f"adapter.targets: {target!r} is not one of its linear layers; allowed: {', '.join(known)}"
            )
    return [name for name in linear if targets is None or _end(name) in targets]


def _end(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _quantize(model: nn.Module, names: list[str], device: torch.device, compute: torch.dtype) -> None:
    """Replace linear layers by ones whose weights are held in four bits, as the device quantizes them."""
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            "adapter.kind = 'qlora' needs bitsandbytes: pip install 'dllm[adapters]', or take kind: lora"
        ) from None
    for name in names:
        old: Any = model.get_submodule(name)
        new = bitsandbytes.nn.Linear4bit(
            old.in_features, old.out_features, old.bias is not None, compute_dtype=compute, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        new.weight = bitsandbytes.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        new.bias = old.bias
        # on some CPUs its first evaluation would repack the weight for a bf16 kernel without a gradient
        new.support_avx512bf16_for_cpu = False
        _replace(model, name, new.to(device))
    model.to(device)


def _train_rows(model: nn.Module, first: int, end: int) -> None:
    """Let the embeddings of tokens `first` to `end` train, in a tied head too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    rows = NewRows(embedding.weight, first, end)
    for module in (embedding, head) if tied else (embedding,):
        parametrize.register_parametrization(module, "weight", rows)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """The stock model that computes what a model with an adapter computes, in place and on the CPU, nothing frozen.

    Four-bit weights become the numbers that they encode.
    """
    from peft.tuners.lora import LoraLayer

    done: dict[int, nn.Module] = {}  # two parts of a model may share a layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoraLayer):
            if id(layer) in done:
                _replace(model, name, done[id(layer)])
                continue
            lora: Any = layer
            weight = _plain(lora.base_layer.weight).cpu()  # one by one: whole, they may not fit the device
            outputs, inputs = weight.shape
            merged = nn.Linear(inputs, outputs, lora.base_layer.bias is not None, device="meta")
            delta = lora.get_delta_weight(ADAPTER).to(weight.device)
            merged.weight = nn.Parameter((weight.float() + delta.float()).to(weight.dtype))
            if merged.bias is not None:  # a four-bit layer casts it to the precision of its products
                merged.bias = nn.Parameter(lora.base_layer.bias.to(weight))
            _replace(model, name, merged)
            done[id(layer)] = merged
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrizations: Any = module.parametrizations
            (rows,) = parametrizations["weight"]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight[rows.first : rows.end] = rows.rows.to(module.weight.dtype)  # a tied head has it, too
    del model.peft_config
    return model.cpu().requires_grad_(True)


def _plain(weight: Tensor) -> Tensor:
    """A weight as a matrix of floats."""
    if not hasattr(weight, "quant_state"):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def save_adapter(model: nn.Module, state: dict[str, Tensor], directory: str | Path) -> Path:
    """Write the adapter in `state`, a model's, as peft stores one, and the embeddings of new tokens beside it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    configs: Any = model.peft_config
    config = copy(configs[ADAPTER])
    for name, value in vars(config).items():
        if isinstance(value, set):  # whose order differs from process to process
            setattr(config, name, sorted(value))
    config.save_pretrained(directory)
    lora = {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": value.contiguous()
        for name, value in state.items()
        if name.partition(".lora_")[0] in config.target_modules  # once, where two parts share a layer
    }
    save_file(lora, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    rows = next((value for name, value in state.items() if name.endswith("parametrizations.weight.0.rows")), None)
    if rows is not None:
        save_file({"rows": rows.contiguous()}, directory / NEW_TOKENS)
    return directory


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
