"""Learning from preferences: how far held-out pairs are put right, and what their chosen answers become."""

from pathlib import Path
from typing import Any

import pandas as pd

from dllm.numbers import Z95
from dllm.report.format import fixed, interval
from dllm.report.load import read_metrics, split_of
from dllm.report.plan import ReportPlan
from dllm.report.tables import Table, table_of


def preferences_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """One row per run: margin of held-out pairs, how many are preferred before and after, and the bound."""
    tidy, rows = [], []
    for entry in plan.preferences:
        evaluations = split_of(read_metrics(workdir, entry.run), "eval")
        first, last = evaluations.iloc[0], evaluations.iloc[-1]
        half = Z95 * last["reward_margin_standard_error"]
        row: dict[str, Any] = {
            "label": entry.label,
            "run": entry.run,
            "steps": int(last["step"]),
            "reward_margin": last["reward_margin"],
            "reward_margin_standard_error": last["reward_margin_standard_error"],
            "accuracy": last["accuracy"],
            "preferred_before": first["preferred"],
            "preferred_after": last["preferred"],
            "bound_before": first["loss"],
            "bound_after": last["loss"],
        }
        tidy.append(row)
        shares = (100 * row[key] for key in ("accuracy", "preferred_before", "preferred_after"))
        rows.append(
            (
                entry.label,
                fixed(row["steps"], 0),
                interval(row["reward_margin"], row["reward_margin"] - half, row["reward_margin"] + half, 2),
                *(fixed(share, 1) for share in shares),
                fixed(row["bound_before"], 3),
                fixed(row["bound_after"], 3),
            )
        )
    columns = ("Pairs", "Steps", "Margin", "Put right, %", "Preferred before, %", "after, %", "Bound before", "after")
    note = (
        "Of held-out pairs. Margin: of the rewards, beta times a log-likelihood above that of the start, with its 95 % "
        "interval. Put right: pairs with a positive margin. Preferred: pairs whose chosen answer has the higher bound. "
        "Bound: nats per token of chosen answers (lower is better)."
    )
    caption = "Learning from preferences: each run before and after."
    return table_of(name, caption, columns, rows, pd.DataFrame(tidy), note)
