"""`dllm train`: one training run, described by its resolved config."""

from __future__ import annotations

import argparse

HELP = "train one run from its resolved config, resuming where it was interrupted"
EXAMPLES = """examples:
  accelerate launch --config_file config/accelerate/cpu.yaml -m dllm train configs/runs/chat-large.yaml
  dllm train configs/runs/chat-large.yaml --tracker tensorboard
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="resolved run config, written by the workflow below configs/runs/")
    parser.add_argument("--workdir", default=".", help="work directory that holds data/ and runs/ (default: here)")
    parser.add_argument("--tracker", choices=("tensorboard", "wandb"), help="also log to TensorBoard or W&B")
    parser.add_argument(
        "--replace", action="store_true", help="train again even if a run of this name is finished, and replace it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train to the end and say where the artifact is."""
    from dllm.config import RunConfig, read_config

    config = read_config(args.config, RunConfig)
    set_up_torch()
    from dllm.training.trainer import train

    path = train(config, args.workdir, tracker=args.tracker, quiet=args.quiet, replace=args.replace)
    print(f"{config.name}: {path}")
    return 0


def set_up_torch() -> None:
    """As many threads as the environment says, deterministic kernels, and no bars and warnings of other packages."""
    import logging
    import os

    import torch
    import transformers

    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every checkpoint
