"""`dllm push` against a hub on the loopback interface: what arrives there, and what is one line."""

import pytest

from dllm.cli.main import main
from dllm.exporting.export import export
from dllm.training.trainer import train
from tests.hub_commands import hub_environment, run_commands
from tests.loopback_hub import LoopbackHub
from tests.training.conftest import run_config


@pytest.fixture
def model(workdir):
    return train(run_config(steps=1), workdir, quiet=True) / "model"


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_export_arrives_whole_and_is_loaded_from_the_hub(model, tmp_path):
    there = export(model)
    with LoopbackHub(tmp_path / "hub") as hub:
        (hub.root / "models").mkdir(parents=True)
        hub.token = "secret"
        commands = [
            ["push", str(model), "me/chatbot", "--private"],
            ["push", str(there), "me/chatbot"],
            ["push", str(there), "me/chatbot", "--revision", "steps-1"],
            ["sample", "me/chatbot", "who likes the sun ?"],
        ]
        done = run_commands(commands, hub_environment(hub.url, tmp_path / "home", HF_TOKEN="secret"))
    assert [status for status, _, _ in done] == [0, 0, 0, 0], done
    assert done[1][1].splitlines() == [f"{hub.url}/me/chatbot/commit/{'0' * 40}"] and f"exported: {there}" in done[0][1]
    assert hub.private == {"me/chatbot": True}
    assert files(hub.root / "models/me/chatbot") == files(there)
    assert files(hub.root / "branches/steps-1/models/me/chatbot") == files(there)
    assert hub.commits[0] == ("me/chatbot", "main", "Upload of run-transformers")
    assert hub.commits[-1] == ("me/chatbot", "steps-1", "Upload of run-transformers")
    sent = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(sent) == 1, "a large file that the hub has is not sent again"


def test_without_a_token_or_with_a_wrong_one_it_is_one_line_and_nothing_arrives(model, tmp_path, monkeypatch, capsys):
    words = ["push", str(model), "me/chatbot"]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    capsys.readouterr()
    assert main(words) == 2
    none = capsys.readouterr().err
    with LoopbackHub(tmp_path / "hub") as hub:
        (hub.root / "models").mkdir(parents=True)
        hub.token = "secret"
        home = tmp_path / "home"
        commands = [words, ["push", str(model), "no name"]]
        wrong, name = run_commands(commands, hub_environment(hub.url, home, HF_TOKEN="x"))
    (nowhere,) = run_commands([words], hub_environment("http://127.0.0.1:9", home, HF_TOKEN="secret"))
    assert [told[0] for told in (wrong, name, nowhere)] == [2, 2, 2]
    assert "no token of the hub" in none and "set HF_TOKEN" in none
    assert "me/chatbot: the hub refuses access (401); set HF_TOKEN to a valid token" in wrong[2]
    assert "HUB_ID = 'no name'" in name[2] and "the upload broke off" in nowhere[2]
    assert all(text.count("\n") == 1 for text in (none, wrong[2], name[2], nowhere[2]))
    assert not hub.commits and not list((hub.root / "models").iterdir())
