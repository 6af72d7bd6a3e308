"""`dllm prepare`: tokenize, split and pack a dataset."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "tokenize, split and pack a dataset into token files"
EXAMPLES = """examples:
  dllm prepare configs/data/alpaca--world--96.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="resolved data config, written by the workflow below configs/data/")
    parser.add_argument("--workdir", default=".", help="work directory that holds downloads/ and data/ (default: here)")


def run(args: argparse.Namespace) -> int:
    """Prepare and print the row and token counts."""
    from tqdm import tqdm

    from dllm.config import PrepareConfig, read_config
    from dllm.data.prepare import prepare
    from dllm.provenance import file_lock

    config = read_config(args.config, PrepareConfig)

    def progress(rows, text):
        return tqdm(rows, desc=text, unit="row", mininterval=1.0, dynamic_ncols=True, disable=None)

    with file_lock(Path(args.workdir) / ".work" / "locks" / f"prepare-{config.name}"):
        manifest = prepare(config, args.workdir, progress)
    for source in manifest["sources"]:
        if source.get("read_as"):
            print(f"{source['name']}: {source['read_as']}")
    if "unusable" in manifest:
        print(f"{config.name}: {manifest['unusable']['rows']:,} unusable rows, e.g. {manifest['unusable']['first']}")
    for split, counts in manifest["splits"].items():
        dropped = f", {counts['dropped_rows']:,} dropped" if counts["dropped_rows"] else ""
        about = "about " if counts.get("estimated") else ""
        dropped += ", streamed while training" if about else ""
        print(f"{config.name} {split}: {about}{counts['rows']:,} rows, {counts['tokens']:,} tokens{dropped}")
    return 0
