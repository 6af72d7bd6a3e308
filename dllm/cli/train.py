"""`dllm train`: one training run, described by its resolved config."""

from __future__ import annotations

import argparse
from collections.abc import MutableMapping

HELP = "train one run from its resolved config, resuming where it was interrupted"
EXAMPLES = """examples:
  cd results/laptop && dllm train --replace configs/runs/chat-large.yaml
      one process; the run is below runs/ there
  dllm train results/laptop/configs/runs/chat-large.yaml --workdir results/laptop --tracker tensorboard
      the same from elsewhere, with curves for TensorBoard
  accelerate launch --config_file config/accelerate/ddp.yaml --num_processes 8 -m dllm train \\
      results/paper/configs/runs/chat-large.yaml --workdir results/paper
      a process for each of eight GPUs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "config", metavar="CONFIG", help="resolved run config, written by the workflow below configs/runs/"
    )
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="work directory that holds data/ and runs/ (default: here)"
    )
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
    """A number of threads that all packages can read, deterministic kernels, no bars and warnings of other packages."""
    import logging
    import os

    import torch
    import transformers

    check_threads(os.environ)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # 2 % of a step
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what its tables of weights say is an error line here
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, warns of the CPU
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every checkpoint


def check_threads(environment: MutableMapping[str, str]) -> None:
    """Leave one number in OMP_NUM_THREADS, the first of several: OpenMP takes lists, accelerate does not.

    Raises ValueError, one line, for anything that OpenMP would pass over.
    """
    stated = environment.get("OMP_NUM_THREADS", "")
    first = stated.split(",")[0].strip()
    if not stated.strip():
        environment.pop("OMP_NUM_THREADS", None)
    elif first.isdecimal() and int(first):
        environment["OMP_NUM_THREADS"] = str(int(first))
    else:
        raise ValueError(f"OMP_NUM_THREADS = {stated!r}; set it to a number of threads from 1 on, or unset it")
