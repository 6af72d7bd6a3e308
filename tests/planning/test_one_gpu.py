"""What config/one-gpu.yaml promises: real models and data, one GPU, less than a day."""

from pathlib import Path

import pytest

from dllm.config import DataPart, DatasetEntry, ModelEntry, PrepareConfig, load_project
from dllm.planning.data import prepared
from dllm.planning.project import plan_project

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def project():
    return load_project(ROOT / "config", ROOT / "config/one-gpu.yaml")


@pytest.mark.parametrize("machine", ["rtx-4090", "a100-40gb", "a100-80gb", "h100"])
def test_it_fits_one_gpu_and_a_day_with_room_to_spare(project, tmp_path, machine):
    plan = plan_project(project, tmp_path, on=machine)
    assert not plan.warnings
    assert all(job.known and job.place.devices <= 1 for job in plan.jobs.values())
    assert max(job.cost.device_gib for job in plan.jobs.values()) < 0.8 * 24
    hours = sum(job.cost.seconds for job in plan.jobs.values()) / 3600
    assert 2 < hours < 16, "one job after another, with a third of the day for what the plan cannot know"
    kept = sum(job.cost.kept_gib for job in plan.jobs.values())
    assert kept + max(job.cost.scratch_gib for job in plan.jobs.values()) < 40


def test_everything_in_it_comes_from_the_hub_at_a_commit(project):
    used = {project.root_model(name) for name in project.runs}
    used |= {project.root_model(entry.checkpoint) for entry in project.evaluations.values()}
    assert used == {"modernbert-base", "gpt2"}
    assert all(project.models[name].revision for name in used)
    assert all(entry.hub or entry.mix for entry in project.datasets.values())
    assert {entry.launch for entry in project.runs.values()} == {"gpu"}


def test_wikitext_and_openwebtext_are_read_at_equal_length(project, tmp_path):
    plan = plan_project(project, tmp_path)
    tokens = [plan.job("train", f"modernbert-base-{name}").cost.tokens for name in ("wikitext", "openwebtext")]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.02)


def test_only_the_rows_that_are_used_are_tokenized(tmp_path):
    entry = DatasetEntry(hub="a/b", revision="0" * 40, documents=1000, tokens=100_000, test_share=0.1)
    config = PrepareConfig(
        name="x", parts=[DataPart(name="x", path="downloads/x", entry=entry)], length=10, split="disjoint",
        model_path="downloads/m", model=ModelEntry(hub="a/m", revision="0" * 40),
    )  # fmt: skip
    assert prepared(config, tmp_path, 100).read_tokens == 100_000
    assert prepared(config.model_copy(update={"rows": 200}), tmp_path, 100).read_tokens == pytest.approx(30_000)


def test_a_sample_of_a_group_counts_for_each_of_its_tasks(project, tmp_path):
    few = project.benchmarks["mmlu"]
    plan = plan_project(project, tmp_path)
    one = project.model_copy(
        update={"benchmarks": project.benchmarks | {"mmlu": few.model_copy(update={"documents": 2 * few.documents})}}
    )
    twice = plan_project(one, tmp_path)
    asked = [p.job("evaluate", "chat-base/mmlu").cost.tokens for p in (plan, twice)]
    assert asked[1] == pytest.approx(2 * asked[0], rel=0.01)
    assert asked[0] > 57 * few.documents * few.size.prompt_tokens * 0.9


def test_a_streamed_set_stores_one_shard_and_its_test_rows(project, tmp_path):
    plan = plan_project(project, tmp_path)
    assert plan.job("download", "openwebtext").cost.kept_gib < 0.6
    assert plan.job("prepare", "openwebtext--modernbert-base--512").cost.kept_gib < 0.1
    whole = project.datasets["openwebtext"].model_copy(update={"stream": False})
    stored = plan_project(project.model_copy(update={"datasets": project.datasets | {"openwebtext": whole}}), tmp_path)
    assert stored.job("download", "openwebtext").cost.kept_gib > 15
