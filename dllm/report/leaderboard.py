"""The leaderboard: models under one protocol, ranked where their intervals do not overlap; its table and its page.

Rows and cells that were not measured yet are there, too, with what they are planned to cost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from dllm.numbers import ABSENT, duration
from dllm.report.format import fixed, interval, quantity, signed_interval
from dllm.report.load import read_evaluation, read_provenance, score
from dllm.report.plan import Benchmark, Ranked, ReportPlan
from dllm.report.systems import algorithm_label
from dllm.report.tables import MARKS_NOTE, Table, table_of
from dllm.report.templating import environment, style_sheet

PLANNED = "configs/planned.json"
"""What each cell is planned to take, written by the workflow: {"row/benchmark": {"hours", "device", "gib"}}."""

MEASURED = ["value", "low", "high", "chance", "metric", "shots", "seed", "n", "passes"]
TIMED = ["tokens_per_second", "seconds", "gib", "hardware"]


def board_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """One line per row of the board and benchmark that it is scored on, measured or not; scores in per cent.

    `rank_low` to `rank_high` are the ranks that a row may have among the measured ones of a benchmark: as many rows are
    surely better as have intervals that lie above its own. `difference` is to the published number, taken as exact.
    """
    lines = [
        _line(workdir, plan, row, benchmark)
        for row in plan.leaderboard
        for benchmark in plan.scored(next(result for result in plan.results if result.run == row.row))
    ]
    frame = pd.DataFrame(lines)
    ranks = [rank for _, part in frame.groupby("benchmark", sort=False) for rank in _ranks(part)]
    return frame.join(pd.DataFrame(ranks, columns=["at", "rank_low", "rank_high"]).set_index("at"))


def _line(workdir: Path, plan: ReportPlan, row: Ranked, benchmark: Benchmark) -> dict[str, Any]:
    published = plan.reported_row(row.published_as)
    reported = published.scores.get(benchmark.name) if published else None
    line: dict[str, Any] = {
        "row": row.row,
        "label": row.label,
        "kind": row.kind,
        "algorithm": algorithm_label(row.algorithm),
        "asked": "in its chat template" if row.chat else "as a base model",
        "parameters": _parameters(workdir, row),
        "benchmark": benchmark.name,
        "benchmark_label": benchmark.label,
        **dict.fromkeys([*MEASURED, *TIMED], float("nan")),
    }
    if (Path(workdir) / "evals" / row.row / f"{benchmark.name}.json").is_file():
        line |= _measured(workdir, row.row, benchmark)
    reported = float("nan") if reported is None else float(reported)
    difference = {f"difference{end}": line[key] - reported for end, key in zip(ENDS, BOUNDS, strict=True)}
    source = published.source if published and not math.isnan(reported) else ""
    return line | {"published": reported, **difference, "source": source}


ENDS, BOUNDS = ("", "_low", "_high"), ("value", "low", "high")


def _measured(workdir: Path, row: str, benchmark: Benchmark) -> dict[str, Any]:
    record, scored = read_evaluation(workdir, row, benchmark.name), score(workdir, row, benchmark)
    where = record["provenance"]
    seconds = where.get("model_seconds") or float("nan")
    return {key: scored[key] for key in ("value", "low", "high", "chance", "metric", "shots", "n")} | {
        "seed": record["scorer"].get("seed"),
        "passes": record.get("passes_per_document", float("nan")),
        "tokens_per_second": record.get("tokens_written", float("nan")) / seconds,
        "seconds": seconds / scored["n"],
        "gib": where.get("peak_device_gib", where.get("peak_host_gib", float("nan"))),
        "hardware": ", ".join(str(where[key]) for key in ("hardware", "device") if where.get(key)),
    }


def _parameters(workdir: Path, row: Ranked) -> float:
    """The number in the record of the run that made it, or the entry's."""
    if row.stages and (Path(workdir) / f"runs/{row.stages[-1]}/provenance.json").is_file():
        return float(read_provenance(workdir, row.stages[-1])["parameters"])
    return float("nan") if row.parameters is None else float(row.parameters)


def _ranks(part: pd.DataFrame) -> Iterable[tuple[Any, float, float]]:
    """(index, best, worst) rank of each line of one benchmark; none of a line that was not measured."""
    known = part[part["value"].notna()]
    for line in part.itertuples():
        if pd.isna(line.value):
            yield line.Index, float("nan"), float("nan")
        else:
            better, worse = (known["low"] > line.high).sum(), (known["high"] < line.low).sum()
            yield line.Index, 1.0 + better, float(len(known) - worse)


def rank_text(low: float, high: float) -> str:
    """`2` or `2–4`; a dash if unknown."""
    if pd.isna(low):
        return ABSENT
    return f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}"


def leaderboard_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """One row per model and benchmark: score, ranks, published number, difference, passes."""
    frame = board_frame(workdir, plan)
    rows = [
        (
            *(line.label, line.benchmark_label, line.kind, quantity(line.parameters)),
            interval(line.value, line.low, line.high),
            *(fixed(line.chance), rank_text(line.rank_low, line.rank_high), fixed(line.published)),
            signed_interval(line.difference, line.difference_low, line.difference_high),
            fixed(line.passes),
        )
        for line in frame.itertuples()
    ]
    columns = ("Model", "Benchmark", "Kind", "Parameters", "Score", "Chance", "Rank", "Published", "Difference")
    note = (
        "Scores in per cent with 95 % intervals. Rank: a range where intervals overlap. Difference: ours less the "
        "published number, which comes without an interval and is taken as exact. Passes: forward passes per document."
    )
    caption = "Models under one protocol."
    return table_of(name, caption, (*columns, "Passes"), rows, frame.drop(columns=TIMED), note, left=3)


# --------------------------------------------------------------------------------------------------------------------
# The page


def build_leaderboard(workdir: Path, plan: ReportPlan, out: Path) -> tuple[Path, ...]:
    """Writes leaderboard.html to `out`, also where scores are missing still. Returns the paths written.

    Raises ValueError if the plan has no leaderboard.
    """
    if not plan.leaderboard:
        raise ValueError("the report has no leaderboard; name its rows in report.leaderboard")
    workdir, out = Path(workdir), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    templates = Path(__file__).parent / "templates"
    html = environment().get_template("leaderboard.html.jinja")
    content = board_content(workdir, plan, root=Path(os.path.relpath(workdir, out)).as_posix())
    style = style_sheet() + (templates / "leaderboard.css").read_text(encoding="utf-8")
    script = (templates / "leaderboard.js").read_text(encoding="utf-8")
    path = out / "leaderboard.html"
    path.write_text(html.render(**content, plan=plan, style=style, script=script), encoding="utf-8")
    return (path,)


def board_content(workdir: Path, plan: ReportPlan, *, root: str) -> dict[str, Any]:
    """What the page shows: columns, rows with their cells, sources, totals."""
    frame = board_frame(workdir, plan)
    planned = read_planned(workdir)
    by_name = {benchmark.name: benchmark for benchmark in plan.benchmarks}
    columns = [by_name[name] for name in dict.fromkeys(frame["benchmark"])]  # rows that are asked alike, side by side
    scales = {b.name: _scale(frame[frame["benchmark"] == b.name]) for b in columns}
    cells = {(line.row, line.benchmark): line for line in frame.itertuples()}
    sources = list(dict.fromkeys(source for source in frame["source"] if source))
    rows = []
    for row in plan.leaderboard:
        own = [cells[row.row, b.name] for b in columns if (row.row, b.name) in cells]
        costs = [planned.get(f"{row.row}/{line.benchmark}", {}) for line in own]
        rows.append(
            {
                "row": row,
                "parameters": quantity(own[0].parameters),
                "parameters_sorted": own[0].parameters,
                "algorithm": own[0].algorithm,
                "cells": [_cell(cells.get((row.row, b.name)), scales[b.name], planned, sources, root) for b in columns],
                "passes": _of(own, "passes"),
                "tokens_per_second": _of(own, "tokens_per_second"),
                "gib": max((line.gib for line in own if not pd.isna(line.gib)), default=float("nan")),
                "hours": sum(cost.get("hours", 0) for cost in costs) if any(costs) else float("nan"),
                "training": sum(planned.get(f"train/{run}", {}).get("hours", 0) for run in row.stages),
            }
        )
    compared = [plan.reported_row(name) for name in dict.fromkeys(row.published_as for row in plan.leaderboard)]
    said = [(entry.source, f"{entry.label}: {entry.note.rstrip('.')}.") for entry in compared if entry and entry.note]
    measured = int(frame["value"].notna().sum())
    open_hours = [planned.get(f"{c.row}/{c.benchmark}", {}).get("hours", 0) for c in cells.values() if pd.isna(c.value)]
    return {
        "root": root,
        "columns": [_column(b, frame[frame["benchmark"] == b.name]) for b in columns],
        "rows": rows,
        "sources": [{"text": text, "notes": [note for source, note in said if source == text]} for text in sources],
        "measured": measured,
        "cells": len(frame),
        "open_hours": _hours(sum(open_hours)),
        "unit": next((cost["device"] for cost in planned.values()), "GPU"),
        "marks": MARKS_NOTE,
        "number": number,
        "hours": _hours,
        "hardware": sorted({*frame["hardware"].dropna()}),
    }


def read_planned(workdir: Path) -> dict[str, dict[str, Any]]:
    """What the workflow planned for each cell; empty if it has not written that. Raises ValueError if it is no JSON."""
    path = Path(workdir) / PLANNED
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{PLANNED}:{error.lineno} is not JSON ({error.msg}); remove it: the workflow writes it anew"
        ) from None


def _column(benchmark: Benchmark, part: pd.DataFrame) -> dict[str, Any]:
    """A benchmark's head: its label, and what is the same for all its measured rows, or a range."""
    known = part[part["value"].notna()]
    facts = {name: sorted({*known[name].dropna()}, key=str) for name in ("metric", "shots", "seed", "n")}
    words = [", ".join(map(str, facts["metric"]))]
    words += [f"{'/'.join(f'{x:.0f}' for x in facts['shots'])} examples"] if facts["shots"] else []
    words += [f"{'/'.join(f'{x:.0f}' for x in facts['n'])} documents"] if facts["n"] else []
    words += [f"seed {'/'.join(f'{x:.0f}' for x in facts['seed'])}"] if facts["seed"] else []
    return {"name": benchmark.name, "label": benchmark.label, "facts": ", ".join(word for word in words if word)}


def _scale(part: pd.DataFrame) -> tuple[float, float]:
    """The ends of the axis that a benchmark's intervals are drawn on, in per cent."""
    seen = pd.concat([part[name] for name in ("low", "high", "chance", "published")]).dropna()
    if seen.empty:
        return 0.0, 100.0
    low, high = 10 * math.floor(seen.min() / 10), 10 * math.ceil(seen.max() / 10)
    return float(low), float(max(high, low + 10))


def _cell(line: Any, scale: tuple[float, float], planned: dict, sources: list[str], root: str) -> dict[str, Any] | None:
    """One cell: its texts, where its marks lie in per cent of the axis, and the files behind it. None: not scored."""
    if line is None:
        return None
    cost = planned.get(f"{line.row}/{line.benchmark}", {})

    def at(value: float) -> float | None:
        return None if pd.isna(value) else round(100 * (value - scale[0]) / (scale[1] - scale[0]), 2)

    differs = line.difference_low > 0 or line.difference_high < 0
    return {
        "measured": not pd.isna(line.value),
        "sorted": None if pd.isna(line.value) else round(line.value, 6),
        "value": fixed(line.value),
        "interval": f"[{fixed(line.low)}, {fixed(line.high)}]",
        "rank": rank_text(line.rank_low, line.rank_high),
        "published": None if pd.isna(line.published) else fixed(line.published),
        "difference": signed_interval(line.difference, line.difference_low, line.difference_high),
        "differs": bool(differs),
        "source": sources.index(line.source) + 1 if line.source else None,
        "chance": None if pd.isna(line.chance) else fixed(line.chance),
        "marks": {name: at(getattr(line, name)) for name in ("value", "low", "high", "chance", "published")},
        "record": f"{root}/evals/{line.row}/{line.benchmark}.json",
        "samples": f"{root}/evals/{line.row}/{line.benchmark}.samples.jsonl",
        "cost": _hours(cost["hours"]) if cost else None,
        "passes": number(line.passes),
        "seconds": duration(line.seconds),
    }


def _of(lines: list[Any], name: str) -> float:
    """The mean of what was measured over the cells of a row."""
    values = [getattr(line, name) for line in lines if not pd.isna(getattr(line, name))]
    return math.fsum(values) / len(values) if values else float("nan")


def number(value: float) -> str:
    """Three significant digits; a dash if unknown."""
    return ABSENT if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _hours(hours: float) -> str:
    """`0.4 h`, `28 h`, or seconds and minutes of what is short."""
    if pd.isna(hours):
        return ABSENT
    return duration(3600 * hours) if hours < 1 else f"{hours:,.1f} h" if hours < 10 else f"{hours:,.0f} h"
