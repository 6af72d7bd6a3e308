"""The comparison of systems: its table, its figure, and what the page shows beside it."""

import json

import pandas as pd
import pytest
from fake_workdir import build_all, plan_dict, read_by

from dllm.report.load import final_answer_nats, read_metrics
from dllm.report.plan import ReportPlan
from dllm.report.systems import answers_frame, seconds_frame, systems_frame
from dllm.report.tables import make_tables

CHAT = "chat-large"
SYSTEMS = [
    {"row": "qwen-ar", "label": "Next tokens", "algorithm": "ar", "stages": ["openwebtext-large", "chat-base"]},
    {"row": CHAT, "label": "Masks | all", "algorithm": "mdlm", "stages": [CHAT], "samples": CHAT},
    {"row": "untuned", "label": "Edits", "algorithm": "edit_flows", "stages": ["alpaca-0-corrected"]},
    {"row": "chat-base", "label": "Published", "algorithm": "", "parameters": 8_000_000_000},
]  # fmt: skip


@pytest.fixture
def systems() -> ReportPlan:
    """A plan of nothing but systems, one of them with one benchmark only."""
    plan = plan_dict() | {"systems": SYSTEMS, "samples": "", "estimators": [], "reported": []}
    for section in ("pretraining", "openwebtext", "ablation", "chat"):
        plan[section] = []
    shown = {system["row"] for system in SYSTEMS}
    scored = {"untuned": ["gsm8k"]}
    plan["results"] = [
        {"run": row["run"], "label": row["label"], "benchmarks": scored.get(row["run"], ["gsm8k", "mmlu"])}
        for row in plan["results"]
        if row["run"] in shown
    ]
    return ReportPlan.model_validate(plan)


@pytest.fixture
def counted(workdir):
    """The work directory with final evaluations that count their rows."""
    for run in ("chat-base", "chat-large", "alpaca-0-corrected"):
        path = workdir / f"runs/{run}/metrics.jsonl"
        final = {"step": 9000, "split": "final", "loss": 1.5, "standard_error": 0.1, "targets": 400, "rows": 100}
        path.write_text(path.read_text() + json.dumps(final) + "\n")
    return workdir


def test_nats_of_an_answer_are_nats_per_target_times_targets_per_answer(counted):
    found = final_answer_nats(read_metrics(counted, "chat-large"))
    assert (found.value, found.standard_error) == pytest.approx((6.0, 0.4))
    assert final_answer_nats(read_metrics(counted, "openwebtext-large")) is None


def test_a_system_counts_the_steps_and_tokens_of_all_its_stages(counted, systems):
    frame = systems_frame(counted, systems).set_index("row")
    assert frame.loc["qwen-ar", "steps"] == 18_000 + 9_000
    assert frame.loc["qwen-ar", "tokens"] == (18_000 + 9_000) * 262_144
    assert frame.loc["chat-base", "parameters"] == 8e9 and pd.isna(frame.loc["chat-base", "steps"])
    assert pd.isna(frame.loc["untuned", "nats"]), "what edits are trained on is no bound"
    assert frame.loc["chat-large", "nats"] == pytest.approx(6.0)
    assert pd.isna(frame.loc["untuned", "mmlu"]) and frame.loc["untuned", "gsm8k_passes"] == 4
    seconds = seconds_frame(counted, systems).set_index("row")
    assert seconds.loc["chat-large", "gsm8k"] == pytest.approx(0.02)
    assert seconds.loc["qwen-ar", "training_seconds"] == 216_000 + 14_600


def test_the_first_answers_stand_in_one_table(counted, systems):
    assert set(answers_frame(counted, systems)["row"]) == {"chat-large"}
    table = make_tables(counted, systems)["answers"]
    assert len(table.rows) == 1 and table.columns[0] == "System" and len(table.columns) == 3


def test_the_page_shows_systems_and_no_claims_of_a_report_that_is_not_repeated(counted, systems, unsaved):
    build_all(counted, systems)
    page = (counted / "report/index.html").read_text()
    for anchor in ("systems", "speed", "provenance"):
        assert f'id="{anchor}"' in page
    for anchor in ("claims", "answer", "faults", "results"):
        assert f'id="{anchor}"' not in page
    assert "Can an encoder" not in page and "Masks | all" in page
    assert (counted / "report/systems-seconds.csv").exists() and (counted / "figures/systems.svg").exists()
    text = (counted / "report/report.md").read_text()
    assert "Systems side by side" in text and "Can BERTs chat" not in text
    inputs = read_by(systems)
    assert "runs/openwebtext-large/metrics.jsonl" in inputs and "samples/chat-large.json" in inputs
