"""A model that edits, behind a server."""

import io
import re

import pytest
from rich.console import Console

import dllm
from dllm.chat.remote import remote
from dllm.cli.chat import Chat, Live
from tests.edit_checkpoint import save_edit_toy
from tests.serving.servers import TURNS, ask, chunks, running, served

DRAFT = "I a am toy toy."


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return dllm.load(save_edit_toy(tmp_path_factory.mktemp("editor"), length=64), device="cpu")


@pytest.fixture(scope="module")
def address(editor):
    with running([served(editor)]) as server:
        yield server.url


def settings(editor, **changes):
    return served(editor, engine=object()).defaults.model_copy(update=changes)


@pytest.mark.parametrize("given", [{}, {"messages": TURNS}, {"prompt": "Hello"}])
def test_a_draft_becomes_what_the_model_makes_of_it(address, editor, given):
    body = {"model": "toy", "draft": DRAFT, "steps": 6, "seed": 3, "temperature": 1.0}
    prompt = given.get("messages") or given.get("prompt")
    *_, last = editor.edits(DRAFT, prompt, settings(editor, steps=6, seed=3, temperature=1.0))
    alone = editor.decode(last.responses()[0])
    said = ask(address, "/v1/edit", body | given)
    assert said.json["object"] == "edit" and said.json["choices"][0]["text"].strip() == alone.strip()
    found = chunks(ask(address, "/v1/edit", body | given | {"stream": True, "canvas": True}).text)
    canvases = [data["canvas"] for name, data in found if name == "canvas"]
    assert [canvas["step"] for canvas in canvases] == list(range(1, len(canvases) + 1))
    assert {kind for canvas in canvases for kind, _ in canvas["edits"]} <= {"kept", "gone", "new"}
    text = "".join(choice["text"] for _, data in found for choice in data.get("choices", []))
    assert text == said.json["choices"][0]["text"]


def test_both_a_prompt_and_a_conversation_are_refused(address):
    said = ask(address, "/v1/edit", {"model": "toy", "draft": DRAFT, "prompt": "x", "messages": TURNS})
    assert said.status == 400 and "give one of them" in said.error["message"]


def test_it_answers_a_conversation_and_says_that_it_edits(address, editor):
    said = ask(address, "/v1/chat/completions", {"model": "toy", "messages": TURNS, "steps": 6})
    assert said.json["choices"][0]["message"]["content"] == editor.generate([TURNS], settings(editor, steps=6))[0]
    assert ask(address, "/v1/models/toy").json["dllm"]["edits"] is True
    assert ask(address, "/v1/infill", {"model": "toy", "text": "a [MASK]"}).status == 400
    for wrong in ({"block_size": 8}, {"n": 2}, {"reveal_rule": "random"}):
        assert ask(address, "/v1/chat/completions", {"model": "toy", "messages": TURNS} | wrong).status == 400


def test_a_terminal_draws_it(address):
    console, ticks, talker = (
        Console(file=io.StringIO(), force_terminal=True),
        iter(range(1000)),
        remote(address, None, None),
    )
    chat = Chat(talker, talker.session(), Live(console, talker, clock=lambda: next(ticks)))
    assert chat.talk(iter(["Who are you?"])) == 0
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert chat.session.conversation.turns, screen
    ((_, answer),) = chat.session.conversation.turns
    assert f"Bot: {answer}" in screen or not answer
