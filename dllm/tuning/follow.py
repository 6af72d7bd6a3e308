"""The jobs of a tuning, one after another, with the functions of the workflow's rules; what is there is kept."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.algorithms import algorithm_named
from dllm.chat.settings import chat_context, chat_generation
from dllm.config import (
    DataPart,
    DownloadConfig,
    ModelEntry,
    PrepareConfig,
    Project,
    RunConfig,
    checkpoint_path,
    digest,
    download_configs,
    download_path,
    load_project,
    prepare_configs,
    read_yaml,
    run_configs,
    write_when_changed,
)
from dllm.data.convert import messages_of, text_of
from dllm.data.download import download
from dllm.data.prepare import prepare
from dllm.language_model import load
from dllm.models.inferred import described, entry_settings, parameters
from dllm.models.load import longest_row, plain_config_of
from dllm.models.tokenizers import load_tokenizer
from dllm.provenance import cores, file_lock, read_record
from dllm.training.artifact import input_paths
from dllm.training.trainer import Interrupted, train
from dllm.tuning import defaults
from dllm.tuning.look import Source, facts_of, held_out, open_source
from dllm.tuning.start import Entry, as_one, as_text, find_data, find_model, tokenizer_datasets

UNKNOWN = 0.02
"""Share of unknown tokens from which on they are said."""

EXAMPLES = 3
"""Held-out answers that are shown."""


@dataclass(frozen=True)
class Wishes:
    """What a user states: model, data, and the settings of the run, the dataset and the recipe that have a value."""

    model: str
    data: tuple[str, ...]
    output: Path | None = None
    algorithm: str = "mdlm"
    prediction: str | None = None
    run: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    block_size: int | None = None


@dataclass(frozen=True)
class Tuning:
    """A tuning that is ready to run: the overlay that says what is wanted, and the project that it makes."""

    overlay: Entry
    project: Project
    run: str
    sources: tuple[Source, ...]

    @property
    def workdir(self) -> Path:
        """Where everything is written."""
        return Path(self.project.workdir)

    @property
    def config(self) -> RunConfig:
        """The config of the training."""
        return run_configs(self.project)[self.run]


@dataclass(frozen=True)
class Example:
    """A held-out row: the question, the answer in the data, and the model's answer."""

    prompt: str
    reference: str
    answer: str


def set_up(wishes: Wishes, say: Callable[[str], None]) -> Tuning:
    """Download what is needed, look at it and choose how to train. Raises ValueError for what cannot work."""
    name, models, place = find_model(wishes.model, _pins(wishes))
    if place is not None:
        found = entry_settings(place, wishes.prediction)
        models[name] |= {key: value for key, value in found.items() if value != ModelEntry.model_fields[key].default}
    run = f"chat-{name}"
    tokenizers = tokenizer_datasets(models)
    datasets = find_data(wishes.data, _pins(wishes), wishes.dataset, tokenizers)
    data, datasets = as_one(datasets, models)
    datasets |= tokenizers
    output = wishes.output or Path("results") / run
    overlay: Entry = {"replaces": "all", "workdir": as_text(output), "models": models, "datasets": datasets}
    overlay["recipes"] = {"tune": {"response_end": "one"} if wishes.algorithm == "edit_flows" else {}}
    settings = {"algorithm": wishes.algorithm, "init": name, "data": data, "recipe": "tune", "launch": "cpu"}
    overlay["runs"] = {run: settings | {"steps": 1}}
    project = load_project(None, overlay)
    algorithm_named(wishes.algorithm).part("sampler")  # without one, nothing could be shown in the end
    for config in download_configs(project).values():
        _download(config, Path(project.workdir), say)

    directory = Path(project.workdir) / checkpoint_path(project, name)
    say(f"model    {name}: {described(directory)}")
    sources = tuple(_sources(project, data))
    for source in sources:
        say(f"data     {source.name}: {len(source.rows):,} {source.said}")
    facts = facts_of(sources, load_tokenizer(directory, project.models[name]))
    if facts.unknown > UNKNOWN:
        say(
            f"         {100 * facts.unknown:.0f} % of the tokens to learn are unknown to the tokenizer of {name}, "
            "and an unknown token is never told from another: a model of this language or script learns more"
        )
    positions = _positions(directory) - (1 if wishes.algorithm == "edit_flows" else 0)
    if (length := wishes.run.get("length", 0)) > positions:
        raise ValueError(
            f"length = {length} is longer than the model allows ({positions}); lower it or take another model"
        )
    chosen = defaults.run_settings(facts, parameters=parameters(directory), positions=positions, wished=wishes.run)
    if (wishes.block_size or 0) > chosen["length"]:
        raise ValueError(f"block_size = {wishes.block_size} is longer than a row ({chosen['length']}); lower it")
    overlay["recipes"]["tune"]["block_size"] = wishes.block_size or defaults.block_size(facts, chosen["length"])
    further = {name: value for name, value in wishes.run.items() if name not in defaults.WISHED}
    overlay["runs"][run] = settings | {"launch": _launch()} | chosen | further
    return Tuning(overlay, load_project(None, overlay), run, sources)


def follow(tuning: Tuning, say: Callable[[str], None], progress: Callable, *, quiet: bool, replace: bool) -> Path:
    """Prepare and train, going on where an earlier start ended; returns the directory of the run.

    Raises Interrupted after Ctrl-C or SIGTERM, with the state saved; ValueError, one line, if a finished run of other
    data or settings is in the place and may not be replaced.
    """
    config, workdir = tuning.config, tuning.workdir
    for prepared in prepare_configs(tuning.project).values():
        _prepare(prepared, workdir, say, progress)
    write_when_changed(workdir / "configs" / "runs" / f"{config.name}.yaml", config)
    target = workdir / "runs" / config.name
    if not replace and _is_made(target, digest(config), input_paths(config), workdir):
        say(f"{config.name}: trained already")
        return target
    if target.exists() and not replace:
        raise ValueError(
            f"{target}: holds a run of other data or settings; pass --output for another place, or --replace to put "
            "the new one there when it is finished"
        )
    with saving_on_interrupt():
        return train(config, workdir, quiet=quiet, replace=replace)


def examples(tuning: Tuning) -> list[Example]:
    """Some held-out rows with the trained model's answers; of texts, how it goes on from their first words."""
    model = load(tuning.workdir / "runs" / tuning.run / "model")
    sidecar = model.backbone.sidecar
    context = chat_context(sidecar, model.max_length)
    settings = chat_generation(sidecar, context)
    chosen: list[tuple[Any, str, str]] = []
    for source in tuning.sources:
        for number, where in held_out(source, 8 * EXAMPLES):
            try:
                prompt, shown, reference = _question(source, number, where)
                fits = len(model.encode_prompt(prompt)) + settings.max_new_tokens <= context
            except ValueError:
                continue  # it was dropped in training, too
            if fits and len(chosen) < EXAMPLES:
                chosen.append((prompt, shown, reference))
    answers = model.generate([prompt for prompt, _, _ in chosen], settings) if chosen else []
    return [Example(shown, ref, text.strip()) for (_, shown, ref), text in zip(chosen, answers, strict=True)]


@contextmanager
def saving_on_interrupt() -> Iterator[None]:
    """Let the first Ctrl-C do what SIGTERM does, once the training listens to that; a second one ends at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def interrupt(number, frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def saved_step(tuning: Tuning) -> int | None:
    """The step up to which an interrupted training is saved."""
    steps = (tuning.workdir / ".work").glob(f"{tuning.run}-*/step-*")
    return max((int(path.name[5:]) for path in steps if path.name[5:].isdigit()), default=None)


def losses(run: Path) -> tuple[dict, dict]:
    """The first and the last evaluation of a run: loss, standard_error and rows."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [row for row in rows if row["split"] in ("eval", "final")]
    return evaluations[0], evaluations[-1]


# --------------------------------------------------------------------------------------------------------------------
# Pieces


def _pins(wishes: Wishes) -> dict[str, str]:
    """Hub id -> commit, as an earlier start wrote them: one that is begun goes on with the same files."""
    commits = {}
    output = wishes.output or Path("results")
    for path in [*output.glob("configs/downloads/*.yaml"), *output.glob("chat-*/configs/downloads/*.yaml")]:
        config = read_yaml(path)
        entry = config.get("model") or config.get("dataset") or {}
        if entry.get("hub"):
            commits[entry["hub"]] = entry["revision"]
    return commits


def _sources(project: Project, data: str) -> Iterator[Source]:
    for name in project.datasets[data].mix or [data]:
        path = str(Path(project.workdir) / download_path(project, name))
        entry, whole = project.datasets[name], project.datasets[data].rows
        rows = min(filter(None, (entry.rows, whole)), default=None)
        yield open_source(DataPart(name=name, path=path, entry=entry.model_copy(update={"rows": rows})))


def _positions(directory: Path) -> int:
    from dllm.models.published import family_of, published_config, stock_config

    family = family_of(directory)
    config = stock_config(family, published_config(directory)) if family else plain_config_of(directory)
    return longest_row(config)


def _launch() -> str:
    from dllm.core.devices import best_device

    return "cpu" if best_device(training=True).type == "cpu" else "gpu"


def _download(config: DownloadConfig, workdir: Path, say: Callable[[str], None]) -> None:
    target = workdir / "downloads" / config.name
    write_when_changed(workdir / "configs" / "downloads" / f"{config.name}.yaml", config)
    inputs = [config.tokenizer_path] if config.tokenizer_path else []
    if _is_made(target, digest(config), inputs, workdir):
        return
    with file_lock(workdir / ".work" / "locks" / f"download-{config.name}"):
        download(config, workdir)
    manifest = target / "manifest.json"
    facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if facts.get("licence"):
        say(f"licence  {config.name}: {facts['licence']}")
    if facts.get("head"):
        say(f"model    {facts['head']}")


def _prepare(config: PrepareConfig, workdir: Path, say: Callable[[str], None], progress: Callable) -> None:
    target = workdir / "data" / config.name
    write_when_changed(workdir / "configs" / "data" / f"{config.name}.yaml", config)
    inputs = sorted({part.path for part in config.parts})
    if _is_made(target, digest(config), inputs, workdir) and _is_newer(target, [*inputs, config.model_path], workdir):
        return
    with file_lock(workdir / ".work" / "locks" / f"prepare-{config.name}"):
        manifest = prepare(config, workdir, progress, cores())
    train, test = manifest["splits"]["train"], manifest["splits"]["test"]
    longest = f"the longest has {train['longest_row']} tokens"
    say(f"prepared {train['rows']:,} rows to train on, {longest}; {test['rows']:,} are held out")
    dropped = train["dropped_rows"] + test["dropped_rows"]
    if dropped:
        unusable = manifest.get("unusable", {"rows": 0})
        why = f"{unusable['rows']:,} unusable, e.g. {unusable['first']}" if unusable["rows"] else ""
        long = (
            f"{dropped - unusable['rows']:,} with a prompt that fills the length" if dropped > unusable["rows"] else ""
        )
        say(f"         {dropped:,} rows are left out: {'; '.join(filter(None, (long, why)))}")


def _is_made(target: Path, config_digest: str, inputs: list[str], workdir: Path) -> bool:
    """Whether an artifact of this configuration, from inputs as they are now, is there."""
    if not (target.is_dir() and Path(f"{target}.json").exists()):
        return False
    written = read_record(f"{target}.json")
    now = {path: read_record(workdir / f"{path}.json")["digest"] for path in inputs}
    return written["config_digest"] == config_digest and written["inputs"] == now


def _is_newer(target: Path, inputs: list[str], workdir: Path) -> bool:
    """Whether an artifact was made after what it is made of, as the workflow asks."""
    made = Path(f"{target}.json").stat().st_mtime_ns
    return all((workdir / f"{path}.json").stat().st_mtime_ns <= made for path in inputs)


def _question(source: Source, number: int, where: str) -> tuple[Any, str, str]:
    """(prompt for the model, its words as shown, the answer in the data) of a row."""
    row = source.rows[number]
    if source.is_text:
        words = text_of(row, where).split()
        half = min(16, len(words) // 2)
        if not half:
            raise ValueError(f"{where}: too short to be continued")
        return " ".join(words[:half]), " ".join(words[:half]), " ".join(words[half : half + 48])
    messages = messages_of(row, source.kind, where)
    return messages[:-1], messages[-2]["content"], messages[-1]["content"]


__all__ = ["Example", "Interrupted", "Tuning", "Wishes", "examples", "follow", "losses", "saved_step", "set_up"]
