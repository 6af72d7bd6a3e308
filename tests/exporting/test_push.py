"""`dllm push` against a hub on the loopback interface: what arrives there, and what is one line."""

import pytest

from dllm.cli.main import main
from dllm.exporting.export import export
from dllm.training.trainer import train
from tests.hub_commands import hub_environment, run_commands
from tests.loopback_hub import LoopbackHub
from tests.training.conftest import prepare_toys, run_config


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(model, its export, the hub, what was said of pushes that succeed and of others): one process, for it is slow."""
    home = tmp_path_factory.mktemp("pushed")
    prepare_toys(home)
    model = train(run_config(steps=1), home, quiet=True) / "model"
    there = export(model)
    with LoopbackHub(home / "hub") as hub:
        (hub.root / "models").mkdir(parents=True)
        hub.token = "secret"
        commands = [
            [{"HF_TOKEN": "x"}, "push", str(model), "me/other"],
            ["push", str(model), "no name"],
            [{"HF_TOKEN": "secret"}, "push", str(model), "me/chatbot", "--private"],
            ["push", str(there), "me/chatbot"],
            ["push", str(there), "me/chatbot", "--revision", "steps-1"],
            ["sample", "me/chatbot", "who likes the sun ?"],
            [{"HF_ENDPOINT": "http://127.0.0.1:9"}, "push", str(there), "me/other"],
        ]
        wrong, name, *done, nowhere = run_commands(commands, hub_environment(hub.url, home / "home"))
    return model, there, hub, done, (wrong, name, nowhere)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_export_arrives_whole_and_is_loaded_from_the_hub(pushed):
    _, there, hub, done, _ = pushed
    assert [status for status, _, _ in done] == [0, 0, 0, 0], done
    assert done[1][1].splitlines() == [f"{hub.url}/me/chatbot/commit/{'0' * 40}"] and f"exported: {there}" in done[0][1]
    assert hub.private == {"me/chatbot": True}
    assert files(hub.root / "models/me/chatbot") == files(there)
    assert files(hub.root / "branches/steps-1/models/me/chatbot") == files(there)
    assert hub.commits[0] == ("me/chatbot", "main", "Upload of run-transformers")
    assert hub.commits[-1] == ("me/chatbot", "steps-1", "Upload of run-transformers")
    sent = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(sent) == 1, "a large file that the hub has is not sent again"


def test_without_a_token_or_with_a_wrong_one_it_is_one_line_and_nothing_arrives(pushed, monkeypatch, capsys):
    model, _, hub, _, (wrong, name, nowhere) = pushed
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    capsys.readouterr()
    assert main(["push", str(model), "me/other"]) == 2
    none = capsys.readouterr().err
    assert [told[0] for told in (wrong, name, nowhere)] == [2, 2, 2]
    assert "no token of the hub" in none and "set HF_TOKEN" in none
    assert "me/other: the hub refuses access (401); set HF_TOKEN to a valid token" in wrong[2]
    assert "HUB_ID = 'no name'" in name[2] and "the upload broke off" in nowhere[2]
    assert all(text.count("\n") == 1 for text in (none, wrong[2], name[2], nowhere[2]))
    assert {repository for repository, *_ in hub.commits} == {"me/chatbot"}
    assert [str(path.relative_to(hub.root / "models")) for path in (hub.root / "models").glob("*/*")] == ["me/chatbot"]
