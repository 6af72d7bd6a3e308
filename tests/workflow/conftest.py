"""Running Snakemake as a person would, in a work directory of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def snakemake(*arguments: str, overlays=(), check: bool = True) -> subprocess.CompletedProcess:
    """Run Snakemake in the repository root with the laptop configuration and overlays on top."""
    files = [str(path) for path in overlays]
    command = [str(BIN / "snakemake"), *arguments, *(["--configfile", *files] if files else [])]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}
    environment.pop("CI", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def planned(*arguments: str, overlays=()) -> list[tuple[str, str, str]]:
    """(rule, target, shell command) of every job a dry run plans, sorted.

    Rule and target are read off the log file that every command writes: logs/<rule>/<target>.log.
    """
    text = snakemake("--dry-run", "--printshellcmds", "--cores", "1", *arguments, overlays=overlays).stdout
    commands = re.findall(r"^Shell command: (.*&> .*)$", text, re.M)
    names = [re.search(r"&> logs/([a-z]+)/?(.*)\.log$", command).groups() for command in commands]
    return sorted((rule, target, command) for (rule, target), command in zip(names, commands, strict=True))


ASKED = """
import sys
from pathlib import Path
from snakemake.api import SnakemakeApi
from snakemake.settings.types import ConfigSettings, DAGSettings, OutputSettings, Quietness, ResourceSettings

PLACES = ("nodes", "cpus_per_task", "tasks", "mpi", "gres", "tasks_per_gpu")

with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
    settings = ConfigSettings(configfiles=[Path(path) for path in sys.argv[1:]])
    workflow = api.workflow(ResourceSettings(cores=1), config_settings=settings, snakefile=Path("Snakefile").resolve())
    workflow.dag(DAGSettings())
    workflow._workflow._prepare_dag(forceall=False, ignore_incomplete=True, lock_warn_only=True)
    workflow._workflow._build_dag()
    for job in workflow._workflow.dag.jobs:
        if job.log:
            asked = [f"{name}={job.resources.get(name)}" for name in ("mem_mb", "runtime", "disk_mb", "gpu")]
            asked += [f"{name}={job.resources.get(name)}" for name in PLACES if job.resources.get(name) is not None]
            print(*str(job.log[0]).removeprefix("logs/").removesuffix(".log").split("/", 1), *asked, sep="\t")
"""
"""What Snakemake itself would ask for; a dry run does not print it for rules with a message."""


def asked_resources(overlays) -> list[list[str]]:
    """[rule, target, resource=value ...] of every job, sorted; the target of a rule of its own is missing."""
    command = [sys.executable, "-c", ASKED, *map(str, overlays)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(line.split("\t") for line in done.stdout.splitlines() if "mem_mb=" in line)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT
