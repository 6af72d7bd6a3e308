"""A small project whose results are tracked: run once, committed and pushed; every test works in a clone of it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dllm.cli.ask import VARIABLE
from dllm.cli.warm import LOADED
from dllm.config import read_yaml
from tests.warm_programs import EARLY, interpreter_of, warm_interpreter
from tests.workflow.rehearsal import small_overlay
from workflow.warm import of_jobs

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
WORK = "results/paper"
STEPS = {"steps": 2, "evaluations": 1}


def dvc_command() -> str | None:
    """The dvc command: of the environment that `make dvc` installs, else whichever there is."""
    own = ROOT / ".venv-dvc" / "bin" / "dvc"
    return str(own) if own.exists() else shutil.which("dvc")


def pytest_collection_modifyitems(items) -> None:
    """Everything here needs DVC, and takes some seconds."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
            if dvc_command() is None:
                item.add_marker(pytest.mark.skip(reason="there is no dvc command; run `make dvc`"))


def variables_of(commands: tuple[Path, ...]) -> dict[str, str]:
    """The environment of a checkout's commands."""
    found = os.environ | {
        "COLUMNS": "200",
        "DVC_NO_ANALYTICS": "1",
        "OMP_NUM_THREADS": "1",
        **{f"GIT_{who}_{what}": "dllm" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    found.pop("CI", None)
    return found | ({VARIABLE: ""} if commands else {})  # no process of Snakemake's own for its jobs


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[tuple[Path, ...]]:
    """dvc, snakemake, dllm and python, as copies of processes that have loaded their packages."""
    if sys.platform != "linux":  # elsewhere a fork of a process with these packages is not safe
        yield ()
        return
    home, environment = tmp_path_factory.mktemp("commands"), variables_of(())
    dvc, python, dllm = Path(dvc_command()), BIN / "python", BIN / "dllm"
    loaded = [name for name in LOADED if not name.startswith("dllm.")]
    with (
        warm_interpreter(interpreter_of(dvc), [dvc], home, environment, first=["dvc.cli"]) as keeping,
        warm_interpreter(python, [BIN / "snakemake"], home, environment, first=["snakemake.cli"]) as planning,
        warm_interpreter(python, [python, dllm], home, of_jobs(environment), EARLY, loaded) as working,
    ):
        yield (*keeping, *planning, *working)


@dataclass(frozen=True)
class Checkout:
    """A git checkout of the small project, and the commands that take the places of installed ones."""

    path: Path
    commands: tuple[Path, ...] = ()

    @property
    def work(self) -> Path:
        """Its work directory."""
        return self.path / WORK

    def run(self, command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run a command line as a person would, in the top directory; stderr is joined to stdout."""
        tools = self.path.parent / f"bin-{self.path.name}"
        if not tools.exists():
            tools.mkdir()
            (tools / "dvc").symlink_to(dvc_command())
            for path in self.commands:
                (tools / path.name).unlink(missing_ok=True)
                (tools / path.name).symlink_to(path)
        environment = variables_of(self.commands) | {
            "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.path),
            "DVC_SITE_CACHE_DIR": str(self.path.parent / "site"),  # by path, and paths return in another session
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.path,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}"
        return done

    def planned(self) -> list[tuple[str, str]]:
        """(rule, target) of every job that a dry run plans, without the report's."""
        text = self.run("snakemake -n -p -c1 --configfile config/paper.yaml").stdout
        found = re.findall(r"&> logs/([a-z]+)/?(.*)\.log$", text, re.M)
        assert found or "Nothing to be done" in text, text
        return sorted(pair for pair in found if pair[0] not in ("tables", "figures", "claims", "page"))

    def set_run(self, name: str, **settings) -> None:
        """Change settings of a run in config/paper.yaml."""
        file = self.path / "config/paper.yaml"
        content = yaml.safe_load(file.read_text())
        content["runs"][name] |= settings
        file.write_text(yaml.safe_dump(content, sort_keys=False))


def small_paper() -> dict:
    """Takes the place of config/paper.yaml: the laptop configuration, cut down to one model, trained and tuned."""
    content = small_overlay(WORK)
    content["runs"]["alpaca-untuned"] = None
    for name in ("modernbert-large", "chat-large"):
        content["runs"][name] |= STEPS
    content |= {"cache": "dvc", "samples": {"chat-large": None}, "speed": {"chat-large": None}}
    content["benchmarks"] |= {"mmlu": {"documents": 2}, "gsm8k": {"documents": 2}}
    content["evaluations"]["chat-large"] = {"compare": None, "close_to": None}
    content["report"] |= {
        "ablation": [],
        "pretraining": [{"run": "modernbert-large", "label": "base"}],
        "openwebtext": [{"run": "modernbert-large", "label": "base"}],
    }
    return overlaid(read_yaml(ROOT / "config/laptop.yaml"), content)


def overlaid(base: dict, update: dict) -> dict:
    """One overlay that says what two say; null stays, for it removes an entry."""
    both = {k: overlaid(base[k], v) for k, v in update.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | update | both


def copy_sources(path: Path, commands: tuple[Path, ...]) -> Checkout:
    """A git repository at `path` with the files of this one as they stand, results left out, and its remote `storage`.

    The remote is the directory `storage` beside it, and compares what arrives with its hash.
    """
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    for name in files.stdout.decode().rstrip("\0").split("\0"):
        if (ROOT / name).is_file() and not name.startswith("results/"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    (path.parent / "storage").mkdir()
    checkout = Checkout(path, commands)
    checkout.run("git init -q -b main && dvc remote add -d storage ../storage")
    checkout.run("dvc remote modify storage verify true")
    return checkout


@pytest.fixture(scope="session")
def published(tmp_path_factory, commands) -> Checkout:
    """The small project, finished, committed, and its data pushed to the directory `storage` beside it."""
    home = tmp_path_factory.mktemp("cache")
    project = copy_sources(home / "dllm", commands)
    project.run(f"dvc remote modify storage url {home / 'storage'}")
    (project.path / "config/paper.yaml").write_text(yaml.safe_dump(small_paper(), sort_keys=False))
    project.run("git add -A && git commit -qm code")
    project.run("snakemake -c2 --configfile config/paper.yaml")
    project.run("dvc push && git add -A && git commit -qm results")
    return project


@pytest.fixture(scope="session")
def storage(published) -> Path:
    """The remote of the published project."""
    return published.path.parent / "storage"


@pytest.fixture
def clone(published, commands, tmp_path) -> Checkout:
    """A fresh clone, with nothing pulled."""
    subprocess.run(["git", "clone", "-q", str(published.path), str(tmp_path / "clone")], check=True)
    return Checkout(tmp_path / "clone", commands)
