"""What `dllm chat` and `dllm sample` have in common: a checkpoint by name, and the sampler's options."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm.config import GenerateSettings
    from dllm.language_model import DiffusionLM

OPTIONS = {
    "new_tokens": "max_new_tokens",
    "steps": "steps",
    "block_size": "block_size",
    "temperature": "temperature",
    "top_p": "top_p",
    "reveal_rule": "reveal_rule",
    "seed": "seed",
}
"""Option of the command line -> field of GenerateSettings."""


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The sampler's options; what is not given keeps its default."""
    group = parser.add_argument_group("sampler")
    group.add_argument("--new-tokens", type=int, metavar="N", help="longest answer, in tokens")
    group.add_argument("--steps", type=int, metavar="N", help="forward passes per answer (default: one per token)")
    group.add_argument("--block-size", type=int, metavar="N", help="tokens per block; blocks go from left to right")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most probable token (default)")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set with this probability")
    group.add_argument(
        "--reveal-rule",
        choices=("confidence", "entropy", "margin", "random", "threshold"),
        help="which masked positions are revealed first (default: confidence)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of the draws at a temperature above 0 (default: 0)")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: an accelerator if there is one)")


def with_options(settings: GenerateSettings, args: argparse.Namespace) -> GenerateSettings:
    """The settings with what the command line says. Raises ValueError, one line, for a value out of range."""
    from pydantic import ValidationError

    from dllm.chat.session import check_steps

    given = {field: getattr(args, name) for name, field in OPTIONS.items() if getattr(args, name) is not None}
    try:
        settings = type(settings).model_validate(settings.model_dump() | given)
    except ValidationError as fault:
        error = fault.errors()[0]
        option = next((name for name, field in OPTIONS.items() if field == error["loc"][0]), error["loc"][0])
        raise ValueError(f"--{option.replace('_', '-')} {error['input']}: {error['msg'].lower()}") from None
    check_steps(settings)
    return settings


def open_model(checkpoint: str, device: str | None) -> DiffusionLM:
    """The model of a checkpoint directory or hub id, without the bars that libraries draw while loading."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from dllm.language_model import load

    return load(checkpoint, device=_known_device(device) if device else None)


def _known_device(name: str):
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; allowed: cpu, cuda, cuda:1, mps") from None
    is_there = {"cpu": lambda: True, "mps": torch.backends.mps.is_available}
    is_there["cuda"] = lambda: torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if not is_there.get(device.type, lambda: False)():
        raise ValueError(f"--device {name}: there is none on this machine; leave --device out")
    return device
