"""The report itself: one self-contained HTML page, and the same in markdown."""

import base64
import os
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from markupsafe import Markup, escape

from dllm.numbers import ABSENT, duration
from dllm.report import markup
from dllm.report.claims import claims_of
from dllm.report.faults import FAULTS
from dllm.report.film import Still, frames
from dllm.report.format import in_words, quantity
from dllm.report.leaderboard import build_leaderboard
from dllm.report.load import read_json, read_samples, read_text
from dllm.report.plan import ReportPlan
from dllm.report.shown import FIGURES
from dllm.report.tables import Table, as_csv, as_markdown, make_tables, timed_tables
from dllm.report.templating import environment, style_sheet
from dllm.report.trace import trace

VERDICT_SIGNS = {"holds": "✓", "does not hold": "✗", "undecided": "?"}
_INTERVAL = re.compile(r"^(.*?) (\[[-−+]?[\d.]+, [-−+]?[\d.]+\])(.*)$", re.DOTALL)


class Section(NamedTuple):
    """One entry of the contents list."""

    anchor: str
    title: str


def build_page(workdir: Path, plan: ReportPlan, out: Path) -> tuple[Path, ...]:
    """Writes index.html, report.md, provenance.csv, the timed tables' csv and leaderboard.html, if there is one, to
    `out`. Returns the paths written.

    Reads the figures and claims.json of the work directory; raises ValueError for the first that is missing.
    """
    workdir, out = Path(workdir), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    content = gather(workdir, plan, root=Path(os.path.relpath(workdir, out)).as_posix())
    html = environment(split_interval=split_interval, data_uri=as_data_uri, unbroken=unbroken)
    texts = {"table": table_markdown, "film": film_text, "conversation": conversation_text}
    markdown = environment(html=False, md=markup.markdown, fenced=markup.fenced, **texts)
    timed = {f"{table.name}.csv": as_csv(table.frame) for table in timed_tables(workdir, plan).values()}
    written = timed | {
        "index.html": html.get_template("page.html.jinja").render(**content),
        "report.md": markdown.get_template("report.md.jinja").render(**content).rstrip() + "\n",
        "provenance.csv": as_csv(content["trace"]),
    }
    for name, text in written.items():
        (out / name).write_text(text, encoding="utf-8")
    board = build_leaderboard(workdir, plan, out) if plan.leaderboard else ()
    return (*(out / name for name in written), *board)


def gather(workdir: Path, plan: ReportPlan, *, root: str) -> dict:
    """Everything both templates show; `root` is the way from the page to the work directory."""
    record = read_json(workdir, "claims.json", "claims")
    samples = read_samples(workdir, plan.samples) if plan.samples else {}
    sources = trace(workdir, plan)
    return {
        "plan": plan,
        "root": root,
        "style": style_sheet(),
        "sections": _sections(plan, samples),
        "question": record["question"],
        "answer": record["answer"],
        "claims": record["claims"],
        "signs": VERDICT_SIGNS,
        "absent": ABSENT,
        "stages": stages(plan),
        "tables": make_tables(workdir, plan) | timed_tables(workdir, plan),
        "figures": {name: read_text(workdir, f"figures/{name}.svg", "figures") for name in plan.figure_names()},
        "captions": {name: row.caption for name, row in FIGURES.items()},
        "film": samples.get("film"),
        "frames": frames(samples["film"]) if samples.get("film") else (),
        "conversations": samples.get("conversations", ()),
        "faults": FAULTS,
        "trace": sources,
        "run_rows": _run_rows(sources),
    }


class Stage(NamedTuple):
    """One stage of the workflow: what was run, how often, and what it starts from."""

    title: str
    runs: tuple[str, ...]
    after: str


def stages(plan: ReportPlan) -> tuple[Stage, ...]:
    """The workflow in the order it ran, stages without a run left out."""
    ablation = tuple(f"{entry.label}, {entry.recipe}" for entry in plan.ablation)
    scored = tuple(row.name for row in plan.results)
    weights = "stand-in encoders" if plan.toy else "public encoder weights"
    trained = "chat models" if plan.chat else "trained models"
    every = (
        Stage("Wikitext-103 pretraining", _labels(plan.pretraining), weights),
        Stage("OpenWebText pretraining", _labels(plan.openwebtext), weights),
        Stage("Alpaca tuning", ablation, "untuned, Wikitext and OpenWebText weights"),
        Stage("Chat tuning, tulu-3 and smoltalk", _labels(plan.chat), weights),
        Stage(
            "The same training" if plan.starts else "Systems of one size",
            tuple(system.label for system in plan.systems),
            "public weights and random ones" if plan.starts else "random weights, in one stage or two",
        ),
        Stage("Learning from rewards", tuple(dict.fromkeys(_labels(plan.policies))), "a tuned model"),
        Stage("Learning from preferences", _labels(plan.preferences), "a tuned model"),
        Stage(
            f"Evaluation on {len(plan.benchmarks)} benchmarks",
            scored if plan.benchmarks else (),
            f"{trained} and comparisons" if plan.chat else trained,
        ),
        Stage("Conversations and timing", _named(plan, (plan.samples, plan.speed)), trained),
    )
    return tuple(stage for stage in every if stage.runs)


def split_interval(text: str) -> Markup:
    """A number with its interval set apart, so that the page can print the interval more quietly."""
    match = _INTERVAL.match(text)
    if not match:
        return escape(text)
    value, bounds, rest = match.groups()
    return Markup('<span class="value">{}</span> <span class="interval">{}</span>{}').format(value, bounds, rest)


def unbroken(text: str) -> str:
    """The text with its per cent signs tied to their numbers."""
    return text.replace(" %", "\u00a0%")


def as_data_uri(svg: str) -> str:
    """An SVG for the `src` of an image, so that the page needs no second file."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def film_text(shown: tuple[Still, ...]) -> str:
    """The film as plain text, one paragraph per frame."""
    return "\n\n".join(f"step {frame.step}, {frame.nfe} passes\n{frame.plain}" for frame in shown)


def conversation_text(conversation: list[dict]) -> str:
    """A conversation as plain text."""
    return "\n\n".join(f"[{turn['role']}]\n{turn['content'].strip()}" for turn in conversation)


def table_markdown(table: Table) -> str:
    """The table as markdown without its caption."""
    return as_markdown(table, heading=False).rstrip()


def _sections(plan: ReportPlan, samples: dict) -> tuple[Section, ...]:
    scored = plan.results and plan.benchmarks
    every = (
        ("answer", "The short answer", plan.judges),
        ("claims", f"The {in_words(len(claims_of(plan)))} claims", plan.judges),
        ("starts", "The same training from other weights", plan.starts),
        ("systems", "Side by side" if plan.starts else "Systems side by side", plan.systems),
        ("policies", "Learning from rewards", plan.policies),
        ("preferences", "Learning from preferences", plan.preferences),
        ("runs", "What was run", True),
        ("pretraining", "Six encoders on Wikitext", plan.pretraining),
        ("openwebtext", "More text: OpenWebText", plan.openwebtext),
        ("ablation", "Three starts, two recipes", plan.ablation),
        ("chat", "Training the chat models", plan.chat),
        ("results", "Scores", scored and not plan.systems),
        ("estimators", "Two estimates of one likelihood", len(plan.estimators) > 1),
        ("reported", "Published numbers", plan.reported and plan.benchmarks),
        ("speed", "Steps, time and quality", plan.speed),
        ("film", "Watching it denoise", samples.get("film")),
        ("conversations", "Conversations", samples.get("conversations")),
        ("faults", "What was corrected", plan.judges and not plan.starts),
        ("reading", "How to read the numbers", True),
        ("provenance", "Where each number comes from", True),
    )
    return tuple(Section(anchor, title) for anchor, title, content in every if content)


def _labels(entries) -> tuple[str, ...]:
    mixed = len({entry.recipe for entry in entries}) > 1
    return tuple(f"{entry.label}, {entry.recipe}" if mixed else entry.label for entry in entries)


def _named(plan: ReportPlan, runs: tuple[str, ...]) -> tuple[str, ...]:
    """Labels of runs, each once; the name of the run where the plan has no label for it."""
    labels = {row.run: row.name for row in plan.results} | {entry.run: entry.label for entry in plan.chat}
    return tuple(dict.fromkeys(labels.get(run, run) for run in runs if run))


def _run_rows(sources: pd.DataFrame) -> list[dict]:
    """The runs of the provenance table, ready to print."""
    return [
        {
            "kind": row.kind,
            "run": row.run,
            "benchmark": row.benchmark,
            "seed": _plain(row.seed),
            "commit": _short(row.commit, 8) + (" + changes" if row.dirty is True else ""),
            "config": _short(row.config_digest),
            "data": _short(row.data_digest),
            "hardware": ", ".join(part for part in (_plain(row.hardware), _plain(row.device)) if part != ABSENT),
            "wall": duration(row.wall_seconds),
            "tokens": quantity(row.tokens),
            "parameters": quantity(row.parameters),
        }
        for row in sources.itertuples()
    ]


def _plain(value) -> str:
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return ABSENT
    return str(int(value)) if isinstance(value, float) else str(value)


def _short(digest, length: int = 12) -> str:
    return ABSENT if not isinstance(digest, str) else digest.removeprefix("sha256:")[:length]
