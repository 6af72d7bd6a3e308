"""The tables: each a pure function of the data, written as csv, markdown and LaTeX.

No wall time and no provenance appears here, so that two full runs write the same bytes.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dllm.algorithms import resolved
from dllm.numbers import ABSENT
from dllm.report import markup
from dllm.report.claims import claims_of, judge
from dllm.report.format import fixed, in_words, interval, quantity, signed_interval
from dllm.report.load import final_losses, scores
from dllm.report.plan import ReportPlan
from dllm.report.shown import TABLES
from dllm.report.statistics import against_chance
from dllm.report.systems import algorithm_label, answers_frame, systems_frame

TOY = "Toy data and models."
MARKS = {"above": "▲", "below": "▼", "near": "", "": ""}
MARKS_NOTE = "▲ the 95 % interval lies above chance; ▼ below it; no mark: chance lies inside, or is unknown."


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a mark behind it, and whether it stands out."""

    text: str
    mark: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """One table: `frame` is the data (csv), `rows` what a reader sees."""

    name: str
    caption: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    """Per column: right-aligned."""
    rows: tuple[tuple[Cell, ...], ...]
    frame: pd.DataFrame
    note: str = ""
    folder: str = "tables"
    """Where its files lie, below the work directory."""
    ours: bool = True
    """Whether we measured what is in it."""

    @property
    def marked(self) -> tuple[bool, ...]:
        """Per column: whether any of its cells has a mark."""
        return tuple(any(row[index].mark for row in self.rows) for index in range(len(self.columns)))


def build_tables(workdir: Path, plan: ReportPlan, out: Path) -> tuple[Path, ...]:
    """Writes every table of the plan to the folder `out`, as csv, md and tex, and metrics.json. Returns the paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in make_tables(workdir, plan).values():
        for suffix, text in (("csv", as_csv(table.frame)), ("md", as_markdown(table)), ("tex", as_latex(table))):
            path = out / f"{table.name}.{suffix}"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    metrics = out / "metrics.json"
    metrics.write_text(json.dumps(make_metrics(workdir, plan), indent=1) + "\n", encoding="utf-8")
    return (*paths, metrics)


def make_metrics(workdir: Path, plan: ReportPlan) -> dict[str, dict]:
    """The numbers worth a comparison between two states of the repository, by what they are of.

    scores: per cent, by row and benchmark; loss: final loss on the test split, nats per target token, by run.
    """
    numbers: dict[str, dict] = {"scores": {}, "loss": {}}
    for row in scores(workdir, plan).itertuples() if plan.results and plan.benchmarks else ():
        numbers["scores"].setdefault(row.run, {})[row.benchmark] = float(f"{row.value:.6g}")
    for section in (plan.pretraining, plan.openwebtext, plan.ablation, plan.chat, plan.starts):
        for row in final_losses(workdir, section).itertuples() if section else ():
            if not math.isnan(row.eval_loss):
                numbers["loss"][row.run] = float(f"{row.eval_loss:.6g}")
    return numbers


def make_tables(workdir: Path, plan: ReportPlan) -> dict[str, Table]:
    """The tables without wall times that the plan fills, by name."""
    return _made(workdir, plan, plan.table_names())


def timed_tables(workdir: Path, plan: ReportPlan) -> dict[str, Table]:
    """The tables with wall times that the plan fills, by name."""
    return _made(workdir, plan, plan.table_names(timed=True))


def _made(workdir: Path, plan: ReportPlan, names: tuple[str, ...]) -> dict[str, Table]:
    made = {name: resolved(TABLES[name].make)(workdir, plan, name) for name in names}
    tables = {name: table for name, table in made.items() if table is not None}
    ours = {name: replace(table, caption=f"{table.caption} {TOY}") for name, table in tables.items() if table.ours}
    return tables | ours if plan.toy else tables


def overview_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """Benchmarks down, models across: every score with its interval and the chance level."""
    frame = scores(workdir, plan)
    by_place = {(row.run, row.benchmark): row for row in frame.itertuples()}
    rows = []
    for benchmark in plan.benchmarks:
        cells = [by_place.get((row.run, benchmark.name)) for row in plan.results]
        chance = next((cell.chance for cell in cells if cell is not None), None)
        shown = [_score_cell(cell) if cell is not None else ABSENT for cell in cells]
        rows.append((benchmark.label, fixed(chance), *shown))
    columns = ("Benchmark", "Chance", *(row.name for row in plan.results))
    keep = "benchmark run label recipe metric shots n truncated value low high chance against_chance".split()
    note = MARKS_NOTE + _truncated_note(frame)
    return table_of(name, "Scores in per cent with 95 % intervals.", columns, rows, frame[keep], note)


def _truncated_note(frame: pd.DataFrame) -> str:
    """A sentence on prompts that were longer than a model's context; empty if there were none."""
    cut = [
        f"{row.label} on {row.benchmark_label}, {row.truncated} of {row.n}"
        for row in frame.itertuples()
        if row.truncated
    ]
    return f" Documents whose prompt did not fit and was cut from the left: {'; '.join(cut)}." if cut else ""


def results_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """One row per model and benchmark: ours, published, and their difference."""
    frame = scores(workdir, plan)
    names = {row.run: row.name for row in plan.results}
    rows = []
    for row in frame.itertuples():
        difference = signed_interval(row.difference, row.difference_low, row.difference_high)
        clear = row.difference_low > 0 or row.difference_high < 0
        score = (_score_cell(row), fixed(row.chance), fixed(row.reported), Cell(difference, strong=bool(clear)))
        rows.append((names[row.run], row.benchmark_label, row.metric, f"{row.n}", *score))
    columns = ("Model", "Benchmark", "Metric", "Documents", "Ours", "Chance", "Published", "Difference")
    note = (
        f"{MARKS_NOTE} Difference: ours less the published number, which comes without an interval and is taken as "
        "exact; bold where the interval excludes zero."
    )
    caption = "Scores in per cent against chance and the published numbers."
    return table_of(name, caption, columns, rows, frame, note, left=3)


def reported_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """The published numbers with their sources; nothing here was measured by us."""
    rows, tidy, notes = [], [], []
    sources = list(dict.fromkeys(row.source for row in plan.reported))
    chance = {b.name: b.chance if b.reported_chance is None else b.reported_chance for b in plan.benchmarks}
    for row in plan.reported:
        cells = []
        for benchmark in plan.benchmarks:
            value = row.scores.get(benchmark.name)
            odd = value is not None and value < 100 * (chance[benchmark.name] or 0) / 2
            cells.append(Cell(fixed(value), mark="†" if odd else ""))
            if value is not None:
                tidy.append({"label": row.label, "benchmark": benchmark.name, "value": value, "source": row.source})
        rows.append((row.label, *cells, f"{sources.index(row.source) + 1}"))
        if row.note:
            notes.append(f"{row.label}: {row.note.rstrip('.')}.")
    if any(isinstance(cell, Cell) and cell.mark for cells in rows for cell in cells):
        notes.insert(0, "† Below half of the chance level: more likely a fault of the scoring than of the model.")
    notes.append(f"Sources: {'; '.join(f'({number}) {source}' for number, source in enumerate(sources, start=1))}.")
    columns = ("Model", *(benchmark.label for benchmark in plan.benchmarks), "Source")
    frame = pd.DataFrame(tidy, columns=["label", "benchmark", "value", "source"])
    caption = "Published numbers in per cent, as printed."
    return table_of(name, caption, columns, rows, frame, " ".join(notes), ours=False)


def systems_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """One row per system: what it is made of, its bound and its scores."""
    frame = systems_frame(workdir, plan)
    benchmarks = plan.system_benchmarks()
    rows = []
    for row in frame.to_dict("records"):
        scored = [_against(*(row[f"{b.name}{end}"] for end in ("", "_low", "_high", "_chance"))) for b in benchmarks]
        made_of = (quantity(row["parameters"]), fixed(row["steps"], 0), quantity(row["tokens"]))
        bound = interval(row["nats"], row["nats_low"], row["nats_high"], 2)
        rows.append((row["label"], algorithm_label(row["algorithm"]), *made_of, bound, *scored))
    columns = ("System", "Algorithm", "Parameters", "Steps", "Tokens", "Bound, nats", *(b.label for b in benchmarks))
    note = (
        "Steps and tokens of training here, all stages together. Bound: on -log p of a test answer with its end, with "
        "its 95 % interval; exact for the autoregressive model, and unknown for edits. Scores in per cent with 95 % "
        f"intervals. {MARKS_NOTE}"
    )
    caption = "The same training from other weights." if plan.starts else "Systems of one size on the same data."
    return table_of(name, caption, columns, rows, frame, note, left=2)


def answers_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """What each system answers: questions across and systems down; of starts, which are few, the other way round."""
    frame = answers_frame(workdir, plan)
    answers = {(row.row, row.question): row.answer for row in frame.itertuples()}
    systems = dict(zip(frame["row"], frame["label"], strict=True))
    questions = {question: question for question in frame["question"]}
    cells = [[answers.get((key, question)) or ABSENT for question in questions] for key in systems]
    down, across = (questions, systems) if plan.starts else (systems, questions)
    cells = list(map(list, zip(*cells, strict=True))) if plan.starts else cells
    rows = [(label, *row) for label, row in zip(down.values(), cells, strict=True)]
    columns = ("Question" if plan.starts else "System", *across.values())
    caption = "The same questions to each system, answers neither chosen nor edited."
    return table_of(name, caption, columns, rows, frame, left=len(columns))


def claims_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """One row per finding. Verdicts that rest on wall times stay out: claims.json has them."""
    rows, tidy = [], []
    for claim in judge(workdir, plan):
        for finding in claim.findings:
            verdict = "timed" if finding.timed else finding.verdict
            because = "Rests on wall times: see claims.json." if finding.timed else finding.because
            values = (claim.number, finding.part, finding.recipe, verdict, because)
            tidy.append(dict(zip(("claim", "part", "recipe", "verdict", "because"), values, strict=True)))
            rows.append(tuple(str(value) or ABSENT for value in values))
    columns = ("Claim", "Part", "Recipe", "Verdict", "Because")
    return table_of(name, f"The {in_words(len(claims_of(plan)))} claims.", columns, rows, pd.DataFrame(tidy), left=5)


def as_csv(frame: pd.DataFrame) -> str:
    """The frame as csv, six significant digits, the same bytes on every machine."""
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def as_markdown(table: Table, *, heading: bool = True) -> str:
    """The table as markdown, its caption above and its note below."""
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    lines = [f"**{markup.markdown(table.caption)}**", ""] if heading else []
    lines.append(_markdown_row([markup.markdown(column) for column in table.columns]))
    lines.append(_markdown_row(["---:" if numeric else ":---" for numeric in table.numeric]))
    lines += [_markdown_row(row) for row in rows]
    if table.note:
        lines += ["", markup.markdown(table.note)]
    return "\n".join(lines) + "\n"


def as_latex(table: Table) -> str:
    """The table as LaTeX for the booktabs package."""
    align = "".join("r" if numeric else "l" for numeric in table.numeric)
    head = " & ".join(markup.latex(column) for column in table.columns)
    body = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{markup.latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        head + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.note:
        lines.append(rf"\par\smallskip {markup.latex(table.note)}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def table_of(name: str, caption: str, columns, rows, frame: pd.DataFrame, note: str = "", **more: Any) -> Table:
    """A table of rows of cells or texts, whose first columns, `left` of them (1), are text and the others numbers."""
    left = more.pop("left", 1)
    numeric = tuple(index >= left for index in range(len(columns)))
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Table(name, caption, tuple(columns), numeric, cells, frame, note, **more)


LOSS_TABLES = {
    "pretraining": ("Encoder", "Final losses of the encoders on Wikitext-103."),
    "openwebtext": ("Model", "Losses on OpenWebText."),
    "ablation": ("Start", "Final losses of Alpaca tuning, by start and recipe."),
    "chat": ("Model", "Final losses of the chat models."),
}
"""Head of the first column and caption of each table of losses."""


def loss_table(workdir: Path, plan: ReportPlan, name: str) -> Table:
    """Final losses of the runs of a section of the plan, which is the table's name."""
    subject, caption = LOSS_TABLES[name]
    frame = final_losses(workdir, getattr(plan, name))
    rows = []
    for row in frame.itertuples():
        last = interval(row.eval_loss, row.eval_low, row.eval_high, 3)
        losses = (fixed(row.train_loss, 3), fixed(row.first_eval_loss, 3), last)
        rows.append((row.label, row.recipe, f"{row.steps}", quantity(row.tokens), *losses))
    columns = (subject, "Recipe", "Steps", "Tokens", "Final training loss", "First evaluation", "Final evaluation")
    note = (
        "Nats per token with 95 % intervals. The final training loss averages the last tenth of the logged steps. "
        "The final evaluation meets the same masks in every run, whatever the recipe."
    )
    return table_of(name, caption, columns, rows, frame, note, left=2)


def _score_cell(row) -> Cell:
    mark = MARKS[row.against_chance]
    return Cell(interval(row.value, row.low, row.high), mark, row.against_chance == "above")


def _against(value: float, low: float, high: float, chance: float) -> Cell:
    """The cell of a score in per cent, marked where its interval lies above or below chance."""
    where = "" if pd.isna(value) else against_chance(low / 100, high / 100, None if pd.isna(chance) else chance / 100)
    return Cell(interval(value, low, high), MARKS[where], where == "above")


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell) -> str:
    text = markup.markdown(cell.text)
    return f"**{text}**{_behind(cell.mark)}" if cell.strong else f"{text}{_behind(cell.mark)}"


def _latex_cell(cell: Cell) -> str:
    text = rf"\textbf{{{markup.latex(cell.text)}}}" if cell.strong else markup.latex(cell.text)
    return f"{text}{_behind(markup.latex(cell.mark))}"


def _behind(mark: str) -> str:
    return f" {mark}" if mark else ""
