"""What a report shows: a frozen, validated plan, read from the project. It reads no file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from dllm.config import CurveEntry, ReportedEntry
from dllm.report.shown import FIGURES, TABLES

if TYPE_CHECKING:
    from dllm.config import Project

Recipe = Literal["published", "corrected"]
RECIPES: tuple[Recipe, ...] = ("published", "corrected")
SECTIONS = ("pretraining", "openwebtext", "ablation", "chat")
"""Parts of the report that show loss curves of runs: what the published report did, in its order."""

LEARNING = ("policies", "preferences")
"""Parts of the report that show runs which learn from rewards and from pairs."""

FEW_STEPS = 20
"""A run of fewer steps shows that the pipeline works, and nothing else: no claim is judged by it."""


SMALL_SHARE = 0.02
"""A run that stops within this share of its schedule counts as one of few steps."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class PlannedRun(_Entry):
    """One training run with a curve in the report."""

    run: str
    """Name of the run: the folder below `runs/`."""
    label: str
    """How the report calls it; in the ablation, the weights that it starts from: `untuned`, `after Wikitext`, ..."""
    recipe: Recipe = "corrected"
    """`published` repeats the faults of the published pipeline, `corrected` corrects them."""
    truncated: bool = False
    """Whether it has next to no steps, at all or of its schedule: no claim is judged by it."""

    @classmethod
    def of(cls, project: Project, curve: CurveEntry) -> PlannedRun:
        """The run of a curve."""
        recipe = "published" if project.runs[curve.run].recipe.startswith("published") else "corrected"
        return cls(run=curve.run, label=curve.label, recipe=recipe, truncated=_is_truncated(project, curve.run))

    @property
    def encoder_family(self) -> str:
        """The label up to its first hyphen or space, lower case: `ModernBERT-large` belongs to `modernbert`."""
        return self.label.replace(" ", "-").split("-")[0].lower()


class Start(PlannedRun):
    """A run among others that differ in the weights they start from."""

    pretrained: bool = True
    twin: str = ""
    """Of random weights: the run of the same training from the pretrained weights of the same architecture."""

    @classmethod
    def of_row(cls, project: Project, row: str) -> Start:
        """The run of an evaluation that `report.starts` names."""
        entry = project.evaluations[row]
        model = project.models[project.root_model(entry.checkpoint)]
        runs = [project.evaluations[other].checkpoint for other in project.report.starts]
        training = {run: project.runs[run].model_dump(exclude={"init", "like"}) for run in runs}
        alike = [run for run in runs if training[run] == training[entry.checkpoint]]
        twins = [run for run in alike if model.new == {} and project.runs[run].init == model.tokenizer]
        planned = PlannedRun.of(project, CurveEntry(run=entry.checkpoint, label=entry.label))
        return cls(**dict(planned), pretrained=model.new is None, twin=next(iter(twins), ""))


class ResultRow(_Entry):
    """One scored model."""

    run: str
    """Name of the folder below `evals/`; may, but need not, be the name of a training run."""
    label: str
    recipe: Recipe = "corrected"
    kind: Literal["ours", "ar", "control", "again"] = "ours"
    """`ar`: an autoregressive comparison; `control`: a model that should stay at chance; `again`: the model of another
    row, scored another way, and so no further evidence for a claim."""
    published_as: str = ""
    """Label of the reported row that this model reproduces: fills the difference columns."""
    close_to: str = ""
    """Label of the reported row that claim 4 compares this model with; names the large chat model."""
    benchmarks: tuple[str, ...] = ()
    """Names of the benchmarks it was scored on; empty means all."""
    truncated: bool = False
    """Whether a run that led to it was, as of `PlannedRun`."""

    @classmethod
    def of(cls, project: Project, name: str, *, again: bool) -> ResultRow:
        """The row of an evaluation; again: whether it scores the model of another row another way."""
        entry, reported = project.evaluations[name], project.reported
        benchmarks = project.benchmarks_of(entry)
        return cls(
            run=name,
            label=entry.label,
            recipe="published" if entry.scorer == "published" else "corrected",
            kind="again" if again else "control" if entry.control else "ar" if entry.kind == "hf" else "ours",
            published_as=reported[entry.compare].label if entry.compare else "",
            close_to=reported[entry.close_to].label if entry.close_to else "",
            truncated=_is_truncated(project, entry.checkpoint),
            benchmarks=() if set(benchmarks) == set(_scored_benchmarks(project)) else tuple(benchmarks),
        )

    @property
    def name(self) -> str:
        """The label, with the recipe where it is the published one and the label does not say so."""
        says_so = self.recipe == "corrected" or "published" in self.label.lower()
        return self.label if says_so else f"{self.label} (published recipe)"


class Benchmark(_Entry):
    """One column of scores."""

    name: str
    """Name of the file below `evals/<run>/`."""
    label: str
    chance: float | None = Field(default=None, ge=0, le=1)
    """Score of guessing, a fraction; by default what the evaluation file says."""
    reported_chance: float | None = Field(default=None, ge=0, le=1)
    """Score of guessing on the benchmark of the published numbers, if ours is a miniature of it; else `chance`."""

    @classmethod
    def of(cls, project: Project, name: str) -> Benchmark:
        """The column of a benchmark."""
        entry = project.benchmarks[name]
        return cls(name=name, label=entry.label, chance=entry.chance, reported_chance=entry.reported_chance)


class System(_Entry):
    """One system of the comparison: a trained model and its algorithm."""

    row: str
    """Its row of `results`."""
    label: str
    algorithm: str
    """Empty for a model that was not trained here: what it is, its label says."""
    stages: tuple[str, ...] = ()
    """The runs that made it, each of which started from the one before; the last is scored."""
    parameters: int | None = None
    """Its number of parameters, for a model that was not trained here."""
    samples: str = ""
    """Name of its sample conversations, if there are any."""

    @classmethod
    def of(cls, project: Project, row: str) -> System:
        """The system that a row scores, with the runs that made it and its sample conversations."""
        entry = project.evaluations[row]
        trained = project.runs.get(entry.checkpoint)
        samples = (name for name, sample in project.samples.items() if sample.checkpoint == entry.checkpoint)
        return cls(
            row=row,
            label=entry.label,
            algorithm=trained.algorithm if trained else "",
            stages=tuple(project.stages(entry.checkpoint)),
            parameters=None if trained else project.models[entry.checkpoint].parameters,
            samples=next(samples, ""),
        )


class Ranked(_Entry):
    """One row of the leaderboard."""

    row: str
    """Its row of `results`."""
    label: str
    kind: Literal["diffusion", "autoregressive"] = "diffusion"
    algorithm: str = ""
    """What it was trained with here; empty for a model that was fetched."""
    chat: bool = True
    """Whether it is asked in its chat template; else it is a base model, scored as it continues a text."""
    parameters: int | None = None
    stages: tuple[str, ...] = ()
    """The runs that made it here; none for a model that was fetched."""
    published_as: str = ""
    """Label of the published row to compare with."""

    @classmethod
    def of(cls, project: Project, row: str) -> Ranked:
        """The row of an evaluation that `report.leaderboard` names."""
        entry = project.evaluations[row]
        trained = project.runs.get(entry.checkpoint)
        return cls(
            row=row,
            label=entry.label,
            kind="autoregressive" if entry.kind == "hf" else "diffusion",
            algorithm=trained.algorithm if trained else "",
            chat=entry.chat_template,
            parameters=project.models[project.root_model(entry.checkpoint)].parameters,
            stages=tuple(project.stages(entry.checkpoint)),
            published_as=project.reported[entry.compare].label if entry.compare else "",
        )


class DecisionRules(_Entry):
    """The margins behind the verdicts; the report states each where it is used."""

    hardly_lower: float = 0.05
    """Claim 2: a relative fall of the loss below this counts as hardly any."""
    same_loss: float = 0.03
    """Claim 3: a relative difference of two losses below this counts as nearly none."""
    close_points: float = 5.0
    """Claim 4: at most this many percentage points below counts as close."""
    gpu_hours: float = 50.0
    """Claim 5: the stated cost of the large chat model."""
    gpu_hours_factor: float = 1.5
    """Claim 5: a cost within this factor of the stated one counts as about the same."""
    halving: tuple[float, float] = (1.6, 2.4)
    """Claim 5: halving the steps should divide the time by a number in this range."""


class ReportPlan(_Entry):
    """Everything a report shows. An empty section is left out of the report."""

    title: str = "BERTs that chat with diffusion: a reproduction"
    toy: bool = False
    """True for the laptop run on stand-in data and models: the page says so at the top."""
    pretraining: tuple[PlannedRun, ...] = ()
    openwebtext: tuple[PlannedRun, ...] = ()
    ablation: tuple[PlannedRun, ...] = ()
    chat: tuple[PlannedRun, ...] = ()
    results: tuple[ResultRow, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    reported: tuple[ReportedEntry, ...] = ()
    samples: str = ""
    """Run whose conversations are shown, and whose denoising frame by frame."""
    speed: str = ""
    """Run whose time and quality are shown against the number of steps."""
    estimators: tuple[str, ...] = ()
    """Rows of `results` that score one checkpoint with different likelihood estimators, shown side by side."""
    systems: tuple[System, ...] = ()
    """Systems that are compared with each other."""
    leaderboard: tuple[Ranked, ...] = ()
    """Models that are ranked, on a page of its own."""
    missing: dict[str, str] = {}
    """Models that the leaderboard names without scores, and why."""
    starts: tuple[Start, ...] = ()
    """The runs of these systems, if what they differ in is the weights they start from."""
    policies: tuple[PlannedRun, ...] = ()
    """Runs that learn from rewards; those with one label differ in the seed alone."""
    preferences: tuple[PlannedRun, ...] = ()
    """Runs that learn from pairs of answers."""
    rules: DecisionRules = DecisionRules()

    @classmethod
    def of(cls, project: Project) -> ReportPlan:
        """What the report of a project shows."""
        shown, estimators = project.report, _rows_that_differ_in_estimator(project)
        compared = dict.fromkeys([*shown.systems, *shown.starts])
        return cls(
            title=shown.title,
            toy=shown.toy,
            **{name: tuple(PlannedRun.of(project, curve) for curve in getattr(shown, name)) for name in SECTIONS},
            results=tuple(ResultRow.of(project, row, again=row in estimators[1:]) for row in project.evaluations),
            benchmarks=tuple(Benchmark.of(project, name) for name in _scored_benchmarks(project)),
            reported=_reported(project),
            # systems have a table of their own for what they say
            samples="" if compared else next(iter(project.samples), ""),
            speed=next(iter(project.speed), ""),
            estimators=estimators,
            systems=tuple(System.of(project, row) for row in compared),
            leaderboard=tuple(Ranked.of(project, row) for row in shown.leaderboard),
            missing=dict(shown.missing),
            starts=tuple(Start.of_row(project, row) for row in shown.starts),
            **{name: tuple(PlannedRun.of(project, curve) for curve in getattr(shown, name)) for name in LEARNING},
        )

    @property
    def reproduces(self) -> bool:
        """Whether anything of the published report is repeated, whose claims can then be judged."""
        return any(getattr(self, section) for section in SECTIONS)

    @property
    def judges(self) -> bool:
        """Whether claims are judged and shown: all but a mere comparison of systems does."""
        return bool(self.reproduces or self.starts or not self.systems)

    def system_benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks that any of the systems was scored on."""
        rows = [next(row for row in self.results if row.run == system.row) for system in self.systems]
        return tuple(b for b in self.benchmarks if any(b in self.scored(row) for row in rows))

    def sample_names(self) -> tuple[str, ...]:
        """Every file of sample conversations that is shown, once."""
        names = (self.samples, *(system.samples for system in self.systems))
        return tuple(dict.fromkeys(name for name in names if name))

    def scored(self, row: ResultRow) -> tuple[Benchmark, ...]:
        """The benchmarks a row was scored on, in the order of the plan."""
        return tuple(b for b in self.benchmarks if not row.benchmarks or b.name in row.benchmarks)

    def reported_row(self, label: str) -> ReportedEntry | None:
        """The published numbers under this label, or None."""
        return next((row for row in self.reported if row.label == label), None)

    def trained_runs(self) -> tuple[str, ...]:
        """Every run that the report shows, once, in the order of the report."""
        curves = [entry.run for section in (*SECTIONS, "starts", *LEARNING) for entry in getattr(self, section)]
        return tuple(dict.fromkeys([*curves, *(run for system in self.systems for run in system.stages)]))

    def table_names(self, *, timed: bool = False) -> tuple[str, ...]:
        """Names of the tables that this plan fills; each becomes csv, md and tex. timed: those with wall times."""
        return tuple(name for name, row in TABLES.items() if row.timed == timed and row.fills(self))

    def figure_names(self) -> tuple[str, ...]:
        """Names of the figures that this plan fills; each becomes svg, png and csv."""
        return tuple(name for name, row in FIGURES.items() if row.fills(self))


def _is_truncated(project: Project, name: str) -> bool:
    """Whether a run, or one that it starts from, has too few steps to show anything, by number or by its schedule.

    A run that stops after a good part of its schedule, as the published one on OpenWebText does, is not truncated.
    """
    while name in project.runs:
        run = project.runs[name]
        planned = [steps for steps in (run.stop_after, run.steps) if steps is not None]
        if planned and min(planned) < max(FEW_STEPS, SMALL_SHARE * max(planned)):
            return True
        name = run.init
    return False


def _scored_benchmarks(project: Project) -> list[str]:
    """The benchmarks that any row is scored on, in the order of their entries."""
    used = {name for entry in project.evaluations.values() for name in project.benchmarks_of(entry)}
    return [name for name in project.benchmarks if name in used]


def _reported(project: Project) -> tuple[ReportedEntry, ...]:
    """The published rows, with the scores that have a column; without such a score only what a row compares with, as of
    those that are shown by name."""
    columns = _scored_benchmarks(project)
    named = {name for row in project.evaluations.values() for name in (row.compare, row.close_to)}
    rows = []
    for name, row in project.reported.items():
        scores = {benchmark: score for benchmark, score in row.scores.items() if benchmark in columns}
        if (scores and not row.by_name) or name in named:
            rows.append(row.model_copy(update={"scores": scores}))
    return tuple(rows)


def _rows_that_differ_in_estimator(project: Project) -> tuple[str, ...]:
    """The first row with a Monte Carlo estimator, after the one that differs from it in the estimator alone."""
    for name, entry in project.evaluations.items():
        scorer = project.scorers[entry.scorer]
        for other, candidate in project.evaluations.items():
            like = scorer.model_copy(update={"likelihood": project.scorers[candidate.scorer].likelihood})
            same_model = candidate.checkpoint == entry.checkpoint and candidate.chat_template == entry.chat_template
            estimators = scorer.likelihood.estimator, like.likelihood.estimator
            if same_model and like == project.scorers[candidate.scorer] and estimators == ("mc", "auto"):
                return other, name
    return ()
