"""`dllm tune`: from an encoder and a file of conversations to a model that chats."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.choices import ROW_KINDS
from dllm.cli.generation import Options, add_options

if TYPE_CHECKING:
    from dllm.tuning.follow import Example, Tuning, Wishes

HELP = "make a chatbot of a model and a file of conversations"
EXAMPLES = """examples:
  dllm tune answerdotai/ModernBERT-base chats.jsonl
      a model of the hub and a file of your own; the result is below results/chat-modernbert-base
  dllm tune ./my-bert questions.csv more.parquet --output results/mine
      a checkpoint on this disk and two files, which may be of different kinds
  dllm tune google/bert_uncased_L-4_H-512_A-8 tatsu-lab/alpaca --epochs 2
      a dataset of the hub
  dllm tune Qwen/Qwen2.5-0.5B chats.jsonl --prediction next
      an autoregressive model becomes a diffusion model
  dllm tune ./my-bert notes.txt --steps 500
      plain text: the model learns to continue it
  dllm tune ./my-bert chats.jsonl --show-config > config/mine.yaml
      the same as entries of the workflow, to be changed: snakemake -c1 --configfile config/mine.yaml

Files: jsonl, json, parquet, csv, tsv and txt, also as .gz. Columns that are known: messages (role, content),
conversations (from, value), instruction/input/output, prompt or question with response or answer, text.
Ctrl-C saves; the same command goes on from there. What is learnt, and how, is chosen by the size of model and data.
"""

RUN_OPTIONS: Options = {
    "length": ("length", int, "N", "longest row, in tokens (default: where few rows are cut)"),
    "epochs": ("epochs", float, "N", "passes over the data (default: by the number of rows)"),
    "steps": ("steps", int, "N", "optimiser steps, in place of --epochs"),
    "batch_size": ("global_batch_size", int, "N", "rows per step (default: by the number of rows)"),
    "learning_rate": ("learning_rate", float, "R", "peak learning rate of AdamW (default: by the size of the model)"),
    "seed": ("seed", int, "N", "seed of order and noise (default: 42)"),
}
"""The settings are those of the run."""

DATA_OPTIONS: Options = {
    "kind": (
        "kind",
        str,
        "KIND",
        "how rows are read: messages, preference, sharegpt, alpaca, pairs, text (default: by the columns)",
    ),
    "subset": ("config", str, "NAME", "configuration of a hub dataset"),
    "rows": ("rows", int, "N", "train on so many rows only, of each dataset"),
    "held_out": ("test_share", float, "SHARE", "share of the rows that is held out (default: 0.05, at least 8 rows)"),
}
"""The settings are those of the dataset."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="hub id, directory of a checkpoint, or name of a model entry")
    parser.add_argument("data", metavar="DATA", nargs="+", help="files, patterns, directories or hub datasets")
    parser.add_argument("--output", metavar="DIR", help="where everything is written (default: results/chat-MODEL)")
    parser.add_argument("--algorithm", metavar="NAME", default="mdlm", help="mdlm (default), bd3lm, edit_flows")
    parser.add_argument("--prediction", metavar="KIND", choices=("in_place", "next"), help="`next` for causal models")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens per block of an answer (default: 16 or 32)")
    add_options(parser, {**RUN_OPTIONS, **DATA_OPTIONS})
    parser.add_argument("--show-config", action="store_true", help="print the entries that say the same, and stop")
    parser.add_argument("--replace", action="store_true", help="replace a finished run in the same place")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Tune, show some answers, and say how to chat; 130 if it was interrupted and saved."""
    for name in ("length", "epochs", "batch_size", "learning_rate", "block_size"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.kind is not None and args.kind not in (kinds := ("auto", *ROW_KINDS)):
        raise ValueError(f"--kind {args.kind!r}: allowed: {', '.join(kinds)}")
    wishes = _wishes(args)
    from dllm.cli.train import set_up_torch

    set_up_torch()
    from dllm.cli.progress import ProgressLine
    from dllm.config import yaml_text
    from dllm.tuning import follow

    say = _to_stderr if args.show_config else _to_stdout
    try:
        tuning = follow.set_up(wishes, say)
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from None
    if args.show_config:
        print("# on top of config/*.yaml: snakemake -c1 --configfile THIS_FILE")
        print(yaml_text(tuning.overlay), end="")
        return 0
    _say_plan(tuning, say)
    try:
        progress = (lambda done, total: None) if args.quiet else ProgressLine("prepare", "row")
        target = follow.follow(tuning, say, progress, quiet=args.quiet, replace=args.replace)
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from None
    except follow.Interrupted:
        step = follow.saved_step(tuning)
        print(f"\nstopped and saved{f' after step {step}' if step else ''}; the same command goes on from there:")
        print(f"  dllm tune {shlex.join(sys.argv[2:])}")
        return 130
    first, last = follow.losses(target)
    say(
        f"\nheld-out loss {last['loss']:.2f} ± {1.96 * last['standard_error']:.2f} nats a token "
        f"({first['loss']:.2f} before training)"
    )
    _show(follow.examples(tuning))
    print(f"\nTalk to it:\n  dllm chat {shlex.quote(str(tuning.workdir))}")
    return 0


def _wishes(args: argparse.Namespace) -> Wishes:
    """The arguments by what they concern. Raises ValueError, one line, for two that exclude each other."""
    if args.steps is not None and args.epochs is not None:
        raise ValueError("--steps and --epochs both say how long to train; give one of them")
    from dllm.tuning.follow import Wishes

    return Wishes(
        model=args.model,
        data=tuple(args.data),
        output=Path(args.output) if args.output else None,
        algorithm=args.algorithm,
        prediction=args.prediction,
        run=_given(args, RUN_OPTIONS),
        dataset=_given(args, DATA_OPTIONS),
        block_size=args.block_size,
    )


def _given(args: argparse.Namespace, options: dict[str, tuple]) -> dict[str, Any]:
    """The settings that have a value on the command line."""
    values = {setting: getattr(args, name) for name, (setting, *_) in options.items()}
    return {setting: value for setting, value in values.items() if value is not None}


def _in_options(line: str) -> str:
    """An error line of the entries that were made of the options, with the option in place of the setting."""
    options = {setting: name.replace("_", "-") for name, (setting, *_) in {**RUN_OPTIONS, **DATA_OPTIONS}.items()}
    options |= {"block_size": "block-size", "algorithm": "algorithm"}
    found = re.match(r"(?:overlay: (?:runs|datasets|recipes)\.(?:[^ ]*: )?[^ ]*?)?\b(\w+) = ", line)
    if found and found[1] in options:
        return f"--{options[found[1]]} {line[found.end() :]}"

    def as_typed(named: re.Match) -> str:
        return f"--{options[named[1]]}{' ' + named[2] if named[2] else ''}" if named[1] in options else named[0]

    return re.sub(r"`(\w+)`(?: = ([\w.]+))?(?: of the (?:run|dataset))?", as_typed, line)


def _say_plan(tuning: Tuning, say) -> None:
    """How it will be trained."""
    config = tuning.config
    rows = f"{config.global_batch_size} rows"
    long = f"{config.steps} steps of {rows}" if config.steps else f"{config.epochs:g} epochs, {rows} a step"
    say(
        f"plan     {config.algorithm}, rows of up to {config.length} tokens, blocks of {config.recipe.block_size}; "
        f"{long}, AdamW at {config.optimizer.learning_rate:g}"
    )
    say(f"         everything is written below {tuning.workdir}; Ctrl-C saves")


def _show(examples: Sequence[Example]) -> None:
    for example in examples:
        print()
        for name, text in (("asked", example.prompt), ("reference", example.reference), ("model", example.answer)):
            short = " ".join(text.split())
            print(f"{name:<10}{short[:400]}{'...' if len(short) > 400 else ''}")


def _to_stdout(line: str) -> None:
    print(line, flush=True)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
