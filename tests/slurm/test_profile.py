"""The shipped profile and the plan of the full reproduction, as `sbatch` would see them; needs no Slurm."""

import re

from tests.slurm.flags import profile, sbatch
from tests.workflow.conftest import ROOT, snakemake

PAPER = [ROOT / "config/paper.yaml"]
ALWAYS = {"--requeue", "--signal=TERM@120", "--open-mode=append", "--export=ALL", "--parsable"}


def flags(rule: str, name: str) -> tuple[set[str], int, int]:
    """(flags that say where a job runs, its minutes, its memory in MB)."""
    text = sbatch(PAPER, rule, name)
    minutes, memory = (int(re.search(rf"{flag} (\d+)", text)[1]) for flag in ("-t", "--mem"))
    words = {word for word in text.split() if word.startswith("--")}
    assert words >= ALWAYS
    return words - ALWAYS - {"--job-name", "--output", "--comment", "--mem"}, minutes, memory


def test_a_training_on_one_machine_gets_one_task_with_all_its_gpus_and_cores():
    words, minutes, memory = flags("train", "chat-large")
    assert words == {"--nodes=1", "--gpus=8", "--cpus-per-task=64"}
    assert minutes > 60 and memory > 32_000


def test_a_training_on_four_machines_gets_a_task_and_eight_gpus_on_each():
    words, _, _ = flags("train", "modernbert-large-openwebtext")
    assert words == {"--nodes=4", "--ntasks=4", "--gres=gpu:8", "--gpus=32", "--cpus-per-task=64"}
    assert not [word for word in words if word.startswith("--ntasks-per-gpu")], "that would start eight tasks a machine"


def test_an_evaluation_gets_one_gpu_and_a_preparation_none():
    assert flags("evaluate", "chat-large/mmlu")[0] == {"--nodes=1", "--gpus=1", "--cpus-per-task=8"}
    for rule in ("sample", "speed"):
        assert flags(rule, "chat-large")[0] == {"--nodes=1", "--gpus=1", "--cpus-per-task=1"}
    assert flags("prepare", "alpaca--modernbert-base--512")[0] == {"--nodes=1", "--ntasks=1", "--cpus-per-task=5"}


def test_the_profile_resumes_and_asks_squeue():
    found = profile()
    assert found["executor"] == "slurm" and found["slurm-requeue"] and found["rerun-incomplete"]
    assert found["slurm-status-command"] == "squeue", "sacct hangs for ever where accounting is off"
    assert found["retries"] >= 1, "or a job that reached its time limit stays down"


def test_the_full_reproduction_is_planned_through_the_profile(tmp_path):
    (tmp_path / "elsewhere.yaml").write_text(f"workdir: {tmp_path / 'work'}\n")
    said = snakemake("-n", "--profile", "slurm", overlays=[*PAPER, tmp_path / "elsewhere.yaml"]).stdout
    assert "slurm_extra=--signal=TERM@120 --open-mode=append" in said
    assert re.search(r"^train +24$", said, re.M)
