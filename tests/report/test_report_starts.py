"""Runs that differ in the weights they start from: two claims, two figures, and a page with a question of its own."""

import json

import numpy as np
import pytest
from fake_workdir import _samples, _write, build_all, write_run

from dllm.config import load_project
from dllm.report import claims
from dllm.report.format import signed_interval
from dllm.report.plan import ReportPlan
from tests.workflow.conftest import ROOT

SIZES = {"random": 17_000_000, "pretrained": 17_000_000, "larger": 32_000_000}


@pytest.fixture
def plan() -> ReportPlan:
    """What config/small.yaml shows."""
    return ReportPlan.of(load_project(ROOT / "config", ROOT / "config/small.yaml"))


def finished(folder, steps=900, error=0.02, **ends: float):
    """A work directory whose runs end at these losses; an answer has five targets."""
    for run, end in ends.items():
        write_run(folder, run, np.random.default_rng(1), first=9.0, final=end, steps=steps, every=max(1, steps // 90))
        path = folder / f"runs/{run}/metrics.jsonl"
        final = {"step": steps, "split": "final", "loss": end, "standard_error": error, "targets": 500, "rows": 100}
        path.write_text(path.read_text() + json.dumps(final) + "\n")
        path = folder / f"runs/{run}/provenance.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": SIZES[run]}))
        _write(folder / f"samples/{run}.json", _samples() | {"run": run})
    return folder


@pytest.mark.parametrize(
    ("random", "pretrained", "larger", "verdicts"),
    [
        (4.0, 3.0, 2.5, ["holds", "holds"]),
        (3.0, 4.0, 4.01, ["does not hold", "undecided"]),
        (3.01, 3.0, 3.5, ["undecided", "does not hold"]),
    ],
)
def test_a_start_is_better_only_by_two_standard_errors(tmp_path, plan, random, pretrained, larger, verdicts):
    found = claims.judge(finished(tmp_path, random=random, pretrained=pretrained, larger=larger), plan)
    assert [claim.verdict for claim in found] == verdicts
    gap, half = 5 * (pretrained - random), 1.96 * 5 * np.hypot(0.02, 0.02)
    assert f"a difference of {signed_interval(gap, gap - half, gap + half)}." in found[0].findings[0].because


def test_it_is_said_when_the_pretrained_start_is_as_low_as_the_random_one_ends(tmp_path, plan):
    found = claims.judge(finished(tmp_path, random=4.0, pretrained=3.0, larger=2.5), plan)
    assert "It reaches the other's final loss at step 180 of 900." in found[0].findings[0].because


def test_runs_of_a_few_steps_decide_nothing(tmp_path, plan):
    found = claims.judge(finished(tmp_path, steps=10, random=4.0, pretrained=3.0, larger=2.5), plan)
    assert [claim.verdict for claim in found] == ["undecided", "undecided"]
    assert "decides nothing" in found[0].findings[0].because


def test_random_weights_of_another_architecture_are_no_twin():
    other = {"models": {"untrained": {"new": {"model_type": "bert"}}}}
    plan = ReportPlan.of(load_project(ROOT / "config", ROOT / "config/small.yaml", other))
    assert [start.twin for start in plan.starts] == ["", "", ""] and not plan.starts[0].pretrained


def test_a_start_is_compared_with_the_same_training_only():
    longer = {"runs": {"pretrained": {"epochs": 7}, "random": {"like": None, "init": "untrained", "data": "small-chat",
        "epochs": 3}}}  # fmt: skip
    plan = ReportPlan.of(load_project(ROOT / "config", ROOT / "config/small.yaml", longer))
    assert [start.twin for start in plan.starts] == ["", "", ""]
    plan = ReportPlan.of(
        load_project(ROOT / "config", ROOT / "config/small.yaml", {"runs": {"pretrained": {"epochs": 7}}})
    )
    assert [start.twin for start in plan.starts] == ["pretrained", "", ""]


def test_the_page_asks_what_a_start_gives_and_shows_all_answers(tmp_path, plan, unsaved):
    build_all(finished(tmp_path, random=4.0, pretrained=3.0, larger=2.5), plan)
    page = (tmp_path / "report/index.html").read_text()
    for anchor in ("answer", "claims", "starts", "systems", "provenance"):
        assert f'id="{anchor}"' in page
    for anchor in ("faults", "results", "reported"):
        assert f'id="{anchor}"' not in page
    assert "What does pretraining give a chatbot?" in page and "Can BERTs chat?" not in page and "five" not in page
    assert page.count("17M, random weights") > 3
    assert (tmp_path / "figures/sizes.png").exists() and not (tmp_path / "figures/systems.png").exists()
    rows = (tmp_path / "figures/sizes.csv").read_text().splitlines()
    assert len(rows) == 4 and "32000000" in rows[-1]
