"""What each configuration plans: the graph, every command line and every resolved config, against snapshots.

After an intended change: `UPDATE_SNAPSHOTS=1 make test`, then read the difference.
"""

import difflib
import os
from pathlib import Path

import pytest
import yaml

from dllm.config import load_project
from tests.workflow.compact import configs_text, defaults_text, jobs_text
from tests.workflow.conftest import ROOT, asked_jobs, snakemake
from workflow.plan import check_writable, make_plan

SNAPSHOTS = Path(__file__).parent / "snapshots"


def check_snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    old = path.read_text()
    lines = list(difflib.unified_diff(old.splitlines(), text.splitlines(), "snapshot", "now", lineterm="", n=1))
    assert not lines, "\n".join(lines[:40])


@pytest.fixture(scope="module", params=["paper", "one-gpu", "laptop"])
def asked(request, tmp_path_factory):
    """(name, planned jobs, what each asks for, work directory) of a shipped configuration in a fresh directory."""
    workdir = tmp_path_factory.mktemp(request.param) / "work"
    elsewhere = workdir.parent / "elsewhere.yaml"
    elsewhere.write_text(f"workdir: {workdir}\n")
    return request.param, *asked_jobs([ROOT / "config" / f"{request.param}.yaml", elsewhere]), workdir


@pytest.fixture(scope="module")
def plan(asked):
    """(name, planned jobs, work directory) of a shipped configuration."""
    name, jobs, _, workdir = asked
    return name, jobs, workdir


def test_every_job_its_command_line_and_its_resources_are_as_in_the_snapshot(asked):
    name, jobs, resources, workdir = asked
    check_snapshot(f"{name}.jobs.txt", jobs_text(jobs, resources, os.path.relpath(ROOT, workdir)))


def test_every_default_is_as_in_the_snapshot():
    check_snapshot("defaults.yaml", defaults_text())


def test_a_resource_that_an_entry_states_is_what_is_asked_for():
    """Of the rules, which ask for what the plan says: see the snapshots."""
    stated = {"runs": {"chat-large": {"resources": {"memory_gib": 3, "runtime_minutes": 77}}}}
    asked = make_plan(load_project(ROOT / "config", ROOT / "config/laptop.yaml", stated)).resources(
        "train", "chat-large"
    )
    assert {"mem_mb": 3072, "runtime": 77, "gpu": 0}.items() <= asked.items()


def test_every_resolved_config_is_as_in_the_snapshot(plan):
    name, _, workdir = plan
    check_snapshot(f"{name}.configs.yaml", configs_text(workdir))


def test_every_command_line_names_a_config_that_was_written(plan):
    _, jobs, workdir = plan
    for _, _, shell in (job for job in jobs if job[0] != "track"):
        (config,) = [word for word in shell.split() if word.startswith("configs/")]
        assert yaml.safe_load((workdir / config).read_text()), shell


def test_only_downloads_and_runs_on_streamed_data_may_use_the_network(plan):
    name, jobs, _ = plan
    online = {
        target.split("/")[-1]
        for rule, target, shell in jobs
        if rule in ("prepare", "train", "evaluate", "sample", "speed") and "HF_HUB_OFFLINE=1" not in shell
    }
    streamed = {
        "paper": {"modernbert-large-openwebtext", "modernbert-large-openwebtext-published"},
        "one-gpu": {"modernbert-base-openwebtext"},
        "laptop": set(),
    }
    assert online == streamed[name]


def test_planning_twice_writes_nothing_new(plan):
    """First by Snakemake, then in this process, as the Snakefile does it."""
    name, _, workdir = plan
    before = {p: p.stat().st_mtime_ns for p in (workdir / "configs").rglob("*.*")}
    overlays = [ROOT / f"config/{name}.yaml", workdir.parent / "elsewhere.yaml"]
    make_plan(load_project(ROOT / "config", *overlays)).write(workdir)
    assert before == {p: p.stat().st_mtime_ns for p in (workdir / "configs").rglob("*.*")} and len(before) > 15


@pytest.mark.parametrize(
    ("overlay", "line"),
    [
        ("runs: {chat-base: {init: nobody}}", "runs.chat-base.init = 'nobody' is neither a model nor a run."),
        ("runs: [1", "not valid JSON or YAML"),
        ("workdir: config/laptop.yaml", "`workdir` must be a directory that can be written"),
    ],
)
def test_a_mistake_in_a_config_stops_the_workflow_with_one_line(tmp_path, overlay, line):
    path = tmp_path / "mine.yaml"
    path.write_text(overlay)
    done = snakemake("-n", overlays=[ROOT / "config/laptop.yaml", path], check=False)
    assert done.returncode != 0
    assert line in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_a_work_directory_of_somebody_else_is_named_before_anything_runs(monkeypatch, tmp_path):
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    check_writable(tmp_path)
    for place in ("", ".snakemake", ".snakemake/locks"):
        closed = tmp_path / place
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: Path(path) != closed)
        with pytest.raises(PermissionError) as error:
            check_writable(tmp_path)
        assert Path(error.value.filename) == closed


@pytest.mark.slow
def test_a_job_runs_also_where_the_environment_is_not_activated(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"workdir: {tmp_path / 'work'}\n")
    target = "downloads/pocket-world.json"
    overlays = [ROOT / "config/laptop.yaml", path]
    snakemake(target, "--nolock", "--cores", "1", overlays=overlays, PATH=os.defpath)
    assert (tmp_path / "work" / target).is_file()
