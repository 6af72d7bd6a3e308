"""`dllm check`: whether what a configuration takes from the hub is there and fits, before it is fetched."""

from __future__ import annotations

import argparse
from pathlib import Path

from dllm.cli.plan import add_project_arguments, config_directory
from dllm.numbers import bar_options

HELP = "look at every pinned model, dataset and benchmark, and compare it with its entry"
EXAMPLES = """examples:
  dllm check config/paper.yaml                 all that the full reproduction takes from the hub; about a minute
  dllm check config/small.yaml my-overlay.yaml with an overlay on top
  dllm check config/paper.yaml --only alpaca   one of them (may be repeated)
  dllm check config/paper.yaml --offline       what is downloaded already, file by file; needs no network

It reads file lists, cards, config.json, tokenizers and the first rows of the data, some megabytes of each repository
and no weights, and loads every task of lm-eval on those rows. A table has a line for each pin, with its commit, size,
rows and licence; a line for each thing that is wrong follows, and the exit status is then 2. A newer commit is shown;
it is another experiment, so read on the hub's page what changed before you write it into `revision`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_project_arguments(parser)
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help="only this entry (may be repeated)")
    parser.add_argument("--offline", action="store_true", help="check what is downloaded in the work directory")
    parser.add_argument("--workdir", metavar="DIR", help="with --offline: another one than that of CONFIG")


def run(args: argparse.Namespace) -> int:
    """Print the table and what is wrong."""
    import tempfile

    from dllm.checking.check import Checked, check, name_of, pins_of, with_their_data
    from dllm.config import did_you_mean, load_project, rehearsed

    if args.workdir and not args.offline:
        raise ValueError("--workdir is for --offline: without it, nothing of a work directory is read")
    directory = config_directory(args.config_directory, args.configs[0])
    project = load_project(directory, *args.configs)
    workdir = (Path(args.workdir) if args.workdir else project.root / rehearsed(project).workdir).resolve()
    pins = pins_of(project, offline=args.offline)
    names = [name_of(pin) for pin in pins]
    for name in args.only:
        if name not in names:
            raise ValueError(f"--only {name}: nothing of this name is pinned here. {did_you_mean(name, sorted(names))}")
    pins = with_their_data(pins, args.only)
    found: list[Checked] = []
    with tempfile.TemporaryDirectory(prefix="dllm-check-") as scratch, _progress(len(pins)) as bar:
        for one in check(project, pins, Path(scratch).resolve(), workdir if args.offline else None):
            found.append(one)
            bar.set_postfix_str(one.name)
            bar.update()
    order = [name_of(pin) for pin in pins]
    found.sort(key=lambda one: order.index(one.name))
    _print([("kind", "name", "repository", "commit", "size", "rows", "licence", "result"), *(x.cells() for x in found)])
    wrong = [f"{one.name} ({one.repository}): {error}" for one in found for error in one.errors]
    absent = [one.name for one in found if one.absent]
    if absent:
        wrong.append(f"not downloaded below {workdir}: {', '.join(absent)}; the workflow fetches them")
    if wrong:
        print("\n".join(["", *wrong]))
        broken = sum(bool(one.errors or one.absent) for one in found)
        raise ValueError(f"{broken} of {len(pins)} do not work; the lines above say why")
    return 0


def _progress(total: int):
    from tqdm import tqdm

    return tqdm(total=total, desc="check", leave=False, disable=None, **bar_options(rate=""))


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
