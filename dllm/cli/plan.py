"""`dllm plan`: what a configuration will cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "predict tokens, FLOPs, time, memory and disk of every job"
EXAMPLES = """examples:
  dllm plan config/paper.yaml                        the full reproduction, rule by rule
  dllm plan config/paper.yaml --hardware h100 -v     on other machines, job by job
  dllm plan config/laptop.yaml my-overlay.yaml       with an overlay on top
  dllm plan config/paper.yaml config/smoke.yaml      its rehearsal, and how much that downloads
  dllm plan config/laptop.yaml --json                for programs

If a job has already run (below the configuration's workdir), its measured time, memory and passes are shown next to
the prediction; `ratio` is predicted / measured. The workflow asks a cluster for these predictions plus a margin."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_project_arguments(parser)
    parser.add_argument(
        "--hardware", metavar="NAME", help="plan GPU jobs for h200, h100, a100-80gb, a100-40gb, rtx-4090, cpu"
    )
    parser.add_argument("--utilisation", metavar="SHARE", type=float, help="share of the peak that training reaches")
    parser.add_argument("--workdir", metavar="DIR", help="work directory of finished jobs (default: that of CONFIG)")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every job")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from dllm.config import load_project, rehearsed
    from dllm.planning import show
    from dllm.planning.measured import measure
    from dllm.planning.project import plan_project
    from dllm.planning.rehearsal import forecast

    directory = config_directory(args.config_directory, args.configs[0])
    whole = load_project(directory, *args.configs)
    project = rehearsed(whole)
    workdir = Path(args.workdir) if args.workdir else directory.parent / project.workdir
    plan = plan_project(project, workdir, on=args.hardware, utilisation=args.utilisation)
    measured = measure(plan, workdir)
    if args.json:
        print(json.dumps(show.as_json(plan, measured), indent=1))
    else:
        print(show.text(plan, measured, verbose=args.verbose, title=" + ".join(map(str, args.configs))))
        if project.rehearsal:
            full = plan_project(whole, workdir, on=args.hardware, utilisation=args.utilisation)
            print(f"\n{forecast(plan, full)}")
    return 0


def add_project_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a project: its overlays, and the directory of the entries below them."""
    parser.add_argument(
        "configs", metavar="CONFIG", nargs="+", help="overlays on the entries of config/*.yaml, in order"
    )
    parser.add_argument(
        "--config-directory",
        metavar="DIR",
        help="the directory of models.yaml and the other entries (default: that of the first CONFIG, or ./config)",
    )


def config_directory(stated: str | None, first: str) -> Path:
    """The directory of the entries. Raises ValueError, one line, if models.yaml is nowhere to be found."""
    places = [Path(stated)] if stated else [Path(first).parent, Path("config")]
    for place in places:
        if (place / "models.yaml").is_file():
            return place
    tried = " or ".join(str(place) for place in places)
    raise ValueError(f"{tried}: no models.yaml there; run in the repository root, or give --config-directory")
