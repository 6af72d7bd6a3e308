"""Ways to decode next to the exact one: what they take, and how often they are right."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dllm.report.format import fixed, interval
from dllm.report.load import read_decoding_options
from dllm.report.plan import ReportPlan
from dllm.report.style import PALETTE, QUIET, WIDTH, head, name_rows
from dllm.report.tables import Table, table_of
from dllm.report.timed import WALL_TIMES


def decoding_frame(workdir: Path, plan: ReportPlan, name: str = "decoding") -> pd.DataFrame:
    """One row per way: name, passes per answer, and right answers in per cent with their 95 % interval."""
    frame = read_decoding_options(workdir, plan.speed)
    shares = {column: 100 * frame[column].astype(float) for column in ("quality", "quality_low", "quality_high")}
    return pd.DataFrame({"name": frame["name"], "passes": frame["nfe"].astype(float), **shares})


def draw_decoding(frame: pd.DataFrame, plan: ReportPlan) -> Figure:
    """One line per way: its passes, and its right answers with their interval against the exact one's."""
    figure = Figure(figsize=(WIDTH, 1.35 + 0.28 * len(frame)))
    left, right = figure.subplots(1, 2, sharey=True)
    heights = range(len(frame) - 1, -1, -1)
    low, high = frame["quality_low"].iloc[0], frame["quality_high"].iloc[0]
    right.axvspan(low, high, color=QUIET, alpha=0.13, linewidth=0, zorder=0)
    for y, row in zip(heights, frame.itertuples(), strict=True):
        apart = row.quality_low > high or row.quality_high < low
        color = PALETTE[1] if apart else PALETTE[0]
        left.hlines(y, 0, row.passes, color=color, linewidth=1.6)
        left.plot(row.passes, y, "o", color=color, markersize=6)
        right.hlines(y, row.quality_low, row.quality_high, color=color, linewidth=1.6)
        right.plot(row.quality, y, "o", color=color, markersize=6, clip_on=False)
    heads = (("Forward passes", "per answer"), ("Right answers", "per cent"))
    name_rows((left, right), heads, list(frame["name"]), ticks=6)
    head(figure, _title(frame))
    figure.subplots_adjust(left=0.24, right=0.975, bottom=0.62 / figure.get_figheight(), wspace=0.08)
    return figure


def _title(frame: pd.DataFrame) -> str:
    """Which ways are told apart from the exact one by their intervals."""
    exact, others = frame.iloc[0], frame.iloc[1:]
    above = others["quality_low"] > exact["quality_high"]
    below = others["quality_high"] < exact["quality_low"]
    if not (above | below).any():
        return f"No way of {len(others)} is right more or less often than one token per pass, by these intervals"
    return f"Of {len(others)} ways, {above.sum()} are right more often than one token per pass, and {below.sum()} less"


def decoding_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """Other ways to decode next to the exact one: passes, speed, quality, agreement."""
    frame = read_decoding_options(workdir, plan.speed)
    rows = []
    for row in frame.itertuples():
        speed = (fixed(row.nfe), f"{row.seconds:.2f}", f"{row.tokens_per_second:.0f}")
        quality = interval(*(100 * x for x in (row.quality, row.quality_low, row.quality_high)))
        agreement = (fixed(x if x is None else 100 * x) for x in (row.agreement, row.token_agreement))
        rows.append((row.name, *speed, quality, *agreement))
    columns = ("Decoding", "Passes", "Seconds", "Tokens/s", "Correct", "Same answer", "Same tokens")
    note = (
        "Passes per answer; seconds for all answers; tokens up to each answer's end. Same answer and same tokens: "
        f"agreement in per cent with the exact decode, one token per pass. {WALL_TIMES}"
    )
    caption = "Other ways to decode, next to the exact one."
    return table_of(name, caption, columns, rows, frame, note, folder="report")
