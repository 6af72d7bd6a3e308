"""The pages: what they name exists, what they quote works, what is generated is up to date."""

import ast
import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from dllm import config
from dllm.cli.main import VERBS, verb_module, verb_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "results" / "README.md"])
TREES = ("dllm", "workflow", "config", "docs", "tests", "envs", ".ci")
MADE_BY_THE_READER = ("config/mine.yaml", "dllm/evaluation/tasks/miniature/gsm8k_short_mini.yaml")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language ("" for those without)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [code for name, code in found if name == language]


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    """Every command line that a page shows, in shell blocks and inline, without comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    return [line.split("#")[0].strip() for line in lines]


@cache
def generator():
    """The module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says():
    assert generator().main(["--check"]) == 0, "run python docs/generate.py"


def test_a_stale_page_is_noticed_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(generator(), "generated", lambda: {"docs/configuration.md": "old"})
    assert generator().main(["--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_every_settings_class_and_every_setting_is_on_the_page():
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name, found in inspect.getmembers(config, inspect.isclass):
        if issubclass(found, config.Settings) and found is not config.Settings:
            assert f"### {name}: " in page
            section = page.split(f"### {name}: ")[1].split("\n#")[0]
            assert all(f"| `{setting}` |" in section for setting in found.model_fields), name


@each_page
def test_every_path_that_a_page_names_exists(page):
    named = {word.rstrip(".,:;") for text in re.findall(r"`([^`\n]+)`", prose(page)) for word in text.split()}
    named |= {word for block in blocks(page, "bash") for word in block.split() if "/" in word}
    paths = {name for name in named if name.split("/")[0] in TREES and "/" in name}
    missing = [p for p in paths if not (ROOT / p).exists() and p not in MADE_BY_THE_READER]
    assert not missing, missing


def test_every_line_of_the_map_exists():
    (tree,) = [block for block in blocks(ROOT / "README.md", "") if block.startswith("Snakefile")]
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if name == "results/":
            continue
        path = (folder if line.startswith(" ") else ROOT) / name
        assert path.exists(), line
        folder = path if path.is_dir() and not line.startswith(" ") else folder


@each_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{target}: there is no {path.relative_to(ROOT)}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@each_page
def test_every_target_of_make_that_a_page_names_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands(page):
        words = re.sub(r"\b[A-Z_]+=\S+", "", command).split()
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, command


@each_page
def test_every_verb_and_option_of_dllm_that_a_page_names_exists(page):
    for command in commands(page):
        for line in re.findall(r"(?:^|-m |\| )dllm ([^|]+)", command):
            verb, *words = line.split()
            if verb.startswith("-"):
                continue
            assert verb in VERBS, command
            known = options_of(verb)
            assert {word for word in words if word.startswith("--")} <= {*known}, command


@cache
def options_of(verb: str) -> set[str]:
    """The options of a verb, and of the program that it passes them on to."""
    module = verb_module(verb)
    if not getattr(module, "PASSES_ON", False):
        return {*verb_parser(verb, module)._option_string_actions}
    from lm_eval._cli.harness import HarnessCLI

    return {*HarnessCLI()._subparsers.choices["run"]._option_string_actions}


@each_page
def test_every_name_of_the_package_that_a_page_gives_exists(page):
    for name in set(re.findall(r"`(dllm(?:\.\w+)+)`", prose(page))) - {"dllm.json"}:  # the file beside the weights
        parts = name.split(".")
        files = [(ROOT.joinpath(*parts[:n]).with_suffix(".py"), parts[n:]) for n in range(len(parts), 1, -1)]
        files += [(ROOT.joinpath(*parts[:n], "__init__.py"), parts[n:]) for n in range(len(parts), 0, -1)]
        path, rest = next((file, rest) for file, rest in files if file.exists())
        if path.name == "__init__.py" and rest:
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert rest[0] in importlib.import_module(package).__all__, name
        elif rest:
            assert rest[0] in top_level_names(path), name


def top_level_names(path: Path) -> set[str]:
    """What a module defines, read without importing it."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@each_page
def test_python_on_a_page_compiles_and_uses_what_is_there(page):
    public = importlib.import_module("dllm").__all__
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dllm":
                assert node.attr in public, node.attr


@each_page
def test_yaml_on_a_page_is_a_valid_overlay_or_task_file(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    make_plan = importlib.import_module("plan").make_plan
    base = "paper" if page.name in ("reproduce.md", "recipes.md") else "laptop"
    for block in blocks(page, "yaml"):
        if block.startswith("include:"):
            task = yaml.safe_load(re.sub(r"\{([A-Z_]+)\}", r"\1", block))
            assert task["task"] and task["dataset_kwargs"]
            continue
        overlay = tmp_path / "mine.yaml"
        overlay.write_text(block)
        assert make_plan(config.load_project(ROOT / "config", ROOT / "config" / f"{base}.yaml", overlay))


def test_decisions_are_numbered_and_say_context_decision_and_consequences():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {int(page.name[:4])}. ")
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.M) == ["Context", "Decision", "Consequences"], page.name


def test_the_part_for_the_results_is_marked():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"<!-- results -->\n.*?<!-- /results -->", text, re.S)


def shipped_projects():
    """Every shipped configuration, merged."""
    for names in (
        ["laptop"],
        ["paper"],
        ["one-gpu"],
        ["small"],
        ["laptop", "systems"],
        ["paper", "systems-paper"],
        ["leaderboard"],
    ):
        yield config.load_project(ROOT / "config", *(ROOT / "config" / f"{name}.yaml" for name in names))


def set_options(value) -> set[tuple[type, str]]:
    """Every option that is written, not left to its default, in a settings object and below it."""
    if isinstance(value, dict | list | tuple):
        return set().union(*map(set_options, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, config.Settings):
        return set()
    found = {(cls, name) for name in value.model_fields_set for cls in type(value).__mro__}
    return found.union(*(set_options(getattr(value, name)) for name in value.model_fields_set))


def keys_of_settings() -> dict[type, set[str]]:
    """Every settings class that a person's file can hold, and the keys that hold it."""
    found, waiting = {config.Project: {""}}, [config.Project]
    while waiting:
        for name, field in waiting.pop().model_fields.items():
            for inner in generator().settings_in(field.annotation):
                waiting += [] if inner in found else [inner]
                found.setdefault(inner, set()).add(name)
    return found


def explained(name: str, keys: set[str], pages: list[str]) -> bool:
    """Whether a page gives an option in code: by its name, or by the key that holds it where two classes have it."""
    paths = [rf"\b{key}\.(?:[A-Z]+\.)?{name}\b" for key in keys] or [rf"\b{name}\b"]
    return any(re.search(path, code) for path in paths for page in pages for code in re.findall(r"`([^`\n]+)`", page))


def test_every_option_is_set_by_a_shipped_config_or_explained_on_a_page():
    used = set().union(*map(set_options, shipped_projects()))
    for project in shipped_projects():  # samplers that an entry changes in part
        changed = [*(entry.generation for entry in project.evaluations.values())]
        used |= {(config.GenerateSettings, name) for changes in changed for name in changes}
    others = ("configuration.md", "lab-log.md", "CHANGELOG.md")
    written = [page for page in PAGES if page.parent.name != "decisions" and page.name not in others]
    pages = [re.sub(r"<!-- generated:.*?<!-- /generated -->", "", page.read_text(), flags=re.S) for page in written]
    settings = keys_of_settings()
    owners = [name for found in settings for name in found.model_fields]
    silent = [
        f"{found.__name__}.{name}"
        for found, keys in settings.items()
        for name in found.model_fields
        if (found, name) not in used and not explained(name, keys if owners.count(name) > 1 else set(), pages)
    ]
    assert not silent, "set them in config/*.yaml, explain them in docs/options.md, or delete them"
    assert len(owners) > 150 and not explained("stop_aftr", set(), pages), "the test sees options"
