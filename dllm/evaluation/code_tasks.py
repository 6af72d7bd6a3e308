"""lm-eval's tasks that run what a model wrote (HumanEval, MBPP and their relatives), scored in our sandbox.

Their task files, prompts, filters and metrics stay lm-eval's own. Only the scorer underneath is replaced: the files
ask Hugging Face's `evaluate` for `code_eval`, which is downloaded code that runs programs in a fork of the evaluation.
While a task is loaded, that request is answered with `PROGRAMS`, which has the same `compute`.

A program is the candidate, a line break, and the tests, as for `code_eval`; it passes if it reaches its end. All
programs of a task are run side by side as soon as its answers are known, and their outcomes are kept on the disk beside
the answers: an evaluation that was killed goes on, and the same program is never run twice.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllm.config import digest
from dllm.evaluation import sandbox
from dllm.evaluation.sandbox import Outcome, run_programs
from dllm.evaluation.store import AnswerStore
from dllm.provenance import file_digest


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Chance that one of k programs, drawn without repetition from n of which `passed` passed, passes.

    Raises ValueError unless 0 <= passed <= n and 1 <= k <= n. Source: Chen et al. 2021 (arXiv:2107.03374), eq. 1.
    """
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: n = {n}, passed = {passed}, k = {k}; give 0 <= passed <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def programs_of(predictions: Any, reference: str) -> list[str]:
    """The programs that decide about one document: each candidate followed by the tests."""
    candidates = [predictions] if isinstance(predictions, str) else predictions
    return [f"{candidate}\n{reference}" for candidate in candidates]


class Programs:
    """The outcomes of programs; `compute` is that of `code_eval` in Hugging Face's `evaluate`."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Outcome] = {}
        self._store: AnswerStore | None = None

    def keep_in(self, directory: str | Path, writer: str) -> None:
        """Read the outcomes kept below a directory, by all writers, and add new ones to this writer's file."""
        self._store = AnswerStore(Path(directory) / sandbox_digest()[:16], writer)
        self._outcomes = {}

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], list[list[Outcome]]]:
        """{"pass@k": mean over the documents}, for every k that no document has fewer candidates than, and outcomes."""
        documents = [programs_of(*pair) for pair in zip(predictions, references, strict=True)]
        flat = iter(self.outcomes([program for programs in documents for program in programs]))
        found = [[next(flat) for _ in programs] for programs in documents]
        rates = {}
        for size in k:
            if all(len(outcomes) >= size for outcomes in found):
                chances = [pass_at_k(len(o), sum(outcome.passed for outcome in o), size) for o in found]
                rates[f"pass@{size}"] = math.fsum(chances) / len(chances)
        return rates, found

    def outcomes(self, programs: Sequence[str]) -> list[Outcome]:
        """Outcomes in the order of the programs; those that are not known are run, each once."""
        keys = [hashlib.sha256(program.encode(errors="surrogatepass")).hexdigest() for program in programs]
        missing = {key: program for key, program in zip(keys, programs, strict=True) if not self._known(key)}
        order = list(missing)
        run_programs(list(missing.values()), done=lambda i, outcome: self._keep(order[i], outcome))
        return [self._outcomes[key] for key in keys]

    def _known(self, key: str) -> bool:
        if key not in self._outcomes and self._store is not None and key in self._store:
            kept = self._store[key]
            self._outcomes[key] = Outcome(kept["passed"], kept["reason"])
        return key in self._outcomes

    def _keep(self, key: str, outcome: Outcome) -> None:
        self._outcomes[key] = outcome
        if self._store is not None:
            self._store.write({key: {"passed": outcome.passed, "reason": outcome.reason}})


PROGRAMS = Programs()
"""The scorer of all code tasks of this process: lm-eval keeps a task's module, and with it its scorer, once loaded."""


class EvaluateStandIn(types.ModuleType):
    """The module `evaluate` while tasks are loaded: `code_eval` is `PROGRAMS`, all else is the real module's.

    The real module takes many seconds to import, so it is imported only if something else is read from it.
    """

    def __init__(self, imported: types.ModuleType | None):
        super().__init__("evaluate")
        self.imported = imported

    def load(self, path: str, *arguments: Any, **settings: Any) -> Any:
        return PROGRAMS if path == "code_eval" else self._real().load(path, *arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import machinery looks for
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> types.ModuleType:
        if self.imported is None:
            if sys.modules.get("evaluate") is self:
                del sys.modules["evaluate"]
            self.imported = importlib.import_module("evaluate")
        return self.imported


@contextmanager
def sandboxed_scoring() -> Iterator[None]:
    """While tasks are loaded, whoever asks `evaluate` for `code_eval` gets `PROGRAMS`."""
    stand_in = sys.modules["evaluate"] = EvaluateStandIn(sys.modules.get("evaluate"))
    try:
        yield
    finally:
        if stand_in.imported is not None:
            sys.modules["evaluate"] = stand_in.imported
        else:
            del sys.modules["evaluate"]


def scored_by_programs(metric: Any) -> bool:
    """Whether a metric of a task file is a function whose module scores with `PROGRAMS`."""
    return callable(metric) and any(value is PROGRAMS for value in getattr(metric, "__globals__", {}).values())


def metric_names(entry: dict[str, Any]) -> list[str]:
    """What a code task's metric entry reports: `pass@1` where it names its k, else its function's name."""
    sizes = entry.get("k") or []
    return [f"pass@{k}" for k in ([sizes] if isinstance(sizes, int) else sizes)] or [entry["metric"].__name__]


def prepare_code_tasks(tasks: dict, workdir: str | Path, writer: str) -> dict[str, Any] | None:
    """Let code tasks run their programs side by side before scoring; returns the limits, None without code tasks.

    Outcomes are kept in `<workdir>/.work/programs`, each writer's in a file of its own and read by all.
    Raises ValueError, one line, for a task that would run generated code outside the sandbox.
    """
    ours = {name: task for name, task in tasks["tasks"].items() if task.config.unsafe_code}
    for name, task in ours.items():
        if not all(scored_by_programs(entry["metric"]) for entry in task.config.metric_list or [{"metric": None}]):
            raise ValueError(
                f"task {name!r} runs generated code by itself, outside the sandbox; only tasks that score with "
                "`code_eval` are run (humaneval, mbpp and their variants): choose one of those"
            )
    if not ours:
        return None
    PROGRAMS.keep_in(Path(workdir) / ".work" / "programs", writer)
    for task in ours.values():
        _run_ahead(task)
    return {"seconds": sandbox.SECONDS, "memory_mib": sandbox.MEMORY_MIB, "isolation": list(sandbox.isolation())}


def _run_ahead(task: Any) -> None:
    """lm-eval scores document by document; all programs are known once the task's filters have been applied."""
    apply_filters = task.apply_filters

    def apply_and_run() -> Any:
        returned = apply_filters()
        programs = [
            program
            for request in task.instances
            for predictions in request.filtered_resps.values()
            for program in programs_of(predictions, task.doc_to_target(request.doc))
        ]
        PROGRAMS.outcomes(programs)
        return returned

    task.apply_filters = apply_and_run


def add_outcomes(documents: list[dict[str, Any]], samples: dict[str, list[dict]]) -> None:
    """Write into each document's row, by filter, how its programs ended: `passed`, or the reason of the failure."""
    rows = {(row["subtask"], row["doc_id"]): row for row in documents}
    for name, found in samples.items():
        for sample in found:
            if (name, sample["doc_id"]) in rows and isinstance(sample["target"], str):
                programs = programs_of(sample["filtered_resps"][0], sample["target"])
                reasons = [outcome.reason for outcome in PROGRAMS.outcomes(programs)]
                rows[name, sample["doc_id"]].setdefault("outcomes", {})[sample["filter"]] = reasons


def sandbox_digest() -> str:
    """Digest of what decides an outcome besides the program."""
    files = [file_digest(path) for path in (Path(sandbox.__file__), sandbox.CHILD)]
    return digest({"files": files, "python": sys.version, "isolation": list(sandbox.isolation())})
