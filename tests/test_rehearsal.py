"""A rehearsal is the same graph with the same entries, cut short everywhere."""

import json
from pathlib import Path

import pytest

from dllm.config import (
    ConfigError,
    download_configs,
    evaluation_configs,
    load_project,
    rehearsed,
    run_configs,
    sample_configs,
    speed_configs,
)
from dllm.planning.project import plan_project
from dllm.planning.rehearsal import forecast, outcome
from dllm.report.rehearsal import rehearsal_page
from workflow.plan import make_plan

CONFIG = Path(__file__).parent.parent / "config"
OVERLAYS = [
    ("paper",),
    ("one-gpu",),
    ("small",),
    ("small", "scaling"),
    ("paper", "systems-paper"),
    ("laptop",),
    ("leaderboard",),
]
OVERLAYS += [("laptop", "systems")]


def projects(*names: str, **section):
    """(the whole project, its rehearsal)."""
    overlays = [CONFIG / f"{name}.yaml" for name in (*names, "smoke")]
    whole = load_project(CONFIG, *overlays, *([{"rehearsal": section}] if section else []))
    return whole, rehearsed(whole)


@pytest.mark.parametrize("names", OVERLAYS)
def test_every_shipped_configuration_is_rehearsed_with_every_job_it_has(names):
    whole, short = projects(*names)
    for jobs in (download_configs, run_configs, evaluation_configs, sample_configs, speed_configs):
        assert list(jobs(short)) == list(jobs(whole))
    assert short.workdir == f"{whole.workdir}-rehearsal"
    assert make_plan(whole).project == short


@pytest.mark.parametrize("names", OVERLAYS)
def test_whatever_takes_long_is_cut_short(names):
    _, short = projects(*names)
    most = short.rehearsal
    for run in short.runs.values():
        assert run.steps <= most.steps and run.epochs is None and run.stop_after is None
        assert run.length <= most.length and run.global_batch_size <= most.batch and run.eval_rows <= most.batch
        assert (run.resources.nodes, run.resources.gpus_per_node) == (1, 0)
    for entry in short.datasets.values():
        if entry.kind not in ("benchmark", "world"):
            assert entry.stream or entry.rows <= most.rows
            assert not entry.documents or entry.test_share * entry.documents <= most.test_rows * 1.001
    for config in evaluation_configs(short).values():
        assert config.limit <= most.documents and config.shots <= most.shots
        assert config.generation.max_new_tokens <= most.new_tokens and config.generation.steps <= most.passes
        assert config.scorer.likelihood.budget <= most.passes and config.scorer.likelihood.mc_draws <= most.draws
    for config in [*sample_configs(short).values(), *speed_configs(short).values()]:
        assert config.generation.max_new_tokens <= most.new_tokens


def test_what_a_rehearsal_keeps_can_be_stated():
    _, short = projects("paper", steps=7, documents=3, rows=40)
    assert {run.steps for run in short.runs.values()} == {7}
    assert {benchmark.documents for benchmark in short.benchmarks.values()} == {3}
    assert short.datasets["alpaca"].rows == 40
    with pytest.raises(ConfigError, match=r"rehearsal.step is not a setting. Did you mean 'steps'\?"):
        projects("paper", step=7)


def test_what_is_already_shorter_stays_as_it_is():
    overlay = {"datasets": {"alpaca": {"rows": 5}}, "benchmarks": {"mmlu": {"shots": 0}}, "rehearsal": {}}
    short = rehearsed(load_project(CONFIG, CONFIG / "paper.yaml", overlay))
    assert short.datasets["alpaca"].rows == 5 and short.benchmarks["mmlu"].shots == 0


def test_a_project_without_the_section_is_no_rehearsal():
    whole = load_project(CONFIG, CONFIG / "paper.yaml")
    assert rehearsed(whole) is whole


def test_the_plan_of_a_rehearsal_says_what_is_downloaded_and_what_the_whole_takes(tmp_path):
    whole, short = projects("paper")
    line = forecast(plan_project(short, tmp_path), plan_project(whole, tmp_path))
    assert "24 downloads of 15.5 GiB" in line and "hours of a100-80gb" in line


def test_the_rehearsal_of_the_paper_is_planned_as_hours_of_one_core_at_most(tmp_path):
    plan = plan_project(projects("paper")[1], tmp_path)
    assert sum(job.cost.seconds for job in plan.jobs.values()) < 6 * 3600
    assert {job.place.devices for job in plan.jobs.values()} == {0}


def test_the_outcome_names_what_works_what_failed_and_what_never_began(tmp_path):
    whole, short = projects("one-gpu")
    plan, full = plan_project(short, tmp_path), plan_project(whole, tmp_path)
    made = ["downloads/gpt2.json", "evals/gpt2/mmlu.json"]
    logs = {"evaluate/gpt2/gsm8k": "begin\nerror: no rows\n\n"}
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"n": 1}')
    for name, text in logs.items():
        (tmp_path / f"logs/{name}.log").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"logs/{name}.log").write_text(text)
    (tmp_path / "benchmarks/evaluate/gpt2").mkdir(parents=True)
    (tmp_path / "benchmarks/evaluate/gpt2/mmlu.tsv").write_text("s\tmax_rss\n12.5\t900\n")
    found = outcome(plan, full, tmp_path)
    rules = {rule.rule: rule for rule in found.rules}
    assert (rules["download"].works, rules["evaluate"].works, rules["train"].works) == (1, 1, 0)
    assert rules["evaluate"].took == 12.5 and rules["evaluate"].timed == 1
    assert rules["train"].would_take == sum(j.cost.seconds for j in full.jobs.values() if j.rule == "train")
    assert (found.missing[0].name, found.missing[0].reason) == ("gpt2/gsm8k", "error: no rows")
    assert not found.works and "first evaluate gpt2/gsm8k: error: no rows" in found.line()
    page = rehearsal_page(found)
    assert "1 of 22" in page and "error: no rows" in page and "not begun" in page
    assert json.loads(found.as_json())["rules"][0]["rule"] == "download"
