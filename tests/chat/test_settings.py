"""Which checkpoint a name means, and how a chat samples by default."""

import os
from pathlib import Path

import pytest

from dllm.chat.settings import chat_context, chat_generation, find_checkpoint


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for age, run in enumerate(
        ["paper/runs/chat-large", "laptop/runs/chat-base", "laptop/runs/chat-large", "x/runs/chat-y"]
    ):
        config = tmp_path / "results" / run / "model" / "config.json"
        config.parent.mkdir(parents=True)
        config.write_text("{}")
        weights = config.with_name("model.safetensors")
        weights.write_bytes(b"x" * (3 if run == "laptop/runs/chat-large" else 2 if "chat-large" in run else 1))
        os.utime(weights, (1000 - age, 1000 - age))
    return tmp_path


def test_a_name_is_a_run_and_the_laptop_comes_first(root):
    assert find_checkpoint("chat-large") == "results/laptop/runs/chat-large/model"
    assert find_checkpoint("chat-y") == "results/x/runs/chat-y/model"


def test_a_directory_is_itself_or_holds_the_model(root):
    directory = "results/paper/runs/chat-large"
    assert find_checkpoint(directory) == find_checkpoint(f"{directory}/model") == f"{directory}/model"


def test_without_a_name_it_is_the_largest_chat_run_and_of_equals_the_newest(root):
    assert find_checkpoint() == "results/laptop/runs/chat-large/model"
    (root / "results/laptop/runs/chat-large/model/model.safetensors").write_bytes(b"xx")
    os.utime(root / "results/laptop/runs/chat-large/model/model.safetensors", (1, 1))
    assert find_checkpoint() == "results/paper/runs/chat-large/model"


def test_a_hub_id_is_returned_as_it_is(root):
    assert find_checkpoint("organisation/model") == "organisation/model"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chat-lagre", "Did you mean 'chat-large'?"),
        ("./nowhere", "neither a model directory"),
        ("results", "no config.json"),
    ],
)
def test_a_wrong_name_is_one_clear_line(root, name, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        find_checkpoint(name)


def test_without_any_run_the_next_step_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (None, "chat-large"):
        with pytest.raises(ValueError, match="un `make report` first"):
            find_checkpoint(name)


def test_a_chat_stays_within_the_length_of_training():
    sidecar = {"length": 96, "response_end": "block", "block_size": 16}
    assert chat_context(sidecar, 160) == 96 and chat_context({}, 8192) == 8192
    settings = chat_generation(sidecar, 96)
    assert (settings.max_new_tokens, settings.block_size) == (48, 16)
    assert chat_generation({"response_end": "fill", "block_size": 16}, 1024).block_size == 32
    assert chat_generation({}, 8192).max_new_tokens == 128
