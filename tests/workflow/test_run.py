"""A small graph, run for real: what is rerun after a change is what depends on it, and nothing else."""

import hashlib
import shutil

import pytest
import yaml

from tests.workflow.conftest import ROOT, planned, snakemake
from tests.workflow.rehearsal import KEPT_RUNS, overlays, reference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id):
    """A copy of the finished small work directory, and its overlay file."""
    source = reference(tmp_path_factory, worker_id)
    home = source.parent.parent / f"copy-of-{source.parent.name}"  # as deep, for command lines lead to the repository
    shutil.copytree(source, home / "work", symlinks=True)
    return home, overlays(home)[1]


def plan_with(home, overlay, changes: dict | None = None) -> list[tuple[str, str]]:
    """(rule, target) planned now, with some run settings changed."""
    files = [ROOT / "config/laptop.yaml", overlay]
    if changes is not None:
        changed = home / "changed.yaml"
        changed.write_text(yaml.safe_dump({"runs": changes}))
        files.append(changed)
    return [(rule, target) for rule, target, _ in planned(overlays=files)]


REPORT_RULES = {"tables", "figures", "claims", "page"}


def test_a_second_call_says_there_is_nothing_to_be_done(finished):
    home, overlay = finished
    again = snakemake("--cores", "1", overlays=[ROOT / "config/laptop.yaml", overlay])
    assert "Nothing to be done" in again.stdout + again.stderr


def test_the_report_is_there_and_self_contained(finished):
    page = (finished[0] / "work/report/index.html").read_text()
    assert "<svg" in page or "data:image" in page
    assert 'src="http' not in page and 'href="http://' not in page.split("</head>")[0]
    assert (finished[0] / "work/report/report.md").stat().st_size > 1000


def test_a_deleted_evaluation_is_redone_with_the_report_and_nothing_else(finished):
    home, overlay = finished
    result = home / "work/evals/chat-large/mmlu.json"
    saved = shutil.copy2(result, home / "mmlu.json")
    result.unlink()
    jobs = plan_with(home, overlay)
    shutil.copy2(saved, result)
    assert {rule for rule, _ in jobs} == {"evaluate"} | REPORT_RULES
    assert [target for rule, target in jobs if rule == "evaluate"] == ["chat-large/mmlu"]


def test_a_changed_learning_rate_redoes_that_run_and_what_depends_on_it(finished):
    home, overlay = finished
    jobs = plan_with(home, overlay, {"alpaca-untuned": {"optimizer": {"learning_rate": 0.001}}})
    assert [target for rule, target in jobs if rule == "train"] == ["alpaca-untuned"]
    assert {rule for rule, _ in jobs} == {"train"} | REPORT_RULES


def test_where_a_run_is_launched_is_no_reason_to_run_it_again(finished):
    home, overlay = finished
    elsewhere = {"launch": "ddp", "resources": {"nodes": 2, "gpus_per_node": 4, "cpus_per_task": 8}}
    assert plan_with(home, overlay, {"alpaca-untuned": elsewhere}) == []


def test_a_changed_start_redoes_everything_that_starts_from_it(finished):
    home, overlay = finished
    jobs = plan_with(home, overlay, {"modernbert-large": {"seed": 43}})
    assert {target for rule, target in jobs if rule == "train"} == set(KEPT_RUNS)
    assert {"evaluate", "sample", "speed"} <= {rule for rule, _ in jobs}


def test_forcing_a_run_again_gives_the_same_bytes_and_so_the_same_tables(finished):
    home, overlay = finished
    work = home / "work"

    def digests() -> dict:
        paths = [*work.glob("tables/*"), *work.glob("figures/*.csv"), *work.glob("runs/*.json")]
        paths = [p for p in paths if p.name != "speed.csv"]
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    before = digests()
    files = [ROOT / "config/laptop.yaml", overlay]
    trained = (work / "runs/alpaca-untuned.json").stat().st_mtime_ns
    again = ["runs/alpaca-untuned.json", "tables", "figures"]
    snakemake("--cores", "2", "--forcerun", *again, overlays=files)
    assert (work / "runs/alpaca-untuned.json").stat().st_mtime_ns > trained and digests() == before


def test_every_number_can_be_traced(finished):
    trace = (finished[0] / "work/report/provenance.csv").read_text().splitlines()
    columns = trace[0].split(",")
    for wanted in ("run", "seed", "commit", "hardware"):
        assert any(wanted in column for column in columns), trace[0]
    assert len(trace) > 3
