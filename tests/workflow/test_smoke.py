"""The full reproduction, cut short by config/smoke.yaml, from download to page over repositories as the real ones."""

import filecmp
import json
import os
import shutil
import subprocess
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from dllm.config import (
    DatasetEntry,
    ModelEntry,
    download_configs,
    evaluation_configs,
    load_project,
    read_yaml,
    run_configs,
)
from tests.hub_commands import hub_environment
from tests.hub_layouts import DATASETS, MODELS, write_hub
from tests.loopback_hub import LoopbackHub
from tests.workflow.conftest import BIN, ROOT, warm_jobs
from workflow.warm import of_jobs

pytestmark = pytest.mark.slow  # 140 jobs: minutes of CPU


ASKED = {
    "lambada": 4, "gsm8k": 4, "ceval": 52 * 3, "bbh": 27 * 3, "math": 7 * 3, "mmlu": 57 * 3, "winogrande": 4,
    "hellaswag": 4, "cmmlu": 67 * 3, "humaneval": 3, "humaneval-chat": 3, "mbpp": 3,
    "mmlu-answered": 57 * 3,
}  # fmt: skip
"""Documents of each benchmark in the hub's repositories."""


KINDS = ["lambada", "gsm8k", "mmlu", "hellaswag"]
"""A benchmark of each kind: greedy words, free answers, letters, endings."""


FEWER = {
    "chat-base-published": KINDS,  # asked what chat-base is, with another scorer
    "gpt2": KINDS,  # likewise
    "chat-large": ["gsm8k", "winogrande"],  # as chat-base, but for the size of the model, which the hub's do not have
    "gpt2-medium": ["gsm8k", "winogrande"],  # as gpt2
    "qwen1.5-0.5b": ["gsm8k", "winogrande"],  # asked as gpt2
    "qwen1.5-0.5b-chat": ["gsm8k", "mmlu"],  # asked as gpt2, but for the template of its chats
}
"""Rows of the paper that are asked less here: what differs from another row is no matter of the benchmark, and one row
is asked them all. The snapshots have all their configs (test_dag.py).
"""

UNTRAINED = (
    # one of two sizes, which the hub's models do not have: large ones are trained from ModernBERT
    *("bert-large-wikitext", "roberta-large-wikitext", "bert-large-wikitext-published"),
    *("roberta-large-wikitext-published", "modernbert-large-wikitext-published", "chat-large-published"),
    "alpaca-after-wikitext-published",  # starts from one of them, as others do from a run of that recipe
)
"""Runs of the paper that are not rehearsed here: each is another one but for what the hub's miniatures do not have."""


def shortened() -> dict:
    """The overlay that takes these runs, and what asks for them, out of the paper, and has its rows asked less."""
    report = read_yaml(ROOT / "config/experiments.yaml")["report"]
    shown = {
        section: [entry for entry in entries if entry["run"] not in UNTRAINED]
        for section, entries in report.items()
        if isinstance(entries, list)
    }
    rows = {row: {"benchmarks": benchmarks} for row, benchmarks in FEWER.items()}
    return {
        "runs": dict.fromkeys(UNTRAINED),
        "evaluations": {**rows, "chat-large-published": None},
        "report": shown,
    }


SHORT = shortened()
ONE_GPU = {
    "evaluations": {
        "gpt2": SHORT["evaluations"]["gpt2"],
        "modernbert-base": {"benchmarks": ["gsm8k", "hellaswag"]},  # turns of a chat, and a text
    }
}


def pins(hub: LoopbackHub, *names: str) -> dict:
    """An overlay with the commits, and the numbers of rows, of the hub's repositories."""
    project = load_project(ROOT / "config", *(ROOT / f"config/{name}.yaml" for name in names))
    found: dict[str, dict] = {"models": {}, "datasets": {}}
    found["benchmarks"] = {name: {"size": {"documents": ASKED[name]}} for name in project.benchmarks}
    for config in download_configs(project).values():
        entry = config.model or config.dataset
        if not entry.hub:
            continue
        kind = f"{config.what}s"
        found[kind][config.name] = {"revision": hub.commit(kind, entry.hub)}
        if isinstance(entry, DatasetEntry) and entry.kind != "benchmark":
            files = DATASETS[entry.hub].configs[entry.config or "default"]
            rows = {split: rows for split, (_, rows) in files.splits.items()}
            found[kind][config.name] |= {"documents": rows["train"]} | (
                {"counts": rows} if project.datasets[config.name].counts else {}
            )
            if entry.test_documents:
                found[kind][config.name]["test_documents"] = rows[project.datasets[config.name].test_split]
    return found


def rehearse(home: Path, hub: LoopbackHub, jobs: dict[str, str], *names: str, **fewer) -> tuple[Path, CompletedProcess]:
    """The work directory and what was printed of a rehearsal of some configurations.

    jobs: the fixture of this name; fewer: changes of entries, by section.
    """
    overlay = home / "pins.yaml"
    overlay.write_text(yaml.safe_dump(pins(hub, *names) | {"workdir": str(home / "work")} | fewer))
    files = [*(f"config/{name}.yaml" for name in (*names, "smoke")), str(overlay)]
    command = [str(BIN / "snakemake"), "--cores", "2", "--keep-going", "--quiet", "host", "reason", "--configfile"]
    done = subprocess.run([*command, *files], cwd=ROOT, env=jobs, capture_output=True, text=True)
    return home / "work-rehearsal", done


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_hub(root)
    with LoopbackHub(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def jobs(hub, tmp_path_factory):
    """The environment of all rehearsals, with the names of the processes that run their jobs."""
    home = tmp_path_factory.mktemp("home")
    environment = hub_environment(hub.url, home, PATH=f"{BIN}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    # for jobs with and without the hub
    with warm_jobs(*(of_jobs(environment, offline) for offline in (0, 1))) as names:
        yield environment | names


@pytest.fixture(scope="module")
def paper(hub, jobs, tmp_path_factory):
    """The finished rehearsal of the paper: (work directory, what was printed)."""
    return rehearse(tmp_path_factory.mktemp("paper"), hub, jobs, "paper", **SHORT)


def test_every_repository_of_the_paper_and_of_the_small_path_has_a_layout():
    projects = [load_project(ROOT / "config", ROOT / f"config/{name}.yaml") for name in ("paper", "small")]
    jobs = [job for project in projects for job in download_configs(project).values()]
    entries = [entry for job in jobs if (entry := job.model or job.dataset).hub]
    assert {e.hub for e in entries if isinstance(e, ModelEntry)} == set(MODELS)
    assert {e.hub for e in entries if isinstance(e, DatasetEntry)} == set(DATASETS)


def test_every_pin_of_the_paper_is_checked_and_works(hub, jobs, tmp_path):
    overlay = pins(hub, "paper")
    for entry in overlay["models"].values():  # the hub's models are real but for depth and width
        entry["shape"] = None
    (tmp_path / "pins.yaml").write_text(yaml.safe_dump(overlay))
    command = [str(BIN / "dllm"), "check", "config/paper.yaml", str(tmp_path / "pins.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=of_jobs(jobs, offline=0), capture_output=True, text=True)
    lines = {line.split()[1]: line for line in done.stdout.splitlines()[1:]}
    assert done.returncode == 0 and len(lines) == 33, done.stdout + done.stderr
    for name, tasks in {"cmmlu": 67, "mmlu": 57, "ceval": 52, "bbh": 27, "math": 7, "gsm8k": 1}.items():
        assert f"tasks {tasks}, documents {ASKED[name]} " in lines[name]


def test_every_rule_of_the_paper_works_from_download_to_page(paper):
    workdir, done = paper
    found = json.loads((workdir / "report/rehearsal.json").read_text())
    failed = [f"{job['rule']} {job['name']}: {job['reason']}" for job in found["missing"]]
    assert not failed and done.returncode == 0, "\n".join(failed) or done.stderr[-3000:]
    assert "Rehearsal: all " in done.stderr and "rehearsal.html" in done.stderr
    page = (workdir / "report/rehearsal.html").read_text()
    project = load_project(ROOT / "config", ROOT / "config/paper.yaml", SHORT)
    for jobs, count in ((evaluation_configs(project), 25), (run_configs(project), 17)):
        assert len(jobs) == count and f"{count} of {count}" in page


def test_every_row_is_asked_every_task_of_its_benchmarks(paper):
    tasks = {"cmmlu": 67, "mmlu": 57, "ceval": 52, "bbh": 27, "math": 7}
    asked = evaluation_configs(load_project(ROOT / "config", ROOT / "config/paper.yaml", SHORT))
    assert {benchmark for _, benchmark in asked} >= set(tasks)
    for row, benchmark in asked:
        scores = json.loads((paper[0] / f"evals/{row}/{benchmark}.json").read_text())
        assert scores["n"] == tasks.get(benchmark, 1), (row, benchmark)


def test_nothing_that_is_not_needed_is_downloaded(paper):
    fetched = {path.name for path in (paper[0] / "downloads").glob("*/*")}
    assert not fetched & {"pytorch_model.bin", "tf_model.h5", "cmmlu.py", "lambada_openai.py"}


def test_every_rule_of_the_path_on_one_gpu_works_too(hub, jobs, paper, tmp_path):
    """Where the paper is rehearsed already: a job of the same configuration is the same one, all others run."""
    reported = shutil.ignore_patterns("report", "tables", "figures", "claims.json")
    shutil.copytree(paper[0], tmp_path / "work-rehearsal", symlinks=True, ignore=reported)
    workdir, done = rehearse(tmp_path, hub, jobs, "one-gpu", **ONE_GPU)
    found = json.loads((workdir / "report/rehearsal.json").read_text())
    failed = [f"{job['rule']} {job['name']}: {job['reason']}" for job in found["missing"]]
    assert not failed and done.returncode == 0, "\n".join(failed) or done.stderr[-3000:]
    runs = load_project(ROOT / "config", ROOT / "config/one-gpu.yaml").runs
    same = {
        run
        for run in runs
        if (made := paper[0] / f"runs/{run}.json").exists() and filecmp.cmp(made, workdir / f"runs/{run}.json")
    }
    assert same == {"modernbert-base-wikitext", "chat-base"} and len(runs) == 6
    # an encoder of the hub, which comes without a chat template
    assert json.loads((workdir / "evals/modernbert-base/gsm8k.json").read_text())["n"] == 1


def test_the_small_path_works_from_weights_without_safetensors_to_a_page_of_three_starts(hub, jobs, tmp_path):
    workdir, done = rehearse(tmp_path, hub, jobs, "small")
    found = json.loads((workdir / "report/rehearsal.json").read_text())
    failed = [f"{job['rule']} {job['name']}: {job['reason']}" for job in found["missing"]]
    assert not failed and done.returncode == 0, "\n".join(failed) or done.stderr[-3000:]
    fetched, drawn = (
        json.loads((workdir / f"downloads/{n}/config.json").read_text()) for n in ("ettin-17m", "untrained")
    )
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "local_attention")
    assert [fetched[key] for key in sizes] == [drawn[key] for key in sizes] and not fetched.get("rope_parameters")
    assert drawn["rope_parameters"]["sliding_attention"]["rope_theta"] == 160000.0
    claims = json.loads((workdir / "claims.json").read_text())
    assert claims["question"] == "What does pretraining give a chatbot?"
    assert [claim["verdict"] for claim in claims["claims"]] == ["undecided", "undecided"]  # of two steps
    assert "decides nothing" in claims["claims"][0]["findings"][0]["because"]
