"""Slurm for real, two virtual machines: the shipped profile runs the graph, and comes to the numbers of a local run."""

import json
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.box import Box, NoSlurm
from tests.slurm.flags import sbatch
from tests.workflow.conftest import ROOT, snakemake
from tests.workflow.rehearsal import overlays, reference, results

pytestmark = pytest.mark.slow

SITE = """\
slurm-init-seconds-before-status-checks: 2   # jobs of seconds want to be asked after more often
latency-wait: 5
set-resources:
  train:
    slurm_partition: gpu
"""
"""What this cluster needs beyond the shipped profile, in a file of its own, as docs/reproduce.md has it."""


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A running cluster."""
    found = Box(tmp_path_factory.mktemp("slurm") / "box")
    try:
        found.start()
    except NoSlurm as reason:
        pytest.skip(str(reason))
    yield found
    found.stop()


LESS = "samples: {chat-large: null}\nspeed: {chat-large: null}\nbenchmarks: {gsm8k: null}\n"
"""What the cluster does not make: the flags of these jobs are those of the other evaluation (test_profile.py)."""


def begun(local: Path, workdir: Path) -> None:
    """A work directory with what another has downloaded, prepared but for the chat, and pretrained."""
    for place in ("configs", "downloads", "data"):
        shutil.copytree(local / place, workdir / place, ignore=shutil.ignore_patterns("chat--world--*"))
    run = "runs/modernbert-large"
    shutil.copytree(local / run, workdir / run)
    shutil.copy2(local / f"{run}.json", workdir / f"{run}.json")


@dataclass
class Run:
    """A finished run of the graph: its work directory, the local one, and what Slurm says of each job, by log file."""

    workdir: Path
    local: Path
    jobs: dict[str, str]
    preempted: str


@pytest.fixture(scope="module")
def run(box, tmp_path_factory, worker_id):
    """The graph on the cluster; one training is preempted in the middle."""
    local = reference(tmp_path_factory, worker_id)
    home = tmp_path_factory.mktemp("cluster")
    files = overlays(home)
    begun(local, home / "work")
    (home / "less.yaml").write_text(LESS)
    files.append(home / "less.yaml")
    (home / "profile.yaml").write_text(SITE)
    preempted: list[str] = [""]
    ended = threading.Event()
    preemption = threading.Thread(target=preempt, args=(box, home / "work", "chat-large", preempted, ended))
    preemption.start()
    try:
        snakemake("--profile", "slurm", "--profile", str(home), overlays=files)
    finally:
        ended.set()
        preemption.join()
    return Run(home / "work", local, described_jobs(box), *preempted)


def preempt(box: Box, workdir: Path, name: str, preempted: list[str], ended: threading.Event) -> None:
    """Requeue the job that trains a run once it has saved a checkpoint, as Slurm does for a job of higher priority."""
    while not list(workdir.glob(f".work/{name}-*/step-*")) and not ended.wait(0.05):
        pass
    number = re.match(r"JobId=(\d+) ", described_jobs(box)[f"train/{name}"])[1]
    box.say("scontrol", "requeue", number)
    preempted[0] = number
    # Slurm lets a requeued job rest for two minutes; this is no test of its patience
    while not ended.wait(0.2) and "Reason=BeginTime" not in box.say("scontrol", "show", "job", number):
        pass
    box.say("scontrol", "update", f"JobId={number}", "StartTime=now")


def described_jobs(box: Box) -> dict[str, str]:
    """What Slurm knows of every job, by `rule/wildcards`, in one line."""
    lines = box.say("scontrol", "--oneliner", "show", "job").splitlines()
    found = {}
    for line in lines:
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        where = Path(facts["StdOut"])
        found[f"{where.parent.parent.name.removeprefix('rule_')}/{where.parent.name}"] = line
    return found


def test_every_number_but_those_of_two_machines_is_the_local_one_bit_for_bit(run):
    here, there = results(run.local), results(run.workdir)
    assert here.keys() - there.keys() == {f"evals/chat-large/gsm8k{end}" for end in (".json", ".samples.jsonl")}
    assert len(there) >= 8
    different = {name for name in there if here[name] != there[name]}
    assert different <= {"runs/alpaca-untuned.json", "runs/alpaca-untuned/metrics.jsonl"}
    here, there = ((w / "tables/results.csv").read_text().splitlines() for w in (run.local, run.workdir))
    assert len(there) >= 2 and there == [line for line in here if "gsm8k" not in line]


def test_two_machines_train_the_same_run_as_one_up_to_rounding(run):
    facts = json.loads((run.workdir / "runs/alpaca-untuned/provenance.json").read_text())
    assert facts["processes"] == 2, "each machine trained alone"
    name = "runs/alpaca-untuned/metrics.jsonl"
    for one, two in zip(results(run.local)[name], results(run.workdir)[name], strict=True):
        assert (one["step"], one["split"]) == (two["step"], two["split"])
        # fp32 sums run in another order, over four steps
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two.get("tokens") == one.get("tokens")


def test_a_preempted_training_goes_on_from_its_checkpoint(run):
    """And ends with the same bits, as the first test says of all."""
    (job,) = [line for line in run.jobs.values() if f"JobId={run.preempted} " in line]
    assert "Restarts=1" in job and "JobState=COMPLETED" in job
    assert "chat-large" in job
    log = (run.workdir / "logs/train/chat-large.log").read_text()
    assert "going on from step" in log


def test_jobs_get_the_machines_memory_and_time_they_ask_for(run):
    assert len(run.jobs) == 4, "two trainings, an evaluation, and the preparation of what one run is trained on"
    two = [line for line in run.jobs.values() if "NumNodes=2" in line]
    assert len(two) == 1 and "NumTasks=2" in two[0] and "alpaca-untuned" in two[0]
    for line in run.jobs.values():
        assert "Requeue=1" in line and "TimeLimit=00:05:00" in line and "MinMemoryNode=" in line
        assert f"Partition={'gpu' if 'rule_train' in line else 'batch'} " in line
    assert not [line for line in run.jobs.values() if "download" in line], "downloads need the login node's network"


def test_logs_are_where_the_documentation_says(run):
    for name in ("logs/train/chat-large.log", "logs/evaluate/chat-large/mmlu.log"):
        assert (run.workdir / name).stat().st_size
    assert list(run.workdir.glob(".snakemake/slurm_logs/rule_train/chat-large/*.log"))


GPU_JOB = """\
runs: {chat-large: {resources: {nodes: %d, gpus_per_node: 2, cpus_per_task: 2, memory_gib: 1}}}
hardware: a100-80gb
"""
SHOW = "import os; print(os.environ['SLURM_NODEID'], os.environ['CUDA_VISIBLE_DEVICES'])"


@pytest.mark.parametrize("nodes", [1, 2])
def test_gpus_are_granted_on_every_machine(box, nodes, tmp_path):
    """To a job with the flags of a training, which only shows what it got."""
    overlay = tmp_path / "gpu.yaml"
    overlay.write_text(GPU_JOB % nodes)
    command = sbatch([ROOT / "config/laptop.yaml", overlay], "train", "chat-large", str(tmp_path / "out"))
    step = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task=2"
    script = f'#!/bin/sh\n{step} python3 -c "{SHOW}"\n'
    done = subprocess.run(f"{command} --wait", shell=True, input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "out").read_text().splitlines()) == [f"{node} 0,1" for node in range(nodes)]
