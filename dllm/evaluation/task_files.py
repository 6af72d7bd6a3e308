"""Finding lm-eval's tasks: our templates rendered, stock tasks with their data pinned, examples seeded.

A task file of ours `include`s lm-eval's own, so that prompt, filter and metric are the real ones, and replaces only
where the data come from. In a template, {LM_EVAL_TASKS} is lm-eval's directory of tasks, {DATA} that of the data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from dllm.config import EvaluationConfig, did_you_mean, digest
from dllm.evaluation.code_tasks import metric_names, sandboxed_scoring, scored_by_programs
from dllm.evaluation.tables import tables_read_once
from dllm.provenance import directory_digest, how_to_make

OURS = Path(__file__).parent / "tasks"
STOCK_DIRECTORIES = {
    "lambada_openai": ["lambada"],
    "gsm8k": ["gsm8k"],
    "ceval-valid": ["ceval"],
    "bbh": ["bbh/cot_fewshot"],
    "minerva_math": ["minerva_math", "benchmarks"],
    "mmlu": ["mmlu/default"],
    "mmlu_generative": ["mmlu/generative"],
    "winogrande": ["winogrande"],
    "hellaswag": ["hellaswag"],
    "cmmlu": ["cmmlu"],
    "humaneval": ["humaneval"],
    "humaneval_instruct": ["humaneval"],
    "mbpp": ["mbpp"],
}
"""Where lm-eval keeps the tasks of the report; for others, all of its 14,000 files are indexed, which takes seconds."""


def load_tasks(config: EvaluationConfig, workdir: str | Path) -> dict:
    """lm-eval's `TaskDict` for a benchmark: {"tasks": {name: Task}, "groups": ..., "group_map": ...}.

    Rendered files and the cache of `datasets` go to `<workdir>/.work`. Raises ValueError, one line, for an unknown
    task and for data that cannot be read.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    workdir = Path(workdir)
    data = workdir / config.data if config.data else None
    if data is not None and not data.is_dir():
        raise ValueError(f"{config.benchmark}: data = {config.data!r} is not in {workdir}, {how_to_make(data)}")
    datasets.disable_progress_bars()
    compile_templates_once()
    # our files override lm-eval's on purpose: 70 lines of a log that say nothing
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)
    reading: AbstractContextManager = nullcontext()
    if data is not None:
        # the cache of `datasets` knows a file by path and time only and would return old rows after a change
        arrow = (workdir / ".work" / "datasets" / content_digest(data)[:16]).resolve()
        datasets.config.HF_DATASETS_CACHE = arrow
        reading = tables_read_once(data, arrow)
    rendered_root = workdir / ".work" / "tasks"
    if config.task_directory is not None:
        directories = [render(template_directory(config.task_directory, workdir), data, rendered_root)]
    else:
        directories = stock_directories(config.task)
    manager = TaskManager(include_path=directories, include_defaults=not directories)
    if config.task not in manager.task_index:
        raise ValueError(
            f"{config.benchmark}: task = {config.task!r} is not in {config.task_directory or 'lm-eval'}. "
            f"{did_you_mean(config.task, manager.all_tasks)}"
        )
    if config.task_directory is None and (data is not None or config.revision is not None):
        pins = pinned(manager.task_index, config.task, data, config.revision)
        directories = [*directories, write_files(pins, rendered_root)]
        manager = TaskManager(include_path=directories, include_defaults=len(directories) == 1)
    loaded = _load(manager, config, reading)
    for task in loaded["tasks"].values():
        _keep_documents(task)
    check_documents(loaded, config)
    for task in loaded["tasks"].values():
        if config.shots is not None:
            task.set_config("num_fewshot", config.shots)
    return loaded


def check_documents(tasks: dict, config: EvaluationConfig) -> None:
    """Raise ValueError, one line, if the tasks have another number of documents than the benchmark's entry says."""
    found = sum(len(task.eval_docs) for task in tasks["tasks"].values()) if config.expected_documents else None
    if found != config.expected_documents:
        raise ValueError(
            f"{config.benchmark}: task {config.task!r} has {found} documents, and the benchmark's size says "
            f"{config.expected_documents}; are other files of the repository among them, or is it another revision? "
            "Correct the dataset, or `size`"
        )


def content_digest(directory: Path) -> str:
    """Digest of a directory's files; within a process, read again only when the file system says that they changed."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    states = [(path, path.stat()) for path in paths]
    # the time of the last change of a file, unlike that of its content, cannot be set back
    return _digest_of(directory, tuple((p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in states))


@lru_cache(maxsize=64)
def _digest_of(directory: Path, state: tuple) -> str:
    return directory_digest(directory)["digest"]


def seed_examples(tasks: dict, seed: int) -> None:
    """Start the draw of examples afresh, so that building the requests again gives the same prompts."""
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed)


def compile_templates_once() -> None:
    """Let lm-eval compile a template once, in this process; it does so for every document, and again for its answer."""
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = lru_cache(maxsize=1024)(env.from_string)


def build_requests(tasks: dict, config: EvaluationConfig, lm) -> dict[str, list]:
    """All requests of all documents by kind, as `lm_eval.evaluate` builds them for a model `lm`."""
    seed_examples(tasks, config.seed)
    requests: dict[str, list] = {}
    for task in tasks["tasks"].values():
        task.build_all_requests(
            limit=config.limit,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            chat_template=lm.apply_chat_template if config.chat_template else None,
            tokenizer_name=lm.tokenizer_name if config.chat_template else "",
        )
        for request in task.instances:
            requests.setdefault(request.request_type, []).extend([request] * request.repeats)
    return requests


def reads_greedy(task) -> bool:
    """Whether a metric of the task reads `is_greedy`: accuracy of a single continuation, exact match of choices."""
    metrics = task.aggregation()
    if callable(task.config.process_results):
        return task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice")
    return (task.OUTPUT_TYPE == "loglikelihood" and "acc" in metrics) or (
        task.OUTPUT_TYPE == "multiple_choice" and "exact_match" in metrics
    )


Divisors = Callable[[Any], dict[str, float]]
"""Of a request, by metric: what its log-likelihood is divided by before choices are compared."""


def choice_divisors(task) -> Divisors | None:
    """How the metrics of a multiple-choice task compare its choices; None if more than the best choice is read."""
    metrics = set(task.aggregation())
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results) or not metrics <= set(_DIVISORS):
        return None

    def divisors(request) -> dict[str, float]:
        choice = task.doc_to_choice(request.doc)[request.idx]
        return {metric: _DIVISORS[metric](choice) for metric in sorted(metrics)}

    return divisors


_DIVISORS: dict[str, Callable[[str], float]] = {
    "acc": lambda choice: 1.0,
    "acc_norm": lambda choice: float(len(choice)),
    "acc_bytes": lambda choice: float(len(choice.encode())),
}
"""As in `process_results` of lm-eval's tasks."""


def declared_metrics(tasks: dict) -> set[str] | None:
    """`metric,filter` names that the tasks declare; None where code of a task decides which there are."""
    names = set()
    for task in tasks["tasks"].values():
        entries = task.config.metric_list or []
        own = [entry for entry in entries if callable(entry["metric"])]
        if callable(task.config.process_results) or not all(scored_by_programs(entry["metric"]) for entry in own):
            return None
        filters = [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]]
        metrics = [name for entry in own for name in metric_names(entry)] if own else task.aggregation()
        names |= {f"{metric},{name}" for metric in metrics for name in filters}
    return names


def definition_digest(tasks: dict) -> str:
    """Digest of what the tasks are (prompts, filters, metrics, and the source of their functions), not of where."""
    definitions = {}
    for name, task in tasks["tasks"].items():
        definition = task.dump_config()
        for key in ("dataset_path", "dataset_kwargs"):
            definition.pop(key, None)
        definition["metadata"] = {"version": (definition.get("metadata") or {}).get("version")}
        definitions[name] = json.loads(json.dumps(definition, default=_portable))
    return digest(definitions)


def task_versions(tasks: dict) -> dict[str, str | None]:
    """The version that lm-eval gives each task."""
    found = {name: (task.dump_config().get("metadata") or {}).get("version") for name, task in tasks["tasks"].items()}
    return {name: None if version is None else str(version) for name, version in sorted(found.items())}


def _portable(value) -> str:
    """A function by its name: its address in memory says nothing."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


# --------------------------------------------------------------------------------------------------------------------
# Files


def template_directory(name: str, workdir: Path) -> Path:
    """A directory of task files: one that comes with the package, else a path. Raises ValueError if neither exists."""
    for directory in (OURS / name, workdir / name):
        if directory.is_dir() and any(directory.glob("*.yaml")):
            return directory
    known = sorted(p.name for p in OURS.iterdir() if p.is_dir()) if OURS.is_dir() else []
    raise ValueError(f"task_directory = {name!r} holds no task files (*.yaml). {did_you_mean(name, known)}")


def stock_directories(task: str) -> list[Path]:
    """lm-eval's directories that hold one of the report's tasks; empty if the whole index must be searched."""
    return [stock_root() / name for name in STOCK_DIRECTORIES.get(task, [])]


def stock_root() -> Path:
    """lm-eval's directory of tasks."""
    import lm_eval

    return Path(lm_eval.__file__).resolve().parent / "tasks"


def render(templates: Path, data: Path | None, root: Path) -> Path:
    """Directory of the templates' files with their placeholders filled in. Raises ValueError if {DATA} has no value."""
    files = {}
    for path in sorted(templates.iterdir()):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            if data is None and "{DATA}" in text:
                raise ValueError(f"{path.name} reads {{DATA}}, but the evaluation has no `data`; name its directory")
            text = text.replace("{LM_EVAL_TASKS}", str(stock_root()))
            text = text.replace("{DATA}", str(data.resolve()) if data is not None else "")
        files[path.name] = text
    return write_files(files, root)


def pinned(index: dict, task: str, data: Path | None, revision: str | None) -> dict[str, str]:
    """Task files that include the stock ones under `task` and name their data: a local snapshot, or a revision."""
    files = {}
    for name in leaf_tasks(index, task):
        lines = [f"include: {json.dumps(str(index[name].yaml_path))}", f"task: {json.dumps(name)}"]
        if data is not None:
            lines.append(f"dataset_path: {json.dumps(str(data.resolve()))}")
        else:
            kwargs = {**((index[name].cfg or {}).get("dataset_kwargs") or {}), "revision": revision}
            lines.append(f"dataset_kwargs: {json.dumps(kwargs)}")
        files[f"{name}.yaml"] = "\n".join(lines) + "\n"
    return files


def leaf_tasks(index: dict, name: str) -> Iterator[str]:
    """Names of the tasks in a group, a tag, or a task itself."""
    entry = index[name]
    if entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        yield from _leaves(index, entry.cfg.get("task") or [])
    else:
        yield name


def _leaves(index: dict, members: list) -> Iterator[str]:
    for member in members:
        stated: dict[str, Any] = {"task": member} if isinstance(member, str) else member
        child, own = stated.get("group") or stated.get("task"), stated.get("task")
        if isinstance(child, str) and child in index:
            yield from leaf_tasks(index, child)
        elif isinstance(own, list):  # a group that has no file of its own
            yield from _leaves(index, own)


def write_files(files: dict[str, str], root: Path) -> Path:
    """A directory below root with exactly these files, named after their content; other processes may make it too."""
    name = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=root, prefix="unfinished-"))
    for file_name, text in files.items():
        (unfinished / file_name).write_text(text, encoding="utf-8")
    try:
        os.rename(unfinished, target)
    except OSError:  # another process was quicker
        shutil.rmtree(unfinished)
        if not target.is_dir():
            raise
    return target


def _keep_documents(task: Any) -> None:
    """Let a task make its documents once; lm-eval makes them anew wherever it counts or names them."""
    for name in ("training_docs", "validation_docs", "test_docs"):
        setattr(task, name, cache(getattr(task, name)))


def _load(manager, config: EvaluationConfig, reading: AbstractContextManager) -> dict:
    try:
        with sandboxed_scoring(), reading:
            return manager.load([config.task])
    except Exception as error:  # what is wrong with a file comes as an error of whoever reads it
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "a package is missing" if isinstance(error, ImportError) else "its data cannot be read"
        raise ValueError(
            f"{config.benchmark}: task {config.task!r}: {kind} ({first}); "
            "fetch the data first, or install the extra the task needs (`lm_eval[math]` for mathematics)"
        ) from error
