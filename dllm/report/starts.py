"""Runs that differ in the weights they start from: how low each ends, and the bound against the size."""

import math
from pathlib import Path

import pandas as pd

from dllm.report.load import final_answer_nats, final_losses, read_metrics, read_provenance, split_of
from dllm.report.plan import ReportPlan
from dllm.report.statistics import Estimate


def starts_frame(workdir: Path, plan: ReportPlan, name: str = "") -> pd.DataFrame:
    """One row per start: `final_losses`, parameters, and the bound on a held-out answer in nats with its interval.

    `passed` is the first evaluated step at which it is as low as its twin of random weights ends; missing without one.
    """
    frame = final_losses(workdir, plan.starts)
    curves = {run: split_of(read_metrics(workdir, run), "eval") for run in frame["run"]}
    nats = [final_answer_nats(read_metrics(workdir, run)) or Estimate(math.nan, math.nan) for run in frame["run"]]
    ends = {start.twin: curves[start.run]["loss"].iloc[-1] for start in plan.starts if start.twin}
    passed = {run: curves[run].loc[curves[run]["loss"] <= end, "step"].min() for run, end in ends.items()}
    return frame.assign(
        start=["pretrained" if start.pretrained else "random" for start in plan.starts],
        parameters=[read_provenance(workdir, run)["parameters"] for run in frame["run"]],
        nats=[bound.value for bound in nats],
        nats_standard_error=[bound.standard_error for bound in nats],
        nats_low=[bound.low for bound in nats],
        nats_high=[bound.high for bound in nats],
        passed=frame["run"].map(passed),
    )
