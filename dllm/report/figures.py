"""The figures: each a pure function of a tidy frame, written as svg, png, and the csv it was drawn from.

Wall times appear in `speed` only, so that two full runs write the same bytes for every other csv.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from dllm.report.claims import halving_ratios
from dllm.report.format import fixed
from dllm.report.load import final_losses, read_metrics, read_speed, scores
from dllm.report.plan import RECIPES, ReportPlan
from dllm.report.statistics import Z95
from dllm.report.style import (
    DASHES,
    GRID,
    INK,
    LABEL_LETTERS,
    PALETTE,
    QUIET,
    RC,
    WIDTH,
    Look,
    family_looks,
    label_line_ends,
    looks,
)
from dllm.report.systems import ALGORITHMS, systems_frame
from dllm.report.tables import TOY, as_csv

SPLITS = {"train": "training loss", "eval": "evaluation loss"}
LOSS_UNIT = "nats per token"
WARMUP = 0.1
"""Share of a run, at its start, that may leave the frame at the top where it would dwarf the rest."""


def build_figures(workdir: Path, plan: ReportPlan, out: Path) -> tuple[Path, ...]:
    """Writes every figure of the plan to the folder `out`, as svg, png and csv. Returns the paths written."""
    makers: dict[str, tuple[Callable, Callable]] = {
        "pretraining": (pretraining_frame, draw_pretraining),
        "openwebtext": (openwebtext_frame, draw_openwebtext),
        "ablation": (ablation_frame, draw_ablation),
        "ablation-final": (ablation_final_frame, draw_ablation_final),
        "chat": (chat_frame, draw_chat),
        "systems": (systems_frame, draw_systems),
        "scores": (scores_frame, draw_scores),
        "speed": (speed_frame, draw_speed),
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in plan.figure_names():
        make_frame, draw = makers[name]
        frame = make_frame(workdir, plan)
        (out / f"{name}.csv").write_text(as_csv(frame), encoding="utf-8")
        with matplotlib.rc_context(RC):
            figure = draw(frame, plan)
            if plan.toy:
                _mark_as_toy(figure)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(out / f"{name}.png", metadata={"Software": None})
        paths += [out / f"{name}.{suffix}" for suffix in ("csv", "svg", "png")]
    return tuple(paths)


def curves(workdir: Path, entries) -> pd.DataFrame:
    """Loss curves of planned runs: label, recipe, split, step, loss, its 95 % interval, and a running mean."""
    frames = []
    for entry in entries:
        metrics = read_metrics(workdir, entry.run)
        half = Z95 * metrics["standard_error"].astype(float)
        frame = metrics.assign(low=metrics["loss"] - half, high=metrics["loss"] + half)
        frame.insert(0, "label", getattr(entry, "label", None) or entry.start)
        frame.insert(1, "recipe", entry.recipe)
        window = frame.groupby("split")["loss"].transform(_running_mean)
        frame["running_mean"] = window.where(frame["split"] == "train")
        frames.append(frame[["label", "recipe", "split", "step", "loss", "low", "high", "running_mean"]])
    return pd.concat(frames, ignore_index=True)


def pretraining_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Curves of the encoders."""
    return curves(workdir, plan.pretraining)


def openwebtext_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Curves of the OpenWebText runs."""
    return curves(workdir, plan.openwebtext)


def ablation_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Curves of the ablation; the label is the start."""
    return curves(workdir, plan.ablation)


def ablation_final_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Final losses of the ablation, with intervals: one row per start, recipe and split."""
    losses = final_losses(workdir, plan.ablation)
    parts = []
    for split in SPLITS:
        part = losses[["label", "recipe"]].assign(split=split, loss=losses[f"{split}_loss"])
        half = Z95 * losses[f"{split}_standard_error"]
        parts.append(part.assign(low=part["loss"] - half, high=part["loss"] + half))
    return pd.concat(parts, ignore_index=True)


def chat_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Curves of the chat models."""
    return curves(workdir, plan.chat)


def scores_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Scores with intervals, chance and the published number, per cent."""
    columns = ["run", "label", "recipe", "kind", "benchmark_label", "value", "low", "high", "chance", "against_chance"]
    return scores(workdir, plan)[[*columns, "reported"]]


def speed_frame(workdir: Path, plan: ReportPlan) -> pd.DataFrame:
    """Time and quality against steps. The one figure with wall times in it."""
    return read_speed(workdir, plan.speed)


def draw_pretraining(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Training and evaluation loss of the encoders."""
    found = family_looks((entry.label, entry.encoder_family) for entry in plan.pretraining)
    ends = _final_points(frame, "eval")
    best = min(ends, key=ends.__getitem__)
    title = f"{best[0]} ends with the lowest evaluation loss, {fixed(ends[best], 2)} {LOSS_UNIT}"
    return _draw_curves(frame, found, title)


def draw_openwebtext(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Training and evaluation loss on OpenWebText."""
    falls = []
    for _, run in frame[frame["split"] == "eval"].groupby(["label", "recipe"], sort=False):
        falls.append(100 * (1 - run["loss"].iloc[-1] / run["loss"].iloc[0]))
    return _draw_curves(frame, looks(frame["label"]), f"The evaluation loss falls by {_range(falls)} % over the run")


def draw_ablation(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Alpaca tuning from each start: one column per recipe, one row per split."""
    rows, parts = frame[frame["split"] == "eval"], []
    for recipe in _recipes(frame):
        last = rows[rows["recipe"] == recipe].groupby("label", sort=False)["loss"].last()
        parts.append(f"{_range(last.tolist(), 2)} ({recipe})")
    title = f"Final evaluation loss by start: {', '.join(parts)}"
    return _draw_curves(frame, looks(frame["label"]), title)


def draw_ablation_final(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Final losses of the ablation with 95 % intervals, side by side."""
    found = looks(frame["label"])
    recipes = _recipes(frame)
    figure = Figure(figsize=(WIDTH, 1.35 + 0.36 * len(found) * len(recipes)))
    panels = figure.subplots(1, len(SPLITS), sharey=True, squeeze=False)[0]
    order = [(label, recipe) for recipe in recipes for label in found]
    height = {key: len(order) - 1 - place for place, key in enumerate(order)}
    for axes, (split, name) in zip(panels, SPLITS.items(), strict=True):
        for row in frame[frame["split"] == split].itertuples():
            look, y = found[row.label], height[(row.label, row.recipe)]
            bar = axes.plot([row.low, row.high], [y, y], color=look.color, linewidth=1.6)[0]
            bar.set_linestyle(DASHES[row.recipe])
            face = look.color if row.recipe == "corrected" else "white"
            axes.plot(row.loss, y, look.marker, color=look.color, markerfacecolor=face, markersize=7)
        axes.set_title(f"Final {name}", color=QUIET)
        axes.set_xlabel(LOSS_UNIT)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
        for edge in range(len(found), len(order), len(found)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.8)
    panels[0].set_yticks(list(height.values()), [f"{label}, {recipe}" for label, recipe in order])
    panels[0].set_ylim(-0.6, len(order) - 0.4)
    _head(figure, _spread_title(frame))
    figure.subplots_adjust(left=0.235, right=0.975, bottom=0.5 / figure.get_figheight(), wspace=0.1)
    return figure


def draw_chat(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Training and evaluation loss of the chat models."""
    ends = _final_points(frame, "eval")
    best = min(ends, key=ends.__getitem__)
    title = f"{best[0]} ends with the lowest evaluation loss, {fixed(ends[best], 2)} {LOSS_UNIT}"
    if len(ends) == 1:
        title = f"The evaluation loss of {best[0]} ends at {fixed(ends[best], 2)} {LOSS_UNIT}"
    return _draw_curves(frame, looks(frame["label"]), title)


def draw_scores(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Every score against chance: filled markers lie above chance, hollow ones do not; crosses are published."""
    keys = [row.run for row in plan.results]
    found = looks(keys)
    benchmarks = list(dict.fromkeys(frame["benchmark_label"]))
    step = 0.18 if len(keys) < 7 else 0.145
    band = step * len(keys) + 0.22
    figure = Figure(figsize=(WIDTH, 1.75 + 0.95 * band * len(benchmarks)))
    axes = figure.subplots()
    for place, benchmark in enumerate(benchmarks):
        rows = frame[frame["benchmark_label"] == benchmark]
        middle = -place * band
        if place % 2:
            axes.axhspan(middle - band / 2, middle + band / 2, color="#f6f7f9", linewidth=0, zorder=0)
        chance = rows["chance"].dropna()
        if len(chance):
            axes.plot([chance.iloc[0]] * 2, [middle - band / 2, middle + band / 2], color=INK, linewidth=1.4, zorder=2)
        for row in rows.itertuples():
            look, y = found[row.run], middle + step * ((len(keys) - 1) / 2 - keys.index(row.run))
            axes.plot([row.low, row.high], [y, y], color=look.color, linewidth=1.5, zorder=3)
            face = "white" if row.against_chance in ("near", "below") else look.color
            axes.plot(row.value, y, look.marker, color=look.color, markerfacecolor=face, markersize=5.5, zorder=4)
            if not pd.isna(row.reported):
                axes.plot(row.reported, y, "x", color=INK, markersize=6, markeredgewidth=1.5, zorder=5)
    axes.set_yticks([-place * band for place in range(len(benchmarks))], benchmarks)
    axes.set_ylim(-(len(benchmarks) - 0.5) * band, band / 2)
    axes.set_xlim(left=min(-1.0, frame["low"].min() - 1))
    axes.set_xlabel("score, per cent")
    axes.tick_params(axis="y", labelsize=10, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    known = frame[(frame["against_chance"] != "") & (frame["kind"] == "ours")]
    above = int((known["against_chance"] == "above").sum())
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linewidth=1.5, label=row.name)
        for row, look in zip(plan.results, found.values(), strict=True)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.4, label="chance"))
    handles.append(
        Line2D([], [], color=QUIET, marker="o", markerfacecolor="white", linewidth=0, label="not above chance")
    )
    if frame["reported"].notna().any():
        handles.append(
            Line2D([], [], color=INK, marker="x", markeredgewidth=1.5, linewidth=0, label="published number")
        )
    columns = 3 if max(len(row.name) for row in plan.results) < 34 else 2
    rows_of_legend = -(-len(handles) // columns)
    _head(
        figure,
        f"{above} of {len(known)} scores of our models lie above chance" if len(known) else "Scores",
        below=0.2 * rows_of_legend - 0.15,
    )
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


def draw_systems(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """One line per system: its bound on an answer, and each score with its interval against chance."""
    benchmarks = plan.system_benchmarks()
    found = looks(dict.fromkeys(frame["algorithm"]))
    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * len(frame)))
    panels = figure.subplots(1, 1 + len(benchmarks), sharey=True)
    heights = range(len(frame) - 1, -1, -1)
    names = [("nats", "Bound", "nats per answer")]
    names += [(benchmark.name, benchmark.label, "per cent") for benchmark in benchmarks]
    for axes, (name, title, unit) in zip(panels, names, strict=True):
        for y, row in zip(heights, frame.to_dict("records"), strict=True):
            look = found[row["algorithm"]]
            if not pd.isna(row[name]):
                axes.plot([row[f"{name}_low"], row[f"{name}_high"]], [y, y], color=look.color, linewidth=1.6)
                axes.plot(row[name], y, look.marker, color=look.color, markersize=6)
        chance = frame.get(f"{name}_chance", pd.Series(dtype=float)).dropna()
        if len(chance):
            axes.axvline(chance.iloc[0], color=INK, linewidth=1.3, zorder=1)
        axes.set_title(title, color=QUIET)
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(list(heights), frame["label"])
    panels[0].tick_params(axis="y", labelcolor=INK)
    panels[0].set_ylim(-0.6, len(frame) - 0.4)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linewidth=1.6, label=ALGORITHMS.get(name, name))
        for name, look in found.items()
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.3, label="chance"))
    _head(figure, _bound_title(frame), below=0.2)
    figure.legend(
        handles=handles, loc="upper left", ncols=len(handles), bbox_to_anchor=(0.0, 1 - 0.36 / figure.get_figheight())
    )
    figure.subplots_adjust(left=0.27, right=0.975, bottom=0.62 / figure.get_figheight(), wspace=0.12)
    return figure


def _bound_title(frame: pd.DataFrame) -> str:
    """`Lowest bound of a diffusion model: LLaDA, 3.6 nats`."""
    bounds = frame[frame["algorithm"] != "ar"].dropna(subset=["nats"])
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
        f"Halving the steps divides the time by {_range(ratios.tolist())}"
        if len(ratios)
        else "Time and quality by steps"
    )
    _head(figure, title)
    figure.subplots_adjust(left=0.08, right=0.985, bottom=0.15, wspace=0.2)
    return figure


def _draw_curves(frame: pd.DataFrame, found: dict[str, Look], title: str) -> Figure:
    """Columns are recipes and rows splits; with one recipe, the splits stand side by side."""
    recipes = _recipes(frame)
    cells = [[(recipe, split) for recipe in recipes] for split in SPLITS]
    if len(recipes) == 1:
        cells = [[row[0] for row in cells]]
    figure = Figure(figsize=(WIDTH, 0.75 + 2.95 * len(cells)))
    sharey: Literal["row", False] = "row" if len(recipes) > 1 else False
    panels = figure.subplots(len(cells), 2, squeeze=False, sharey=sharey, sharex=True)
    for axes_row, cell_row in zip(panels, cells, strict=True):
        for axes, (recipe, split) in zip(axes_row, cell_row, strict=True):
            rows = frame[(frame["recipe"] == recipe) & (frame["split"] == split)]
            _draw_panel(axes, rows, split, found)
            name = SPLITS[split].capitalize()
            axes.set_title(f"{name}, {recipe}" if len(recipes) > 1 else name, color=QUIET)
        if len(recipes) == 1:
            for axes in axes_row:
                axes.set_ylim(*_limits([frame[frame["split"] == split] for _, split in cell_row], frame))
        else:
            axes_row[0].set_ylim(*_limits([frame[frame["split"] == cell_row[0][1]]], frame))
        axes_row[0].set_ylabel(LOSS_UNIT)
        for axes, (recipe, split) in zip(axes_row, cell_row, strict=True):
            rows = frame[(frame["recipe"] == recipe) & (frame["split"] == split)]
            last = rows.groupby("label", sort=False).last()
            y = last["running_mean"] if split == "train" else last["loss"]
            if len(found) > 1:
                label_line_ends(axes, [(last["step"][key], y[key], key, found[key]) for key in last.index])
    for axes in panels[-1]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels.flat:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    _head(figure, title)
    _place(figure, names=tuple(found) if len(found) > 1 else (), shared=len(recipes) > 1)
    return figure


def _place(figure: Figure, *, names: tuple[str, ...], shared: bool) -> None:
    """Two columns of panels, each with room for the names at its right; `shared`: one set of y ticks per row."""
    left = 0.68
    name = 0.33 + 0.072 * min(LABEL_LETTERS, max(map(len, names))) if names else 0.1
    gap = (name if names else 0.15) + (0.1 if shared else 0.45)
    panel = (WIDTH - left - name - gap) / 2
    bottom = 0.52 / figure.get_figheight()
    figure.subplots_adjust(left=left / WIDTH, right=1 - name / WIDTH, bottom=bottom, wspace=gap / panel, hspace=0.3)


def _draw_panel(axes, rows: pd.DataFrame, split: str, found: dict[str, Look]) -> None:
    alone = rows["label"].nunique() == 1
    for (label, recipe), run in rows.groupby(["label", "recipe"], sort=False):
        look = found[label]
        if split == "train":
            if alone:
                axes.plot(run["step"], run["loss"], color=look.color, alpha=0.25, linewidth=0.8)
            axes.plot(run["step"], run["running_mean"], color=look.color, linestyle=DASHES[recipe])
            axes.plot(*run[["step", "running_mean"]].iloc[-1], look.marker, color=look.color, markerfacecolor=look.face)
        else:
            axes.fill_between(run["step"], run["low"], run["high"], color=look.color, alpha=0.14, linewidth=0)
            axes.plot(
                run["step"],
                run["loss"],
                color=look.color,
                linestyle=DASHES[recipe],
                marker=look.marker,
                markerfacecolor=look.face,
            )


def _limits(parts: list[pd.DataFrame], frame: pd.DataFrame) -> tuple[float, float]:
    """Limits that show everything after the first steps, and these too unless they would squeeze the rest."""
    shown = pd.concat(parts)
    middle = shown["running_mean"].where(shown["split"] == "train", shown["loss"])
    tops, bottoms = shown["high"].fillna(middle), shown["low"].fillna(middle)
    late = shown["step"] >= WARMUP * frame["step"].max()
    low, high = bottoms[late].min(), tops[late].max()
    if tops.max() - low < 1.5 * (high - low):
        high = tops.max()
    return low - 0.08 * (high - low), high + 0.12 * (high - low)


def _running_mean(losses: pd.Series) -> pd.Series:
    """Mean over a twentieth of the run around each step."""
    return losses.rolling(max(1, len(losses) // 20), min_periods=1, center=True).mean()


def _recipes(frame: pd.DataFrame) -> list[str]:
    present = set(frame["recipe"])
    return [recipe for recipe in RECIPES if recipe in present]


def _final_points(frame: pd.DataFrame, split: str) -> dict[tuple[str, str], float]:
    """Last loss by (label, recipe), corrected runs only where there are any."""
    rows = frame[frame["split"] == split]
    if (rows["recipe"] == "corrected").any():
        rows = rows[rows["recipe"] == "corrected"]
    return {key: float(run["loss"].iloc[-1]) for key, run in rows.groupby(["label", "recipe"], sort=False)}


def _spread_title(frame: pd.DataFrame) -> str:
    """`Final evaluation losses differ by 0.4 % (published) and 1.2 % (corrected)`."""
    rows, parts = frame[frame["split"] == "eval"], []
    for recipe in _recipes(frame):
        last = rows[rows["recipe"] == recipe].groupby("label", sort=False)["loss"].last()
        parts.append(f"{fixed(100 * (last.max() - last.min()) / last.mean())} % ({recipe})")
    return f"Across starts, final evaluation losses differ by {' and '.join(parts)}"


def _range(values: list[float], digits: int = 1) -> str:
    """`1.9 to 2.1`, or one number where both ends look the same."""
    low, high = fixed(min(values), digits), fixed(max(values), digits)
    return low if low == high else f"{low} to {high}"


def _mark_as_toy(figure: Figure) -> None:
    """A figure may be passed on without its page: it says itself that its numbers are toys."""
    figure.text(0.012, 0.08 / figure.get_figheight(), TOY, ha="left", va="bottom", fontsize=9, color=PALETTE[1])


def _head(figure: Figure, title: str, *, below: float = 0.0) -> None:
    """The title, flush left, with `below` inches kept free under it."""
    height, lines = figure.get_figheight(), textwrap.wrap(title, 84)
    figure.text(0.012, 1 - 0.12 / height, "\n".join(lines), va="top", fontsize=12.5, fontweight="bold")
    figure.subplots_adjust(top=1 - (0.74 + below + 0.2 * (len(lines) - 1)) / height)
