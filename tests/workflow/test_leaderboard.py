"""config/leaderboard.yaml: one cell is one target, every row is pinned and planned, and the page of it is open."""

import json
import re

import pytest

from dllm.cli.main import main
from dllm.config import GenerateSettings, load_project
from dllm.families import LLADA2
from dllm.models.published import published_decoding
from tests.workflow.conftest import ROOT, planned
from workflow.plan import make_plan

LEADERBOARD = ROOT / "config/leaderboard.yaml"


@pytest.fixture(scope="module")
def plan():
    return make_plan(load_project(ROOT / "config", LEADERBOARD))


def test_one_cell_is_one_target(tmp_path):
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(f"workdir: {tmp_path / 'work'}\n")
    jobs = planned("evals/llada-8b-instruct/gsm8k.json", overlays=[LEADERBOARD, elsewhere])
    found = [("download", "gsm8k-data"), ("download", "llada-8b-instruct"), ("evaluate", "llada-8b-instruct/gsm8k")]
    assert [(rule, name) for rule, name, _ in jobs] == found


def test_every_row_is_pinned_planned_and_asked_as_the_protocol_says(plan):
    assert [row.row for row in plan.report.leaderboard] == list(plan.project.evaluations)
    assert plan.costs.warnings == [] and all(job.known for job in plan.costs.jobs.values())
    samplers = {}
    for (row, name), config in plan.evaluations.items():
        entry, benchmark = plan.project.evaluations[row], plan.project.benchmarks[name]
        assert bool(benchmark.size.choices) == (not entry.chat_template), "base models by likelihood, chat by answers"
        assert config.task_directory is None and config.data and config.seed == 1234, "stock tasks, pinned data"
        own = published_decoding(LLADA2, row)
        assert bool(own) == (row == "llada2.1-mini")
        assert own.items() <= config.generation.model_dump().items(), "decoded as its authors do, in this alone"
        usual = {setting: getattr(GenerateSettings(), setting) for setting in own}
        changed = config.generation.model_copy(update=usual).model_dump(exclude={"batch_size"})
        if row.startswith("diffusiongemma"):  # at temperature 0 it would be sure of every token at once
            assert changed["temperature"] == 0.8
            changed["temperature"] = 0.0
        assert samplers.setdefault(name, (changed, config.shots)) == (changed, config.shots)
    assert all(entry.hub is None or len(entry.revision) == 40 for entry in plan.project.models.values())


def test_a_board_of_which_nothing_is_measured_says_what_each_cell_would_take(plan, tmp_path, capsys):
    plan.write(tmp_path)
    hours = json.loads((tmp_path / "configs/planned.json").read_text())
    assert set(hours) == {f"{r}/{b}" for r, b in plan.evaluations} | {f"train/{run}" for run in plan.runs}
    assert all(cost["hours"] > 0 and cost["device"] == "GPU" for cost in hours.values())
    assert main(["report", "leaderboard", str(tmp_path / "configs/report.yaml"), "--workdir", str(tmp_path)]) == 0
    page = (tmp_path / "report/leaderboard.html").read_text()
    assert f"0 of {len(plan.evaluations)} scores are measured" in page
    assert page.count('class="cost">planned: ') == len(plan.evaluations) and "published 78.9" in page
    assert all(label in page for label in plan.report.missing)


def test_every_published_number_has_a_source_and_belongs_to_a_task_of_its_row():
    project = load_project(ROOT / "config", LEADERBOARD)
    rows = {name: entry for name, entry in project.evaluations.items() if entry.compare}
    assert len(rows) >= 20, "all but two of the first rows"
    for name, entry in rows.items():
        published = project.reported[entry.compare]
        shown = {task: score for task, score in published.scores.items() if task in project.benchmarks_of(entry)}
        assert shown and all(0 < score < 100 for score in shown.values()), name
        said = re.search(r"arXiv:\d{4}\.\d{5}|\b[\w-]+/[\w.-]+\b|leaderboard|blog|report", published.source)
        assert said, f"{name}: {published.source!r} names no work"
    assert len({entry.compare for entry in rows.values()}) == len(rows), "no two rows share published numbers"


def test_published_numbers_of_the_leaderboard_name_only_tasks_of_the_row_that_uses_them():
    project = load_project(ROOT / "config", LEADERBOARD)
    used = {entry.compare: set(project.benchmarks_of(entry)) for entry in project.evaluations.values() if entry.compare}
    by_name = {name: entry for name, entry in project.reported.items() if entry.by_name}
    for name, published in by_name.items():
        assert set(published.scores) <= used.get(name, set()), (
            f"{name}: no row is compared with it, or not in all tasks"
        )
        assert published.note, f"{name} does not say under which conditions"
