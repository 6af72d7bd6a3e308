"""One look for all figures: sizes, colours that colour-blind readers can tell apart, and labels at line ends."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402  (the backend comes first)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

INK, QUIET, GRID = "#22252b", "#5b616b", "#e4e6ea"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito 2008, less the yellow, which white paper swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = {"published": (0, (5, 2.2)), "corrected": "solid"}
LABEL_LETTERS = 26
"""A longer name at a line end is broken into lines."""
WIDTH = 9.0
"""Inches; every figure is as wide."""

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": "#9aa0aa",
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "dllm.report",
    "svg.fonttype": "path",
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and filling of one series, the same in every panel."""

    color: str
    marker: str
    filled: bool = True

    @property
    def face(self) -> str:
        """Colour inside the marker."""
        return self.color if self.filled else "white"


def looks(keys: Iterable[str]) -> dict[str, Look]:
    """One look per key, in order of appearance."""
    unique = dict.fromkeys(keys)
    return {key: Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, key in enumerate(unique)}


def family_looks(pairs: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """One look per (label, family): the family chooses the colour and marker, a second size is hollow."""
    seen: dict[str, list[str]] = {}
    for label, family in dict.fromkeys(pairs):
        seen.setdefault(family, []).append(label)
    by_label = {}
    for look, labels in zip(looks(seen).values(), seen.values(), strict=True):
        for index, label in enumerate(labels):
            by_label[label] = Look(look.color, look.marker, filled=index % 2 == len(labels[:2]) - 1)
    return by_label


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights moved apart to at least `gap`, order kept, each moved as little as a single pass allows."""
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    groups: list[list[Any]] = []  # [first position, members, sum of wished first positions, rank of the first]
    for rank, index in enumerate(order):
        groups.append([heights[index], 1, heights[index], rank])
        while len(groups) > 1 and groups[-2][0] + gap * groups[-2][1] > groups[-1][0]:
            _, members, wished, _ = groups.pop()
            below = groups[-1]
            below[2] += wished - gap * below[1] * members
            below[1] += members
            below[0] = below[2] / below[1]
    placed = [0.0] * len(heights)
    for first, members, _, rank in groups:
        for offset in range(members):
            placed[order[rank + offset]] = first + gap * offset
    return placed


LINE_HEIGHT = 0.075
"""Height of a name at a line end, as a share of the height of the axes."""


def label_line_ends(axes: Axes, ends: list[tuple[float, float, str, Look]]) -> None:
    """Writes each series' name right of its last point (x, y), apart from each other, tied by a thin line.

    Call it after the limits of the axes are final.
    """
    bottom, top = axes.get_ylim()
    shares = [(min(max(y, bottom), top) - bottom) / (top - bottom) for _, y, _, _ in ends]
    for (x, _, text, look), share, place in zip(ends, shares, spread(shares, LINE_HEIGHT), strict=True):
        right = axes.transLimits.transform((x, bottom))[0]
        axes.plot(
            [right + 0.012, 1.035],
            [share, place],
            transform=axes.transAxes,
            color=look.color,
            linewidth=0.9,
            clip_on=False,
        )
        axes.text(1.045, place, textwrap.fill(text, LABEL_LETTERS), transform=axes.transAxes, va="center", fontsize=9.5)


def name_rows(panels: Sequence[Axes], heads: Sequence[tuple[str, str]], names: Sequence[str], *, ticks: int) -> None:
    """Panels side by side whose rows, from the top, are `names`; heads: title and unit of each, from 0 on."""
    for axes, (title, unit) in zip(panels, heads, strict=True):
        axes.set_title(title, color=QUIET)
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(ticks))
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(names) - 1, -1, -1), names)
    panels[0].tick_params(axis="y", labelcolor=INK)
    panels[0].set_ylim(-0.6, len(names) - 0.4)


def head(figure: Figure, title: str, *, below: float = 0.0) -> None:
    """The title, flush left, with `below` inches kept free under it."""
    height, lines = figure.get_figheight(), textwrap.wrap(title, 84)
    figure.text(0.012, 1 - 0.12 / height, "\n".join(lines), va="top", fontsize=12.5, fontweight="bold")
    figure.subplots_adjust(top=1 - (0.74 + below + 0.2 * (len(lines) - 1)) / height)
