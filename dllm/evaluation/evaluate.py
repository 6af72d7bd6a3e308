"""One benchmark of one checkpoint: all requests, their answers from the store or the model, the scores with intervals.

lm-eval builds the prompts and scores the answers; this module adds what it lacks: requests (not documents) dealt to
several processes, resuming, pinned data, intervals, and a file whose content is the same after every run.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.algorithms import trained_causally
from dllm.config import EvaluationConfig, did_you_mean, digest
from dllm.evaluation.code_tasks import add_outcomes, prepare_code_tasks
from dllm.evaluation.scores import summarise
from dllm.evaluation.store import AnswerStore
from dllm.evaluation.task_files import (
    build_requests,
    choice_divisors,
    content_digest,
    declared_metrics,
    definition_digest,
    load_tasks,
    reads_greedy,
    seed_examples,
    task_versions,
)
from dllm.models.literal_text import unmarked
from dllm.provenance import collect, file_digest, how_to_make, versions, write_atomically

if TYPE_CHECKING:
    from dllm.evaluation.stored import Answerer, Progress, StoredLM

PACKAGE = Path(__file__).resolve().parents[1]
DECIDES_ANSWERS = (
    *("algorithms.py", "core", "models", "sampling", "likelihood", "language_model.py"),
    *("evaluation/adapter.py", "evaluation/causal.py"),
)
"""The code whose change makes stored answers unusable."""


BATCHES_PER_CHUNK = 8
"""Batches of generations between two writes of answers: rows that end early make room only within a chunk."""


def evaluate_benchmark(
    config: EvaluationConfig,
    workdir: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    compute: bool = True,
    wait: bool = False,
    score: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a checkpoint on a benchmark and write evals/<run>/<benchmark>.json and .samples.jsonl below workdir.

    Returns what was written. shard = (i, n) computes the answers to the i-th of n parts of the documents only; then
    `score=False` stops there (and returns {"computed": int}) and `wait` waits for the other parts before scoring.
    compute=False scores what is stored and never loads the model.
    Raises ValueError, one line, for an unknown task or metric, a missing checkpoint and missing answers.
    """
    started = time.monotonic()
    workdir = Path(workdir)
    _check_checkpoint(config, workdir)
    tasks = load_tasks(config, workdir)
    programs = prepare_code_tasks(tasks, workdir, f"{config.run}-{config.benchmark}")
    declared = declared_metrics(tasks)
    if declared is not None:
        check_metrics(config, declared)
    lm = _open_stored(config, workdir, tasks, shard, device, progress, may_compute=compute and not wait)
    if compute and (shard[1] > 1 or not score):
        for kind, requests in build_requests(tasks, config, lm).items():
            lm.fill(kind, requests, shard)
    if not score:
        return {"computed": lm.computed}
    if wait:
        for kind, requests in build_requests(tasks, config, lm).items():
            lm.wait_for(kind, requests)
    seed_examples(tasks, config.seed)
    samples = _run_harness(lm, tasks, config)["samples"]
    lm.store.read()
    documents = collect_documents(samples, lm)
    if programs:
        add_outcomes(documents, samples)
    result = _result(config, workdir, tasks, samples, documents, lm, programs)
    result["wall_seconds"] = round(time.monotonic() - started, 3)
    seconds = round(lm.store.seconds, 3)
    peak = _peak_gib(device)
    memory = {} if peak is None else {"peak_device_gib": peak}
    result["provenance"] = collect(config_digest=digest(config), device=device, model_seconds=seconds, **memory)
    target = workdir / "evals" / config.run / config.benchmark
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    write_atomically(target.with_name(f"{target.name}.samples.jsonl"), lines)
    write_atomically(target.with_name(f"{target.name}.json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _open_stored(
    config: EvaluationConfig,
    workdir: Path,
    tasks: dict,
    shard: tuple[int, int],
    device: str,
    progress: Progress | None,
    *,
    may_compute: bool,
) -> StoredLM:
    """lm-eval's model, with the answers that are stored for this checkpoint, these settings and this code."""
    from dllm.evaluation.stored import StoredLM

    checkpoint = content_digest(workdir / config.checkpoint)
    decides = {"checkpoint": checkpoint, "settings": answer_settings(config), "code": code_digest()}
    model_key = digest(decides | {"versions": versions()})
    directory = workdir / ".work" / "answers" / config.run / config.benchmark / model_key[:16]
    return StoredLM(
        open_answerer(config, workdir, tasks, device),
        AnswerStore(directory, f"shard-{shard[0]}-of-{shard[1]}"),
        model_key=model_key,
        generations_per_chunk=BATCHES_PER_CHUNK * config.generation.batch_size,
        progress=progress,
        may_compute=may_compute,
    )


def _peak_gib(device: str) -> float | None:
    from dllm.core.devices import peak_gib

    return peak_gib(device)


def _result(
    config: EvaluationConfig,
    workdir: Path,
    tasks: dict,
    samples: dict,
    documents: list[dict],
    lm: StoredLM,
    programs: dict | None,
) -> dict[str, Any]:
    """What the scores of a benchmark are, and what they come from."""
    metrics = collect_metrics(tasks, samples, lm)
    check_metrics(config, set(metrics))
    return {
        "run": config.run,
        "benchmark": config.benchmark,
        "task": config.task,
        "shots": config.shots if config.shots is not None else _shots(tasks),
        "n": metrics[f"{config.metric},{config.filter}"]["n"],
        "metric": config.metric,
        "filter": config.filter,
        "metrics": {_without_filter(name, config.filter): summary for name, summary in metrics.items()},
        "chance": config.chance,
        "limit": config.limit,
        "scorer": answer_settings(config) | {"seed": config.seed},
        **({"programs": programs} if programs else {}),
        **collect_cost(documents, lm),
        "truncated": sum(1 for document in documents if document.get("truncated")),
        "subtasks": collect_subtasks(tasks, samples, lm, config),
        "inputs": {
            "checkpoint": content_digest(workdir / config.checkpoint),
            "data": content_digest(workdir / config.data) if config.data else config.revision,
            "task_definition": definition_digest(tasks),
            "task_versions": task_versions(tasks),
            "prompts": digest({"prompts": [document["prompt_sha256"] for document in documents]}),
        },
    }


# --------------------------------------------------------------------------------------------------------------------
# Who answers


def open_answerer(config: EvaluationConfig, workdir: Path, tasks: dict, device: str) -> Answerer:
    """The checkpoint as lm-eval's model; its weights are loaded at the first answer that is not stored."""
    from dllm.models.published import is_encoder
    from dllm.models.tokenizers import chat_template, load_tokenizer

    checkpoint = workdir / config.checkpoint
    check_kind(config, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    if config.chat_template and not tokenizer.chat_template and is_encoder(checkpoint):
        tokenizer.chat_template = chat_template("bert")  # as its first chat training would give it
    if config.chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"{config.run}: the tokenizer in {checkpoint} has no chat template; set chat_template: false, "
            "or evaluate a checkpoint that was trained on conversations"
        )
    if config.model_kind == "hf":
        from dllm.evaluation.causal import CausalAnswerer, open_causal

        def open_model():
            return open_causal(
                str(checkpoint),
                precision=config.scorer.precision,
                device=device,
                batch_size=config.generation.batch_size,
            )

        return CausalAnswerer(tokenizer, open_model, generation=config.generation, chat_template=config.chat_template)
    from dllm.evaluation.adapter import DiffusionAnswerer

    return DiffusionAnswerer(
        tokenizer,
        lambda: open_diffusion(str(checkpoint), config.scorer.precision, device),
        generation=config.generation,
        scorer=config.scorer,
        greedy_tasks=frozenset(name for name, task in tasks["tasks"].items() if reads_greedy(task)),
        divisors={name: found for name, task in tasks["tasks"].items() if (found := choice_divisors(task))},
        chat_template=config.chat_template,
    )


def check_kind(config: EvaluationConfig, checkpoint: Path) -> None:
    """Raise ValueError, one line, unless the checkpoint was trained for what it is to be scored as.

    A checkpoint without a note of its training is taken for what the evaluation says, unless it is a published
    diffusion model.
    """
    from dllm.models.load import read_sidecar
    from dllm.models.published import family_of

    family = family_of(checkpoint)
    trained = read_sidecar(checkpoint).get("algorithm") or (family.algorithm if family else None)
    causal = trained_causally(trained)
    if trained and causal != (config.model_kind == "hf"):
        right = "hf" if causal else "dllm"
        raise ValueError(
            f"{config.run}: kind = {config.model_kind!r} does not score a checkpoint trained with {trained!r}, such as "
            f"{config.checkpoint}; allowed: {right}; set kind: {right} in its entry of evaluations"
        )


@lru_cache(maxsize=1)
def open_diffusion(checkpoint: str, precision: str, device: str):
    """The diffusion model of a checkpoint; the last one is kept for the next benchmark of the same process."""
    import torch

    import dllm

    weights = torch.bfloat16 if precision == "bf16" else None
    return dllm.load(checkpoint, device=device, dtype=weights, mixed=precision == "mixed")


def answer_settings(config: EvaluationConfig) -> dict[str, Any]:
    """Every setting that can change an answer, and nothing else."""
    return {
        "model_kind": config.model_kind,
        "chat_template": config.chat_template,
        **config.scorer.model_dump(mode="json"),
        "fewshot_as_multiturn": config.fewshot_as_multiturn,
        "generation": config.generation.model_dump(mode="json"),
    }


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of the source files that decide an answer."""
    total = hashlib.sha256()
    for name in DECIDES_ANSWERS:
        place = PACKAGE / name
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            total.update(f"{path.relative_to(PACKAGE).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# What lm-eval gives back


def _run_harness(lm: StoredLM, tasks: dict, config: EvaluationConfig) -> dict[str, Any]:
    import lm_eval

    return lm_eval.evaluate(
        lm,
        tasks,
        limit=config.limit,
        bootstrap_iters=0,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        confirm_run_unsafe_code=True,  # `prepare_code_tasks` has made sure that it runs in the sandbox
    )


def check_metrics(config: EvaluationConfig, known: set[str]) -> None:
    """Raise ValueError, one line, unless the metrics that the evaluation names are among `metric,filter` names."""
    for name in (config.metric, *config.further_metrics):
        name = name if "," in name else f"{name},{config.filter}"
        if name not in known:
            raise ValueError(
                f"{config.benchmark}: metric {name!r} (metric,filter) does not come out of task {config.task!r}, "
                f"which gives {', '.join(sorted(known))}. {did_you_mean(name, sorted(known))}"
            )


def collect_metrics(tasks: dict, samples: dict[str, list[dict]], lm: StoredLM) -> dict[str, dict]:
    """{"metric,filter": {value, standard_error, low, high, n}} over the documents of all tasks, each counting once."""
    values: dict[str, list] = {}
    aggregates: dict[str, Any] = {}
    doubts: dict[str, list[float]] = {}
    for name, documents in samples.items():
        for document in documents:
            doubt = _race(lm.found[name, document["doc_id"]]).get("doubt", {})
            for metric in document["metrics"]:
                key = f"{metric},{document['filter']}"
                values.setdefault(key, []).append(document[metric])
                aggregates.setdefault(key, tasks["tasks"][name].aggregation().get(metric, _mean))
                if metric in doubt:
                    doubts.setdefault(key, []).append(doubt[metric])
    return {key: summarise(values[key], aggregates[key], doubts.get(key, ())) for key in sorted(values)}


def collect_subtasks(
    tasks: dict, samples: dict[str, list[dict]], lm: StoredLM, config: EvaluationConfig
) -> dict[str, dict]:
    """{task: {value, n}} of the headline metric."""
    headline = f"{config.metric},{config.filter}"
    found = {}
    for name in sorted(samples):
        summary = collect_metrics(tasks, {name: samples[name]}, lm).get(headline)
        if summary is not None:
            found[name] = {"value": summary["value"], "n": summary["n"]}
    return found


def collect_documents(samples: dict[str, list[dict]], lm: StoredLM) -> list[dict[str, Any]]:
    """One row per document: prompt, target, response or log-likelihoods, scores by metric and filter."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for name in sorted(samples):
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"]):
            key = (name, sample["doc_id"])
            row = rows.setdefault(key, _document(name, sample, lm.found[key]))
            for metric in sample["metrics"]:
                row["scores"][f"{metric},{sample['filter']}"] = _plain(sample[metric])
    return list(rows.values())


def collect_cost(documents: list[dict[str, Any]], lm: StoredLM) -> dict[str, Any]:
    """What the answers took and how sure they are; without wall times, so that identical runs have identical records.

    passes: forward rows in all, a row shared by several answers counted once; passes_per_document; tokens_written: of
    answers that are texts; estimators: answers
    by the likelihood estimator they were scored with; standard_error_of_answers: the mean over those, in nats. Of raced
    questions also race: questions by the rounds that they took, and by metric those that ended undecided.
    """
    answers = [a for row in documents for a in lm.found[row["subtask"], row["doc_id"]]]
    passes = sum(row["passes"] for row in documents)
    written = [answer["tokens"] for answer in answers if "tokens" in answer]
    races = [race for row in documents if (race := _race(lm.found[row["subtask"], row["doc_id"]]))]
    rounds, undecided = Counter(r["rounds"] for r in races), Counter(rule for r in races for rule in r["doubt"])
    errors = [answer["standard_error"] for answer in answers if answer.get("standard_error") is not None]
    return {
        "passes": passes,
        "passes_per_document": round(passes / len(documents), 6),
        **({"tokens_written": sum(written)} if written else {}),
        "estimators": dict(sorted(Counter(a["estimator"] for a in answers if "estimator" in a).items())),
        "standard_error_of_answers": _mean(errors) if errors else None,
        **({"race": {"rounds": _by_name(rounds), "undecided": _by_name(undecided)}} if races else {}),
    }


def _race(answers: list[dict]) -> dict[str, Any]:
    """{"rounds", "doubt"} of a raced question, else nothing."""
    return next(({name: answer[name] for name in ("rounds", "doubt")} for answer in answers if "rounds" in answer), {})


def _by_name(counts: Counter) -> dict[str, int]:
    return {str(name): counts[name] for name in sorted(counts)}


def _document(subtask: str, sample: dict, answers: list[dict]) -> dict[str, Any]:
    prompts = [arguments[0] for arguments in sample["arguments"]]
    shared = len(set(prompts)) == 1
    row: dict[str, Any] = {
        "doc_id": sample["doc_id"],
        "subtask": subtask,
        "prompt": unmarked(prompts[0]) if shared else [unmarked(prompt) for prompt in prompts],
        "prompt_sha256": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "target": _plain(sample["target"]),
    }
    first = answers[0]["answer"]
    if isinstance(first, str):
        row["response"] = first if len(answers) == 1 else [answer["answer"] for answer in answers]
    else:
        if isinstance(first, (list, tuple)):
            row["continuations"] = [arguments[1] for arguments in sample["arguments"]]
            row["log_likelihoods"] = [answer["answer"][0] for answer in answers]
            row["is_greedy"] = [answer["answer"][1] for answer in answers]
        else:
            row["log_likelihoods"] = [answer["answer"] for answer in answers]
        row["standard_errors"] = [answer.get("standard_error") for answer in answers]
    row["passes"] = sum(answer.get("passes") or 0 for answer in answers)
    row |= _race(answers)
    truncated = max(answer.get("truncated", 0) for answer in answers)
    if truncated:
        row["truncated"] = truncated
    row["scores"] = {}
    return row


def _plain(value: Any) -> Any:
    """A value as JSON knows it; numpy's numbers become Python's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _mean(values) -> float:
    return math.fsum(values) / len(values)


_mean.__name__ = "mean"  # what lm-eval falls back to, under the name by which `summarise` knows it


def _without_filter(name: str, default: str) -> str:
    """`acc` for the headline's filter, lm-eval's own `metric,filter` for others."""
    return name.removesuffix(f",{default}")


def _shots(tasks: dict) -> int | None:
    numbers = {task.config.num_fewshot or 0 for task in tasks["tasks"].values()}
    return numbers.pop() if len(numbers) == 1 else None


def _check_checkpoint(config: EvaluationConfig, workdir: Path) -> None:
    checkpoint = workdir / config.checkpoint
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"{config.run}: checkpoint = {config.checkpoint!r} is not in {workdir} (no config.json), "
            f"{how_to_make(checkpoint)}"
        )
