"""Running Snakemake as a person would, in a work directory of its own."""

import atexit
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

from dllm.cli import warm
from dllm.cli.ask import VARIABLE
from tests.warm_programs import warm_interpreter

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def variables() -> dict[str, str]:
    """The environment of Snakemake."""
    found = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}
    found.pop("CI", None)
    return found


@contextmanager
def warm_jobs(*environments: dict[str, str]) -> Iterator[dict[str, str]]:
    """What to add to the environment of Snakemake: the names of processes, one for each environment of jobs.

    Several runs share them; alone, each starts one of its own and loads all packages again.
    """
    started = [found for environment in environments if (found := warm.start(environment))]
    try:
        yield {VARIABLE: " ".join(name for _, name in started)} if started else {}
    finally:
        for process, _ in started:
            process.stdin.close()
            process.wait()


@cache
def planning() -> tuple[Path, Path]:
    """The commands snakemake and python of a process that has loaded Snakemake, for what only plans."""
    stack = ExitStack()
    atexit.register(stack.close)
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    programs, first = [BIN / "snakemake", BIN / "python"], ["snakemake.cli", "snakemake.api"]
    snakemake, python = stack.enter_context(warm_interpreter(programs[1], programs, home, variables(), first=first))
    return snakemake, python


def snakemake(*arguments: str, overlays=(), check: bool = True, **more: str) -> subprocess.CompletedProcess:
    """Run Snakemake in the repository root with the laptop configuration and overlays on top; `more` are variables."""
    files = [str(path) for path in overlays]
    program = planning()[0] if {"-n", "--dry-run"} & set(arguments) else BIN / "snakemake"
    command = [str(program), *arguments, *(["--configfile", *files] if files else [])]
    done = subprocess.run(command, cwd=ROOT, env=variables() | more, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def planned(*arguments: str, overlays=()) -> list[tuple[str, str, str]]:
    """(rule, target, shell command) of every job a dry run plans, sorted."""
    return commands_in(snakemake("--dry-run", "--printshellcmds", "--cores", "1", *arguments, overlays=overlays).stdout)


def commands_in(text: str) -> list[tuple[str, str, str]]:
    """(rule, target, shell command) of every job whose command is printed, sorted.

    Rule and target are read off the log file that every command writes: logs/<rule>/<target>.log.
    """
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
            words = str(job.log[0]).removeprefix("logs/").removesuffix(".log").split("/", 1)
            print("job", *words, *asked, sep="\t")
            print("Shell command:", job.shellcmd)
"""
"""What Snakemake itself would run and ask for; a dry run does not print the latter for rules with a message."""


def asked_jobs(overlays) -> tuple[list[tuple[str, str, str]], list[list[str]]]:
    """Of every job (rule, target, shell command), as `planned`, and [rule, target, resource=value ...], sorted.

    The target of a rule of its own is missing in the second.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(ASKED)
        script.flush()
        command = [planning()[1], script.name, *map(str, overlays)]
        done = subprocess.run(command, cwd=ROOT, env=variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("job\t")]
    return commands_in(done.stdout), sorted(asked)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT
