"""OpenAI's own client, against a server."""

import asyncio

import pytest

from tests.serving.serial import SerialEngine
from tests.serving.servers import TURNS, running, served
from tests.toys import LEARNT

HELLO = "Hello! I am a toy."


@pytest.fixture(scope="module")
def openai():
    """The client's package: a second of a core, which is not spent where this file is only collected."""
    import openai

    return openai


@pytest.fixture(scope="module")
def client(openai):
    def made(url: str, kind=openai.OpenAI, **options):
        return kind(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0} | options)

    return made


def test_it_gets_an_answer(url, client):
    said = client(url).chat.completions.create(model="toy", messages=TURNS, seed=0, temperature=0, top_p=1, n=2)
    assert [choice.message.content for choice in said.choices] == [HELLO, HELLO]
    assert said.choices[0].finish_reason == "stop"
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert said.dllm["passes"] > 0


def test_it_streams_an_answer_past_the_canvases(url, client):
    stream = client(url).chat.completions.create(
        model="toy",
        messages=TURNS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"canvas": True, "steps": 4},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == HELLO
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0
    assert sum("canvas" in (c.model_extra or {}) for c in chunks) == 4


def test_it_goes_on_with_a_conversation_it_got(url, client):
    turns, answer = LEARNT[3]
    first = client(url).chat.completions.create(model="toy", messages=turns[:1])
    said = client(url).chat.completions.create(model="toy", messages=[turns[0], first.choices[0].message, turns[2]])
    assert said.choices[0].message.content == answer


def test_it_completes_a_text_and_streams_it(url, client):
    whole = client(url).completions.create(model="toy", prompt=["Hello", "Who"], max_tokens=4)
    parts = client(url).completions.create(model="toy", prompt=["Hello", "Who"], max_tokens=4, stream=True)
    texts = ["", ""]
    for chunk in parts:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_it_lists_the_models(url, client):
    assert [model.id for model in client(url).models.list()] == ["toy"]
    assert client(url).models.retrieve("toy").owned_by == "dllm"


def test_many_of_its_tasks_are_answered_at_once(url, client, openai):
    async def all_of_them() -> list[str]:
        async with client(url, openai.AsyncOpenAI) as asked:

            async def streamed(turns) -> str:
                stream = await asked.chat.completions.create(model="toy", messages=turns, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

            async def whole(turns) -> str:
                said = await asked.chat.completions.create(model="toy", messages=turns)
                return said.choices[0].message.content

            return await asyncio.gather(*(kind(turns) for turns, _ in LEARNT for kind in (streamed, whole)))

    assert asyncio.run(all_of_them()) == [answer for _, answer in LEARNT for _ in range(2)]


def test_it_knows_every_error(url, taught, client, openai):
    asked = client(url).chat.completions
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
        asked.create(model="gpt", messages=TURNS)
    with pytest.raises(openai.BadRequestError) as error:
        asked.create(model="toy", messages=TURNS, logit_bias={"1": 1})
    assert error.value.param == "logit_bias" and error.value.code == "unsupported_parameter"
    with running([served(taught, engine=SerialEngine(taught, most=0))], key=b"k" * 16) as server:
        with pytest.raises(openai.AuthenticationError):
            client(server.url).models.list()
        with pytest.raises(openai.RateLimitError) as full:
            client(server.url, api_key="k" * 16).chat.completions.create(model="toy", messages=TURNS)
        assert int(full.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):  # also where a stream is asked for
            client(server.url, api_key="k" * 16).chat.completions.create(model="toy", messages=TURNS, stream=True)
        server.server.gate.closing = True
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client(server.url, api_key="k" * 16).chat.completions.create(model="toy", messages=TURNS)
