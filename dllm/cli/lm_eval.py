"""`dllm lm-eval`: lm-eval's own command, which here knows the model `dllm`."""

from __future__ import annotations

import argparse

HELP = "lm-eval's own command, which here knows `--model dllm`"
EXAMPLES = """examples:
  dllm lm-eval --model dllm --model_args pretrained=results/laptop/runs/chat-large/model --tasks lambada_openai
      any task of lm-eval, scored by the rules of `dllm evaluate`
  dllm lm-eval --model dllm --model_args pretrained=./my-bert,likelihood.budget=32,generation.steps=64 \\
      --tasks gsm8k --apply_chat_template --output_path scores
      estimator and sampler by the names that they have in a configuration
  dllm lm-eval run --help
      everything that lm-eval takes; `--model hf` and its other models are there, too"""
PASSES_ON = True
"""The arguments are another program's: they are not looked at here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments are lm-eval's."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="what lm-eval takes")


def run(args: argparse.Namespace) -> int:
    """Run lm-eval with the arguments as they are. Returns its exit status."""
    from dllm.evaluation.harness import run_lm_eval

    return run_lm_eval(args.arguments)
