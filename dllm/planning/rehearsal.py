"""What a rehearsal showed: for each rule, which jobs work, what they took, and what they would take in full."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dllm.numbers import duration
from dllm.planning.measured import Measured, measure
from dllm.planning.project import RULES, Job, ProjectPlan

MADE = {
    "download": "downloads/{}.json",
    "prepare": "data/{}.json",
    "train": "runs/{}.json",
    "evaluate": "evals/{}.json",
    "sample": "samples/{}.json",
    "speed": "speed/{}.json",
}
"""The file that a finished job of a rule has written last, by the job's name."""

REPORTED = {
    "tables": "tables/metrics.json",
    "figures": "figures",
    "claims": "claims.json",
    "page": "report/index.html",
}
"""The same for the jobs of the report."""

TAIL_BYTES = 4000
"""How much of the end of a log is searched for its last line."""


@dataclass(frozen=True)
class Missing:
    """A job that has not made what it makes. `reason`: the last line of its log; empty if it never began."""

    rule: str
    name: str
    log: str
    reason: str


@dataclass(frozen=True)
class RuleOutcome:
    """The jobs of a rule: how many there are and work, seconds one after another in the rehearsal and in full.

    timed: jobs whose seconds are known, which `took` sums. gpu_hours: of the full run, on its hardware.
    """

    rule: str
    jobs: int
    works: int
    timed: int
    took: float
    full_jobs: int
    would_take: float
    gpu_hours: float
    would_keep_gib: float


@dataclass(frozen=True)
class Outcome:
    """A whole rehearsal. `full`: one job after another and the longest chain in full, seconds; `hardware`: its GPU."""

    rules: list[RuleOutcome]
    missing: list[Missing]
    title: str
    hardware: str
    full_seconds: float
    chain_seconds: float
    gpu_hours: float
    unplanned: list[str]

    @property
    def works(self) -> bool:
        """Whether every job has run."""
        return not self.missing

    def as_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps({"works": self.works, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def line(self) -> str:
        """The result in one line."""
        jobs, works = (sum(getattr(rule, name) for rule in self.rules) for name in ("jobs", "works"))
        if self.works:
            return f"Rehearsal: all {jobs} jobs work. In full: {self.in_full()}."
        first = self.missing[0]
        return f"Rehearsal: {works} of {jobs} jobs work; first {first.rule} {first.name}: {first.reason or first.log}"

    def in_full(self) -> str:
        """What the rehearsed project would take."""
        return _in_full(self.hardware, self.gpu_hours, self.full_seconds, self.chain_seconds)


def forecast(short: ProjectPlan, full: ProjectPlan) -> str:
    """How much a rehearsal downloads, and what the whole would take, before any of it has run."""
    fetched = [job for job in _needed(short) if job.rule == "download"]
    size = sum(job.cost.kept_gib for job in fetched)
    unknown = sum(not job.known for job in fetched)
    more = f" and {unknown} of unknown size" if unknown else ""
    whole = _in_full(full.hardware.name, _gpu_hours(full.jobs.values()), _seconds(full), full.longest_chain[0])
    return (
        f"A rehearsal: {len(fetched) - unknown} downloads of {size:.1f} GiB{more}, all else is cut short.\n"
        f"In full: {whole}."
    )


def _needed(plan: ProjectPlan) -> list[Job]:
    """The jobs that the report needs: a benchmark that no row is scored on is planned, but not fetched."""
    read = {key for job in plan.jobs.values() for key in job.after}
    return [job for job in plan.jobs.values() if job.rule != "download" or (job.rule, job.name) in read]


def _in_full(hardware: str, gpu_hours: float, seconds: float, chain: float) -> str:
    hours = f"{gpu_hours:,.0f} hours of {hardware}, " if gpu_hours else ""
    return f"{hours}{duration(seconds)} one job after another, {duration(chain)} at least"


def _seconds(plan: ProjectPlan) -> float:
    return sum(job.cost.seconds for job in plan.jobs.values())


def _gpu_hours(jobs: Iterable[Job]) -> float:
    return sum(job.device_hours for job in jobs if job.place.hardware.is_gpu)


def outcome(short: ProjectPlan, full: ProjectPlan, workdir: str | Path) -> Outcome:
    """What the rehearsal `short` of the plan `full` has shown below its work directory, which is read."""
    workdir = Path(workdir)
    measured = measure(short, workdir)
    jobs = _needed(short)
    missing = [_missing(job, workdir) for job in jobs if not _is_made(job, workdir)]
    # what failed comes before what therefore never began
    missing.sort(key=lambda job: not job.reason)
    return Outcome(
        rules=[_rule(rule, short, full, measured, missing) for rule in RULES if any(job.rule == rule for job in jobs)],
        missing=missing,
        title=full.project.report.title,
        hardware=full.hardware.name,
        full_seconds=_seconds(full),
        chain_seconds=full.longest_chain[0],
        gpu_hours=_gpu_hours(full.jobs.values()),
        unplanned=[f"{job.rule} {job.name}" for job in full.jobs.values() if not job.known],
    )


def _rule(
    rule: str,
    short: ProjectPlan,
    full: ProjectPlan,
    measured: dict[tuple[str, str], Measured],
    missing: list[Missing],
) -> RuleOutcome:
    jobs = [job for job in _needed(short) if job.rule == rule]
    later = [job for job in full.jobs.values() if job.rule == rule]
    times = [measured[rule, job.name].seconds for job in jobs if (rule, job.name) in measured]
    seconds = [value for value in times if value is not None]
    return RuleOutcome(
        rule=rule,
        jobs=len(jobs),
        works=len(jobs) - sum(job.rule == rule for job in missing),
        timed=len(seconds),
        took=sum(seconds),
        full_jobs=len(later),
        would_take=sum(job.cost.seconds for job in later),
        gpu_hours=_gpu_hours(later),
        would_keep_gib=sum(job.cost.kept_gib for job in later),
    )


def _is_made(job: Job, workdir: Path) -> bool:
    made = REPORTED[job.name] if job.rule == "report" else MADE[job.rule].format(job.name)
    return (workdir / made).exists()


def _missing(job: Job, workdir: Path) -> Missing:
    log = f"logs/{job.name}.log" if job.rule == "report" else f"logs/{job.rule}/{job.name}.log"
    return Missing(job.rule, job.name, log, _last_line(workdir / log))


def _last_line(path: Path) -> str:
    """The last line of a log that says something; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
