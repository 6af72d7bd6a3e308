"""The environments: exact versions, within the bounds of the package, complete, and the same in every file."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
ENVS = ROOT / "envs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASIC = ("pip", "wheel")
"""Packages that an environment has before anything is installed into it."""


def pins(file: str) -> dict[str, Version]:
    """Package and version of every line of a constraints file."""
    lines = [line.split("#")[0].strip() for line in (ENVS / file).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("-")]
    found = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(found) == len(pairs), f"{file}: a package stands twice"
    return found


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("line", requirements("dev"), ids=lambda r: r.name)
def test_every_dependency_has_both_bounds_and_a_pin_within_them(line):
    operators = {specifier.operator for specifier in line.specifier}
    assert operators == {">=", "<"}, f"{line}: a lower and an upper bound"
    assert line.specifier.contains(pins("pip.txt")[canonicalize_name(line.name)])


def test_a_pin_of_an_extra_lies_within_its_bounds():
    pinned = pins("pip.txt")
    for line in requirements(*PROJECT["optional-dependencies"]):
        if canonicalize_name(line.name) in pinned:
            assert line.specifier.contains(pinned[canonicalize_name(line.name)]), line


def needed(*extras: str) -> set[str]:
    """Every package that the dependencies need, and theirs: what pip installs, as what is installed here says."""
    todo, seen = requirements(*extras), set()
    while todo:
        line = todo.pop()
        name = canonicalize_name(line.name)
        key = name, frozenset(line.extras)
        if key in seen or (line.marker and not line.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        for text in metadata.requires(name) or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in ("", *line.extras)):
                inner.marker = None
                todo.append(inner)
    return {name for name, _ in seen}


def test_what_the_dependencies_need_is_pinned_too():
    missing = needed("dev") - pins("pip.txt").keys() - set(BASIC)
    assert not missing, f"{missing}: installed as dependencies, but not in envs/pip.txt"


def test_this_environment_has_the_pinned_versions():
    for name, version in pins("pip.txt").items():
        try:
            installed = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
        assert installed.public == version.public, f"{name}: {installed} is installed, {version} is pinned"


def test_the_cuda_pins_are_added_to_the_others_and_repeat_none():
    assert "-c pip.txt" in (ENVS / "pip-cuda.txt").read_text().splitlines()
    both = pins("pip.txt").keys() & pins("pip-cuda.txt").keys()
    assert not both
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in pins("pip-cuda.txt"))


def test_conda_and_container_have_one_python_and_the_same_constraints():
    conda = yaml.safe_load((ENVS / "environment.yaml").read_text())
    (python,) = [x.split("=")[1] for x in conda["dependencies"] if str(x).startswith("python=")]
    container = (ENVS / "Containerfile").read_text()
    assert f"FROM docker.io/library/python:{python}-slim" in container
    low, high = re.findall(r"3\.\d+", PROJECT["requires-python"])
    assert Version(low) <= Version(python) < Version(high)
    assert all(re.fullmatch(r"[a-z]+=\d+(\.\d+)+", x) for x in conda["dependencies"] if isinstance(x, str))
    (by_pip,) = [x["pip"] for x in conda["dependencies"] if isinstance(x, dict)]
    assert "--constraint pip-cuda.txt" in by_pip and "--constraint envs/pip-cuda.txt" in container
    copied = re.findall(r"^COPY (.+) \S+$", container, re.M)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def source_in(directory: Path) -> tuple[Path, list[str]]:
    """The package's own files, copied there so that nothing is built in the checkout, and what git tracks."""
    source = directory / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = listed.split("\0")
    for name in files:
        if name.startswith("dllm/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source, files


def test_the_built_package_works_outside_the_checkout(tmp_path):
    """Its data files are in it. The dependencies are those of this environment: CI begins with a full install."""
    environment = os.environ | {"PYTHONPATH": "", "PIP_NO_INDEX": "1"}

    def run(*command, cwd=tmp_path, **more):
        done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment | more)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    source, files = source_in(tmp_path)
    pip = sys.executable, "-m", "pip", "--quiet"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", source)
    (wheel,) = (tmp_path / "wheels").glob("dllm-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")  # as pip installs it, which takes a second to start
    there = {"PYTHONPATH": str(tmp_path / "site")}
    code = "import dllm, runpy, sys; print(dllm.__file__); sys.argv[1:] = ['--help']; "
    said = run(sys.executable, "-c", code + "runpy.run_module('dllm', run_name='__main__')", **there)
    assert said.startswith(str(tmp_path / "site")) and "verbs:" in said
    shipped = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site/dllm").rglob("*") if p.is_file()}
    for name in files:
        if name.startswith("dllm/"):
            assert name in shipped, f"{name} is not in the built package"


def linked(names: list[str], directory: Path) -> Path:
    """A place for packages that has those of this environment which are named, by links, and no other."""
    directory.mkdir()
    for name in names:
        found = metadata.distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (directory / top).exists():
                (directory / top).symlink_to(found.locate_file(top))
    return directory


def test_the_package_works_with_what_it_needs_and_nothing_else(tmp_path):
    """As a user of it has it: without the extras of developers, away from the checkout.

    That pip finds these versions together is tried where it counts: CI begins with a full install.
    """
    source, _ = source_in(tmp_path)
    names = needed()
    assert {"torch", "transformers"} < names and not names & {"pytest", "ruff", "mypy", "sphinx"}
    site = linked(sorted(names - set(BASIC)), tmp_path / "site")
    code = f"import sys; sys.path[:0] = [{str(source)!r}, {str(site)!r}]; import dllm.language_model, dllm.cli.main\n"
    code += "assert 'pytest' not in sys.modules; sys.exit(dllm.cli.main.main(['--help']))"
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    said = subprocess.run([sys.executable, "-I", "-S", "-c", code], **run)  # -S: no other packages
    assert "verbs:" in said.stdout, said.stderr
