"""`dllm prepare`: tokenize, split and pack a dataset."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "tokenize, split and pack a dataset into token files"
EXAMPLES = """examples:
  cd results/laptop && dllm prepare configs/data/alpaca--world--96.yaml
      what the workflow runs; the rows are below data/ there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "config", metavar="CONFIG", help="resolved data config, written by the workflow below configs/data/"
    )
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="work directory that holds downloads/ and data/ (default: here)"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that tokenize (default: one for each core it may use)"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare and print the row and token counts."""
    from dllm.cli.progress import ProgressLine
    from dllm.config import PrepareConfig, read_config
    from dllm.data.prepare import prepare
    from dllm.provenance import cores, file_lock

    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes = {args.processes} is not a number of processes; allowed: 1 or more")
    config = read_config(args.config, PrepareConfig)
    with file_lock(Path(args.workdir) / ".work" / "locks" / f"prepare-{config.name}"):
        manifest = prepare(config, args.workdir, ProgressLine(config.name, "row"), args.processes or cores())
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
