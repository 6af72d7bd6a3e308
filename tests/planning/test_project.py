"""Plans of whole configurations: every job of the workflow, what does not fit, what was measured."""

import json
from pathlib import Path

import pytest

from dllm.config import load_project
from dllm.numbers import duration
from dllm.planning.measured import comparable, measure
from dllm.planning.project import RULES, plan_project
from dllm.planning.show import aligned, as_json, count, text
from workflow.plan import make_plan

ROOT = Path(__file__).parent.parent.parent


def project(name: str = "laptop", *overlays: dict):
    return load_project(ROOT / "config", ROOT / f"config/{name}.yaml", *overlays)


@pytest.fixture(scope="module", params=["laptop", "paper"])
def plan(request, tmp_path_factory):
    return plan_project(project(request.param), tmp_path_factory.mktemp("empty"))


def test_every_job_of_the_workflow_is_planned(plan):
    jobs = make_plan(plan.project)
    wanted = {("download", name) for name in jobs.downloads} | {("prepare", name) for name in jobs.data}
    wanted |= {("train", name) for name in jobs.runs} | {("evaluate", "/".join(key)) for key in jobs.evaluations}
    wanted |= {("sample", name) for name in jobs.samples} | {("speed", name) for name in jobs.speed}
    wanted |= {("report", name) for name in ("tables", "figures", "claims", "page")}
    assert set(plan.jobs) == wanted


def test_every_job_is_known_and_nothing_is_doubtful_in_the_shipped_configurations(plan):
    assert [key for key, job in plan.jobs.items() if not job.known] == []
    assert plan.warnings == []


def test_every_job_asks_for_what_it_is_predicted_to_take_and_more(plan):
    for job in plan.jobs.values():
        asked = job.resources
        assert asked["mem_mb"] > job.cost.host_gib * 1024
        assert asked["runtime"] * 60 > job.cost.seconds > 0
        assert asked["disk_mb"] > (job.cost.kept_gib + job.cost.scratch_gib) * 1024
        assert asked["gpu"] == job.place.devices
        assert all(isinstance(value, int) for value in asked.values())


def test_a_preparation_asks_for_memory_by_the_rows_of_its_sources_and_for_more_when_it_failed(tmp_path, monkeypatch):
    few, many = (
        plan_project(project("paper", {"datasets": {"alpaca": {"documents": rows}}}), tmp_path).job(
            "prepare", "alpaca--modernbert-base--512"
        )
        for rows in (1000, 10_000_000)
    )
    assert few.resources["mem_mb"] == 2048 and few.place.cores == 1 and many.place.cores == 8
    assert many.cost.host_gib > 2 and many.resources["mem_mb"] > 1.4 * 1024 * many.cost.host_gib
    ask = make_plan(project("paper")).requests("prepare")
    asked = [ask["mem_mb"](["alpaca--modernbert-base--512"], attempt) for attempt in (1, 2, 3)]
    assert asked == [2048, 4096, 6144] and ask["runtime"](["alpaca--modernbert-base--512"], 2) == 5


def test_a_job_waits_for_planned_jobs_only_and_the_longest_chain_follows_the_edges(plan):
    assert all(key in plan.jobs for job in plan.jobs.values() for key in job.after)
    seconds, chain = plan.longest_chain
    assert seconds == pytest.approx(sum(job.cost.seconds for job in chain))
    assert all((a.rule, a.name) in b.after for a, b in zip(chain, chain[1:], strict=False))
    assert chain[-1].name == "page"


@pytest.mark.parametrize("config", ["laptop", "paper"])
def test_of_jobs_that_are_ready_the_one_with_the_longest_chain_to_the_end_starts_first(config):
    found = make_plan(project(config))
    place = {key: found.priority(key[0])(key[1].split("/")) for key in found.costs.jobs if key[0] != "report"}
    for key, job in found.costs.jobs.items():
        for made in job.after:
            assert key not in place or place[made] > place[key], "what is waited for comes before what waits"
    assert place["train", "modernbert-large-wikitext"] < place["train", "chat-large"]
    first = found.costs.longest_chain[1][0]
    assert place[first.rule, first.name] == max(place.values())


def test_the_published_chat_runs_take_about_the_published_hours():
    plan = plan_project(project("paper"), "nowhere")
    # 8 A100: about 4 h (base) and 7 h (large), as docs/reproduce.md quotes them; the plan is to be right within 1.5
    assert plan.job("train", "chat-base").cost.seconds / 3600 == pytest.approx(4, rel=0.5)
    assert plan.job("train", "chat-large").cost.seconds / 3600 == pytest.approx(7, rel=0.5)


def test_a_stated_resource_wins_and_too_small_a_one_is_a_warning(tmp_path):
    stated = {"memory_gib": 3, "runtime_minutes": 1, "disk_gib": 2}
    plan = plan_project(project("laptop", {"runs": {"chat-large": {"resources": stated}}}), tmp_path)
    asked = plan.job("train", "chat-large").resources
    assert (asked["mem_mb"], asked["runtime"], asked["disk_mb"]) == (3072, 1, 2048)
    assert [line for line in plan.warnings if "resources.runtime_minutes = 1, predicted 2" in line]
    assert not [line for line in plan.warnings if "memory_gib" in line]


def test_a_run_that_does_not_fit_the_device_is_a_warning(tmp_path):
    plan = plan_project(project("paper"), tmp_path, on="rtx-4090")
    assert any("train chat-large: needs about" in line and "a rtx-4090 has" in line for line in plan.warnings)
    assert plan_project(project("paper"), tmp_path, on="h200").warnings == []


def test_faster_hardware_and_a_higher_utilisation_take_less_time(tmp_path):
    hours = [
        plan_project(project("paper"), tmp_path, on=name, utilisation=share).job("train", "chat-large").device_hours
        for name, share in (("a100-80gb", None), ("h100", None), ("h100", 0.6))
    ]
    assert hours[0] > hours[1] > hours[2]


def test_a_model_without_a_shape_leaves_its_jobs_unplanned_and_says_so(tmp_path):
    plan = plan_project(project("paper", {"models": {"modernbert-large": {"shape": None}}}), tmp_path)
    assert not plan.job("train", "chat-large").known and plan.job("train", "chat-base").known
    assert any(line.startswith("models.modernbert-large: no `shape`") for line in plan.warnings)
    asked = plan.job("train", "chat-large").resources
    assert asked["mem_mb"] >= 16384 and asked["runtime"] >= 1440 and asked["gpu"] == 8


@pytest.mark.parametrize(
    "new", [{"model_type": "mixtral", "num_local_experts": 4}, {"model_type": "bert", "hidden_size": "x"}]
)
def test_a_new_model_that_cannot_be_counted_is_a_warning_and_no_error(new, tmp_path):
    entry = {"runs": {"chat-large": {"init": "odd"}}, "models": {"odd": {"new": new, "tokenizer": "world"}}}
    plan = plan_project(project("laptop", entry), tmp_path)
    assert any(line.startswith("models.odd") for line in plan.warnings)
    assert plan.job("train", "chat-large").resources["mem_mb"] > 512


def test_a_downloaded_config_that_differs_from_the_shape_is_one_warning(tmp_path):
    place = tmp_path / "downloads/bert-base/config.json"
    place.parent.mkdir(parents=True)
    stated = {"model_type": "bert", "vocab_size": 30522, "num_hidden_layers": 12}
    place.write_text(json.dumps(stated))
    assert plan_project(project("paper"), tmp_path).warnings == []
    place.write_text(json.dumps(stated | {"num_hidden_layers": 10}))
    plan = plan_project(project("paper"), tmp_path)
    assert plan.warnings == ["models.bert-base.shape: layers = 12, not 10 in its config.json; correct the entry"]


def test_an_estimate_is_no_part_of_what_a_job_is_told():
    from dllm.config import digest, download_configs, prepare_configs, run_configs

    more = {"tokens": 1, "documents": 1, "test_documents": 1, "target_share": 0.1}
    entries = {"datasets": {"tulu": more}, "models": {"modernbert-large": {"parameters": 1, "shape": None}}}
    before, after = project("paper"), project("paper", entries)
    for configs in (download_configs, prepare_configs, run_configs):
        told = [{name: digest(c) for name, c in configs(p).items()} for p in (before, after)]
        assert told[0] == told[1]


# --------------------------------------------------------------------------------------------------------------------
# Measured


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


TSV = "s\th:m:s\tmax_rss\n{}\t0:00:10\t{}\n"


@pytest.fixture
def finished(tmp_path):
    """A work directory with a finished run, one on its way, a benchmark, and a damaged file."""
    facts = {"wall_seconds": 100.0, "tokens": 1_160_000, "device": "cpu", "hardware": "a CPU"}
    write(tmp_path / "runs/chat-large/provenance.json", facts)
    write(tmp_path / "runs/chat-large.json", {"bytes": 2**20})
    write(tmp_path / "benchmarks/train/chat-large.tsv", TSV.format(110.0, 1024))
    rows = [{"split": "train", "tokens_per_second": speed} for speed in (10_000, 20_000, 30_000)]
    write(tmp_path / f".work/chat-base-{'0' * 16}/metrics.jsonl", "\n".join(map(json.dumps, rows)) + "\n{torn")
    other = {"split": "train", "tokens_per_second": 1}
    write(tmp_path / f".work/chat-base-published-{'0' * 16}/metrics.jsonl", other)
    score = {"wall_seconds": 5.0, "passes": 240, "provenance": {"device": "cuda", "hardware": "a GPU"}}
    write(tmp_path / "evals/chat-large/lambada.json", score)
    write(tmp_path / "evals/chat-large/mmlu.json", "{damaged")
    return tmp_path


def test_finished_jobs_are_read_and_damaged_ones_are_left_out(finished):
    plan = plan_project(project(), finished)
    found = measure(plan, finished)
    large = found["train", "chat-large"]
    assert (large.seconds, large.host_gib, large.tokens, large.kept_gib) == (110.0, 1.0, 1_160_000, 2**-10)
    assert ("evaluate", "chat-large/mmlu") not in found


def test_a_run_on_its_way_is_extrapolated_from_its_median_speed(finished):
    plan = plan_project(project(), finished)
    base = measure(plan, finished)["train", "chat-base"]
    assert base.partial
    assert base.seconds == pytest.approx(plan.job("train", "chat-base").cost.tokens / 20_000)


def test_times_of_another_kind_of_machine_are_not_compared(finished):
    plan = plan_project(project(), finished)
    found = measure(plan, finished)
    lambada = found["evaluate", "chat-large/lambada"]
    assert lambada.passes == 240 and not comparable(plan.job("evaluate", "chat-large/lambada"), lambada)
    printed = text(plan, found, verbose=True, title="t")
    assert "seconds          2 jobs" in printed and "passes           1 jobs" in printed
    told = {(j["rule"], j["name"]): j for j in as_json(plan, found)["jobs"]}
    assert told["train", "chat-large"]["ratio"] > 0 and told["evaluate", "chat-large/lambada"]["ratio"] is None


# --------------------------------------------------------------------------------------------------------------------
# Shown


def test_the_table_has_a_line_for_every_rule_and_the_total(plan):
    printed = text(plan, {}, title="t")
    table = printed.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table if not line.startswith("-")] == ["rule", *RULES, "total"]
    assert max(map(len, table)) <= 118
    assert len({len(line) for line in table if set(line) == {"-"}}) == 1


def test_numbers_are_short():
    assert [count(x) for x in (0, 999, 1234, 2.5e9, 1e21)] == ["", "999", "1.23 k", "2.5 G", "1 Z"]
    assert [duration(x) for x in (4.21, 51, 600, 7200, 1e6)] == ["4.2 s", "51 s", "10 min", "2.0 h", "11.6 days"]
    assert aligned([["a", "b"], ["x", "10"], ["t", "1"]]) == "a   b\n-----\nx  10\n-----\nt   1"
