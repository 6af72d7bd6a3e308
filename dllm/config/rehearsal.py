"""A rehearsal: the same graph with the same models, data and settings, cut short so that it takes minutes.

What is downloaded stays whole, and nothing is added or left out: every entry is there, with less of it.
"""

from __future__ import annotations

from typing import Any, TypeVar

from dllm.algorithms import algorithm_named
from dllm.config.entries import (
    BenchmarkEntry,
    DatasetEntry,
    EvaluationEntry,
    Project,
    Rehearsal,
    RunEntry,
    SampleEntry,
    SpeedEntry,
)
from dllm.config.policy import PolicySettings, PreferenceSettings
from dllm.config.settings import GenerateSettings, Resources, Scorer, Settings

Entry = TypeVar("Entry", bound=Settings)

SUFFIX = "-rehearsal"
"""What the work directory of a rehearsal is called, behind the name of the one that is rehearsed."""


def rehearsed(project: Project) -> Project:
    """The project cut short as its section `rehearsal` says, below a work directory of its own.

    A project without that section is returned as it is. One process runs each job, on the accelerator where there is
    one: nothing is asked of a cluster.
    """
    most = project.rehearsal
    if most is None:
        return project

    def cut(section: str, one: Any) -> dict[str, Any]:
        return {name: one(entry, most) for name, entry in getattr(project, section).items()}

    return project.model_copy(
        update={
            "workdir": project.workdir.rstrip("/") + SUFFIX,
            "cache": "none",
            "datasets": cut("datasets", _dataset),
            "runs": cut("runs", _run),
            "scorers": cut("scorers", _scorer),
            "benchmarks": cut("benchmarks", _benchmark),
            "evaluations": cut("evaluations", _evaluation),
            "samples": cut("samples", _sample),
            "speed": cut("speed", _speed),
            "report": _changed(project.report, title=f"Rehearsal, cut short: {project.report.title}"),
        }
    )


def _changed(entry: Entry, **changes: Any) -> Entry:
    """An entry with some settings changed, checked as a whole."""
    return type(entry)(**(dict(entry) | changes))


def _least(*values: int | None) -> int:
    """The smallest of the values there are."""
    return min(value for value in values if value is not None)


def _dataset(entry: DatasetEntry, most: Rehearsal) -> DatasetEntry:
    if entry.kind in ("benchmark", "world"):
        return entry
    less = {"test_rows": _least(entry.test_rows, most.test_rows), "test_share": _test_share(entry, most)}
    if entry.stream:
        return _changed(entry, **less, shuffle_rows=_least(entry.shuffle_rows, most.rows))
    # a test split of its own would be tokenized whole: some train rows stand for it
    return _changed(entry, **less, rows=_least(entry.rows, most.rows), test_split=None)


def _test_share(entry: DatasetEntry, most: Rehearsal) -> float:
    """The share that `test_rows` are, of a set whose size is stated."""
    share = entry.test_share or DatasetEntry.model_fields["test_share"].default
    return min(share, most.test_rows / entry.documents) if entry.documents else share


def _run(entry: RunEntry, most: Rehearsal) -> RunEntry:
    batch = _least(entry.global_batch_size, most.batch)
    return _changed(
        entry,
        length=_least(entry.length, most.length),
        steps=_least(entry.steps, entry.stop_after, most.steps),
        epochs=None,
        stop_after=None,
        global_batch_size=batch,
        micro_batch_size=_least(entry.micro_batch_size, max(1, batch // 2)),
        evaluations=1,
        eval_rows=_least(entry.eval_rows, batch),
        eval_draws=1,
        policy=entry.policy and _policy(entry.policy, most),
        preferences=_preferences(entry, most),
        launch="gpu",  # the one process that it starts takes the CPU where there is no accelerator
        resources=Resources(),
    )


def _preferences(entry: RunEntry, most: Rehearsal) -> PreferenceSettings:
    if "preferences" not in algorithm_named(entry.algorithm).takes:
        return entry.preferences
    return _changed(entry.preferences, passes=_least(entry.preferences.passes, most.passes))


def _policy(settings: PolicySettings, most: Rehearsal) -> PolicySettings:
    less = {"num_generations": 2, "num_generations_eval": 1, "passes": _least(settings.passes, most.passes)}
    return _changed(settings, generation=_generation(settings.generation, most), **less)


def _generation(settings: GenerateSettings, most: Rehearsal) -> GenerateSettings:
    return _changed(settings, **_less(dict(settings), most))


def _less(given: dict[str, Any], most: Rehearsal) -> dict[str, Any]:
    """Those settings of a sampler that are more than a rehearsal keeps; an answer still has two blocks."""
    limits = {
        "max_new_tokens": most.new_tokens,
        "steps": most.passes,
        "block_size": most.new_tokens // 2,
        "batch_size": most.batch,
        "batch_tokens": most.batch_tokens,
    }
    return {name: _least(given[name], limit) for name, limit in limits.items() if name in given}


def _scorer(scorer: Scorer, most: Rehearsal) -> Scorer:
    likelihood = scorer.likelihood
    draws = _least(likelihood.mc_draws, most.draws)
    return _changed(
        scorer,
        likelihood=_changed(
            likelihood,
            budget=_least(likelihood.budget, most.passes),
            mc_draws=draws,
            mc_batch=draws,  # which must divide them
            batch_tokens=_least(likelihood.batch_tokens, most.batch_tokens),
        ),
    )


def _benchmark(entry: BenchmarkEntry, most: Rehearsal) -> BenchmarkEntry:
    size, shots = entry.size, _least(entry.shots, most.shots)
    if size:  # a prompt is the examples and the question, each about as long
        size = _changed(size, prompt_tokens=max(1, size.prompt_tokens * (shots + 1) // (entry.shots + 1)))
    return _changed(
        entry,
        documents=_least(entry.documents, most.documents),
        shots=shots,
        size=size,
        generation=_generation(entry.generation, most),
    )


def _evaluation(entry: EvaluationEntry, most: Rehearsal) -> EvaluationEntry:
    return _changed(entry, generation=entry.generation | _less(entry.generation, most), resources=Resources())


def _sample(entry: SampleEntry, most: Rehearsal) -> SampleEntry:
    return _changed(
        entry,
        conversations=entry.conversations[: most.conversations],
        generation=_generation(entry.generation, most),
    )


def _speed(entry: SpeedEntry, most: Rehearsal) -> SpeedEntry:
    return _changed(
        entry,
        documents=_least(entry.documents, most.documents),
        steps=list(dict.fromkeys(_least(steps, most.passes - turn) for turn, steps in enumerate(entry.steps[:2]))),
        generation=_generation(entry.generation, most),
        options={name: changes | _less(changes, most) for name, changes in entry.options.items()},
    )
