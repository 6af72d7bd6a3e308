"""The figures: each a pure function of a tidy frame, written as svg, png, and the csv it was drawn from.

Wall times appear in `speed` only, so that two full runs write the same bytes for every other csv.
"""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from dllm.algorithms import ALGORITHMS, resolved
from dllm.report.claims import halving_ratios
from dllm.report.format import fixed, range_of
from dllm.report.load import read_speed, scores
from dllm.report.plan import ReportPlan
from dllm.report.shown import FIGURES
from dllm.report.style import INK, PALETTE, QUIET, RC, WIDTH, Look, head, looks, name_rows
from dllm.report.systems import algorithm_label
from dllm.report.tables import TOY, as_csv


def build_figures(workdir: Path, plan: ReportPlan, out: Path) -> tuple[Path, ...]:
    """Writes every figure of the plan to the folder `out`, as svg, png and csv. Returns the paths written."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in plan.figure_names():
        row = FIGURES[name]
        frame = resolved(row.frame)(workdir, plan, name)
        (out / f"{name}.csv").write_text(as_csv(frame), encoding="utf-8")
        with matplotlib.rc_context(RC):
            figure = resolved(row.draw)(frame, plan)
            if plan.toy:
                _mark_as_toy(figure)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(out / f"{name}.png", metadata={"Software": None})
        paths += [out / f"{name}.{suffix}" for suffix in ("csv", "svg", "png")]
    return tuple(paths)


def scores_frame(workdir: Path, plan: ReportPlan, name: str) -> pd.DataFrame:
    """Scores with intervals, chance and the published number, per cent."""
    columns = ["run", "label", "recipe", "kind", "benchmark_label", "value", "low", "high", "chance", "against_chance"]
    return scores(workdir, plan)[[*columns, "reported"]]


def speed_frame(workdir: Path, plan: ReportPlan, name: str) -> pd.DataFrame:
    """Time and quality against steps. The one figure with wall times in it."""
    return read_speed(workdir, plan.speed)


def draw_scores(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Every score against chance: filled markers lie above chance, hollow ones do not; crosses are published."""
    keys = [row.run for row in plan.results]
    looks_of = looks(keys)
    benchmarks = list(dict.fromkeys(frame["benchmark_label"]))
    step = 0.18 if len(keys) < 7 else 0.145
    scored = {name: [key for key in keys if key in set(rows["run"])] for name, rows in frame.groupby("benchmark_label")}
    bands = [step * len(scored[benchmark]) + 0.22 for benchmark in benchmarks]
    middles = [-sum(bands[:place]) - band / 2 for place, band in enumerate(bands)]
    figure = Figure(figsize=(WIDTH, 1.75 + 0.95 * sum(bands)))
    axes = figure.subplots()
    for place, (benchmark, band, middle) in enumerate(zip(benchmarks, bands, middles, strict=True)):
        rows = frame[frame["benchmark_label"] == benchmark]
        if place % 2:
            axes.axhspan(middle - band / 2, middle + band / 2, color="#f6f7f9", linewidth=0, zorder=0)
        chance = rows["chance"].dropna()
        if len(chance):
            axes.plot([chance.iloc[0]] * 2, [middle - band / 2, middle + band / 2], color=INK, linewidth=1.4, zorder=2)
        for row in rows.itertuples():
            here = scored[benchmark]
            look, y = looks_of[row.run], middle + step * ((len(here) - 1) / 2 - here.index(row.run))
            axes.plot([row.low, row.high], [y, y], color=look.color, linewidth=1.5, zorder=3)
            face = "white" if row.against_chance in ("near", "below") else look.color
            axes.plot(row.value, y, look.marker, color=look.color, markerfacecolor=face, markersize=5.5, zorder=4)
            if not pd.isna(row.reported):
                axes.plot(row.reported, y, "x", color=INK, markersize=6, markeredgewidth=1.5, zorder=5)
    axes.set_yticks(middles, benchmarks)
    axes.set_ylim(-sum(bands), 0)
    axes.set_xlim(left=min(-1.0, frame["low"].min() - 1))
    axes.set_xlabel("score, per cent")
    axes.tick_params(axis="y", labelsize=10, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    known = frame[(frame["against_chance"] != "") & (frame["kind"] == "ours")]
    above = int((known["against_chance"] == "above").sum())
    handles = _scores_legend(frame, plan, looks_of)
    columns = 3 if max(len(row.name) for row in plan.results) < 34 else 2
    title = f"{above} of {len(known)} scores of our models lie above chance" if len(known) else "Scores"
    head(figure, title, below=0.2 * -(-len(handles) // columns) - 0.15)
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=columns,
        bbox_to_anchor=(0.0, 1 - 0.4 / figure.get_figheight()),
        columnspacing=1.8,
        handlelength=1.6,
    )
    figure.subplots_adjust(left=0.13, right=0.975, bottom=0.55 / figure.get_figheight())
    return figure


def _scores_legend(frame: pd.DataFrame, plan: ReportPlan, looks_of: dict[str, Look]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linewidth=1.5, label=row.name)
        for row, look in zip(plan.results, looks_of.values(), strict=True)
    ]
    hollow: dict[str, Any] = {"color": QUIET, "marker": "o", "markerfacecolor": "white", "linewidth": 0}
    cross: dict[str, Any] = {"color": INK, "marker": "x", "markeredgewidth": 1.5, "linewidth": 0}
    handles.append(Line2D([], [], color=INK, linewidth=1.4, label="chance"))
    handles.append(Line2D([], [], **hollow, label="not above chance"))
    if frame["reported"].notna().any():
        handles.append(Line2D([], [], **cross, label="published number"))
    return handles


def draw_systems(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """One line per system: its bound on an answer, and each score with its interval against chance."""
    benchmarks = plan.system_benchmarks()
    looks_of = looks(dict.fromkeys(frame["algorithm"]))
    lines = -(-(len(looks_of) + 1) // 6)  # of the legend
    figure = Figure(figsize=(WIDTH, 1.3 + 0.2 * lines + 0.3 * len(frame)))
    panels = figure.subplots(1, 1 + len(benchmarks), sharey=True, squeeze=False)[0]
    heights = range(len(frame) - 1, -1, -1)
    names = [("nats", "Bound", "nats per answer")]
    names += [(benchmark.name, benchmark.label, "per cent") for benchmark in benchmarks]
    for axes, (name, *_) in zip(panels, names, strict=True):
        for y, row in zip(heights, frame.to_dict("records"), strict=True):
            look = looks_of[row["algorithm"]]
            if not pd.isna(row[name]):
                axes.plot([row[f"{name}_low"], row[f"{name}_high"]], [y, y], color=look.color, linewidth=1.6)
                axes.plot(row[name], y, look.marker, color=look.color, markersize=6, clip_on=False, zorder=3)
        chance = frame.get(f"{name}_chance", pd.Series(dtype=float)).dropna()
        if len(chance):
            axes.axvline(chance.iloc[0], color=INK, linewidth=1.3, zorder=1)
    name_rows(panels, [(title, unit) for _, title, unit in names], list(frame["label"]), ticks=5)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linewidth=1.6, label=algorithm_label(name))
        for name, look in looks_of.items()
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.3, label="chance"))
    head(figure, _bound_title(frame), below=0.2 * lines)
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=-(-len(handles) // lines),
        bbox_to_anchor=(0.0, 1 - 0.36 / figure.get_figheight()),
    )
    figure.subplots_adjust(left=0.27, right=0.975, bottom=0.62 / figure.get_figheight(), wspace=0.12)
    return figure


def _bound_title(frame: pd.DataFrame) -> str:
    """`Lowest bound of a diffusion model: LLaDA, 3.6 nats`."""
    causal = [name for name, row in ALGORITHMS.items() if row.causal]
    bounds = frame[~frame["algorithm"].isin(causal)].dropna(subset=["nats"])
    if bounds.empty:
        return "Systems side by side"
    best = bounds.loc[bounds["nats"].idxmin()]
    return f"Lowest bound of a diffusion model: {best['label']}, {fixed(best['nats'])} nats"


def draw_speed(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Seconds and quality against the number of steps."""
    look = looks(["speed"])["speed"]
    figure = Figure(figsize=(WIDTH, 3.7))
    left, right = figure.subplots(1, 2)
    steps, seconds = frame["steps"].astype(float), frame["seconds"].astype(float)
    left.plot(steps, seconds.iloc[0] * steps / steps.iloc[0], color=QUIET, linestyle=(0, (1.5, 2)), linewidth=1.4)
    left.plot(steps, seconds, color=look.color, marker=look.marker)
    left.text(
        steps.iloc[-1],
        seconds.iloc[0] * steps.iloc[-1] / steps.iloc[0],
        "  in proportion",
        color=QUIET,
        fontsize=9,
        va="top",
    )
    for x, y in zip(steps, seconds, strict=True):
        left.annotate(f"{y:.3g}", (x, y), textcoords="offset points", xytext=(-3, 7), ha="right", fontsize=9)
    left.set(xscale="log", yscale="log", xlabel="denoising steps", ylabel="seconds")
    left.set_ylim(top=seconds.max() * 1.8, bottom=min(seconds.min(), seconds.iloc[0] * steps.min() / steps.max()) * 0.6)
    left.set_title("Time", color=QUIET)
    quality = frame.dropna(subset=["quality"])
    scale = 100 if quality["quality"].max() <= 1 else 1
    if {"quality_low", "quality_high"} <= set(quality):
        low, high = (scale * quality[end].astype(float) for end in ("quality_low", "quality_high"))
        right.vlines(quality["steps"], low, high, color=look.color, linewidth=1.5)
    right.plot(quality["steps"], scale * quality["quality"], color=look.color, marker=look.marker)
    right.set(xscale="log", xlabel="denoising steps", ylabel="per cent" if scale == 100 else "score")
    right.set_ylim(bottom=0)
    metric = str(frame["metric"].iloc[0]) if "metric" in frame else "quality"
    right.set_title(f"Quality: {metric}", color=QUIET)
    for axes in (left, right):
        axes.set_xticks(steps, [f"{int(step)}" for step in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(steps.min() / 1.5, steps.max() * 1.3)
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ratios = halving_ratios(frame)
    title = (
        f"Halving the steps divides the time by {range_of(ratios.tolist())}"
        if len(ratios)
        else "Time and quality by steps"
    )
    head(figure, title)
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.15, wspace=0.2)
    return figure


def _mark_as_toy(figure: Figure) -> None:
    """A figure may be passed on without its page: it says itself that its numbers are toys."""
    figure.text(0.012, 0.08 / figure.get_figheight(), TOY, ha="left", va="bottom", fontsize=9, color=PALETTE[1])
