"""A graph with every rule and a few steps, run once without interruption: other ways must come to the same."""

import json
from pathlib import Path

import yaml

from dllm.provenance import file_lock
from tests.workflow.conftest import ROOT, snakemake
from tests.workflow.test_run import small_overlay

TIMES = ("wall_seconds", "tokens_per_second", "provenance", "model_seconds")
"""What differs between two identical runs."""


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


def reference(tmp_path_factory, worker_id: str) -> Path:
    """The work directory of the uninterrupted local run, made once for all workers of a test session."""
    base = tmp_path_factory.getbasetemp()
    home = (base if worker_id == "master" else base.parent) / "reference"
    with file_lock(home / "lock"):
        if not (home / "done").exists():
            snakemake("--cores", "2", overlays=overlays(home))
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
