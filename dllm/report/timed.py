"""Tables that hold wall times: the page shows them, and no folder compared byte by byte has them."""

from pathlib import Path

from dllm.numbers import duration
from dllm.report.format import fixed, interval
from dllm.report.load import evaluation_costs
from dllm.report.plan import ReportPlan
from dllm.report.systems import seconds_frame, systems_frame
from dllm.report.tables import Table, table_of

WALL_TIMES = "Seconds are wall times of one machine."


def estimators_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """Likelihood estimators side by side on the same checkpoint: score, noise of a choice, passes, seconds."""
    frame = evaluation_costs(workdir, plan)
    rows = []
    for row in frame.itertuples():
        score = (interval(row.value, row.low, row.high), fixed(row.score_standard_error, 3))
        costs = (fixed(row.passes_per_document), fixed(row.seconds_per_document, 4))
        rows.append((row.benchmark_label, row.estimator, *score, *costs))
    columns = ("Benchmark", "Estimator", "Score", "Standard error of a choice, nats", "Passes", "Seconds")
    note = (
        "Score in per cent with its 95 % interval. The standard error is that of one choice's log-likelihood, on "
        "average: noise of the estimator, not of the documents. Passes and seconds of forward computation are per "
        "document; equal inputs are forwarded once under either estimator, where the published code forwards all 128 "
        f"draws of every choice. {WALL_TIMES}"
    )
    caption = "Estimators of the likelihood on the same model and documents."
    return table_of(name, caption, columns, rows, frame, note, left=2, folder="report")


def seconds_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """Seconds of training, and passes and seconds per question, system by system."""
    frame, benchmarks = seconds_frame(workdir, plan), plan.system_benchmarks()
    passes = systems_frame(workdir, plan).set_index("row")
    rows = [
        (
            row["label"],
            duration(row["training_seconds"]),
            *(fixed(passes.loc[row["row"], f"{benchmark.name}_passes"]) for benchmark in benchmarks),
            *(fixed(1000 * row[benchmark.name], 0) for benchmark in benchmarks),
        )
        for row in frame.to_dict("records")
    ]
    columns = ("System", "Training", *(f"{benchmark.label}, passes" for benchmark in benchmarks))
    columns += tuple(f"{benchmark.label}, ms" for benchmark in benchmarks)
    of_questions = (
        " Passes: forward passes per question. Milliseconds of forward computation per question, many questions side "
        "by side."
    )
    note = f"Training: of all stages.{of_questions if benchmarks else ''} {WALL_TIMES}"
    return table_of(name, "What the systems take.", columns, rows, frame, note, folder="report")
