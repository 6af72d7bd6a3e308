"""Learning from rewards in the report: its figure, its tables and its part of the page's plan."""

import json

import pytest

from dllm.config import load_project
from dllm.report.plan import ReportPlan
from dllm.report.policies import draw_policies, policies_frame, policies_table, policy_answers_table
from tests.workflow.conftest import ROOT


@pytest.fixture
def plan() -> ReportPlan:
    """Two seeds of one likelihood, and one run of another."""
    runs = (("a-1", "sampled"), ("a-2", "sampled"), ("b-1", "d1"))
    return ReportPlan(policies=[{"run": run, "label": label} for run, label in runs])


@pytest.fixture
def workdir(tmp_path, plan):
    """Metrics of runs whose reward rises by 0.1 per evaluation (d1: by 0.05), from 0.2."""
    for entry in plan.policies:
        rise = 0.1 if entry.label == "sampled" else 0.05
        rows = []
        for step in (0, 10, 20):
            samples = [{"prompt": "3+4?", "answer": f"{step}", "reward": 0.0}]
            rows.append(
                {"step": step, "split": "eval", "loss": 0.3 + step / 100, "standard_error": 0.01}
                | {"reward": 0.2 + rise * step / 10, "reward_standard_error": 0.01, "samples": samples}
            )
        for step in (10, 20):
            rows.append({"step": step, "split": "train", "loss": 0.0, "kl": 0.1, "clipped": 0.25, "distinct": 1.0})
        (tmp_path / "runs" / entry.run).mkdir(parents=True)
        (tmp_path / "runs" / entry.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_figure_says_which_likelihood_ends_highest(workdir, plan):
    frame = policies_frame(workdir, plan)
    assert len(frame) == 9 and frame["reward_low"].iloc[0] == pytest.approx(0.2 - 1.96 * 0.01, abs=1e-4)
    figure = draw_policies(frame, plan)
    assert "sampled ends with the highest reward, 0.40" in titles(figure) and "overlaps" not in titles(figure)
    unsure = draw_policies(frame.assign(reward_low=0.0, reward_high=1.0), plan)
    assert "0.40; its interval overlaps with d1" in titles(unsure)


def titles(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_the_table_states_each_run_before_and_after(workdir, plan):
    table = policies_table(workdir, plan, "policies")
    cells = [[cell.text for cell in row] for row in table.rows]
    assert cells[0][:4] == ["sampled", "20", "0.20 [0.18, 0.22]", "0.40 [0.38, 0.42]"]
    assert cells[2][4] == "+0.10 [0.07, 0.13]" and cells[2][-1] == "25.0"


def test_answers_of_the_first_run_of_each_likelihood_are_shown_over_time(workdir, plan):
    table = policy_answers_table(workdir, plan, "policy-answers")
    assert [[cell.text for cell in row] for row in table.rows] == [
        [label, step, step] for label in ("sampled", "d1") for step in ("0", "10", "20")
    ]


def test_the_plan_of_the_systems_reads_the_runs_that_learn_from_rewards():
    project = load_project(ROOT / "config", ROOT / "config/laptop.yaml", ROOT / "config/systems.yaml")
    plan = ReportPlan.of(project)
    assert {"policies", "policy-answers"} < set(plan.table_names()) and "policies" in plan.figure_names()
    assert "sums-sampled-2" in plan.trained_runs()
