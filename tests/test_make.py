"""The Makefile in a directory of its own, with stand-ins for the programs that it calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The Makefile, what it installs from, and an environment that seems to be installed; snakemake fails."""
    clone = tmp_path / "clone"
    (clone / "envs").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "envs/pip.txt"):
        shutil.copy(ROOT / name, clone / name)
    script(clone / ".venv/bin/snakemake", 'echo "$@" >> called; exit 1')
    script(clone / ".venv/bin/python", "exit 0")
    script(clone / ".venv/bin/dllm", "exit 0")
    (clone / ".venv/.installed").write_text(str(clone / ".venv"))
    # says which environment it makes, and makes none
    script(tmp_path / "python3", 'echo "python3 $*" | grep venv >> made; mkdir -p .venv/bin; true')
    return clone


def make(clone: Path, *words: str) -> subprocess.CompletedProcess:
    command = ["make", *words, f"PYTHON={clone.parent}/python3"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def lock(workdir: Path) -> Path:
    """What a run that was cut off leaves."""
    path = workdir / ".snakemake/locks/0.input.lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (["report"], "laptop"),
        (["systems"], "systems"),
        (["small"], "small"),
        (["one-gpu", "YES=1"], "one-gpu"),
        (["smoke", "CONFIG=mine.yaml"], "mine-rehearsal"),
    ],
)
def test_a_run_that_finds_the_lock_of_one_that_was_cut_off_says_what_to_do(clone, target, place):
    lock(clone / "results" / place)
    done = make(clone, *target)
    assert done.returncode != 0
    said = "is locked by a run that was cut off, unless one is at work: make unlock"
    assert f"make: results/{place} {said}\n" in done.stderr
    shutil.rmtree(clone / "results" / place)
    done = make(clone, *target)
    assert done.returncode != 0 and "unlock" not in done.stderr, "snakemake failed for another reason"


def test_unlock_frees_every_work_directory_and_touches_nothing_else(clone):
    locks = [lock(clone / "results" / name) for name in ("laptop", "small-rehearsal", "somebody's own")]
    kept = clone / "results/laptop/.snakemake/metadata/record"
    kept.parent.mkdir()
    kept.touch()
    (clone / "scratch").mkdir()
    (clone / "results/linked").symlink_to(clone / "scratch")
    locks.append(lock(clone / "results/linked"))
    done = make(clone, "unlock")
    assert done.returncode == 0 and not any(path.exists() for path in locks) and kept.exists(), done.stderr
    assert not (clone / "called").exists() and make(clone, "unlock").returncode == 0, "there is nothing left to free"
    script(clone / ".venv/bin/snakemake", 'echo "$@" >> called')
    assert make(clone, "unlock", "CONFIG=mine.yaml config/smoke.yaml").returncode == 0
    assert (clone / "called").read_text() == "--unlock --quiet all --configfile mine.yaml config/smoke.yaml\n"


def test_the_environment_of_a_clone_that_was_moved_is_made_again(clone):
    assert make(clone, "install").returncode == 0 and not (clone / "made").exists(), "it is there, and for this place"
    moved = clone.rename(clone.parent / "moved")
    done = make(moved, "install")
    assert done.returncode == 0, done.stderr
    assert (moved / "made").read_text() == "python3 -m venv --clear .venv\n"
    assert (moved / ".venv/.installed").read_text() == str(moved / ".venv")
    (moved / "made").unlink()
    assert make(moved, "install").returncode == 0 and not (moved / "made").exists(), "once"


@pytest.mark.parametrize(
    ("variables", "kept"),
    [({"HOME": "."}, ""), ({"HOME": "/dev/null"}, ".cache"), ({}, ".cache"), ({"XDG_CACHE_HOME": "/elsewhere"}, "x")],
)
def test_without_a_home_that_can_be_written_caches_stand_in_the_clone(clone, variables, kept):
    script(clone / ".venv/bin/snakemake", 'printf %s "$XDG_CACHE_HOME" > cache')
    found = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")} | variables
    subprocess.run(["make", "report"], cwd=clone, env=found, capture_output=True)
    expected = {"": "", ".cache": str(clone / ".cache"), "x": "/elsewhere"}
    assert (clone / "cache").read_text() == expected[kept]
