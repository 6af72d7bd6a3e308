"""Names that entries mention: a table of references, and the rules that reach over several entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dllm.algorithms import algorithm_named
from dllm.config.entries import LONGEST_NAME, NAME, DatasetEntry, Project
from dllm.config.policy import own_reward
from dllm.config.settings import GenerateSettings, did_you_mean, overlaid

Problem = tuple[tuple[str, ...], str]
"""Where something is wrong (section, entry, keys), and the error line without its file."""


@dataclass(frozen=True)
class Reference:
    """A setting of a section's entries that names entries of other sections: `section.*.key`."""

    section: str
    key: str
    targets: tuple[str, ...]

    def problems(self, project: Project) -> Iterator[Problem]:
        """Every name that does not exist."""
        known = [name for target in self.targets for name in getattr(project, target)]
        for name, entry in getattr(project, self.section).items():
            for value in _names(getattr(entry, self.key)):
                if value not in known:
                    yield _unknown((self.section, name, self.key), value, self.targets, known)


REFERENCES = (
    Reference("models", "tokenizer", ("datasets", "models")),
    Reference("datasets", "mix", ("datasets",)),
    Reference("runs", "init", ("models", "runs")),
    Reference("runs", "data", ("datasets",)),
    Reference("runs", "recipe", ("recipes",)),
    Reference("benchmarks", "dataset", ("datasets",)),
    Reference("evaluations", "checkpoint", ("runs", "models")),
    Reference("evaluations", "scorer", ("scorers",)),
    Reference("evaluations", "benchmarks", ("benchmarks",)),
    Reference("evaluations", "compare", ("reported",)),
    Reference("evaluations", "close_to", ("reported",)),
    Reference("samples", "checkpoint", ("runs",)),
    Reference("speed", "checkpoint", ("runs",)),
    Reference("reported", "scores", ("benchmarks",)),
)

NOUNS = {
    "models": "a model",
    "datasets": "a dataset",
    "recipes": "a recipe",
    "runs": "a run",
    "scorers": "a scorer",
    "benchmarks": "a benchmark",
    "evaluations": "an evaluation",
    "reported": "a reported row",
}
"""What an entry of a section is called."""

CURVES = ("pretraining", "openwebtext", "ablation", "chat", "policies", "preferences")
"""Parts of the report that show training runs."""


def problems(project: Project) -> Iterator[Problem]:
    """Everything wrong between the entries of a project; each check relies on the ones before it."""
    yield from _unusable_names(project)
    for reference in REFERENCES:
        yield from reference.problems(project)
    for check in CHECKS:
        yield from check(project)


def _names(value: Any) -> Iterable[str]:
    """The names in a setting: none, one, or the items of a list or keys of a mapping."""
    return () if value is None else (value,) if isinstance(value, str) else value


def _at(*path: str, says: str) -> Problem:
    """A problem of the setting at a path, with which its line begins."""
    return path, f"{'.'.join(path)} {says}"


def _unknown(path: tuple[str, ...], value: str, targets: tuple[str, ...], known: list[str]) -> Problem:
    nouns = [NOUNS[target] for target in targets]
    what = f"neither {' nor '.join(nouns)}" if len(nouns) > 1 else f"not {nouns[0]}"
    return _at(*path, says=f"= {value!r} is {what}. {did_you_mean(value, known)}")


def _unusable_names(project: Project) -> Iterator[Problem]:
    """Names become file names, and `init` names a model or a run."""
    for section in ("models", "datasets", "runs", "benchmarks", "evaluations"):
        for name in getattr(project, section):
            if not NAME.match(name):
                allowed = f"{LONGEST_NAME} lower-case letters, digits, '.' and '-' at most; it becomes a file name"
                yield _at(section, name, says=f"is not a usable name; allowed: {allowed}")
    for name in sorted(set(project.models) & set(project.runs)):
        yield (
            ("runs", name),
            f"{name!r} names both a model and a run, so `init: {name}` is ambiguous; rename one, or set "
            f"models.{name}: null in the overlay",
        )


def _streamed_data(project: Project) -> Iterator[Problem]:
    """A streamed dataset cannot be part of a mixture, and its number of rows is not known."""
    for name, dataset in project.datasets.items():
        for part in dataset.mix or []:
            if project.datasets[part].stream:
                says = f"= {part!r} is streamed, which a part of a mixture cannot be; set stream: false in the entry of"
                yield _at("datasets", name, "mix", says=f"{says} {part!r}")
    for name, run in project.runs.items():
        if project.datasets[run.data].stream and run.epochs is not None:
            unknown = "how many rows it has is not known beforehand; give `steps` in place of `epochs`"
            yield _at("runs", name, "epochs", says=f"= {run.epochs:g}, but {run.data!r} is streamed: {unknown}")


def _recipes_of_algorithms(project: Project) -> Iterator[Problem]:
    """A run's recipe asks nothing that its algorithm does not allow."""
    for name, run in project.runs.items():
        if error := algorithm_named(run.algorithm).recipe_error(project.recipes[run.recipe]):
            yield _at("runs", name, "recipe", says=f"= {run.recipe!r} {error}")


def _tokenizers(project: Project) -> Iterator[Problem]:
    """A tokenizer comes from, or is the same as, that of a model with its own; so does a config that is not stated."""
    for name, model in project.models.items():
        other = model.tokenizer
        if model.new == {} and other in project.datasets:
            yield (
                ("models", name, "new"),
                f"models.{name}.new = {{}} takes the config of {other!r}, a dataset; state one, model_type first",
            )
        if other in project.datasets:
            if model.new is None:
                says = f"= {other!r} is a dataset; name a model with the same tokenizer, or leave it out"
                yield _at("models", name, "tokenizer", says=says)
        elif other is not None and (brings := project.models[other].tokenizer):
            if project.models[other].new is not None:
                says = f"= {other!r} is a new model itself; name what brings its tokenizer: {brings}"
                yield _at("models", name, "tokenizer", says=says)
            elif model.new is None:
                says = f"= {other!r} shares that of another model itself; name that one: {brings}"
                yield _at("models", name, "tokenizer", says=says)


def _circles(project: Project) -> Iterator[Problem]:
    """A chain of `init` ends at a model."""
    for name in project.runs:
        seen = [name]
        while (start := project.runs[seen[-1]].init) in project.runs:
            if start in seen:
                circle = " -> ".join([*seen, start])
                yield _at(
                    "runs", name, "init", says=f"goes round in a circle: {circle}; start one of them from a model"
                )
                break
            seen.append(start)


def _samplers(project: Project) -> Iterator[Problem]:
    """What a row changes of the benchmarks' samplers are settings of a sampler."""
    for name, entry in project.evaluations.items():
        try:
            overlaid(GenerateSettings(), entry.generation)
        except ValueError as error:
            yield ("evaluations", name, "generation"), f"evaluations.{name}.generation: {error}"


def _questions(project: Project) -> Iterator[Problem]:
    """Questions are files of a dataset."""
    for name, entry in project.speed.items():
        if (dataset := entry.questions.split("/")[0]) not in project.datasets:
            yield _unknown(("speed", name, "questions"), dataset, ("datasets",), list(project.datasets))


def _shown(project: Project) -> Iterator[Problem]:
    """The report shows runs and evaluations that there are, each once."""
    for section in CURVES:
        for curve in getattr(project.report, section):
            if curve.run not in project.runs:
                yield _unknown(("report", section, "run"), curve.run, ("runs",), list(project.runs))
    for section in ("systems", "starts", "leaderboard"):
        for name in getattr(project.report, section):
            if name not in project.evaluations:
                yield _unknown(("report", section), name, ("evaluations",), list(project.evaluations))
            elif section == "starts" and project.evaluations[name].checkpoint not in project.runs:
                given = project.evaluations[name].checkpoint
                yield (
                    ("report", section),
                    f"report.starts = {name!r} scores {given!r}, no run; name evaluations of runs",
                )
    shown = {("report", section): [curve.run for curve in getattr(project.report, section)] for section in CURVES}
    starts = [
        f"{curve.label}, {'published' if project.runs[curve.run].recipe.startswith('published') else 'corrected'}"
        for curve in project.report.ablation
    ]
    labels = [row.label for row in project.reported.values()]
    listed = [
        *shown.items(),
        (("report", "ablation"), starts),
        (("report", "systems"), project.report.systems),
        (("report", "starts"), project.report.starts),
        (("report", "leaderboard"), project.report.leaderboard),
    ]
    for path, names in [*listed, (("reported",), labels)]:
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield path, f"{'.'.join(path)} shows {twice!r} twice; keep one of them"


def _policies(project: Project) -> Iterator[Problem]:
    """Rewards are of answers to prompts, and their own files are there."""
    for name, run in project.runs.items():
        if run.policy is None:
            continue
        for key, data in (("data", run.data), ("policy.bound_data", run.policy.bound_data)):
            if data is None:
                continue
            if data not in project.datasets:
                yield _unknown(("runs", name, key), data, ("datasets",), list(project.datasets))
            elif _is_text(project, data):
                says = f"= {data!r} holds texts without prompts; take a dataset of conversations"
                yield _at("runs", name, key, says=says)
        for reward in run.policy.reward_funcs:
            own = own_reward(reward, project.root)
            if own is not None and not own.is_file():
                says = f"= {reward!r}: there is no such file ({own}); check the path"
                yield _at("runs", name, "policy.reward_funcs", says=says)


def _preferences(project: Project) -> Iterator[Problem]:
    """What learns from preferences has chosen and rejected answers."""
    for name, run in project.runs.items():
        if "preferences" in algorithm_named(run.algorithm).takes and run.data in project.datasets:
            if not {part.kind for part in _parts(project, run.data)} <= {"preference", "auto"}:
                says = (
                    f"= {run.data!r} has no rejected answers, and algorithm = {run.algorithm!r} compares them with "
                    "chosen ones; take a dataset of kind: preference"
                )
                yield _at("runs", name, "data", says=says)


def _starts(project: Project) -> Iterator[Problem]:
    """What goes on from answers of a model starts from a run whose answers it knows how to score."""
    for name, run in project.runs.items():
        starts, before = algorithm_named(run.algorithm).starts, project.runs.get(run.init)
        if starts and before is not None and before.algorithm not in starts:
            says = (
                f"= {run.init!r} is trained with {before.algorithm!r}, whose answers algorithm = {run.algorithm!r} "
                f"does not know how to score; allowed: {', '.join(starts)}"
            )
            yield _at("runs", name, "init", says=says)


def _parts(project: Project, data: str) -> list[DatasetEntry]:
    """The datasets that one is made of."""
    entry = project.datasets[data]
    return [project.datasets[part] for part in entry.mix if part in project.datasets] if entry.mix else [entry]


def _is_text(project: Project, data: str) -> bool:
    """Whether a dataset, or a part of it, is known to hold text."""
    return any(part.kind == "text" for part in _parts(project, data))


CHECKS: tuple[Callable[[Project], Iterator[Problem]], ...] = (
    _streamed_data,
    _tokenizers,
    _circles,
    _recipes_of_algorithms,
    _samplers,
    _questions,
    _policies,
    _preferences,
    _starts,
    _shown,
)
"""What the existence of a name does not show."""
