"""What finished jobs took, read from their artifacts and from the workflow's benchmark files."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dllm.planning.project import Job, ProjectPlan


@dataclass(frozen=True)
class Measured:
    """One job as it was: wall seconds, resident GiB of the host, tokens, passes, disk in GiB; None if unknown.

    `gpu` says whether it ran on an accelerator; `partial`, that the run is not finished and its seconds are
    extrapolated from its speed so far.
    """

    seconds: float | None = None
    host_gib: float | None = None
    device_gib: float | None = None
    tokens: float | None = None
    passes: float | None = None
    kept_gib: float | None = None
    hardware: str = ""
    gpu: bool = False
    partial: bool = False


ASKING = 64
"""MiB; only a job that waits for a warm process (`dllm.cli.warm`) needs less, and the memory there is not seen."""


def measure(plan: ProjectPlan, workdir: str | Path) -> dict[tuple[str, str], Measured]:
    """The measurements of the plan's jobs below a work directory, by (rule, name)."""
    jobs = {key: _job(job, Path(workdir)) for key, job in plan.jobs.items()}
    return {key: measured for key, measured in jobs.items() if measured is not None}


def comparable(job: Job, measured: Measured) -> bool:
    """Whether predicted and measured seconds are of the same kind of machine."""
    return measured.seconds is not None and job.known and measured.gpu == job.place.hardware.is_gpu


def _job(job: Job, workdir: Path) -> Measured | None:
    bench = _benchmark(workdir / "benchmarks" / job.rule / f"{job.name}.tsv")
    facts = READERS[job.rule](job, workdir) if job.rule in READERS else {}
    if facts is None or not (bench or facts):
        return None
    seconds = bench.get("s") or facts.pop("seconds", None)
    facts.pop("seconds", None)
    seen = bench.get("max_rss", 0.0)
    host = facts.pop("host_gib", None) or (seen / 1024 if seen > ASKING else None)
    return Measured(seconds=seconds, host_gib=host, **facts)


def _download(job: Job, workdir: Path) -> dict[str, Any] | None:
    record = _json(workdir / "downloads" / f"{job.name}.json")
    return {"kept_gib": record["bytes"] / 2**30} if record.get("bytes") else None


def _prepare(job: Job, workdir: Path) -> dict[str, Any] | None:
    record, manifest = (_json(workdir / "data" / name) for name in (f"{job.name}.json", f"{job.name}/manifest.json"))
    if not record or not manifest.get("splits"):
        return None
    tokens = sum(split.get("tokens", 0) for split in manifest["splits"].values())
    return {"kept_gib": record["bytes"] / 2**30, "tokens": tokens}


def _train(job: Job, workdir: Path) -> dict[str, Any] | None:
    facts, record = _json(workdir / "runs" / job.name / "provenance.json"), _json(workdir / "runs" / f"{job.name}.json")
    if facts:
        return {
            "seconds": facts.get("wall_seconds"),
            "tokens": facts.get("tokens"),
            "device_gib": facts.get("peak_memory_gib"),
            "kept_gib": record["bytes"] / 2**30 if record.get("bytes") else None,
        } | _machine(facts)
    return _unfinished(job, workdir)


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    """What a provenance says of the machine."""
    return {
        "host_gib": facts.get("peak_host_gib"),
        "hardware": str(facts.get("hardware", "")),
        "gpu": str(facts.get("device", "cpu")) != "cpu",
    }


def _unfinished(job: Job, workdir: Path) -> dict[str, Any] | None:
    """A run on its way: the seconds of the whole from the median speed of the steps it has logged."""
    key = "[0-9a-f]" * 16  # of the state directory; another run's name may begin with this one's
    logs = sorted((workdir / ".work").glob(f"{job.name}-{key}/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = _lines(logs[-1]) if logs else []
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    if not speeds:
        return None
    # metrics do not say where they were measured: the plan's own kind of machine is taken
    gpu = job.place.hardware.is_gpu
    return {"seconds": job.cost.tokens / median(speeds), "tokens": job.cost.tokens, "partial": True, "gpu": gpu}


def _evaluate(job: Job, workdir: Path) -> dict[str, Any] | None:
    scores = _json(workdir / "evals" / f"{job.name}.json")
    if not scores:
        return None
    facts = scores.get("provenance") or {}
    return {
        "seconds": scores.get("wall_seconds"),
        # lm-eval's own adapter does not say how many passes it took
        "passes": None if (scores.get("scorer") or {}).get("model_kind") == "hf" else scores.get("passes"),
    } | _machine(facts)


def _speed(job: Job, workdir: Path) -> dict[str, Any] | None:
    speed = _json(workdir / "speed" / f"{job.name}.json")
    points = speed.get("points")
    if not points:
        return None
    facts = speed.get("provenance") or {}
    return {
        "seconds": sum(point["seconds"] for point in points) + job.place.hardware.startup_seconds,
        "passes": sum(point["nfe"] * point["n"] for point in points),
    } | _machine(facts)


READERS = {"download": _download, "prepare": _prepare, "train": _train, "evaluate": _evaluate, "speed": _speed}


def _benchmark(path: Path) -> dict[str, float]:
    """The mean of a benchmark file's rows (seconds, MB); empty without a file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return {key: sum(float(row[key]) for row in rows) / len(rows) for key in ("s", "max_rss")} if rows else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is missing or damaged, which other commands report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
