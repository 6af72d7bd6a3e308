"""What a claim is, how its findings decide it, and which runs decide nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dllm.report.format import joined
from dllm.report.plan import FEW_STEPS, ReportPlan
from dllm.report.statistics import Verdict, all_of

ClaimRow = tuple[Callable[..., "Claim"], Callable[[Path, ReportPlan], tuple]]
"""The function that decides a claim, and what it reads for it."""


@dataclass(frozen=True)
class Finding:
    """One part of a claim, decided on the runs of one recipe."""

    part: str
    recipe: str
    verdict: Verdict
    because: str
    """One sentence with the numbers."""
    timed: bool = False
    """True if the numbers are wall times, which differ from one machine, and one day, to the next."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published claim, its rule of decision and what was found. number: its place in `CLAIMS`, from 1."""

    number: int = 0
    claim: str
    rule: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    caveat: str = ""


def claim_of(claim: str, rule: str, findings: list[Finding], caveat: str = "", deciding=None) -> Claim:
    """The claim with its verdict; if there are corrected runs, they alone decide."""
    if not findings:
        findings = [Finding("runs", "", "undecided", "The plan has no runs that could decide it.")]
    deciding = deciding or findings
    corrected = [finding for finding in deciding if finding.recipe != "published"]
    verdict = all_of([finding.verdict for finding in corrected or deciding])
    return Claim(claim=claim, rule=rule, verdict=verdict, findings=tuple(findings), caveat=caveat)


def unless_truncated(finding: Finding, runs: pd.DataFrame) -> Finding:
    """The finding, undecided if one of the runs that it rests on was truncated."""
    if "truncated" not in runs or not runs["truncated"].any():
        return finding
    return without_verdict(finding, runs[runs["truncated"].astype(bool)]["label"].tolist())


def without_verdict(finding: Finding, labels: list[str]) -> Finding:
    """The finding, undecided because these runs are too short."""
    cut = f"{joined(labels)} stopped early or after fewer than {FEW_STEPS} steps, which decides nothing."
    return replace(finding, verdict="undecided", because=f"{finding.because} {cut}")
