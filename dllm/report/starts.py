"""Runs that differ in the weights they start from: how low each ends, the bound against the size, and two claims."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd

from dllm.report.format import fixed, signed_interval
from dllm.report.load import final_answer_nats, final_losses, read_metrics, read_provenance, split_of
from dllm.report.plan import ReportPlan
from dllm.report.statistics import Estimate, decide_below
from dllm.report.verdicts import Claim, ClaimRow, Finding, claim_of, unless_truncated


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


def pretraining_claim(starts: pd.DataFrame, plan: ReportPlan) -> Claim:
    """Of what a run starts from: does the pretrained start end lower than random weights of the same architecture?"""
    rows = {row["run"]: row for _, row in starts.iterrows()}
    findings = []
    for start in (start for start in plan.starts if start.twin):
        pretrained, random = rows[start.twin], rows[start.run]
        finding = _lower(pretrained, random)
        if not math.isnan(pretrained["passed"]):
            step, last = int(pretrained["passed"]), int(random["steps"])
            finding = replace(
                finding, because=f"{finding.because} It reaches the other's final loss at step {step} of {last}."
            )
        findings.append(unless_truncated(finding, pd.DataFrame([pretrained, random])))
    return claim_of(
        "Pretrained weights give a chatbot a lower held-out bound than random weights of the same architecture.",
        f"{_LOWER_RULE} Both had the same data, steps and noise.",
        findings,
        _ONE_SEED,
    )


def size_claim(starts: pd.DataFrame, plan: ReportPlan) -> Claim:
    """Of pretrained starts with as many steps: has each next larger one a lower bound?"""
    pretrained = starts[starts["start"] == "pretrained"].sort_values("parameters")
    pairs = [
        (larger, smaller)
        for _, same in pretrained.groupby("steps", sort=False)
        for (_, smaller), (_, larger) in pairwise(same.iterrows())
        if larger["parameters"] > smaller["parameters"]
    ]
    return claim_of(
        "A larger pretrained encoder gives a lower held-out bound than the next smaller one.",
        f"{_LOWER_RULE} One pair that fails makes the claim fail.",
        [unless_truncated(_lower(a, b), pd.DataFrame([a, b])) for a, b in pairs],
        f"{_ONE_SEED} The encoders may differ in more than their size.",
    )


_LOWER_RULE = (
    "Holds if the bound on a held-out answer is at least 2 combined standard errors below the other one, fails if it "
    "is as far above, and is undecided between."
)
_ONE_SEED = (
    "All runs meet the same answers and noise, so their errors are partly shared and the combined one is cautious. One "
    "seed each: how much another seed would move a bound is not in these intervals."
)


def _lower(one: pd.Series, other: pd.Series) -> Finding:
    """Whether the bound of one start ends below that of another."""
    gap = Estimate(one["nats"], one["nats_standard_error"]) - Estimate(other["nats"], other["nats_standard_error"])
    because = (
        f"{one['label']} ends at {fixed(one['nats'])} and {other['label']} at {fixed(other['nats'])} nats per answer: "
        f"a difference of {signed_interval(gap.value, gap.low, gap.high)}."
    )
    return Finding("bound", "", decide_below(gap, 0.0), because)


STARTS_CLAIMS: tuple[ClaimRow, ...] = (
    (pretraining_claim, lambda workdir, plan: (starts_frame(workdir, plan),)),
    (size_claim, lambda workdir, plan: (starts_frame(workdir, plan),)),
)
