"""`dllm chat`: finished turns in a pipe, the canvas in place on a terminal."""

import io
import re

import pytest
from rich.console import Console

from dllm.chat.local import Local
from dllm.chat.session import Conversation, Session
from dllm.cli.chat import Chat, Live, Plain
from dllm.cli.generation import open_model
from dllm.cli.main import main
from dllm.config import GenerateSettings

SETTINGS = GenerateSettings(max_new_tokens=16, block_size=8)
OPTIONS = ("--new-tokens", "16", "--block-size", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def model(project):
    return open_model(str(project / "results/laptop/runs/chat-toy/model"), "cpu")


@pytest.fixture
def typed(monkeypatch):
    """Feed standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_piped_chat_prints_one_line_per_turn(here, typed, capsys):
    typed("What is the capital of France?\n\nAnd Italy?\n")
    assert main(["chat", *OPTIONS]) == 0
    captured = capsys.readouterr()
    lines = ["You: What is the capital of France?", "Bot: Paris.", "You: And Italy?", "Bot: Rome."]
    assert captured.out.splitlines() == lines
    assert captured.err == ""


def test_commands_work_in_a_pipe_and_stay_out_of_the_answers(here, typed, capsys):
    typed("/steps 4\nWho are you?\n/quit\nHello!\n")
    assert main(["chat", "chat-toy", *OPTIONS]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("You: Who are you?\nBot: ") and "Hello!" not in captured.out.split("Bot:")[0]
    assert "4 steps" in captured.err and len(captured.out.splitlines()) == 2


def test_a_wrong_line_is_reported_and_the_chat_goes_on(here, typed, capsys):
    typed(f"/stepz 4\n{'Hello ' * 80}\nWho are you?\n")
    assert main(["chat", *OPTIONS]) == 2
    captured = capsys.readouterr()
    assert captured.out.endswith("Bot: I am a toy.\n")
    assert "/stepz is not a command" in captured.err and "the context of 64 tokens has room for 48" in captured.err


def test_a_bug_costs_one_message_and_keeps_the_conversation(model, capsys, monkeypatch):
    chat, whole = Chat(Local(model), Session(SETTINGS, 64), Plain()), type(model).stream

    def broken(self, prompts, settings):
        if "Hello" in prompts[0][-1]["content"]:
            raise TypeError("no such thing")
        return whole(self, prompts, settings)

    monkeypatch.setattr(type(model), "stream", broken)
    assert chat.talk(iter(["Who are you?", "Hello!", "Who are you?"])) == 70
    captured = capsys.readouterr()
    assert captured.err.startswith("dllm chat: error: this is a bug of dllm (TypeError: no such thing at local.py:")
    assert captured.err.count("\n") == 1
    assert [asked for asked, _ in chat.session.conversation.turns] == ["Who are you?", "Who are you?"]


def test_once_prints_the_bare_answer(here, capsys):
    assert main(["chat", "--once", "Who are you?", *OPTIONS]) == 0
    assert capsys.readouterr().out == "I am a toy.\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["chat-tiy"], "Did you mean 'chat-toy'?"),
        (["--once", "Hello " * 99], "the message takes"),
        (["--once", " "], "--once is empty"),
        (["--steps", "1"], "steps = 1 is less than the 2 blocks"),
        (["--temperature", "-1"], "--temperature -1.0: input should be greater"),
        (["--temperature", "inf"], "--temperature inf: input should be a finite number"),
        (["--temperature", "nan"], "--temperature nan: input should be a finite number"),
        (["--temperature", "1e39"], "--temperature 1e+39: input should be less than or equal to 100"),
        (["--temperature", "1e-39"], "--temperature 1e-39: value error, input should be 0, or between 0.001 and 100"),
        (["--steps", "9" * 20], "input should be less than or equal to 1000000"),
        (["--seed", "9" * 20], "input should be less than or equal to"),
        (["--device", "gpu"], "--device gpu is not a device; allowed: cpu, cuda"),
    ],
)
def test_a_mistake_is_one_line(here, typed, words, line, capsys):
    typed("")
    assert main(["chat", *OPTIONS, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dllm chat: error: ") and line in captured.err and captured.err.count("\n") == 1


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=60, highlight=False, **options)


def test_on_a_terminal_the_canvas_is_drawn_until_the_answer_stands(model):
    console, ticks = terminal(), iter(range(1000))
    chat = Chat(Local(model), Session(SETTINGS, 64), Live(console, Local(model), clock=lambda: next(ticks)))
    assert chat.talk(iter(["Who are you?"])) == 0
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "················" in drawn and "I am a toy." in drawn and "tokens/s" in drawn
    assert chat.session.conversation == Conversation("", (("Who are you?", "I am a toy."),))


def test_no_color_leaves_colours_out(model, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console, ticks = terminal(), iter(range(1000))
    Chat(Local(model), Session(SETTINGS, 64), Live(console, Local(model), clock=lambda: next(ticks))).answer(
        "Who are you?"
    )
    assert "38;5" not in console.file.getvalue() and "38;2" not in console.file.getvalue()


def test_an_interrupt_stops_the_answer_and_not_the_chat(model, capsys, monkeypatch):
    chat = Chat(Local(model), Session(SETTINGS, 64), Plain())
    whole = type(model).stream

    def interrupted(self, prompts, settings):
        yield next(whole(self, prompts, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "stream", interrupted)
    chat.answer("Hello!")
    monkeypatch.undo()
    assert chat.session.conversation == Conversation()
    chat.answer("Who are you?")
    captured = capsys.readouterr()
    assert captured.out == "Bot: I am a toy.\n" and "stopped" in captured.err


def test_forgetting_the_oldest_turns_is_said_once(model, capsys):
    long = tuple(("Who are you?", "I am a toy.") for _ in range(4))
    chat = Chat(Local(model), Session(SETTINGS, 64, Conversation("", long)), Plain())
    for _ in range(3):
        chat.answer("Who are you?")
    assert capsys.readouterr().err.count("oldest turns are forgotten") == 1
    assert len(chat.session.conversation.turns) < 4


@pytest.mark.parametrize("bad", ["\udcff", "Hello \ud800"])
def test_a_message_that_is_no_text_fails_alone(model, capsys, bad):
    chat = Chat(Local(model), Session(SETTINGS, 64), Plain())
    assert chat.talk(iter(["Who are you?", bad, "Who are you?"])) == 2
    assert len(chat.session.conversation.turns) == 2
    with pytest.raises(ValueError, match="is no text"):
        chat.once(bad)


def test_bytes_that_are_no_text_on_standard_input_fail_alone(here, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO(b"Who are you?\n\xff\nWho are you?\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", piped)
    assert main(["chat", "chat-toy", *OPTIONS]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("Bot: ") == 2 and captured.err.count("\n") == 1, captured.err


def test_a_prompt_that_is_no_text_is_one_line(here, capsys):
    assert main(["sample", "chat-toy", *OPTIONS, "\udcff"]) == 2
    printed = capsys.readouterr().err
    assert "is no text" in printed and printed.count("\n") == 1


def test_a_mask_in_a_question_is_left_there(here, capsys):
    assert main(["sample", "chat-toy", *OPTIONS, "Who are you? [MASK]"]) == 0
