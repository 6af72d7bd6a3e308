"""What a report shows: a frozen, validated plan. It receives a dict and reads no file."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Recipe = Literal["published", "corrected"]
RECIPES: tuple[Recipe, ...] = ("published", "corrected")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class PlannedRun(_Entry):
    """One training run with a curve in the report."""

    run: str
    """Name of the run: the folder below `runs/`."""
    label: str
    """How the report calls it."""
    recipe: Recipe = "corrected"
    """`published` repeats the faults of the published pipeline, `corrected` mends them."""
    family: str = ""
    """Encoder family, for the first claim; by default the label up to its first hyphen or space."""

    @property
    def encoder_family(self) -> str:
        """The family, lower case: `ModernBERT-large` belongs to `modernbert`."""
        return (self.family or self.label.replace(" ", "-").split("-")[0]).lower()


class AblationRun(_Entry):
    """One instruction-tuning run of the ablation."""

    start: str
    """The weights it starts from, as the report calls them: `untuned`, `after Wikitext`, ..."""
    run: str
    recipe: Recipe = "corrected"


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
    metric: str = ""
    """Metric to show; by default the evaluation's headline metric."""


class ReportedRow(_Entry):
    """Published numbers of one model."""

    label: str
    source: str
    values: dict[str, float]
    """Benchmark name -> per cent."""
    note: str = ""


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
    """Of a model that was not trained here."""
    samples: str = ""
    """Name of its sample conversations, if there are any."""


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
    ablation: tuple[AblationRun, ...] = ()
    chat: tuple[PlannedRun, ...] = ()
    results: tuple[ResultRow, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    reported: tuple[ReportedRow, ...] = ()
    film: str = ""
    """Run whose denoising is shown frame by frame."""
    samples: str = ""
    """Run whose conversations are shown."""
    speed: str = ""
    """Run whose time and quality are shown against the number of steps."""
    estimators: tuple[str, ...] = ()
    """Rows of `results` that score one checkpoint with different likelihood estimators, shown side by side."""
    systems: tuple[System, ...] = ()
    """Systems that are compared with each other."""
    rules: DecisionRules = DecisionRules()

    @model_validator(mode="after")
    def _names_exist(self) -> "ReportPlan":
        benchmarks = [benchmark.name for benchmark in self.benchmarks]
        reported = [row.label for row in self.reported]
        for row in self.results:
            _check(f"results: {row.run}.benchmarks", row.benchmarks, benchmarks)
            _check(f"results: {row.run}.published_as", [row.published_as] if row.published_as else [], reported)
            _check(f"results: {row.run}.close_to", [row.close_to] if row.close_to else [], reported)
        _check("systems", [system.row for system in self.systems], [row.run for row in self.results])
        _check_unique("systems", [(system.row,) for system in self.systems])
        _check("estimators", self.estimators, [row.run for row in self.results])
        for published in self.reported:
            _check(f"reported: {published.label}.values", published.values, benchmarks)
        for section in ("pretraining", "openwebtext", "ablation", "chat"):
            _check_unique(section, [(entry.run, entry.recipe) for entry in getattr(self, section)])
        _check_unique("ablation", [(entry.start, entry.recipe) for entry in self.ablation])
        _check_unique("results", [(row.run,) for row in self.results])
        _check_unique("benchmarks", [(name,) for name in benchmarks])
        _check_unique("reported", [(label,) for label in reported])
        return self

    @property
    def reproduces(self) -> bool:
        """Whether anything of the published report is repeated, whose claims can then be judged."""
        return bool(self.pretraining or self.openwebtext or self.ablation or self.chat)

    def system_benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks that any of the systems was scored on."""
        rows = [next(row for row in self.results if row.run == system.row) for system in self.systems]
        return tuple(b for b in self.benchmarks if any(b in self.scored(row) for row in rows))

    def sample_names(self) -> tuple[str, ...]:
        """Every file of sample conversations that is shown, once."""
        names = (self.film, self.samples, *(system.samples for system in self.systems))
        return tuple(dict.fromkeys(name for name in names if name))

    def scored(self, row: ResultRow) -> tuple[Benchmark, ...]:
        """The benchmarks a row was scored on, in the order of the plan."""
        return tuple(b for b in self.benchmarks if not row.benchmarks or b.name in row.benchmarks)

    def reported_row(self, label: str) -> ReportedRow | None:
        """The published numbers under this label, or None."""
        return next((row for row in self.reported if row.label == label), None)

    def trained_runs(self) -> tuple[str, ...]:
        """Every run that the report shows, once, in the order of the report."""
        sections = (self.pretraining, self.openwebtext, self.ablation, self.chat)
        curves = [entry.run for section in sections for entry in section]
        return tuple(dict.fromkeys([*curves, *(run for system in self.systems for run in system.stages)]))

    def table_names(self) -> tuple[str, ...]:
        """Names of the tables that this plan fills; each becomes csv, md and tex."""
        filled = {
            "overview": self.results and self.benchmarks,
            "results": self.results and self.benchmarks,
            "pretraining": self.pretraining,
            "openwebtext": self.openwebtext,
            "ablation": self.ablation,
            "chat": self.chat,
            "reported": self.reported and self.benchmarks,
            "systems": self.systems,
            "answers": any(system.samples for system in self.systems),
            "claims": self.reproduces or not self.systems,
        }
        return tuple(name for name, content in filled.items() if content)

    def figure_names(self) -> tuple[str, ...]:
        """Names of the figures that this plan fills; each becomes svg, png and csv."""
        filled = {
            "pretraining": self.pretraining,
            "openwebtext": self.openwebtext,
            "ablation": self.ablation,
            "ablation-final": self.ablation,
            "chat": self.chat,
            "systems": self.systems,
            "scores": self.results and self.benchmarks and not self.systems,
            "speed": self.speed,
        }
        return tuple(name for name, content in filled.items() if content)

    def inputs(self) -> tuple[str, ...]:
        """Every file the tables, figures, claims and page read, relative to the work directory."""
        files = [f"runs/{run}/metrics.jsonl" for run in self.trained_runs()]
        files += [f"runs/{run}/provenance.json" for run in self.trained_runs()]
        files += [f"evals/{row.run}/{b.name}.json" for row in self.results for b in self.scored(row)]
        files += [f"samples/{name}.json" for name in self.sample_names()]
        files += [f"speed/{self.speed}.json"] if self.speed else []
        return tuple(files)


def _check(where: str, names, allowed: list[str]) -> None:
    for name in names:
        if name not in allowed:
            raise ValueError(f"report plan: {where} = {name!r} is not in the plan; known are {', '.join(allowed)}.")


def _check_unique(where: str, keys: list[tuple]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"report plan: {where} lists {' / '.join(key)} twice; keep one of them.")
