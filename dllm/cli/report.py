"""`dllm report`: tables, figures, claims and the page, from a finished work directory."""

from __future__ import annotations

import argparse

HELP = "build tables, figures, claims, page or leaderboard from finished runs"
EXAMPLES = """examples:
  cd results/laptop && dllm report tables configs/report.yaml
      tables/, from the runs and scores that are there
  dllm report page results/laptop/configs/report.yaml --workdir results/laptop
      report/index.html and report.md, after tables, figures and claims
  dllm report leaderboard results/leaderboard/configs/report.yaml --workdir results/leaderboard
      the leaderboard of what is scored so far; empty cells say what they would take
"""
PARTS = ("tables", "figures", "claims", "page", "leaderboard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("part", choices=PARTS, help="what to build")
    parser.add_argument("config", metavar="CONFIG", help="report plan, written by the workflow as configs/report.yaml")
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="work directory with runs/ and evals/ (default: here)"
    )


def run(args: argparse.Namespace) -> int:
    """Build one part and print the paths written."""
    from importlib import import_module
    from pathlib import Path

    from dllm.config import read_config
    from dllm.report.plan import ReportPlan

    plan = read_config(args.config, ReportPlan)
    workdir = Path(args.workdir)
    report = workdir / "report"
    builder = getattr(import_module(f"dllm.report.{args.part}"), f"build_{args.part}")
    target = {"claims": workdir / "claims.json", "page": report, "leaderboard": report}.get(
        args.part, workdir / args.part
    )
    for path in builder(workdir, plan, target):
        print(path)
    return 0
