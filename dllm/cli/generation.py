"""What `dllm chat` and `dllm sample` have in common: a checkpoint by name, and the sampler's options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
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
    "threshold": "threshold",
    "factor": "factor",
    "entropy_bound": "entropy_bound",
    "reuse": "reuse",
    "refresh": "refresh",
    "seed": "seed",
}
"""Option of the command line -> field of GenerateSettings."""

RULES = {"threshold": "threshold", "factor": "factor", "entropy_bound": "entropy_bound"}
"""Option that concerns one reveal rule only -> that rule."""


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
        choices=("confidence", "entropy", "margin", "random", "threshold", "factor", "entropy_bound"),
        help="which masked positions are revealed first (default: confidence); the last three reveal all that are "
        "sure enough, in fewer passes",
    )
    group.add_argument("--threshold", type=float, metavar="P", help="rule threshold: sure from here on (default: 0.9)")
    group.add_argument(
        "--factor", type=float, metavar="F", help="rule factor: larger reveals more at once (default: 1)"
    )
    group.add_argument(
        "--entropy-bound", type=float, metavar="H", help="rule entropy_bound: larger reveals more (default: 0.1 nats)"
    )
    group.add_argument(
        "--reuse",
        choices=("none", "prefix", "dual"),
        help="approximation: between refreshes, keep what was computed left of the active block, or on both sides",
    )
    group.add_argument("--refresh", type=int, metavar="N", help="passes between refreshes (default: once per block)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of the draws at a temperature above 0 (default: 0)")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: an accelerator if there is one)")


def with_options(settings: GenerateSettings, args: argparse.Namespace, sidecar: dict | None = None) -> GenerateSettings:
    """The settings with what the command line says; sidecar: what is noted of the checkpoint, where it is known.

    Raises ValueError, one line, for a value out of range and for blocks that the checkpoint does not have.
    """
    from pydantic import ValidationError

    from dllm.chat.session import check_block, check_steps

    given = {field: getattr(args, name) for name, field in OPTIONS.items() if getattr(args, name) is not None}
    try:
        settings = type(settings).model_validate(settings.model_dump() | given)
    except ValidationError as fault:
        error = fault.errors()[0]
        if not error["loc"]:
            raise ValueError(error["msg"].removeprefix("Value error, ")) from None
        option = next((name for name, field in OPTIONS.items() if field == error["loc"][0]), str(error["loc"][0]))
        raise ValueError(f"--{option.replace('_', '-')} {error['input']}: {error['msg'].lower()}") from None
    for name, rule in RULES.items():
        if name in given and settings.reveal_rule != rule:
            raise ValueError(
                f"--{name.replace('_', '-')} {given[name]:g} is for --reveal-rule {rule}, not {settings.reveal_rule}; "
                "give both or neither"
            )
    if args.block_size is not None:
        check_block(args.block_size, sidecar or {}, f"--block-size {args.block_size}")
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
    is_there: dict[str, Callable[[], bool]] = {"cpu": lambda: True, "mps": torch.backends.mps.is_available}
    is_there["cuda"] = lambda: torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if not is_there.get(device.type, lambda: False)():
        raise ValueError(f"--device {name}: there is none on this machine; leave --device out")
    return device
