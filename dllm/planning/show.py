"""The plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm.numbers import duration
from dllm.planning.measured import Measured, comparable
from dllm.planning.project import RULES, Job, ProjectPlan

Measurements = dict[tuple[str, str], Measured]


def text(plan: ProjectPlan, measured: Measurements, *, verbose: bool = False, title: str = "") -> str:
    """The assumptions, one line per rule (or per job), the total, what was measured, and the warnings."""
    parts = [f"{title}: {len(plan.jobs)} jobs", assumptions(plan), "", table(plan, measured, verbose=verbose), ""]
    parts.append(totals(plan))
    parts += checks(plan, measured)
    if plan.warnings:
        parts += ["", *(f"warning: {line}" for line in plan.warnings)]
    return "\n".join(parts)


def assumptions(plan: ProjectPlan) -> str:
    """The assumptions behind the times, in a line."""
    machines = {job.place.hardware.name: job.place.hardware for job in plan.jobs.values() if job.cost.flops}
    lines = []
    for machine in machines.values():
        unit = "device" if machine.is_gpu else "core"
        memory = f", {machine.memory_gib:g} GiB" if machine.is_gpu else ""
        lines.append(
            f"{machine.name}: peak {machine.bf16_tflops:g} TFLOP/s bf16 and {machine.fp32_tflops:g} fp32 per {unit}"
            f"{memory}; assumed {machine.training:.0%} of it in training, {machine.inference:.0%} in scoring"
        )
    return "\n".join(lines)


def table(plan: ProjectPlan, measured: Measurements, *, verbose: bool) -> str:
    """Aligned columns: sums over a rule's jobs, its largest memory, and what was measured, if anything was."""
    gpu = any(job.place.hardware.is_gpu for job in plan.jobs.values())
    head = ["rule", "jobs", "tokens", "FLOPs", "GPU h" if gpu else "core h", "wall", "longest", "host GiB"]
    head += ["GPU GiB"] * gpu + ["disk GiB", "measured", "ratio"]
    rows = [head]
    for rule in RULES:
        jobs = [job for job in plan.jobs.values() if job.rule == rule]
        if not jobs:
            continue
        rows.append(_row(rule, jobs, measured, gpu))
        if verbose:
            rows += [_row(f"  {job.name}", [job], measured, gpu) for job in jobs]
    rows.append(_row("total", list(plan.jobs.values()), measured, gpu))
    return aligned(rows if rows[-1][-1] else [row[:-2] for row in rows])


def _row(label: str, jobs: Sequence[Job], measured: Measurements, gpu: bool) -> list[str]:
    seconds = [job.cost.seconds for job in jobs]
    hours = sum(job.device_hours for job in jobs if job.place.hardware.is_gpu or not gpu)
    cells = [label, f"{len(jobs)}", *(count(sum(getattr(job.cost, x) for job in jobs)) for x in ("tokens", "flops"))]
    cells += [f"{hours:,.1f}" if hours >= 0.05 else f"{hours:.3f}" if hours else "", duration(sum(seconds))]
    cells += [duration(max(seconds)), f"{max(job.cost.host_gib for job in jobs):.1f}"]
    if gpu:
        device = max(job.cost.device_gib for job in jobs)
        cells.append(f"{device:.1f}" if device else "")
    cells.append(f"{sum(job.cost.kept_gib for job in jobs):.2f}")
    pairs = _pairs(jobs, measured)
    took = sum(found.seconds or 0.0 for _, found in pairs)
    many = f" of {len(pairs)}" if len(pairs) < len(jobs) else ""
    cells += (
        [f"{duration(took)}{many}", f"{sum(job.cost.seconds for job, _ in pairs) / took:.2f}"] if took else ["", ""]
    )
    return cells


def _pairs(jobs: Sequence[Job], measured: Measurements) -> list[tuple[Job, Measured]]:
    pairs = [(job, measured.get((job.rule, job.name))) for job in jobs]
    return [(job, m) for job, m in pairs if m is not None and comparable(job, m)]


def totals(plan: ProjectPlan) -> str:
    """One job after another, and the longest chain with a machine for every job."""
    seconds, chain = plan.longest_chain
    names = " > ".join(f"{job.rule} {job.name}" for job in chain)
    everything = duration(sum(job.cost.seconds for job in plan.jobs.values()))
    scratch = max((job.cost.scratch_gib for job in plan.jobs.values()), default=0.0)
    return (
        f"One job after another: {everything}. With a machine for every job: {duration(seconds)}, the chain\n"
        f"  {names}\n"
        f"Disk while a job runs: up to {scratch:.2f} GiB more."
    )


def checks(plan: ProjectPlan, measured: Measurements) -> list[str]:
    """Predicted against measured, quantity by quantity; empty if nothing was measured."""
    lines = []
    labels = ("seconds", "host memory", "device memory", "tokens", "passes", "disk")
    for label, name in zip(labels, ("seconds", "host_gib", "device_gib", "tokens", "passes", "kept_gib"), strict=True):
        ratios = {}
        for key, job in plan.jobs.items():
            m = measured.get(key)
            value = getattr(m, name) if m else None
            other_machine = m is not None and label in ("seconds", "host memory") and not comparable(job, m)
            if value and getattr(job.cost, name) and not other_machine:
                ratios[key] = getattr(job.cost, name) / value
        if ratios:
            ordered = sorted(ratios.values())
            low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
            lines.append(
                f"  {label:<14}{len(ratios):>4} jobs  median {ordered[len(ordered) // 2]:.2f}"
                f"  lowest {ratios[low]:.2f} ({' '.join(low)})  highest {ratios[high]:.2f} ({' '.join(high)})"
            )
    machines = sorted({m.hardware for m in measured.values() if m.hardware})
    return ["", f"Predicted / measured ({'; '.join(machines) or 'machine unknown'}):", *lines] if lines else []


def as_json(plan: ProjectPlan, measured: Measurements) -> dict[str, Any]:
    """The plan for programs: jobs with cost, requested resources, and measurements."""
    jobs = []
    for (rule, name), job in plan.jobs.items():
        took = measured.get((rule, name))
        seconds = took.seconds if took and comparable(job, took) else None
        jobs.append(
            {
                "rule": rule,
                "name": name,
                "planned": job.known,
                "hardware": job.place.hardware.name,
                "devices": job.place.devices,
                "device_hours": job.device_hours,
                "predicted": dict(job.cost.__dict__),
                "measured": {k: v for k, v in took.__dict__.items() if v is not None} if took else None,
                "ratio": job.cost.seconds / seconds if seconds else None,
                "resources": job.resources,
                "after": [" ".join(key) for key in job.after],
                "warnings": list(job.warnings),
            }
        )
    seconds, chain = plan.longest_chain
    return {
        "hardware": dict(plan.hardware.__dict__),
        "jobs": jobs,
        "longest_chain": {"seconds": seconds, "jobs": [f"{job.rule} {job.name}" for job in chain]},
        "warnings": plan.warnings,
    }


# --------------------------------------------------------------------------------------------------------------------
# Numbers and columns


def aligned(rows: list[list[str]]) -> str:
    """Rows as columns: the first one left, the others right, a rule under the head and over the last row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
    line = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], line, *lines[1:-1], line, lines[-1]])


def count(value: float) -> str:
    """A large number with its thousands as a letter: 1.2 M, 35 P; empty for 0."""
    if not value:
        return ""
    for letter in ("", " k", " M", " G", " T", " P", " E"):
        if value < 1000:
            return f"{value:.3g}{letter}"
        value /= 1000
    return f"{value:,.0f} Z" if value < 1000 else f"{value / 1000:,.0f} Y"
