"""Where every number comes from: one row per run, evaluation, sample and timing."""

from pathlib import Path

import pandas as pd

from dllm.report.load import read_evaluation, read_provenance
from dllm.report.plan import ReportPlan

FIELDS = ("seed", "commit", "dirty", "config_digest", "data_digest", "hardware", "devices", "started", "wall_seconds")
FIELDS += ("tokens", "parameters")


def trace(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Columns `kind` (run or evaluation), `run`, `benchmark`, then what provenance holds; blank where it does not."""
    rows = [_row("run", run, "", read_provenance(workdir, run)) for run in plan.runs()]
    for row in plan.results:
        for benchmark in plan.scored(row):
            evaluation = read_evaluation(workdir, row.run, benchmark.name)
            found = dict(evaluation.get("provenance") or {})
            found.setdefault("wall_seconds", evaluation.get("wall_seconds"))
            rows.append(_row("evaluation", row.run, benchmark.name, found))
    return pd.DataFrame(rows, columns=["kind", "run", "benchmark", *FIELDS])


def _row(kind: str, run: str, benchmark: str, found: dict) -> dict:
    values = {field: found.get(field) for field in FIELDS}
    if isinstance(values["hardware"], dict):
        values["hardware"] = ", ".join(f"{value}" for value in values["hardware"].values())
    return {"kind": kind, "run": run, "benchmark": benchmark, **values}
