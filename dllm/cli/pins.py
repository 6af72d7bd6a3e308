"""`dllm pins`: the commit of every hub repository that the configuration uses."""

from __future__ import annotations

import argparse

HELP = "show the pinned commit of every model and dataset, or ask the hub for newer ones"
EXAMPLES = """examples:
  dllm pins                                  every pin of config/*.yaml; needs no network
  dllm pins config/mine.yaml                 with an overlay on top
  dllm pins --only alpaca --only tulu        two of them
  dllm pins --refresh                        ask the hub for the newest commits, and change nothing
  dllm pins --refresh --write --only alpaca  and replace the old commit in its file

A newer commit is another experiment: read on the hub's page what changed before you use --write. If a repository does
not answer, its line says why, the others are still asked, and the exit status is 2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("configs", metavar="CONFIG", nargs="*", help="overlays on the entries of config/*.yaml")
    parser.add_argument(
        "--config-directory",
        metavar="DIR",
        help="directory of models.yaml and the other entries (default: ./config)",
    )
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help="only this entry (may be repeated)")
    parser.add_argument("--refresh", action="store_true", help="ask the hub for the newest commit of each")
    parser.add_argument("--write", action="store_true", help="with --refresh: write the newest commits into the files")


def run(args: argparse.Namespace) -> int:
    """Print the pins; with --refresh, beside the newest commits."""
    from dllm.cli.plan import config_directory
    from dllm.config import did_you_mean
    from dllm.data.pins import read_pins

    if args.write and not args.refresh:
        raise ValueError("--write needs --refresh, which asks for the new commits")
    directory = config_directory(args.config_directory, args.configs[0] if args.configs else "config/models.yaml")
    pins = read_pins(directory, args.configs)
    names = {pin.name for pin in pins}
    for name in args.only:
        if name not in names:
            raise ValueError(f"--only {name}: not an entry from the hub. {did_you_mean(name, sorted(names))}")
    pins = [pin for pin in pins if not args.only or pin.name in args.only]
    if args.refresh:
        return _refresh(pins, write=args.write)
    rows = [(pin.kind, pin.name, pin.repository, pin.commit or "not pinned", pin.licence) for pin in pins]
    _print([("kind", "name", "repository", "commit", "licence"), *rows])
    return 0


def _refresh(pins: list, *, write: bool) -> int:
    """Ask for each pin's newest commit and print old and new, a line at a time."""
    from dllm.data.hub import HubUnreachable
    from dllm.data.pins import newest, write_pin

    failed = changed = 0
    for pin in pins:
        label = f"{pin.kind:<9} {pin.name:<22} {pin.repository:<40}"
        if pin.kind == "benchmark":
            print(f"{label} not pinned: lm-eval fetches it; give it a `dataset`")
            continue
        try:
            commit = newest(pin)
        except HubUnreachable:
            raise
        except ValueError as error:
            failed += 1
            print(f"{label} {error}")
            continue
        if commit == pin.commit:
            print(f"{label} {commit} is the newest", flush=True)
            continue
        changed += 1
        if write:
            write_pin(pin, commit)
        print(f"{label} {pin.commit or 'not pinned'} -> {commit}{f'  ({pin.file})' if write else ''}", flush=True)
    done = "written" if write else "newer; --write puts them into the files"
    print(f"{changed} of {len(pins)} {done}")
    if failed:
        raise ValueError(f"{failed} of {len(pins)} repositories did not answer; the lines above say why")
    return 0


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
