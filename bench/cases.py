"""The cases of the benchmark by name, and the results of those that were run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One JSON of results: where its function is, as `module:function`, and what it measures."""

    function: str
    title: str


CASES = {
    "letters": Case("bench.likelihood:letters", "One-letter answers"),
    "endings": Case("bench.likelihood:endings_at_equal_error", "Endings at equal standard error"),
    "racing": Case("bench.racing:racing", "Multiple choice in rounds"),
    "generation": Case("bench.generation:generation", "Generation, identical tokens"),
    "serving": Case("bench.serving:serving", "Requests of several clients"),
    "revising": Case("bench.revising:revising", "Samplers that revise, by passes"),
    "sft": Case("bench.training:sft", "Fine-tuning step"),
    "prepare": Case("bench.preparing:prepare", "Preparing conversations"),
    "policy": Case("bench.policy_gradients:policy", "Policy gradients: three likelihoods of an answer"),
    "gpu": Case("bench.gpu:gpu", "On a CUDA device"),
}


def read(out: Path) -> dict[str, dict]:
    """The results in a folder by case, in the order of `CASES`."""
    paths = {name: out / f"{name}.json" for name in CASES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
