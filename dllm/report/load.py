"""Files of a finished work directory, as tidy frames. Every path in an error is relative to that directory."""

import json
from pathlib import Path

import pandas as pd

from dllm.numbers import wilson_interval
from dllm.provenance import how_to_make
from dllm.report.plan import FEW_STEPS, ReportPlan
from dllm.report.statistics import Estimate, against_chance

TAIL = 0.1
"""Share of the logged steps, at the end of a run, that its final training loss averages."""

_RUN_COLUMNS = ("step", "split", "loss")


def read_text(workdir: Path, path: str, rule: str) -> str:
    """Text of one file. Raises ValueError with the file and the rule that makes it if the file is missing."""
    file = Path(workdir) / path
    if not file.is_file():
        raise ValueError(f"{path} is missing in {workdir}; rule {rule!r} makes it: {how_to_make(file)}")
    return file.read_text(encoding="utf-8")


def read_json(workdir: Path, path: str, rule: str) -> dict:
    """One JSON object. Raises ValueError if the file is missing or is not one."""
    try:
        content = json.loads(read_text(workdir, path, rule))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is not JSON ({error.msg}); rule {rule!r} makes it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; rule {rule!r} makes it again.")
    return content


def read_metrics(workdir: Path, run: str) -> pd.DataFrame:
    """Every logged line of a run: columns `step`, `split` (train, eval or final), `loss`, and what else was logged.

    Raises ValueError if the file is missing, a line is not JSON, or either split has no line.
    """
    path = f"runs/{run}/metrics.jsonl"
    rows = []
    for number, line in enumerate(read_text(workdir, path, "train").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error.msg}); rule 'train' makes it again.") from error
    frame = pd.DataFrame(rows)
    missing = [column for column in _RUN_COLUMNS if column not in frame]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; rule 'train' makes it again.")
    for split in ("train", "eval"):
        if not (frame["split"] == split).any():
            raise ValueError(f"{path} has no {split} line; rule 'train' makes it again.")
    for column in ("standard_error", "tokens", "targets", "epoch"):
        if column not in frame:
            frame[column] = float("nan")
    return frame.sort_values(["split", "step"], kind="stable", ignore_index=True)


def read_provenance(workdir: Path, run: str) -> dict:
    """Where a run comes from: seed, commit, digests, hardware, wall seconds."""
    return read_json(workdir, f"runs/{run}/provenance.json", "train")


def read_evaluation(workdir: Path, run: str, benchmark: str) -> dict:
    """One evaluation: metrics, chance level, scorer settings, provenance. Raises ValueError if one is missing."""
    path = f"evals/{run}/{benchmark}.json"
    record = read_json(workdir, path, "evaluate")
    if missing := [name for name in ("metric", "metrics", "n", "scorer", "provenance") if name not in record]:
        raise ValueError(f"{path} has no {', '.join(missing)}; rule 'evaluate' makes it again.")
    return record


def read_samples(workdir: Path, run: str) -> dict:
    """Sample conversations of a run, and its denoising film."""
    return read_json(workdir, f"samples/{run}.json", "sample")


def read_speed(workdir: Path, run: str) -> pd.DataFrame:
    """Time and quality against the number of denoising steps, most steps first."""
    return _measured(workdir, run, "points").sort_values("steps", ascending=False, ignore_index=True)


def read_decoding_options(workdir: Path, run: str) -> pd.DataFrame:
    """Ways to decode, the exact one first: passes, seconds, quality, and agreement with the exact decode."""
    return _measured(workdir, run, "options")


def _measured(workdir: Path, run: str, name: str) -> pd.DataFrame:
    """What rule `speed` measured under a name. Raises ValueError, one line, if that is nothing."""
    path = f"speed/{run}.json"
    rows = read_json(workdir, path, "speed").get(name)
    if not rows:
        raise ValueError(f"{path} has no {name}; rule 'speed' makes it again.")
    return pd.DataFrame(rows)


def evaluation_costs(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """One row per benchmark and compared estimator: score in per cent, noise, passes and seconds per document.

    The benchmarks are those that all rows of `plan.estimators` were scored on. Raises ValueError where a file lacks
    its costs.
    """
    compared = [next(row for row in plan.results if row.run == run) for run in plan.estimators]
    shared = [b for b in plan.benchmarks if all(b in plan.scored(row) for row in compared)]
    rows = []
    for benchmark in shared:
        for row in compared:
            evaluation = read_evaluation(workdir, row.run, benchmark.name)
            passes, seconds = evaluation.get("passes_per_document"), evaluation["provenance"].get("model_seconds")
            if passes is None or seconds is None:
                raise ValueError(f"evals/{row.run}/{benchmark.name}.json has no costs; rule 'evaluate' makes it again.")
            scored = score(workdir, row.run, benchmark)
            n = evaluation["n"]
            rows.append(
                {
                    "benchmark": benchmark.name,
                    "benchmark_label": benchmark.label,
                    "run": row.run,
                    "estimator": evaluation["scorer"]["likelihood"]["estimator"],
                    "n": n,
                    **{key: scored[key] for key in ("value", "low", "high")},
                    "score_standard_error": _number(evaluation.get("standard_error_of_answers")),
                    "passes_per_document": passes,
                    "seconds_per_document": seconds / n,
                }
            )
    return pd.DataFrame(rows)


def split_of(metrics: pd.DataFrame, split: str) -> pd.DataFrame:
    """The lines of one split, in the order of their steps."""
    return metrics[metrics["split"] == split].reset_index(drop=True)


def final_eval_loss(metrics: pd.DataFrame) -> Estimate:
    """Loss of the last evaluation, nats per target token; on the whole test split with fixed masks, if logged."""
    final = split_of(metrics, "final")
    last = (split_of(metrics, "eval") if final.empty else final).iloc[-1]
    return Estimate(float(last["loss"]), _number(last["standard_error"]))


def final_answer_nats(metrics: pd.DataFrame) -> Estimate | None:
    """The final evaluation as nats per row: what a whole answer takes. None where the rows were not counted.

    Unlike nats per token it does not depend on how many EOS an answer is trained with, which are next to free.
    """
    final = split_of(metrics, "final")
    if final.empty or "rows" not in final or pd.isna(final["rows"].iloc[-1]):
        return None
    per_row = final["targets"].iloc[-1] / final["rows"].iloc[-1]
    per_target = final_eval_loss(metrics)
    return Estimate(per_target.value * per_row, per_target.standard_error * per_row)


def final_train_loss(metrics: pd.DataFrame) -> Estimate:
    """Mean training loss over the last tenth of the logged steps, with the standard error of that mean."""
    losses = split_of(metrics, "train")["loss"].astype(float)
    tail = losses.tail(max(2, round(TAIL * len(losses))))
    return Estimate(float(tail.mean()), float(tail.sem()) if len(tail) > 1 else 0.0)


def final_losses(workdir: Path, entries) -> pd.DataFrame:
    """One row per planned run: label, recipe, run, steps, tokens, and final losses with their standard errors."""
    rows = []
    for entry in entries:
        metrics = read_metrics(workdir, entry.run)
        train, evaluation = final_train_loss(metrics), final_eval_loss(metrics)
        first = split_of(metrics, "eval").iloc[0]
        steps = int(metrics["step"].max())
        rows.append(
            {
                "label": entry.label,
                "recipe": entry.recipe,
                "run": entry.run,
                "steps": steps,
                "truncated": entry.truncated or steps < FEW_STEPS,
                "tokens": _number(metrics["tokens"].max()),
                "train_loss": train.value,
                "train_standard_error": train.standard_error,
                "eval_loss": evaluation.value,
                "eval_standard_error": evaluation.standard_error,
                "eval_low": evaluation.low,
                "eval_high": evaluation.high,
                "first_eval_step": int(first["step"]),
                "first_eval_loss": float(first["loss"]),
                "first_eval_standard_error": _number(first["standard_error"]),
            }
        )
    return pd.DataFrame(rows)


def scores(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """One row per scored model and benchmark, in per cent: value, 95 % interval, chance, published, difference.

    The published number has no interval and is taken as exact, so the difference has the width of ours.
    """
    rows = []
    for row in plan.results:
        published = plan.reported_row(row.published_as)
        for benchmark in plan.scored(row):
            scored = score(workdir, row.run, benchmark)
            reported = published.scores.get(benchmark.name) if published else None
            rows.append(
                {
                    "run": row.run,
                    "label": row.label,
                    "recipe": row.recipe,
                    "kind": row.kind,
                    "benchmark": benchmark.name,
                    "benchmark_label": benchmark.label,
                    **scored,
                    "reported": _number(reported),
                    "reported_as": row.published_as if reported is not None else "",
                    "difference": scored["value"] - _number(reported),
                    "difference_low": scored["low"] - _number(reported),
                    "difference_high": scored["high"] - _number(reported),
                }
            )
    return pd.DataFrame(rows)


def score(workdir: Path, run: str, benchmark) -> dict:
    """The score of a row of the results on a benchmark, in per cent, with its interval, chance and metric."""
    evaluation = read_evaluation(workdir, run, benchmark.name)
    name = evaluation["metric"]
    metric = evaluation["metrics"].get(name)
    if metric is None:
        known = ", ".join(sorted(evaluation["metrics"]))
        raise ValueError(f"evals/{run}/{benchmark.name}.json has no metric {name!r}; it has {known}.")
    n = int(metric.get("n") or evaluation["n"])
    low, high = metric.get("low"), metric.get("high")
    if low is None or high is None:
        low, high = wilson_interval(metric["value"] * n, n)
    chance = benchmark.chance if benchmark.chance is not None else evaluation.get("chance")
    return {
        "metric": name,
        "shots": evaluation.get("shots"),
        "n": n,
        "truncated": int(evaluation.get("truncated") or 0),
        "value": 100 * metric["value"],
        "low": 100 * low,
        "high": 100 * high,
        "chance": 100 * _number(chance),
        "against_chance": against_chance(low, high, chance),
    }


def _number(value) -> float:
    return float("nan") if value is None else float(value)
