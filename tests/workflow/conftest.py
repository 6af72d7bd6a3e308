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


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT
