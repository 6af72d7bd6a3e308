"""A model that renoises, behind a server and in the terminal."""

import io
import re

import openai
import pytest
from rich.console import Console

import dllm
from dllm.chat.remote import remote
from dllm.cli.chat import Chat, Live
from dllm.cli.main import main
from dllm.config import LikelihoodSettings
from tests.sampling.test_renoise import SIZE, save_tiny
from tests.serving.servers import TURNS, ask, running, served

OPTIONS = {"max_tokens": 3 * SIZE, "seed": 5, "temperature": 0.9, "extra_body": {"steps": 12, "early_stop": False}}
"""Three canvases, four passes for each."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def gemma(place):
    return dllm.load(place, device="cpu")


@pytest.fixture(scope="module")
def url(gemma):
    with running([served(gemma)]) as server:
        yield server.url


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def alone(gemma, **changes):
    """The answer without a server, with the settings of `OPTIONS`."""
    given = {"max_new_tokens": 3 * SIZE, "seed": 5, "temperature": 0.9, "steps": 12}
    return gemma.answers([TURNS], served(gemma, engine=object()).settings(given | changes))[0]


def test_the_answer_is_that_of_the_model_alone(url, gemma):
    options = OPTIONS | {"extra_body": {"steps": 12}}
    said = client(url).chat.completions.create(model="toy", messages=TURNS, **options)
    answer = alone(gemma)
    assert said.choices[0].message.content == answer.text.strip() and answer.text.strip()
    assert (said.usage.completion_tokens, said.dllm["passes"]) == (answer.tokens, answer.passes)
    said = client(url).completions.create(model="toy", prompt="Hello", max_tokens=4, temperature=0)
    assert said.choices[0].text == gemma.generate(["Hello"], alone_settings(gemma))[0]


def alone_settings(gemma):
    return served(gemma, engine=object()).settings({"max_new_tokens": 4, "temperature": 0.0})


def test_a_stream_says_a_canvas_when_it_is_finished_and_shows_it_before(url, gemma):
    options = OPTIONS | {"extra_body": {"steps": 12, "canvas": True}}
    chunks = list(client(url).chat.completions.create(model="toy", messages=TURNS, stream=True, **options))
    said = [(number, c.choices[0].delta.content) for number, c in enumerate(chunks) if c.choices]
    texts = [(number, text) for number, text in said if text]
    assert "".join(text for _, text in texts).strip() == alone(gemma).text.strip()
    canvases = [(number, c.model_extra["canvas"]) for number, c in enumerate(chunks) if "canvas" in c.model_extra]
    assert len(texts) > 1, "it does not wait for the end"
    first = [canvas for number, canvas in canvases if number < texts[0][0]]
    assert 1 < len(first) < len(canvases), "a canvas is shown in several passes before it is said"
    hidden = [[piece is None for piece in canvas["pieces"][:SIZE]] for canvas in first]
    assert any(hidden[-2]) and not any(hidden[-1]), "all of it is known at once"
    assert all(any(canvas["pieces"][place] is None for place in range(SIZE, 3 * SIZE)) for canvas in first)


def test_it_is_scored_and_what_it_cannot_do_is_one_line(url, gemma):
    body = {"model": "toy", "prompt": "Hello", "continuations": ["a toy"], "budget": 8}
    said = ask(url, "/v1/score", body)
    (score,) = gemma.nelbo(*gemma.pairs(["Hello"], ["a toy"]), LikelihoodSettings(budget=8))
    assert said.json["data"][0]["nats"] == pytest.approx(score.nats, rel=1e-5)
    for path, body, words in (
        ("/v1/infill", {"text": "a [MASK]"}, "renoise fills no masks; use `generate`"),
        ("/v1/edit", {"draft": "a"}, "trained with edit_flows only"),
        ("/v1/chat/completions", {"messages": TURNS, "n": 2}, "gives one answer to a request"),
        ("/v1/chat/completions", {"messages": TURNS, "block_size": 4}, "trained in blocks of 8"),
        ("/v1/chat/completions", {"messages": TURNS, "remask": "cap"}, "remask = 'cap' means nothing"),
        ("/v1/chat/completions", {"messages": TURNS, "steps": 1}, "less than the 2 canvases"),
    ):
        said = ask(url, path, {"model": "toy"} | body)
        assert said.status == 400 and words in said.error["message"] and "\n" not in said.error["message"]


def test_the_terminal_draws_it_from_a_server_and_alone(url, place, capsys):
    console, ticks, talker = (
        Console(file=io.StringIO(), force_terminal=True),
        iter(range(1000)),
        remote(url, None, None),
    )
    chat = Chat(talker, talker.session(), Live(console, talker, clock=lambda: next(ticks)))
    assert chat.talk(iter(["Who are you?"])) == 0
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    ((_, answer),) = chat.session.conversation.turns
    assert f"Bot: {answer.split()[0]}" in screen
    assert main(["chat", str(place), "--once", "Who are you?", "--device", "cpu", "--new-tokens", "16"]) == 0
    assert capsys.readouterr().out.strip()
