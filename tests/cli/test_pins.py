"""`dllm pins`: the commits of a configuration, and newer ones from a hub, written where the old ones stand."""

import re
import shutil
from pathlib import Path

import pytest

from dllm.cli.main import main
from dllm.config import load_project
from dllm.data.pins import read_pins, write_pin
from tests.hub_commands import hub_environment, run_commands
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).parent.parent.parent
OLD = "0a2b4c6d8e" * 4
MODELS = f"""# backbones
models:
  first:   # the small one
    hub: one/toy
    revision: {OLD}   # seen in March
    parameters: 1_000
  same: {{hub: same/toy, revision: SAME}}
  made: {{new: {{model_type: bert}}, tokenizer: rows}}
"""
DATASETS = f"""datasets:
  rows:
    hub: rows/toy
    revision: '{OLD}'
    licence: MIT
  lost: {{hub: lost/toy, revision: {OLD}}}
  gated: {{hub: gated/toy, revision: {OLD}}}
  world: {{world: all}}
"""
BENCHMARKS = "benchmarks:\n  free: {label: Free, task: bbh}\n  held: {label: Held, task: gsm8k, dataset: rows}\n"


@pytest.fixture
def directory(tmp_path):
    """A config directory with pins of all kinds."""
    folder = tmp_path / "config"
    folder.mkdir()
    for name, text in {"models": MODELS, "datasets": DATASETS, "benchmarks": BENCHMARKS}.items():
        (folder / f"{name}.yaml").write_text(text)
    for name in ("experiments", "reported"):
        (folder / f"{name}.yaml").write_text("runs: {}\n")
    return folder


@pytest.fixture
def hub(tmp_path):
    root = tmp_path / "hub"
    for kind, name in (("models", "one"), ("models", "same"), ("datasets", "rows"), ("datasets", "gated")):
        (root / kind / name / "toy").mkdir(parents=True)
        (root / kind / name / "toy/README.md").write_text(name)
    with LoopbackHub(root) as hub:
        yield hub


def test_every_hub_repository_of_the_shipped_configuration_is_pinned(capsys):
    assert main(["pins", "--config-directory", str(ROOT / "config")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["kind", "name", "repository", "commit", "licence"]
    assert all(re.search(r" [0-9a-f]{40} ", line) for line in lines), [x for x in lines if "not pinned" in x]
    project = load_project(ROOT / "config", ROOT / "config/paper.yaml")
    entries = project.models | project.datasets
    assert [line.split()[1] for line in lines] == [name for name, entry in entries.items() if entry.hub]


def test_what_is_not_pinned_is_listed_so(directory, capsys):
    assert main(["pins", "--config-directory", str(directory)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["first", "same", "rows", "lost", "gated", "free"]
    assert "lm-eval task bbh" in lines[-1] and "not pinned" in lines[-1]


def test_an_overlay_replaces_and_removes_pins(directory, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(f"models: {{first: {{revision: {'a' * 40}}}, same: null}}\n")
    pins = {pin.name: pin for pin in read_pins(directory, [overlay])}
    assert (pins["first"].commit, pins["first"].file, pins["first"].repository) == ("a" * 40, overlay, "one/toy")
    assert "same" not in pins


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--write"], "--write needs --refresh"),
        (["--only", "frist"], "--only frist: not an entry from the hub. Did you mean 'first'?"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(directory, capsys, words, said):
    assert main(["pins", *words, "--config-directory", str(directory)]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1


def test_refreshing_shows_old_and_new_and_writes_only_when_told_to(directory, hub, tmp_path):
    newest = {name: hub.commit("models", f"{name}/toy") for name in ("one", "same")}
    newest["rows"] = hub.commit("datasets", "rows/toy")
    models, datasets = (directory / f"{name}.yaml" for name in ("models", "datasets"))
    models.write_text(MODELS.replace("SAME", newest["same"]))
    before = models.read_text(), datasets.read_text()
    hub.refused = {"gated/toy"}
    ask = ["pins", "--refresh", "--config-directory", str(directory)]
    found = [*ask, *"--only first --only same --only rows".split()]
    environment = hub_environment(hub.url, tmp_path / "home")
    looked, whole = run_commands([found, ask], environment)
    assert (models.read_text(), datasets.read_text()) == before, "nothing is written without --write"
    wrote, again = run_commands([[*found, "--write"], [*found, "--write"]], environment)
    assert looked[0] == 0 and f"{OLD} -> {newest['one']}" in looked[1] and "is the newest" in looked[1]
    assert whole[0] == 2 and "no such dataset on the hub" in whole[1] and "the hub refuses access (401)" in whole[1]
    assert "2 of 6 repositories did not answer" in whole[2] and f"-> {newest['rows']}" in whole[1]
    assert wrote[0] == 0 and "2 of 3 written" in wrote[1]
    assert models.read_text() == before[0].replace(OLD, newest["one"]), "comments and layout stay"
    assert datasets.read_text() == before[1].replace(f"'{OLD}'", newest["rows"])
    assert again[0] == 0 and "0 of 3 written" in again[1]


def test_without_a_network_refreshing_is_one_line_and_status_two(directory, tmp_path):
    (told,) = run_commands(
        [["pins", "--refresh", "--write", "--config-directory", str(directory)]],
        hub_environment("http://127.0.0.1:9", tmp_path / "home"),
    )
    assert told[0] == 2 and told[2].count("\n") == 1
    assert "one/toy: the hub gave no answer (" in told[2] and "check the network and run again" in told[2]
    assert (directory / "models.yaml").read_text() == MODELS


def test_a_commit_that_is_not_written_in_the_file_is_not_written_elsewhere(directory):
    from dllm.config import ConfigError, with_scalar

    shutil.copy(directory / "models.yaml", directory / "copy.yaml")
    with pytest.raises(ConfigError, match="models.made.revision is not written there"):
        with_scalar(directory / "copy.yaml", ("models", "made", "revision"), "x")


@pytest.mark.parametrize("commit", ["1" * 40, "1" * 20 + "e" + "1" * 19, "ab" * 20])
def test_a_commit_that_looks_like_a_number_stays_a_text(directory, commit):
    pins = {pin.name: pin for pin in read_pins(directory)}
    for name in ("first", "rows"):
        write_pin(pins[name], commit)
    pins = {pin.name: pin for pin in read_pins(directory)}
    assert pins["first"].commit == pins["rows"].commit == commit
