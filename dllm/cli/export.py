"""`dllm export`: a checkpoint as a directory that other tools load."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a checkpoint as other tools load it, with a card that says where it comes from"
EXAMPLES = """examples:
  dllm export chat-large                     classes of transformers: results/*/exports/chat-large-transformers
  dllm export chat-llada --format published  names and config.json as LLaDA was published, for SGLang and vLLM
  dllm export ./my-model --output ./out      any checkpoint directory, into a directory of your choice

Nothing of dllm is needed to load what is written. README.md is its card, with the runs, data, licences and scores that
are on record."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", metavar="RUN", help="run below results/, or model directory")
    add_format_argument(parser)
    parser.add_argument(
        "--output", metavar="DIR", help="where to write (default: exports/ in the run's work directory)"
    )


def add_format_argument(parser: argparse.ArgumentParser) -> None:
    """`--format`."""
    parser.add_argument(
        "--format",
        default="transformers",
        metavar="NAME",
        help="transformers (default): stock classes; published: the layout of the family that it was trained from, "
        "which SGLang and vLLM read",
    )


def run(args: argparse.Namespace) -> int:
    """Write the directory and say where it is."""
    print(exported(args.model, args.format, args.output))
    return 0


def exported(model: str, kind: str, output: str | Path | None = None) -> Path:
    """Export the checkpoint that a name means, without the bars that libraries draw; returns the directory."""
    from dllm.chat.settings import find_checkpoint

    checkpoint = find_checkpoint(model)
    if not Path(checkpoint).is_dir():
        raise ValueError(f"{model}: not on this disk; fetch it first (`hf download {model} --local-dir DIR`)")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from dllm.exporting.export import export

    return export(checkpoint, kind, output)
