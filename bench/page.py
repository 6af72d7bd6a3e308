"""The page of results: what was reached and missed, figures with their csv, and how everything was measured."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from textwrap import fill

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.cases import read
from dllm.numbers import duration, wilson_interval
from dllm.provenance import write_atomically
from dllm.report.page import as_data_uri
from dllm.report.style import INK, PALETTE, QUIET, RC, WIDTH, looks

HERE = Path(__file__).resolve().parent
STYLE = HERE.parent / "dllm" / "report" / "templates" / "page.css"
OURS, MISSED = PALETTE[0], "#9c3b1b"


def build(out: Path) -> Path:
    """Draw figures and page from the results in `out`; returns the page. Raises ValueError without results."""
    cases = read(out)
    if not cases:
        raise ValueError(f"{out}: no results there; run python -m bench first")
    figures = {}
    with matplotlib.rc_context(RC):
        for name, (caption, figure, table) in _figures(cases).items():
            for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
                figure.savefig(out / f"{name}.{suffix}", metadata=metadata)
            write_atomically(out / f"{name}.csv", table)
            figures[name] = (caption, as_data_uri((out / f"{name}.svg").read_text(encoding="utf-8")))
    write_atomically(out / "rows.csv", _rows_csv(cases))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(ratio=ratio, amount=amount, work=work, verdict=verdict, duration=duration)
    content = environment.get_template("page.html.jinja").render(
        style=STYLE.read_text(encoding="utf-8"),
        cases=cases,
        figures=figures,
        targets=[row for case in cases.values() for row in case["rows"] if row["target"]],
        quick=any(case["quick"] for case in cases.values()),
        where=_where(cases),
        seconds=sum(case["seconds"] for case in cases.values()),
    )
    write_atomically(out / "index.html", content)
    return out / "index.html"


def summary(out: Path) -> str:
    """The rows as text for a terminal."""
    lines = []
    for case in read(out).values():
        lines += ["", case["title"] + (f": skipped, {case['skipped']}" if case["skipped"] else "")]
        for row in case["rows"]:
            spread = f"[{ratio(row['low'])}, {ratio(row['high'])}]"
            asked = f"{verdict(row)} (at least {row['target']:g})" if row["target"] else ""
            lines.append(f"  {ratio(row['ratio']):>7} x {spread:<16} {row['name']}  {asked}")
            lines.append(f"{'':29}against {row['against']}")
    rows = [row for case in read(out).values() for row in case["rows"] if row["target"]]
    reached = sum(verdict(row) == "reached" for row in rows)
    return "\n".join([*lines, "", f"{reached} of {len(rows)} targets reached." if rows else "A run without targets."])


def ratio(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def amount(value: float, unit: str) -> str:
    """`1.3 s`, `450 ms`, `1,024 forward rows`."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def work(row: dict) -> str:
    """What a row compares, with its unit where that is not a time."""
    return row["name"] if row["unit"] in ("s", "ms per useful token") else f"{row['name']}, {row['unit']}"


def verdict(row: dict) -> str:
    """`reached`, `missed`, or nothing without a target."""
    return "" if not row["target"] else "reached" if row["ratio"] >= row["target"] else "missed"


def _where(cases: dict) -> list[dict]:
    """The different machines and versions of the results, one entry each."""
    keys = ("hardware", "device", "commit", "dirty", "versions", "threads")
    places = {str([case[key] for key in keys]): {key: case[key] for key in keys} for case in cases.values()}
    return list(places.values())


# --------------------------------------------------------------------------------------------------------------------
# Figures


def _figures(cases: dict) -> dict[str, tuple[str, Figure, str]]:
    figures = {
        "ratios": (
            "Every comparison: median of theirs over median of ours, with the interquartile range of the paired "
            "ratios, outside of which that quotient may lie. Upright marks are the targets. Right of 1, ours is faster "
            "or smaller.",
            _ratios(cases),
            _rows_csv(cases),
        )
    }
    if scaling := [curve for case in cases.values() for curve in case["growth"]]:
        caption = (
            "How cost grows. Points are medians, bars the quartiles. Both axes are logarithmic; both lines of a panel "
        )
        figures["growth"] = (caption + "were taken in turn.", _panels(scaling), _growth_csv(scaling))
    if answered := cases.get("revising", {}).get("setup", {}).get("answers"):
        caption = (
            "Ways to revise, against the forward passes of an answer: right answers with their 95 % intervals, the "
            "model's bound of the answers, and the share of tokens that repeat the one before."
        )
        figures["revising"] = (caption, _revising(answered), _revising_csv(answered))
    return figures


def _ratios(cases: dict) -> Figure:
    rows = [row for case in cases.values() for row in case["rows"]]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.56 * max(1, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        color = MISSED if verdict(row) == "missed" else OURS
        axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2.4, solid_capstyle="round")
        axes.plot(row["ratio"], place, "o", color=color)
        if row["target"]:
            axes.plot([row["target"]] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=1.4)
        axes.annotate(
            f"{ratio(row['ratio'])} ×",
            (max(row["high"], row["ratio"], row["target"] or 0), place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color=QUIET, linewidth=1)
    axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6), xlabel="times less with ours")
    axes.set_xlim(right=axes.get_xlim()[1] * 1.6)
    labels = ["\n".join(fill(part, 66) for part in (work(row), f"against {row['against']}")) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", visible=False)
    return figure


def _panels(curves: list[dict]) -> Figure:
    columns = 2
    height = -(-len(curves) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * height), layout="constrained")
    every = figure.subplots(height, columns, squeeze=False).flatten()
    for axes in every[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(every, curves, strict=False):
        for (label, values), look in zip(curve["lines"].items(), looks(curve["lines"]).values(), strict=True):
            low, high = curve["low"][label], curve["high"][label]
            below = [max(0.0, v - bound) for v, bound in zip(values, low, strict=True)]
            above = [max(0.0, bound - v) for v, bound in zip(values, high, strict=True)]
            style = {"color": look.color, "marker": look.marker, "label": label}
            axes.errorbar(curve["x"], values, yerr=[below, above], **style)
        axes.set(xscale="log", yscale="log", title=curve["title"], xlabel=curve["x_label"], ylabel=curve["y_label"])
        axes.set_xticks(curve["x"], [f"{x:g}" for x in curve["x"]])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom / 1.2, top * 3)
        axes.minorticks_off()
        axes.legend(loc="upper left", fontsize=8)
    return figure


def _revising(rows: list[dict]) -> Figure:
    """One line of three panels for each model, set of questions and temperature."""
    lines = list(dict.fromkeys(_panel(row) for row in rows))
    ways = looks(list(dict.fromkeys(row["way"] for row in rows)))
    figure = Figure(figsize=(WIDTH, 0.7 + 2.0 * len(lines)))
    every = figure.subplots(len(lines), 3, squeeze=False)
    for (right, bound, repeated), line in zip(every, lines, strict=True):
        for shift, (way, look) in enumerate(ways.items()):
            own = sorted((r for r in rows if _panel(r) == line and r["way"] == way), key=lambda r: r["passes"])
            style = {"color": look.color, "marker": look.marker, "markersize": 3.5, "linewidth": 1.3, "label": way}
            x = [row["passes"] * 1.02 ** (shift - len(ways) / 2) for row in own]  # intervals side by side
            for at, row in zip(x, own, strict=True):
                ends = [100 * end for end in wilson_interval(row["right"], row["of"])]
                right.plot([at, at], ends, color=look.color, linewidth=0.7, alpha=0.5)
            right.plot(x, [100 * row["right"] / row["of"] for row in own], **style)
            bound.plot(x, [row["bound"] for row in own], **style)
            repeated.plot(x, [100 * row["repeated"] for row in own], **style)
        model, asked, temperature = line
        right.set_title(f"{model}: {asked}, temperature {temperature:g}", loc="left", fontsize=9)
        right.set(ylim=(0, 100), ylabel="right, %")
        bound.set_ylabel("bound, nats per token")
        repeated.set_ylabel("repeated tokens, %")
        for axes in (right, bound, repeated):
            axes.set(xscale="log")
            axes.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.minorticks_off()
            if axes is not right:
                axes.set_ylim(bottom=0)
    for axes in every[-1]:
        axes.set_xlabel("passes per answer")
    known = {label: handle for handle, label in zip(*every[0][0].get_legend_handles_labels(), strict=True)}
    for axes in every[:, 0]:
        known |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known, loc="upper left", ncols=3, fontsize=8)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.07, right=0.99, top=1 - 0.75 / height, bottom=0.45 / height, wspace=0.28, hspace=0.45)
    return figure


def _panel(row: dict) -> tuple[str, str, float]:
    """Which line of panels a row belongs to."""
    return row["model"], row["questions"], row["temperature"]


# --------------------------------------------------------------------------------------------------------------------
# Tables


def _rows_csv(cases: dict) -> str:
    fields = ("name", "against", "unit", "ours", "theirs", "ratio", "low", "high", "pairs", "target")
    rows = [{"case": name} | {f: row[f] for f in fields} for name, case in cases.items() for row in case["rows"]]
    return _csv(["case", *fields], [list(row.values()) for row in rows])


def _growth_csv(curves: list[dict]) -> str:
    rows = [
        [
            curve["name"],
            curve["x_label"],
            x,
            curve["y_label"],
            line,
            *(curve[k][line][i] for k in ("lines", "low", "high")),
        ]
        for curve in curves
        for line in curve["lines"]
        for i, x in enumerate(curve["x"])
    ]
    return _csv(["figure", "x_label", "x", "unit", "line", "median", "low", "high"], rows)


def _revising_csv(rows: list[dict]) -> str:
    return _csv(list(rows[0]), [list(row.values()) for row in rows])


def _csv(head: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([head, *rows])
    return text.getvalue()
