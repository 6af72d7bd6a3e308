"""What is wrong with the rows of a dataset, the tokenizer of a model, the tasks of a benchmark: a line each."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from fnmatch import fnmatch
from pathlib import Path

from dllm.checking.sketch import Rows, split_sizes
from dllm.config import DataPart, DatasetEntry, EvaluationConfig, ModelEntry, Project
from dllm.data.convert import answers_of, kind_of_part, place_of, read_rows, text_of
from dllm.data.download import PICKLED
from dllm.evaluation.evaluate import check_metrics
from dllm.evaluation.tables import cards_read_once
from dllm.evaluation.task_files import build_requests, declared_metrics, load_tasks
from dllm.models.load import WEIGHTS, check_entry, longest_row, stock_config_of
from dllm.models.published import family_of, is_encoder, published_config
from dllm.models.tokenizers import check_same_tokenizer, read_tokenizer, set_up_tokenizer
from dllm.planning.shapes import differences, translated

ABOUT = 0.05
"""How far an estimate of an entry may be from what there is."""


def dataset_errors(name: str, entry: DatasetEntry, directory: Path, rows: Rows, found: Rows) -> Iterator[str]:
    """Of the splits that are read for training: missing, unreadable, of another kind, of another size.

    directory: the sketch of the repository, or of what was downloaded; found: is given the rows of each split.
    """
    part = DataPart(name=name, path=str(directory), entry=entry.model_copy(update={"counts": None}))
    for split in ["train", *([entry.test_split] if entry.test_split else [])]:
        first = read_rows(part, split)
        if line := _unusable(part, first):
            yield line
    found |= split_sizes(directory, entry.config, rows)
    for split, stated in (entry.counts or {}).items():
        if found.get(split) not in (stated, None):
            yield f"split {split!r} has {found[split]:,} rows, counts of its entry {stated:,}; correct `counts`"
    for key, read in (("documents", "train"), ("test_documents", entry.test_split or "")):
        about, size = getattr(entry, key), found.get(read)
        if about and size and read not in (entry.counts or {}) and abs(about - size) > ABOUT * size:
            yield f"split {read!r} has {size:,} rows, {key} of its entry {about:,}; correct `{key}`"


def _unusable(part: DataPart, rows) -> str | None:
    """The line for rows that cannot be read as the entry says, or None: of droppable rows one must be usable."""
    kind, _ = kind_of_part(part, rows)
    refused = None
    for number in range(len(rows)):
        where = place_of(part, rows, number)
        try:
            if kind == "text":
                text_of(rows[number], where)
            else:
                answers_of(rows[number], kind, where)
        except ValueError as error:
            refused = refused or str(error)
            if not part.entry.drop_unusable:
                return refused
        else:
            if part.entry.drop_unusable:
                return None
    return refused


def model_errors(project: Project, name: str, entry: ModelEntry, directory: Path) -> Iterator[str]:
    """Of a model whose files but for the weights are in a directory: what keeps it from what the project asks of it."""
    published, raw = family_of(directory), published_config(directory)
    config = stock_config_of(directory, published).get_text_config()
    known = set(_classes(entry))
    if type(config).__name__ not in known and (published is None or published.loader is None):
        yield f"model_type = {config.model_type!r} is not one of transformers' {entry.family}s; correct `family`"
    if entry.shape and raw and (different := differences(entry.shape, translated(raw))):
        yield f"shape of its entry: {', '.join(different)} as config.json says; correct `shape`"
    positions = longest_row(config)
    for run, settings in project.runs.items():
        if project.root_model(run) == name and settings.length > positions:
            yield f"runs.{run}.length = {settings.length}, and the model has {positions} positions; lower it"
    tokenizer = read_tokenizer(directory)
    words = len(tokenizer)
    if words > config.vocab_size:
        yield f"the tokenizer has {words} tokens, the model {config.vocab_size}; they are not from one checkpoint"
    rows = [row for row in project.evaluations.values() if project.root_model(row.checkpoint) == name]
    runs = [run for run in project.runs.values() if name in (run.init, *map(project.root_model, project.runs))]
    if published:
        check_entry(entry, published, directory)
    if any(row.kind == "dllm" for row in rows) or runs:
        set_up_tokenizer(tokenizer, entry, directory)
    asked = [row for row in rows if row.chat_template and row.checkpoint == name]
    if asked and not tokenizer.chat_template and not is_encoder(directory):
        yield "the tokenizer has no chat template; set chat_template: false in the evaluations of it"


def tokenizer_errors(entry: ModelEntry, directory: Path, other: Path) -> Iterator[str]:
    """Of a model that states the tokenizer of another one, whose files are in `other`: that it has another one."""
    try:
        check_same_tokenizer(directory, other, entry)
    except ValueError as error:
        yield str(error)


def _classes(entry: ModelEntry) -> list[str]:
    """Names of the configurations that the classes of a family are made of; no such class is loaded for it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    known = MODEL_FOR_MASKED_LM_MAPPING_NAMES if entry.family == "encoder" else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [CONFIG_MAPPING_NAMES[model_type] for model_type in known if model_type in CONFIG_MAPPING_NAMES]


def task_errors(config: EvaluationConfig, workdir: Path, rows: Rows, counts: Rows) -> Iterator[str]:
    """Of a benchmark whose data is sketched below a work directory: tasks that cannot be asked, metrics, documents.

    Every task makes the prompt of its first document, with its examples. counts: is given tasks and documents.
    """
    stated = config.expected_documents
    changes = {"expected_documents": None, "limit": 1, "chat_template": False, "fewshot_as_multiturn": False}
    config = config.model_copy(update=changes)
    tasks = load_tasks(config, workdir)
    declared = declared_metrics(tasks)
    if declared is not None:
        check_metrics(config, declared)
    try:
        with redirect_stderr(io.StringIO()):  # a bar for each task
            build_requests(tasks, config, None)
    except Exception as error:  # a template or a function of a task, which may raise anything
        first = (str(error).strip() or "no reason given").splitlines()[0]
        yield f"task {config.task!r}: no prompt can be made of its first rows ({type(error).__name__}: {first})"
    found = _documents(tasks, workdir / config.data, rows) if config.data else None
    counts |= {"tasks": len(tasks["tasks"]), "documents": found}
    if stated and found not in (stated, None):
        yield f"task {config.task!r} has {found:,} documents, size of the benchmark {stated:,}; correct `size`"


def _documents(tasks: dict, data: Path, rows: Rows) -> int | None:
    """Documents of all tasks in the real files; None if one leaves rows out, or where the first bytes do not tell."""
    total = 0
    sizes: dict[str | None, Rows] = {}
    for task in tasks["tasks"].values():
        config, split = task.config.dataset_name, task.config.test_split or task.config.validation_split
        if config not in sizes:
            with cards_read_once(config):
                sizes[config] = split_sizes(data, config, rows)
        found = sizes[config].get(re.sub(r"\[.*", "", split or ""))
        if found is None or len(task.eval_docs) != len(task.dataset[split]):
            return None
        total += found
    return total


def has_weights(names: list[str]) -> bool:
    """Whether a repository's files include weights in a format that is fetched."""
    return any(name.endswith(".safetensors") or fnmatch(name, PICKLED[0]) for name in names)


PLACEHOLDER = WEIGHTS[0]
"""An empty file of this name stands for the weights, which are not looked at."""
