"""Systems side by side: what each was made of, what it scores, and what an answer takes."""

from pathlib import Path

import pandas as pd

from dllm.algorithms import ALGORITHMS, algorithm_named
from dllm.report.load import (
    final_answer_nats,
    read_evaluation,
    read_metrics,
    read_provenance,
    read_samples,
    score,
)
from dllm.report.plan import ReportPlan, System


def algorithm_label(name: str) -> str:
    """How the report calls an algorithm; empty: of a model that was not trained here."""
    return algorithm_named(name).label if name else "as published"


def systems_frame(workdir: Path, plan: ReportPlan, name: str = "systems") -> pd.DataFrame:
    """One row per system: parameters, steps and tokens of all its stages, and the bound on an answer in nats.

    `nats` with `nats_low` and `nats_high` is the mean bound on -log p of a test answer with its end; exact for an
    autoregressive model, missing where the algorithm has none. For each benchmark b, `b`, `b_low`, `b_high` (per cent),
    `b_chance` and `b_passes` (forward passes per document; missing where nothing counts them).
    """
    return pd.DataFrame([_row(workdir, plan, system) for system in plan.systems])


def seconds_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """One row per system: seconds of training here, and seconds of the model per document of each benchmark."""
    rows = []
    for system in plan.systems:
        trained = [read_provenance(workdir, run)["wall_seconds"] for run in system.stages]
        row = {"row": system.row, "label": system.label, "training_seconds": sum(trained) if trained else float("nan")}
        for benchmark in _scored(plan, system):
            evaluation = read_evaluation(workdir, system.row, benchmark.name)
            row[benchmark.name] = evaluation["provenance"]["model_seconds"] / evaluation["n"]
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=["row", "label", "training_seconds", *_names(plan)])


def answers_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """One row per system with samples and question: the first answer of each of its conversations."""
    rows = []
    for system in plan.systems:
        conversations = read_samples(workdir, system.samples)["conversations"] if system.samples else []
        for question, answer, *_ in conversations:
            rows.append((system.row, system.label, question["content"].strip(), answer["content"].strip()))
    return pd.DataFrame(rows, columns=["row", "label", "question", "answer"])


def _row(workdir: Path, plan: ReportPlan, system: System) -> dict:
    records = [read_provenance(workdir, run) for run in system.stages]
    metrics = [read_metrics(workdir, run) for run in system.stages]
    row = {
        "row": system.row,
        "label": system.label,
        "algorithm": system.algorithm,
        "parameters": records[-1]["parameters"] if records else system.parameters,
        "steps": sum(int(metric["step"].max()) for metric in metrics) if metrics else float("nan"),
        "tokens": sum(record["tokens"] for record in records) if records else float("nan"),
        **dict.fromkeys(("nats", "nats_low", "nats_high"), float("nan")),
    }
    trained = ALGORITHMS.get(system.algorithm)
    if metrics and trained and trained.has_likelihood and (bound := final_answer_nats(metrics[-1])):
        row |= {"nats": bound.value, "nats_low": bound.low, "nats_high": bound.high}
    for benchmark in plan.system_benchmarks():
        keys = ("", "_low", "_high", "_chance", "_passes")
        row |= {f"{benchmark.name}{key}": float("nan") for key in keys}
        if benchmark in _scored(plan, system):
            scored = score(workdir, system.row, benchmark)
            values = (scored["value"], scored["low"], scored["high"], scored["chance"])
            row |= {f"{benchmark.name}{key}": value for key, value in zip(keys, values, strict=False)}
            passes = read_evaluation(workdir, system.row, benchmark.name).get("passes_per_document")
            row[f"{benchmark.name}_passes"] = passes or float("nan")
    return row


def _scored(plan: ReportPlan, system: System):
    row = next(row for row in plan.results if row.run == system.row)
    return plan.scored(row)


def _names(plan: ReportPlan) -> list[str]:
    return [benchmark.name for benchmark in plan.system_benchmarks()]
