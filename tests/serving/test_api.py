"""The API: OpenAI's shapes and ours, over a real connection to a toy."""

import json

import pytest

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.serving import schemas
from dllm.serving.documentation import ENDPOINTS
from dllm.serving.events import Finished, Snapshot, TooLong
from tests.serving.serial import SerialEngine, scripted
from tests.serving.servers import TURNS, ask, chunks, running, served
from tests.toys import LEARNT

CHAT = "/v1/chat/completions"


def chat(url: str, **parameters):
    return ask(url, CHAT, {"model": "toy", "messages": TURNS} | parameters)


# --------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("turns, answer", LEARNT)
def test_a_chat_is_answered_as_generate_answers_it(url, turns, answer):
    said = ask(url, CHAT, {"model": "toy", "messages": turns})
    assert said.status == 200
    (choice,) = said.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer}
    assert choice["finish_reason"] == "stop"
    usage = said.json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert said.json["dllm"]["passes"] > 0 and said.json["dllm"]["seed"] == 0


def test_every_setting_of_the_sampler_reaches_it(url, taught):
    drawn = {"temperature": 1.5, "seed": 7, "top_p": 0.9, "steps": 4, "block_size": 8, "reveal_rule": "random"}
    settings = GenerateSettings(max_new_tokens=16, **drawn)
    for length in ("max_tokens", "max_completion_tokens"):
        said = chat(url, **drawn, **{length: 16})
        assert said.json["choices"][0]["message"]["content"] == taught.generate([TURNS], settings)[0]
        assert said.json["dllm"]["seed"] == 7


def test_a_request_can_name_every_setting_of_the_sampler_but_those_of_the_server():
    own = {"batch_size", "batch_tokens", "early_stop", "max_new_tokens"}
    assert set(GenerateSettings.model_fields) - set(schemas.ChatRequest.model_fields) == own
    assert set(LikelihoodSettings.model_fields) - set(schemas.ScoreRequest.model_fields) == {"batch_tokens", "rounds"}


@pytest.mark.parametrize("revises", [{"remask": "cap", "remask_share": 0.5, "steps": 60}, {"edit_threshold": 0.1}])
def test_a_stream_takes_nothing_back_where_tokens_are_revised(url, taught, revises):
    drawn = {"temperature": 3.0, "block_size": 8, "max_tokens": 40} | revises
    for seed in range(4):
        found = [data for _, data in chunks(chat(url, stream=True, seed=seed, **drawn).text)]
        text = "".join(c["delta"].get("content") or "" for d in found for c in d.get("choices", []))
        settings = GenerateSettings(
            max_new_tokens=40, seed=seed, **{name: value for name, value in drawn.items() if name != "max_tokens"}
        )
        assert text == taught.generate([TURNS], settings)[0]
        assert not [d for d in found if "error" in d]


def test_several_choices_are_those_of_the_next_seeds(url, taught):
    said = chat(url, n=3, temperature=2.0, seed=5, max_tokens=8)
    texts = [choice["message"]["content"] for choice in said.json["choices"]]
    alone = [
        taught.generate([TURNS], GenerateSettings(max_new_tokens=8, temperature=2.0, seed=seed))[0]
        for seed in (5, 6, 7)
    ]
    assert texts == alone and len(set(texts)) > 1
    assert [choice["index"] for choice in said.json["choices"]] == [0, 1, 2]


def test_several_prompts_are_answered_in_their_order(url, taught):
    prompts = ["Who are", "The capital of", "Hello"]
    said = ask(url, "/v1/completions", {"model": "toy", "prompt": prompts, "n": 2, "max_tokens": 6})
    alone = taught.generate(prompts, GenerateSettings(max_new_tokens=6))
    assert [choice["text"] for choice in said.json["choices"]] == [text for text in alone for _ in range(2)]
    ids = [taught.encode_prompt(text) for text in prompts]
    assert (
        said.json["choices"]
        == ask(url, "/v1/completions", {"model": "toy", "prompt": ids, "n": 2, "max_tokens": 6}).json["choices"]
    )
    one = ask(url, "/v1/completions", {"model": "toy", "prompt": ids[0], "max_tokens": 6})
    assert one.json["choices"][0]["text"] == alone[0]


def test_a_stop_string_ends_an_answer_and_is_not_in_it(url):
    for stop in ("am", ["zzz", "am"]):
        choice = chat(url, stop=stop).json["choices"][0]
        assert choice["message"]["content"] == "Hello! I" and choice["finish_reason"] == "stop"


def test_parts_of_a_message_are_joined_and_a_developer_speaks_as_the_system(url):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    said = ask(url, CHAT, {"model": "toy", "messages": [{"role": "user", "content": parts}]})
    assert said.json["choices"] == chat(url).json["choices"]
    both = [
        ask(url, CHAT, {"model": "toy", "messages": [{"role": role, "content": "Who"}, *TURNS]}).json["choices"]
        for role in ("developer", "system")
    ]
    assert both[0] == both[1]


def test_what_openais_clients_send_by_default_is_taken(url):
    idle = {"logit_bias": {}, "logprobs": False, "tools": None, "frequency_penalty": 0.0, "user": "me", "stop": None}
    assert chat(url, **idle).json["choices"] == chat(url).json["choices"]


def test_scores_are_those_of_nelbo(url, taught):
    texts = [" you", " Rome", " are you"]
    said = ask(url, "/v1/score", {"model": "toy", "prompt": "Who are", "continuations": texts, "budget": 8})
    alone = taught.nelbo(["Who are"] * 3, texts, LikelihoodSettings(budget=8))
    assert [score["nats"] for score in said.json["data"]] == [score.nats for score in alone]
    assert [score["tokens"] for score in said.json["data"]] == [1, 1, 2]
    assert [score["index"] for score in said.json["data"]] == [0, 1, 2]
    in_chat = ask(url, "/v1/score", {"model": "toy", "messages": TURNS, "continuations": texts})
    assert [score["nats"] for score in in_chat.json["data"]] == [s.nats for s in taught.nelbo([TURNS] * 3, texts)]
    whole = ask(url, "/v1/score", {"model": "toy", "continuations": ["Who are you"]})
    assert whole.json["data"][0]["nats"] == taught.nelbo([[]], ["Who are you"])[0].nats


def test_holes_are_filled_and_the_rest_stays(url, taught):
    said = ask(url, "/v1/infill", {"model": "toy", "text": "Who [MASK] you?"})
    assert said.json["choices"][0]["text"] == taught.infill(["Who [MASK] you?"])[0]
    assert ask(url, "/v1/infill", {"model": "toy", "text": "Who are you?"}).status == 400
    # the passes are those of the holes, whatever the length of an answer would be
    holes = {"model": "toy", "text": "Who [MASK] you?", "steps": 1, "block_size": 4}
    assert ask(url, "/v1/infill", holes).json["dllm"]["passes"] == 1


def test_a_model_that_does_not_edit_says_so(url):
    said = ask(url, "/v1/edit", {"model": "toy", "draft": "Who"})
    assert said.status == 400 and "edit_flows" in said.error["message"]


def test_the_models_are_listed_with_their_defaults(url):
    (card,) = ask(url, "/v1/models").json["data"]
    assert card["id"] == "toy" and card["dllm"]["context"] == 64
    assert card["dllm"]["defaults"]["max_tokens"] == 16
    assert ask(url, "/v1/models/toy").json == card
    assert ask(url, "/v1/models/no/such").error["code"] == "model_not_found"


def test_a_model_of_the_hub_has_a_slash_in_its_id(taught):
    with running([served(taught, id="org/toy")]) as server:
        assert ask(server.url, "/v1/models/org/toy").json["id"] == "org/toy"


# --------------------------------------------------------------------------------------------------------------------
# Streams


def test_a_stream_says_what_the_whole_answer_is(url):
    said = chat(url, stream=True, stream_options={"include_usage": True})
    assert said.headers["content-type"].startswith("text/event-stream")
    (first, *_, last, counted, end) = [data for _, data in chunks(said.text)]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(
        choice["delta"].get("content", "") for _, data in chunks(said.text) for choice in data.get("choices", [])
    )
    whole = chat(url).json
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "stop" and last["dllm"]["passes"] == whole["dllm"]["passes"]
    assert counted["usage"] == whole["usage"] and counted["choices"] == []
    assert end == {}


def test_canvases_are_events_that_openais_clients_pass_over(url):
    said = chat(url, stream=True, canvas=True, steps=2)
    canvases = [data for name, data in chunks(said.text) if name == "canvas"]
    assert [one["canvas"]["step"] for one in canvases] == [1, 2]
    assert all(one["choices"] == [] and one["object"] == "chat.completion.chunk" for one in canvases)
    before, after = (one["canvas"] for one in canvases)
    assert None in before["pieces"] and None not in after["pieces"]
    assert sorted(before["revealed"] + after["revealed"]) == list(range(16))
    assert all(
        (piece is None) == (sure == 0) for piece, sure in zip(before["pieces"], before["confidence"], strict=True)
    )


def test_a_stream_sends_what_is_new_and_takes_nothing_back(taught):
    def snapshot(step: int, text: str) -> Snapshot:
        return Snapshot(step, (), (), (), (), text)

    events = [(0, snapshot(1, "")), (0, snapshot(2, "Par")), (1, snapshot(1, "R")), (0, snapshot(3, "Paris"))]
    ends = [(number, Finished(text, 3, 1, 4, "stop", 0.1, ())) for number, text in ((1, "Rome"), (0, "Paris."))]
    with running([served(taught, engine=scripted(SerialEngine(taught), events + ends))]) as server:
        found = [data for _, data in chunks(chat(server.url, stream=True, n=2, seed=3).text)]
        said = [(c["index"], c["delta"]["content"]) for d in found for c in d.get("choices", []) if c["delta"]]
        assert said == [(0, ""), (1, ""), (0, "Par"), (1, "R"), (0, "is"), (1, "ome"), (0, ".")]
        assert [d["dllm"]["seed"] for d in found if "dllm" in d] == [4, 3]


def test_an_answer_that_fails_on_its_way_ends_its_stream_with_an_error(taught):
    events = [(0, Snapshot(1, (), (), (), (), "Par")), (0, TooLong("it took 600 s"))]
    with running([served(taught, engine=scripted(SerialEngine(taught), events))]) as server:
        *_, last = chunks(chat(server.url, stream=True).text)
        assert last[1]["error"]["code"] == "time_limit"
        assert chat(server.url).status == 504


def test_a_bug_is_an_error_of_the_server_in_the_same_shape(taught):
    with running([served(taught, engine=scripted(SerialEngine(taught), [(0, RuntimeError("a bug"))]))]) as server:
        said = chat(server.url)
        assert said.status == 500 and said.error["type"] == "server_error" and "bug" not in said.error["message"]
        *_, last = chunks(chat(server.url, stream=True).text)
        assert last[1]["error"]["code"] == "internal_error"


# --------------------------------------------------------------------------------------------------------------------
# Refusals


def said(content) -> list[dict]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "wrong, param, code",
    [
        ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"max_new_tokens": 3}, "max_new_tokens", "unknown_parameter"),
        ({"batch_size": 3}, "batch_size", "unknown_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 2}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**6}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"seed": 2**40}, "seed", "invalid_value"),
        ({"reveal_rule": "bogus"}, "reveal_rule", "invalid_value"),
        ({"steps": 1, "block_size": 4}, "steps", "invalid_value"),
        ({"reuse": "prefix", "guidance": 1.0}, "reuse", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "invalid_value"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "x"}]}, None, "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "invalid_value"),
        ({"max_tokens": 10**5}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "Hello " * 90}]}, "messages", "context_length_exceeded"),
        ({"canvas": True}, None, "invalid_value"),
        ({"stop": [""]}, None, "invalid_value"),
        ({"model": "gpt"}, "model", "model_not_found"),
        ({"messages": said([{"type": "image_url"}])}, "messages[0].content[0].type", "invalid_value"),
        ({"messages": said([{"type": "text", "text": 3}])}, "messages[0].content[0].text", "invalid_value"),
        ({"stop": ["a", 3]}, "stop[1]", "invalid_value"),
        ({"tools": [{}], "store": True, "logprobs": True, "best_of": 2}, "tools", "unsupported_parameter"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(url, wrong, param, code):
    said = chat(url, **wrong)
    assert said.status == (404 if code == "model_not_found" else 400)
    assert said.error["code"] == code and said.error["type"] == "invalid_request_error"
    assert "\n" not in said.error["message"]
    if param:
        assert said.error["param"] == param and param.split("[")[0] in said.error["message"] + param


@pytest.mark.parametrize(
    "path, wrong, param, code",
    [
        ("completions", {"prompt": "Hello " * 900, "max_tokens": 4}, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": ["Hello", "Hello " * 900]}, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": [3, 10**6]}, "prompt", "invalid_value"),
        ("completions", {"prompt": ["a", 3]}, "prompt[1]", "invalid_value"),
        ("completions", {"prompt": []}, None, "invalid_value"),
        ("completions", {"prompt": [[3], []]}, None, "invalid_value"),
        ("score", {"continuations": ["a", ""]}, "continuations[1]", "invalid_value"),
        ("score", {"continuations": ["a", "a " * 900]}, "continuations[1]", "context_length_exceeded"),
        ("infill", {"text": "no hole"}, "text", "invalid_value"),
    ],
)
def test_what_is_wrong_is_named_as_the_request_names_it(url, path, wrong, param, code):
    said = ask(url, f"/v1/{path}", {"model": "toy"} | wrong)
    assert said.status == 400 and said.error["code"] == code and said.error["param"] == param
    words = said.error["message"]
    assert words.startswith(param or "prompt") and "\n" not in words
    for unknown in ("max_new_tokens", "prompts[", "targets[", "texts[", "request ", "messages"):
        assert unknown not in words


def test_an_empty_prompt_is_a_prompt_alone_and_among_others(url):
    alone, among = (
        ask(url, "/v1/completions", {"model": "toy", "prompt": prompt, "max_tokens": 4}).json
        for prompt in ("", ["", "Who"])
    )
    assert alone["choices"][0]["text"] == among["choices"][0]["text"] and alone["usage"]["prompt_tokens"] == 0


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", "3", '"x"', '{"model":"toy"}', "[" * 10**5, b"\xff\xfe", '{"a":NaN}']
)
def test_a_body_that_is_no_request_is_refused(url, body):
    said = ask(url, CHAT, body)
    assert said.status == 400 and said.error["type"] == "invalid_request_error"


def test_paths_methods_and_kinds_that_are_not_there_are_refused_in_the_same_shape(url):
    assert ask(url, "/v1/nothing").status == 404
    assert ask(url, "/v1/models/").status == 404
    assert ask(url, CHAT).status == 405
    assert ask(url, "/v1/models", {}, method="POST").status == 405
    assert ask(url, CHAT, "{}", headers={"content-type": "text/plain"}).status == 415
    for said in (ask(url, "/v1/nothing"), ask(url, CHAT), ask(url, CHAT, "{}", headers={"content-type": "text/plain"})):
        assert set(said.error) == {"message", "type", "param", "code"}


def test_an_error_about_text_that_cannot_be_sent_is_sent(url):
    said = ask(url, CHAT, '{"model": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert said.status in (400, 404)
    assert ask(url, CHAT, json.dumps({"model": "\u202e漢", "messages": TURNS})).error["code"] == "model_not_found"


# --------------------------------------------------------------------------------------------------------------------
# Documentation


def test_answers_are_what_the_document_says(url):
    said = {
        schemas.ChatCompletion: chat(url),
        schemas.TextCompletion: ask(url, "/v1/completions", {"model": "toy", "prompt": "Who", "max_tokens": 4}),
        schemas.Models: ask(url, "/v1/models"),
        schemas.Scores: ask(url, "/v1/score", {"model": "toy", "continuations": ["Who"]}),
        schemas.Failure: ask(url, "/v1/nothing"),
    }
    for kind, answer in said.items():
        kind.model_validate_json(answer.text)
    for _, data in chunks(chat(url, stream=True, canvas=True).text)[:-1]:
        schemas.ChatChunk.model_validate_json(json.dumps(data))


def test_the_document_has_every_path_and_parameter(url):
    document = ask(url, "/openapi.json").json
    assert set(document["paths"]) == {one.path for one in ENDPOINTS}
    known = document["components"]["schemas"]
    assert {"messages", "steps", "reveal_rule", "canvas", "n"} <= set(known["ChatRequest"]["properties"])
    assert known["ChatRequest"]["properties"]["steps"]["description"]
    references = {line.split('"')[0] for line in json.dumps(document).split('"$ref": "#/components/schemas/')[1:]}
    assert references <= set(known)
    for one in ENDPOINTS:
        if one.example:
            one.takes.model_validate(one.example)


def test_the_page_of_the_documentation_asks_nobody_for_anything(url):
    page = ask(url, "/docs")
    assert page.status == 200 and "reveal_rule" in page.text
    assert f"curl -N {url}/v1/score" in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert "<script" not in page.text and "src=" not in page.text
    assert "https://" not in page.text and "`" not in page.text
