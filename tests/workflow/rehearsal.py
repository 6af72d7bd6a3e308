"""A graph with every rule and a few steps, run once without interruption: other ways must come to the same."""

import json
from pathlib import Path

import yaml

from dllm.config import read_yaml
from dllm.provenance import file_lock
from tests.workflow.conftest import ROOT, snakemake

KEPT_RUNS = {"modernbert-large": 6, "alpaca-untuned": 4, "chat-large": 6}
KEPT_BENCHMARKS = ("mmlu", "gsm8k")

TIMES = ("wall_seconds", "tokens_per_second", "provenance", "model_seconds")
"""What differs between two identical runs."""


def small_overlay(workdir, **runs) -> dict:
    """The laptop configuration cut down to one base, two fine-tunings and two benchmarks, a few steps each."""
    files = ("laptop", "experiments", "benchmarks", "reported")
    laptop, experiments, benchmarks, reported = (read_yaml(ROOT / f"config/{name}.yaml") for name in files)
    every_run = {**experiments["runs"], **{k: v for k, v in laptop["runs"].items() if v}}
    chat = {k: v for k, v in experiments["runs"]["chat-base"].items() if k != "epochs"} | laptop["runs"]["chat-base"]
    untuned = experiments["runs"]["alpaca-untuned"] | laptop["runs"]["alpaca-untuned"]
    base = laptop["runs"]["bert-base"]
    settings = {"evaluations": 2, "eval_rows": 20, "eval_draws": 1, "global_batch_size": 8, "micro_batch_size": 8}
    bodies = {
        "modernbert-large": base | {"init": "modernbert-large-untrained"},
        "alpaca-untuned": untuned,
        "chat-large": chat | {"init": "modernbert-large"},
    }
    dropped = {name: None for name in every_run if name not in KEPT_RUNS}
    kept = {
        name: {k: v for k, v in body.items() if v is not None and k != "like"}
        | settings
        | {"steps": KEPT_RUNS[name], "like": None}
        for name, body in bodies.items()
    }
    for name, changes in runs.items():
        kept[name] = kept[name] | changes
    return {
        "workdir": str(workdir),
        "runs": dropped | kept,
        "benchmarks": {n: {"documents": 4} if n in KEPT_BENCHMARKS else None for n in benchmarks["benchmarks"]},
        "evaluations": {n: None for n in (*benchmarks["evaluations"], *laptop["evaluations"]) if n != "chat-large"},
        "reported": {n: None for n in reported["reported"]},
        "speed": {"chat-large": {"documents": 2, "steps": [8, 4]}},
        "report": {
            "pretraining": [], "openwebtext": [],
            "ablation": [{"run": "alpaca-untuned", "label": "untuned"}],
            "chat": [{"run": "chat-large", "label": "chat"}],
        },
    }  # fmt: skip


def overlays(home: Path) -> list[Path]:
    """Configuration files for a work directory `home`/work; one run asks for two machines."""
    content = small_overlay(
        home / "work",
        **{"chat-large": {"steps": 60, "evaluations": 12}, "alpaca-untuned": {"resources": {"nodes": 2}}},
    )
    content["evaluations"]["chat-large"] = {"compare": None, "close_to": None}
    home.mkdir(parents=True, exist_ok=True)
    (home / "small.yaml").write_text(yaml.safe_dump(content))
    return [ROOT / "config/laptop.yaml", home / "small.yaml"]


def reference(tmp_path_factory, worker_id: str, **variables: str) -> Path:
    """The work directory of the uninterrupted local run, made once for all workers of a test session.

    variables: more of Snakemake's environment, where it is this worker that makes it.
    """
    base = tmp_path_factory.getbasetemp()
    home = (base if worker_id == "master" else base.parent) / "reference"
    with file_lock(home / "lock"):
        if not (home / "done").exists():
            snakemake("--cores", "2", overlays=overlays(home), **variables)
            (home / "done").touch()
    return home / "work"


def results(workdir: Path) -> dict[str, object]:
    """Everything that a finished work directory says in numbers, by file, without times."""
    found: dict[str, object] = {}
    for path in sorted([*workdir.glob("runs/*.json"), *workdir.glob("evals/*/*.json")]):
        found[str(path.relative_to(workdir))] = _without_times(json.loads(path.read_text()))
    for path in sorted([*workdir.glob("runs/*/metrics.jsonl"), *workdir.glob("evals/*/*.jsonl")]):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(workdir))] = [_without_times(row) for row in rows]
    return found


def _without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMES}
