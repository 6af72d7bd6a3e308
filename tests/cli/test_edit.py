"""`dllm sample --edit`, and chat and samples with a model that edits."""

import io
import json
import re

import pytest
import torch

from dllm.cli.main import main
from tests.edit_checkpoint import save_edit_toy

DRAFT = "I am am a red toy What is is the the capital of France"
FAST = ("--new-tokens", "12", "--steps", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """A directory with a run of Edit Flows that is not trained, so that it changes much."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("editor")
    save_edit_toy(root / "results/laptop/runs/chat-edits/model")
    return root


@pytest.fixture
def here(editor, monkeypatch):
    monkeypatch.chdir(editor)
    return editor


def applied(line: str) -> str:
    """A marked line as it reads once its marks are carried out, without spaces, which tokens bring or not."""
    return "".join(re.sub(r"\[-.*?-\]|\{\+|\+\}", "", line).split())


def undone(line: str) -> str:
    """A marked line as it read before, without spaces."""
    return "".join(re.sub(r"\{\+.*?\+\}|\[-|-\]", "", line).split())


@pytest.mark.parametrize("prompt", [(), ("Who are you?",), ("Who are you?", "--raw"), ("Who?", "--system", "Hello")])
def test_a_text_is_edited_into_another_line_by_line(here, capsys, prompt):
    assert main(["sample", "chat-edits", "--edit", DRAFT, *prompt, *FAST]) == 0
    out = capsys.readouterr().out
    frames = re.findall(r"^ {0,2}\d+  .*", out, re.MULTILINE)
    last = out[out.rindex(frames[-1]) + len(frames[-1]) :]  # the finished text, which may have several lines
    passes, lines = zip(*((frame[:3], frame[5:]) for frame in frames), strict=True)
    assert passes[0] == "  0" and lines[0] == DRAFT and len(lines) > 1
    assert [int(number) for number in passes] == sorted({int(number) for number in passes})
    for before, line in zip(lines, lines[1:], strict=False):
        assert "{+" in line or "[-" in line
        assert undone(line) == applied(before), "each line begins with what the one before it made"
    assert applied(lines[-1]).startswith("".join(last.split()))
    assert "\x1b" not in out and "[/Answer]" not in "".join(lines)


def test_in_a_terminal_what_goes_and_what_comes_has_colours(here, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    words = ["sample", "chat-edits", "--edit", DRAFT, *FAST]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;38" in out and "{+" not in out  # bold and blue
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(words) == 0
    assert "{+" in capsys.readouterr().out


def test_the_same_command_gives_the_same_edits_and_another_seed_others(here, capsys):
    found = []
    for seed in ("0", "0", "1"):
        assert main(["sample", "chat-edits", "--edit", "I am a toy", "--seed", seed, *FAST]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["chat-edits", "--edit", "a", "b", "c"], "--edit takes one draft and at most one PROMPT, got 2"),
        (["chat-edits", "--edit", " "], "--edit needs a text; to start from"),
        (
            ["chat-edits", "--edit", "a", "--output", "x.json"],
            "--output writes conversations, and --edit does not",
        ),
        (["chat-edits", "--edit", "Hello " * 96], "prompt and draft have 97 tokens; the model's context is 95"),
        (["chat-edits", "Who?", "--reveal-rule", "threshold"], "reveal_rule = 'threshold' means nothing to algorithm"),
        (["chat-edits", "Who?", "--reuse", "dual"], "reuse = 'dual' means nothing to algorithm = 'edit_flows'"),
        (["chat-edits", "Who?", "--block-size", "4"], "--block-size 4: a model trained with edit_flows has no blocks"),
        (["--edit", "a"], "needs a MODEL"),
        (["--config", "c.yaml", "--edit", "a"], "leave out --edit"),
    ],
)
def test_a_mistake_is_one_line(here, words, line, capsys):
    assert main(["sample", *words, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_model_of_another_algorithm_cannot_edit(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert main(["sample", "chat-toy", "--edit", "I am a toy", *FAST]) == 2
    assert "a model trained with edit_flows only; this one was trained with mdlm" in capsys.readouterr().err


def test_a_block_size_that_a_model_does_not_have_is_refused():
    from dllm.chat.session import Session, check_block, obey
    from dllm.config import GenerateSettings

    sidecar = {"algorithm": "bd3lm", "block_size": 16}
    check_block(16, sidecar, "")
    check_block(4, {"algorithm": "mdlm", "block_size": 16}, "")
    with pytest.raises(ValueError, match="/block 4: this model was trained in blocks of 16"):
        obey(Session(GenerateSettings(), 64, sidecar=sidecar), "/block 4")


def test_from_nothing_it_draws_unless_told_otherwise(here, capsys):
    """At temperature 0 every gap of an empty answer gets the same token."""
    from dllm.chat.settings import EDIT_TEMPERATURE, chat_generation

    settings = chat_generation({"algorithm": "edit_flows", "response_end": "one", "block_size": 16}, 64)
    assert settings.temperature == EDIT_TEMPERATURE > 0
    assert chat_generation({"algorithm": "mdlm"}, 64).temperature == 0
    assert main(["sample", "chat-edits", *FAST, "Who are you?"]) == 0
    assert main(["sample", "chat-edits", *FAST, "--temperature", "0", "Who are you?"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_it_chats_in_pipes_and_in_terminals(here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\nHello!\n"))
    assert main(["chat", "chat-edits", *FAST]) == 0
    assert capsys.readouterr().out.count("Bot:") == 2

    from rich.console import Console

    import dllm
    from dllm.chat.local import Local
    from dllm.chat.session import Session
    from dllm.chat.settings import chat_generation
    from dllm.cli.chat import Chat, Live

    model = dllm.load(here / "results/laptop/runs/chat-edits/model", device="cpu")
    settings = chat_generation(model.backbone.sidecar, 24).model_copy(update={"steps": 5})
    screen = io.StringIO()
    ticks = iter(range(1000))  # a second per look at the clock: every canvas is drawn
    live = Live(Console(file=screen, force_terminal=True, width=120), Local(model), clock=lambda: float(next(ticks)))
    Chat(Local(model), Session(settings, model.max_length), live).answer("Who are you?")
    assert "passes" in screen.getvalue()


def test_the_film_of_an_edited_answer_keeps_each_token_in_its_place(here, tmp_path, capsys):
    from dllm.report.film import frames

    output = tmp_path / "film.json"
    assert main(["sample", "chat-edits", "Hello!", "--output", str(output), *FAST]) == 0
    film = json.loads(output.read_text())["film"]
    assert len({len(frame["tokens"]) for frame in film["frames"]}) == 1
    assert all(token["state"] == "masked" for token in film["frames"][0]["tokens"]), "it begins with nothing"
    assert frames(film)[-1].plain.replace("⏎", "").strip().startswith(film["answer"].replace("\n", "").strip())
