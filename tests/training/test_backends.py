"""Every launch file: two processes on CPUs train the run that one process trains, and go on with it after a kill."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dllm.config import write_when_changed
from dllm.training.trainer import train
from tests.training.conftest import run_config
from tests.training.test_trainer import assert_same_run

LAUNCHES = Path(__file__).resolve().parents[2] / "config/accelerate"
SHARDED = ("zero1", "zero2", "zero3", "fsdp")

INTERRUPTED = """
import sys
from pathlib import Path
from dllm.config import RunConfig, read_config
from dllm.training import trainer

step = trainer._Run._step

def killed(self, number):
    if number == 5:
        raise KeyboardInterrupt
    return step(self, number)

trainer._Run._step = killed
trainer.train(read_config(sys.argv[1], RunConfig), Path(sys.argv[2]), quiet=True)
"""


def needs(launch):
    """Skip where the launch file's back-end is not installed."""
    if launch.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'dllm[cluster]'")


def launched(workdir, launch, *command, processes=2):
    """Run `accelerate launch COMMAND` with a shipped launch file, on gloo processes."""
    needs(launch)
    settings = yaml.safe_load((LAUNCHES / f"{launch}.yaml").read_text()) | {"use_cpu": True, "main_process_port": 0}
    file = workdir / f"{launch}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", processes,
        *command,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        list(map(str, command)), cwd=workdir, env=environment, capture_output=True, text=True, timeout=240
    )


def trained(workdir, launch, config, processes=2):
    path = write_when_changed(workdir / f"configs/runs/{config.name}.yaml", config)
    command = ("-m", "dllm", "train", path, "--workdir", workdir, "--quiet")
    done = launched(workdir, launch, *command, processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", *SHARDED])
def test_two_processes_train_the_run_of_one(workdir, launch):
    """The whole curve: averaged gradients times the number of processes are those of the global batch."""
    needs(launch)
    train(run_config("one", steps=8, evaluations=2), workdir, quiet=True)
    config = run_config("two", steps=8, evaluations=2, micro_batch_size=3)
    trained(workdir, launch, config)
    assert json.loads((workdir / "runs/two/provenance.json").read_text())["processes"] == 2
    assert_same_run(workdir, "one", "two")
