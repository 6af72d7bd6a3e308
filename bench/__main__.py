"""Run the benchmark: `python -m bench` for all of it, `python -m bench NAME ...` for some cases."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from bench.cases import CASES
from bench.options import Options

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_RESULTS = Path(__file__).resolve().parent / ".work" / "quick"


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases, write their results and the page. 0 even where a target is missed, 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases to run; all by default (see --list)")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--quick", action="store_true", help="a smoke run of tiny sizes; its numbers mean nothing")
    parser.add_argument("--page", action="store_true", help="only draw the page again, from the existing results")
    parser.add_argument(
        "--workdir", type=Path, help="the directory of the laptop run (default: results/laptop, made if needed)"
    )
    parser.add_argument(
        "--out", type=Path, help="results directory (default: bench/results; of a smoke run bench/.work)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: as PyTorch chooses)")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:<12} {case.title}" for name, case in CASES.items()))
        return 0
    if unknown := [name for name in given.names if name not in CASES]:
        print(f"{unknown[0]!r} is not a case of the benchmark; allowed: {', '.join(CASES)}", file=sys.stderr)
        return 2
    out = given.out or (QUICK_RESULTS if given.quick else RESULTS)
    failed = [] if given.page else _run(given.names or list(CASES), Options(out, given.workdir, given.quick), given)
    from bench.page import build, summary

    page = build(out)
    print(summary(out))
    print(f"The page: {page}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(names: list[str], options: Options, given: argparse.Namespace) -> list[str]:
    """Run the cases in turn; returns those that failed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    from bench.measure import say, write_result

    logging.disable_progress_bar()
    if given.threads:
        torch.set_num_threads(given.threads)
    failed, began = [], time.perf_counter()
    for number, name in enumerate(names, 1):
        case = CASES[name]
        say(f"[{number}/{len(names)}] {case.title} ({name})")
        module, function = case.function.split(":")
        start = time.perf_counter()
        try:
            result = getattr(import_module(module), function)(options)
        except Exception as error:  # one case that breaks must not cost the others their minutes; it is reported
            say(f"    {error}" if isinstance(error, ValueError) else traceback.format_exc())
            failed.append(name)
            continue
        seconds = time.perf_counter() - start
        write_result(options.out / f"{name}.json", name, case.title, result, seconds, quick=options.quick)
        for row in result.rows:
            say(f"    {row.ratio:8.2f} x [{row.low:.2f}, {row.high:.2f}]  {row.name}  {row.verdict}")
        say(f"    {result.skipped or 'done'} ({seconds:.0f} s, {time.perf_counter() - began:.0f} s so far)")
    return failed


if __name__ == "__main__":
    sys.exit(main())
