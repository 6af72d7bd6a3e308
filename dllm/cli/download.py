"""`dllm download`: fetch a pinned model or dataset, or make the laptop's stand-in."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "fetch a pinned model or dataset, verified (or make the laptop's stand-in)"
EXAMPLES = """examples:
  cd results/laptop && dllm download configs/downloads/pocket-world.yaml
      what the workflow runs; the record is downloads/pocket-world.json there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "config", metavar="CONFIG", help="resolved download config, written by the workflow below configs/downloads/"
    )
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="work directory that holds downloads/ (default: here)"
    )


def run(args: argparse.Namespace) -> int:
    """Download and say where it is."""
    from dllm.config import DownloadConfig, read_config
    from dllm.data.download import download, store_of
    from dllm.provenance import file_lock

    config = read_config(args.config, DownloadConfig)
    stated = config.dataset.licence if config.dataset else None
    if stated:
        print(f"{config.name}: licence {stated}", flush=True)
    with file_lock(Path(args.workdir) / ".work" / "locks" / f"download-{config.name}"):
        path = download(config, args.workdir, store_of(args.workdir))
    manifest = path / "manifest.json"
    facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if facts.get("licence") and not stated:
        print(f"{config.name}: licence {facts['licence']}, as its card states it")
    if facts.get("head"):
        print(f"{config.name}: {facts['head']}")
    print(f"{config.name}: {path}")
    return 0
