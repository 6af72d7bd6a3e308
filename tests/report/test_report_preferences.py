"""Learning from preferences in the report: its table and its part of the page's plan."""

import json

from dllm.config import load_project
from dllm.report.page import stages
from dllm.report.plan import ReportPlan
from dllm.report.preferences import preferences_table
from tests.workflow.conftest import ROOT


def test_the_table_has_pairs_before_and_after(tmp_path):
    plan = ReportPlan(preferences=[{"run": "a", "label": "Sums"}])
    rows = [
        {"step": step, "split": "eval", "loss": 0.5 + margin / 10, "standard_error": 0.01, "reward_margin": margin}
        | {"reward_margin_standard_error": 0.1, "accuracy": 0.5 + margin / 4, "preferred": 0.6 + margin / 5}
        for step, margin in ((0, 0.0), (10, 1.0))
    ]
    rows.append({"step": 10, "split": "train", "loss": 0.6})
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = preferences_table(tmp_path, plan, "preferences")
    (cells,) = [[cell.text for cell in row] for row in table.rows]
    assert cells == ["Sums", "10", "1.00 [0.80, 1.20]", "75.0", "60.0", "80.0", "0.500", "0.600"]
    (row,) = table.frame.to_dict("records")
    assert row["reward_margin"] == 1.0 and row["accuracy"] == 0.75


def test_the_systems_page_shows_the_run_with_pairs():
    project = load_project(ROOT / "config", ROOT / "config/laptop.yaml", ROOT / "config/systems.yaml")
    plan = ReportPlan.of(project)
    assert "preferences" in plan.table_names() and "sums-preferred" in plan.trained_runs()
    assert "Learning from preferences" in [stage.title for stage in stages(plan)]
