"""`dllm download`: fetch a pinned model or dataset, or make the laptop's stand-in."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "fetch a pinned model or dataset, verified (or make the laptop's stand-in)"
EXAMPLES = """examples:
  dllm download configs/downloads/pocket-world.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="resolved download config, written by the workflow below configs/downloads/")
    parser.add_argument("--workdir", default=".", help="work directory that holds downloads/ (default: here)")


def run(args: argparse.Namespace) -> int:
    """Download and say where it is."""
    from dllm.config import DownloadConfig, read_config
    from dllm.data.download import download
    from dllm.provenance import alone

    config = read_config(args.config, DownloadConfig)
    licence = config.dataset.licence if config.dataset else None
    if licence:
        print(f"{config.name}: licence {licence}")
    with alone(Path(args.workdir) / ".work" / "locks" / f"download-{config.name}"):
        print(f"{config.name}: {download(config, args.workdir)}")
    return 0
