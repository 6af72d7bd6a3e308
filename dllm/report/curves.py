"""Figures of loss curves: the encoders, OpenWebText, the ablation, the chat models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from dllm.numbers import Z95
from dllm.report.format import fixed, quantity, range_of
from dllm.report.load import final_losses, read_metrics
from dllm.report.plan import RECIPES, ReportPlan
from dllm.report.style import (
    DASHES,
    GRID,
    LABEL_LETTERS,
    QUIET,
    WIDTH,
    Look,
    family_looks,
    head,
    label_line_ends,
    looks,
)

SPLITS = {"train": "training loss", "eval": "evaluation loss"}
LOSS_UNIT = "nats per token"
BESIDE = 1.02
"""Factor between the places of intervals that belong to one number of parameters."""
WARMUP = 0.1
"""Share of a run, at its start, that may leave the frame at the top where it would dwarf the rest."""


def curves(workdir: Path, plan: ReportPlan, section: str) -> pd.DataFrame:
    """Loss curves of a section's runs: label, recipe, split, step, loss, its 95 % interval, and a running mean."""
    frames = []
    for entry in getattr(plan, section):
        metrics = read_metrics(workdir, entry.run)
        half = Z95 * metrics["standard_error"].astype(float)
        frame = metrics.assign(low=metrics["loss"] - half, high=metrics["loss"] + half)
        frame.insert(0, "label", entry.label)
        frame.insert(1, "recipe", entry.recipe)
        window = frame.groupby("split")["loss"].transform(_running_mean)
        frame["running_mean"] = window.where(frame["split"] == "train")
        frames.append(frame[["label", "recipe", "split", "step", "loss", "low", "high", "running_mean"]])
    return pd.concat(frames, ignore_index=True)


def ablation_final_frame(workdir: Path, plan: ReportPlan, name: str) -> pd.DataFrame:
    """Final losses of the ablation, with intervals: one row per start, recipe and split."""
    losses = final_losses(workdir, plan.ablation)
    parts = []
    for split in SPLITS:
        part = losses[["label", "recipe"]].assign(split=split, loss=losses[f"{split}_loss"])
        half = Z95 * losses[f"{split}_standard_error"]
        parts.append(part.assign(low=part["loss"] - half, high=part["loss"] + half))
    return pd.concat(parts, ignore_index=True)


def draw_pretraining(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Training and evaluation loss of the encoders."""
    looks_of = family_looks((entry.label, entry.encoder_family) for entry in plan.pretraining)
    return _draw_curves(frame, looks_of, _lowest_title(frame))


def draw_openwebtext(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Training and evaluation loss on OpenWebText."""
    first = frame[frame["split"] == "eval"].groupby(["label", "recipe"], sort=False)["loss"].first()
    falls = (100 * (1 - _final_evaluations(frame) / first)).tolist()
    return _draw_curves(frame, looks(frame["label"]), f"The evaluation loss falls by {range_of(falls)} % over the run")


def draw_ablation(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Alpaca tuning from each start: one column per recipe, one row per split."""
    parts = [f"{range_of(last, 2)} ({recipe})" for recipe, last in _final_by_recipe(frame)]
    title = f"Final evaluation loss by start: {', '.join(parts)}"
    return _draw_curves(frame, looks(frame["label"]), title)


def draw_ablation_final(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Final losses of the ablation with 95 % intervals, side by side."""
    looks_of = looks(frame["label"])
    recipes = _recipes(frame)
    figure = Figure(figsize=(WIDTH, 1.35 + 0.36 * len(looks_of) * len(recipes)))
    panels = figure.subplots(1, len(SPLITS), sharey=True, squeeze=False)[0]
    order = [(label, recipe) for recipe in recipes for label in looks_of]
    height = {key: len(order) - 1 - place for place, key in enumerate(order)}
    for axes, (split, name) in zip(panels, SPLITS.items(), strict=True):
        for row in frame[frame["split"] == split].itertuples():
            look, y = looks_of[row.label], height[(row.label, row.recipe)]
            bar = axes.plot([row.low, row.high], [y, y], color=look.color, linewidth=1.6)[0]
            bar.set_linestyle(DASHES[row.recipe])
            face = look.color if row.recipe == "corrected" else "white"
            axes.plot(row.loss, y, look.marker, color=look.color, markerfacecolor=face, markersize=7)
        axes.set_title(f"Final {name}", color=QUIET)
        axes.set_xlabel(LOSS_UNIT)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
        for edge in range(len(looks_of), len(order), len(looks_of)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.8)
    panels[0].set_yticks(list(height.values()), [f"{label}, {recipe}" for label, recipe in order])
    panels[0].set_ylim(-0.6, len(order) - 0.4)
    head(figure, _spread_title(frame))
    figure.subplots_adjust(left=0.235, right=0.975, bottom=0.5 / figure.get_figheight(), wspace=0.1)
    return figure


def draw_chat(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """Training and evaluation loss of the chat models."""
    return _draw_curves(frame, looks(frame["label"]), _lowest_title(frame))


def draw_sizes(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """The bound on an answer against the number of parameters: filled from pretrained weights, hollow from random.

    A line joins runs of as many steps.
    """
    looks_of = looks(["pretrained", "random"])
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.subplots()
    groups = list(frame.sort_values("parameters").groupby(["start", "steps"], sort=False))
    for place, ((name, _), rows) in enumerate(groups):
        look = looks_of[name]
        face = look.color if name == "pretrained" else "white"
        x = rows["parameters"] * BESIDE ** (place - (len(groups) - 1) / 2)  # intervals side by side
        axes.vlines(x, rows["nats_low"], rows["nats_high"], color=look.color, linewidth=1.8)
        line = axes.plot(x, rows["nats"], look.marker, color=look.color, markerfacecolor=face)[0]
        line.set(linestyle="-", linewidth=1.2, markersize=6.5)
    for row in frame.itertuples():
        axes.annotate(
            row.label,
            (row.parameters, row.nats),
            xytext=(15, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )
    axes.set(xscale="log", xlabel="parameters", ylabel="bound, nats per answer")
    axes.set_xticks(sorted(set(frame["parameters"])), [quantity(n) for n in sorted(set(frame["parameters"]))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.22, y=0.18)
    lowest = frame.loc[frame["nats"].idxmin()]
    head(figure, f"{lowest['label']}: the lowest bound, {fixed(lowest['nats'])} nats per answer")
    figure.subplots_adjust(left=0.09, right=0.975, bottom=0.17)
    return figure


def _draw_curves(frame: pd.DataFrame, looks_of: dict[str, Look], title: str) -> Figure:
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
            _draw_panel(axes, rows, split, looks_of)
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
            if len(looks_of) > 1:
                label_line_ends(axes, [(last["step"][key], y[key], key, looks_of[key]) for key in last.index])
    for axes in panels[-1]:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels.flat:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    head(figure, title)
    _place(figure, names=tuple(looks_of) if len(looks_of) > 1 else (), shared=len(recipes) > 1)
    return figure


def _place(figure: Figure, *, names: tuple[str, ...], shared: bool) -> None:
    """Two columns of panels, each with room for the names at its right; `shared`: one set of y ticks per row."""
    left = 0.68
    name = 0.33 + 0.072 * min(LABEL_LETTERS, max(map(len, names))) if names else 0.1
    gap = (name if names else 0.15) + (0.1 if shared else 0.45)
    panel = (WIDTH - left - name - gap) / 2
    bottom = 0.52 / figure.get_figheight()
    figure.subplots_adjust(left=left / WIDTH, right=1 - name / WIDTH, bottom=bottom, wspace=gap / panel, hspace=0.3)


def _draw_panel(axes, rows: pd.DataFrame, split: str, looks_of: dict[str, Look]) -> None:
    alone = rows["label"].nunique() == 1
    for (label, recipe), run in rows.groupby(["label", "recipe"], sort=False):
        look = looks_of[label]
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


def _lowest_title(frame: pd.DataFrame) -> str:
    """Which run ends lowest, of the corrected runs if there are any."""
    ends = _final_evaluations(frame[frame["recipe"] == _recipes(frame)[-1]])
    (label, _), loss = ends.idxmin(), fixed(ends.min(), 2)
    if len(ends) == 1:
        return f"The evaluation loss of {label} ends at {loss} {LOSS_UNIT}"
    return f"{label} ends with the lowest evaluation loss, {loss} {LOSS_UNIT}"


def _final_evaluations(frame: pd.DataFrame) -> pd.Series:
    """The loss of each (label, recipe) that tables and claims show: of the final evaluation, else of the last one."""
    keys = ["label", "recipe"]
    ends = {split: rows.groupby(keys, sort=False)["loss"].last() for split, rows in frame.groupby("split")}
    return ends["final"].combine_first(ends["eval"]).reindex(ends["eval"].index) if "final" in ends else ends["eval"]


def _final_by_recipe(frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Per recipe, the final evaluation loss of every label."""
    for recipe in _recipes(frame):
        yield recipe, _final_evaluations(frame[frame["recipe"] == recipe])


def _spread_title(frame: pd.DataFrame) -> str:
    """`Across starts, final evaluation losses differ by 0.4 % (published) and 1.2 % (corrected)`."""
    parts = [
        f"{fixed(100 * (last.max() - last.min()) / last.mean())} % ({recipe})"
        for recipe, last in _final_by_recipe(frame)
    ]
    return f"Across starts, final evaluation losses differ by {' and '.join(parts)}"
