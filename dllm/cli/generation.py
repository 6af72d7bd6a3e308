"""What `dllm chat` and `dllm sample` have in common: a checkpoint by name, and the sampler's options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.choices import REMASKING, REVEAL_RULES, parallel_rules

if TYPE_CHECKING:
    from dllm.config import GenerateSettings
    from dllm.language_model import DiffusionLM

RULES = parallel_rules()
"""Reveal rules with an option of their name, which concerns no other rule."""


def _either(names: Iterable[str]) -> str:
    """Names in a sentence."""
    *first, last = sorted(names, key=[*REVEAL_RULES].index)
    return f"{', '.join(first)} or {last}"


Options = dict[str, tuple[str, type, str, str]]
"""Option of the command line -> setting, type, placeholder, help."""

OPTIONS: Options = {
    "new_tokens": ("max_new_tokens", int, "N", "longest answer, in tokens"),
    "steps": ("steps", int, "N", "forward passes per answer (default: one per token)"),
    "block_size": ("block_size", int, "N", "tokens per block; blocks go from left to right"),
    "temperature": ("temperature", float, "T", "0 takes the most probable token (default)"),
    "top_p": ("top_p", float, "P", "draw from the smallest set with this probability"),
    "reveal_rule": (
        *("reveal_rule", str, "RULE"),
        f"which masked positions are revealed first: {_either(set(REVEAL_RULES) - set(RULES))}; or {_either(RULES)}, "
        "which reveal all that are sure enough, in fewer passes (default: confidence)",
    ),
    "threshold": ("threshold", float, "P", "rule threshold: reveal all that are at least so probable (default: 0.9)"),
    "factor": ("factor", float, "F", "rule factor: larger reveals more at once (default: 1)"),
    "entropy_bound": ("entropy_bound", float, "H", "rule entropy_bound: larger reveals more (default: 0.1 nats)"),
    "remask": (
        *("remask", str, "WAY"),
        f"mask some revealed tokens again: {', '.join(REMASKING)}; --steps may then exceed the masks (default: none)",
    ),
    "remask_share": ("remask_share", float, "ETA", "how many of them (default: 0.1)"),
    "edit_threshold": ("edit_threshold", float, "P", "replace a revealed token by another one that is likelier than P"),
    "reuse": (
        "reuse",
        str,
        "KIND",
        "approximation: prefix or dual keep what was computed left of, or around, the active block",
    ),
    "refresh": ("refresh", int, "N", "passes between refreshes of what is reused (default: once per block)"),
    "seed": ("seed", int, "N", "seed of the draws at a temperature above 0 (default: 0)"),
}
"""The settings are those of GenerateSettings."""


def add_options(group: argparse._ActionsContainer, options: Options) -> None:
    """Every option of a table; one that is not given keeps its default."""
    for name, (_, kind, metavar, text) in options.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The sampler's options."""
    add_options(parser.add_argument_group("sampler"), OPTIONS)


def add_chat_model_argument(parser: argparse.ArgumentParser, name: str, nargs: str) -> None:
    """MODEL, which may be left out: one (nargs "?") or several ("*") of what `chat.settings.find_checkpoint` takes."""
    words = "run below results/, model directory or hub id (default: largest chat run)"
    parser.add_argument(name, nargs=nargs, metavar="MODEL", help=words)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: an accelerator if there is one)")


def with_options(settings: GenerateSettings, args: argparse.Namespace, sidecar: dict | None = None) -> GenerateSettings:
    """The settings, changed by the command line; sidecar: the record of the checkpoint's training, if it is known.

    Raises ValueError, one line, for a value out of range and for blocks that the checkpoint does not have.
    """
    from pydantic import ValidationError

    from dllm.chat.session import check_block, check_steps

    fields = {name: field for name, (field, *_) in OPTIONS.items()}
    given = {field: getattr(args, name) for name, field in fields.items() if getattr(args, name) is not None}
    try:
        settings = type(settings).model_validate(settings.model_dump() | given)
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:
            raise ValueError(wrong["msg"].removeprefix("Value error, ")) from None
        option = next((name for name, field in fields.items() if field == wrong["loc"][0]), str(wrong["loc"][0]))
        raise ValueError(f"--{option.replace('_', '-')} {wrong['input']}: {wrong['msg'].lower()}") from None
    for rule in RULES:
        if rule in given and settings.reveal_rule != rule:
            raise ValueError(
                f"--{rule.replace('_', '-')} {given[rule]:g} is for --reveal-rule {rule}, not {settings.reveal_rule}; "
                "give both or neither"
            )
    if args.block_size is not None:
        check_block(args.block_size, sidecar or {}, f"--block-size {args.block_size}")
    check_steps(settings)
    return settings


def open_recorded(workdir: str | Path, checkpoint: str, device: str | None) -> DiffusionLM:
    """The model of a checkpoint in a work directory. Raises ValueError, one line, if it is gone."""
    from dllm.provenance import how_to_make

    path = Path(workdir) / checkpoint
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no checkpoint there, {how_to_make(path)}")
    return open_model(str(path), device)


def open_model(checkpoint: str, device: str | None) -> DiffusionLM:
    """The model of a checkpoint directory or hub id, without the bars that libraries draw while loading."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from dllm.core.devices import known_device
    from dllm.language_model import load

    return load(checkpoint, device=None if device is None else known_device(device))
