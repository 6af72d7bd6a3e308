"""Where every number comes from: one row per run, evaluation, sample and timing."""

from pathlib import Path

import pandas as pd

from dllm.report.load import read_evaluation, read_json, read_provenance, read_samples
from dllm.report.plan import ReportPlan

FIELDS = (
    *("seed", "commit", "dirty", "config_digest", "data_digest", "hardware", "device", "processes", "written"),
    *("wall_seconds", "tokens", "parameters"),
)


def trace(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Columns `kind` (run, evaluation, samples, speed), `run`, `benchmark`, then what provenance holds, or blank."""
    rows = [_row("run", run, "", read_provenance(workdir, run)) for run in plan.trained_runs()]
    for row in plan.results:
        for benchmark in plan.scored(row):
            evaluation = read_evaluation(workdir, row.run, benchmark.name)
            facts = dict(evaluation.get("provenance") or {})
            facts.setdefault("wall_seconds", evaluation.get("wall_seconds"))
            facts.setdefault("seed", (evaluation.get("scorer") or {}).get("seed"))
            facts.setdefault("data_digest", (evaluation.get("inputs") or {}).get("data"))
            rows.append(_row("evaluation", row.run, benchmark.name, facts))
    for run in plan.sample_names():
        rows.append(_row("samples", run, "", read_samples(workdir, run).get("provenance") or {}))
    if plan.speed:
        facts = read_json(workdir, f"speed/{plan.speed}.json", "speed").get("provenance") or {}
        rows.append(_row("speed", plan.speed, "", facts))
    return pd.DataFrame(rows, columns=["kind", "run", "benchmark", *FIELDS])


def _row(kind: str, run: str, benchmark: str, facts: dict) -> dict:
    values = {field: facts.get(field) for field in FIELDS}
    values["written"] = facts.get("written") or facts.get("started")
    return {"kind": kind, "run": run, "benchmark": benchmark, **values}
