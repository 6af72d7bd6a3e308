"""The launcher: what a job was given becomes one command line, and nobody trains alone by mistake."""

import argparse
import subprocess
import sys

import pytest
import torch

from tests.workflow.conftest import ROOT
from workflow import launch

SLURM = {
    ("squeue", "--noheader", "--jobs", "41", "--format=%D"): "4",
    ("scontrol", "show", "hostnames", "gpu[3,5-7]"): "gpu3\ngpu5\ngpu6\ngpu7",
    (
        "scontrol",
        "show",
        "node",
        "gpu3",
    ): "NodeName=gpu3 Arch=x86_64\n NodeAddr=10.0.0.3 Port=6818\n OS=Linux 6",
}
STEP = {"SLURM_JOB_ID": "41", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[3,5-7]", "SLURM_NODEID": "2"}


@pytest.fixture(autouse=True)
def cluster(monkeypatch):
    """Slurm's answers, and eight visible accelerators."""
    monkeypatch.setattr(launch, "output", lambda *command: SLURM[command])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)


def planned(words: str, environment=None) -> tuple[list[str], dict[str, str]]:
    command, told = launch.plan(launch.parser().parse_args(words.split()), environment or {})
    return command[1:] if command[0] == sys.executable else command, told


def config(kind: str) -> str:
    return str(ROOT / f"config/accelerate/{kind}.yaml")


@pytest.mark.parametrize("kind", ["cpu", "ddp"])
def test_one_process_needs_no_launcher(kind):
    command, told = planned(f"--with {config(kind)} -- train --replace x.yaml")
    assert command == ["-m", "dllm", "train", "--replace", "x.yaml"]
    assert told["DLLM_PROCESSES"] == "1" and ("ACCELERATE_USE_CPU" in told) == (kind == "cpu")


@pytest.mark.parametrize(("asked", "visible", "used"), [(8, 8, 8), (8, 4, 4), (2, 8, 2)])
def test_a_process_for_every_accelerator_that_was_asked_for_and_is_there(monkeypatch, asked, visible, used):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
    command, told = planned(f"--with {config('ddp')} --nodes 4 --gpus {asked} -- train x.yaml")
    assert told == {"DLLM_PROCESSES": str(used)}
    assert command[:4] == ["-m", "accelerate.commands.launch", "--config_file", config("ddp")]
    assert " ".join(command[4:]) == (
        f"--num_machines 1 --num_processes {used} --main_process_port 0 -m dllm train x.yaml"
    )


def test_no_accelerator_where_one_is_needed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["launch", "--with", config("ddp"), "--gpus", "8", "--", "train", "x.yaml"])
    assert launch.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch: error: --gpus 8: no accelerator is visible here") and "set `launch: cpu`" in line


def test_a_job_of_several_machines_starts_itself_once_on_each():
    command, told = planned(
        f"--with {config('ddp')} --nodes 4 --gpus 8 --cpus 64 -- train x.yaml", {"SLURM_JOB_ID": "41"}
    )
    assert command[:5] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpus-per-task=64"]
    assert command[5] == "--kill-on-bad-exit=1", "or the others wait five minutes for the one that failed"
    assert not told
    again = launch.parser().parse_args(command[8:])
    assert again.on_each_node and (again.config, again.gpus, again.command) == (config("ddp"), 8, ["train", "x.yaml"])


def test_on_each_machine_it_finds_its_number_and_the_first_ones_address():
    command, told = planned(f"--with {config('ddp')} --gpus 8 --on-each-node -- train x.yaml", STEP)
    assert told == {"DLLM_PROCESSES": "32"}
    port = 20000 + 41
    assert " ".join(command[4:]) == (
        "--num_machines 4 --num_processes 32 "
        f"--machine_rank 2 --main_process_ip 10.0.0.3 --main_process_port {port} -m dllm train x.yaml"
    )


def test_machines_without_accelerators_meet_as_well():
    command, told = planned(f"--with {config('cpu')} --on-each-node -- train x.yaml", STEP)
    assert told == {"DLLM_PROCESSES": "4", "ACCELERATE_USE_CPU": "true"}
    assert "--multi_gpu" in command, "without it accelerate starts four runs of one process each"


def test_fewer_machines_than_asked_for_are_used_as_they_are():
    command, _ = planned(f"--with {config('ddp')} --nodes 8 --gpus 8 -- train x.yaml", {"SLURM_JOB_ID": "41"})
    assert "--nodes=4" in command


def test_a_launch_that_needs_its_launcher_keeps_it_for_one_process():
    command, _ = planned(f"--with {config('zero2')} --gpus 1 -- train x.yaml")
    assert command[1] == "accelerate.commands.launch" and "--num_processes 1" in " ".join(command)


def test_a_run_in_a_smaller_world_than_launched_refuses_to_start(tmp_path):
    """What `accelerate launch --cpu --num_machines 2` would do: two runs, each alone, both believed finished."""
    from dllm.training.setup import check_world

    accelerator = argparse.Namespace(num_processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLLM_PROCESSES", "2")
        with pytest.raises(
            ValueError, match="DLLM_PROCESSES = 2, but accelerate sees 1 process.*each would train alone"
        ):
            check_world(accelerator)


def test_the_launcher_runs_dllm_and_passes_its_status_on(tmp_path):
    script = [sys.executable, str(ROOT / "workflow/launch.py"), "--with", config("cpu"), "--"]
    done = subprocess.run([*script, "train", "nothing.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing.yaml" in done.stderr
