"""Rows of every kind are recognised by their columns and become the same conversation."""

import json

import pytest

from dllm.data.convert import answers_of, messages_of, text_of
from dllm.data.kinds import has_rejected, kind_of, kinds, recognised

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SYSTEM = {"role": "system", "content": "Be kind."}
PARTS = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("messages", {"messages": TURNS}),
        ("messages", {"messages": PARTS, "id": 3}),
        ("messages", {"conversations": TURNS}),
        ("messages", {"messages": json.dumps(TURNS)}),
        ("sharegpt", {"conversations": SHARED}),
        ("sharegpt", {"conversations": SHARED, "text": None, "messages": None}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello!"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello!"}),
        ("pairs", {"prompt": "Hi", "response": "Hello!"}),
        ("pairs", {"question": "Hi", "answer": "Hello!", "id": "7"}),
        ("pairs", {"query": "Hi", "completion": "Hello!"}),
        ("pairs", {"input": "Hi", "output": "Hello!"}),
        ("pairs", {"User": "Hi", "Assistant": "Hello!"}),
        ("pairs", {"instruction": "Hi", "response": "Hello!"}),
        ("pairs", {"prompt": TURNS[:1], "completion": TURNS[1:]}),
        ("preference", {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}),
        ("pairs", {"Question": "Hi", " Answer ": "Hello!"}),
        ("alpaca", {"Instruction": "Hi", "INPUT": "", "Output": "Hello!"}),
        ("sharegpt", {"Conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello!"}]}),
        ("messages", {"messages": [{"role": "User", "content": "Hi"}, {"role": "AI", "content": "Hello!"}]}),
    ],
)
def test_a_row_of_every_kind_becomes_the_same_conversation(kind, row):
    assert kind_of(row) == kind
    assert messages_of(row, "auto", "") == messages_of(row, kind, "") == TURNS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *TURNS]},
        {"messages": [{"role": "developer", "content": "Be kind."}, *TURNS]},
        {"conversations": [{"from": "system", "value": "Be kind."}, *SHARED]},
        {"conversations": SHARED, "system": "Be kind."},
        {"question": "Hi", "response": "Hello!", "system_prompt": "Be kind."},
        {"instruction": "Hi", "output": "Hello!", "system": "Be kind."},
    ],
)
def test_a_system_prompt_is_the_first_turn_wherever_it_is_written(row):
    assert messages_of(row, "auto", "") == [SYSTEM, *TURNS]


def test_what_rows_look_like_is_said_in_one_line():
    assert recognised([{"conversations": SHARED}], "x")[1] == (
        "rows look like ShareGPT conversations: column conversations"
    )
    kind, said = recognised([{"messages": TURNS}, {"prompt": "Hi", "response": "Hello!"}], "x")
    assert kind == "messages" and said.endswith("messages; prompts and responses: columns prompt, response")
    assert recognised([{"text": "a"}], "x")[0] == "text"
    with pytest.raises(ValueError, match="x: holds both texts and conversations"):
        recognised([{"text": "a"}, {"messages": TURNS}], "x")


def test_columns_that_are_not_read_are_said():
    row = {"prompt": "Hi", "response": "Hello!", "notes": "", "System": "Be kind.", "topic": "x"}
    assert recognised([row], "x")[1].endswith("columns prompt, response; not read: topic")
    many = {"text": "a"} | {f"column{i}": i for i in range(8)}
    assert recognised([many], "x")[1].endswith("not read: column0, column1, column2, column3, column4 and 3 more")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say hello.", "input": "to Mira", "output": "Hello!"},
        {"instruction": "Say hello.", "input": "to Mira", "response": "Hello!"},
        {"instruction": "Say hello.", "context": "to Mira", "response": "Hello!", "category": "open"},
    ],
)
def test_what_stands_beside_an_instruction_is_part_of_the_question(row):
    assert kind_of(row) == "alpaca"
    assert messages_of(row, "auto", "")[0]["content"] == "Say hello.\n\nto Mira"


@pytest.mark.parametrize("row", [{"titel": "a", "inhalt": "b"}, {}, {"text": 3}, {"prompt": "Hi"}])
def test_rows_that_are_not_recognised_are_one_line_with_their_columns(row):
    with pytest.raises(ValueError) as caught:
        recognised([row], "notes")
    line = str(caught.value)
    assert line.startswith(f"notes: rows with the columns {', '.join(row) or '(none)'} are of no known kind; allowed: ")
    assert "\n" not in line and "`kind`" in line


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"messages": TURNS[1:]}, "begins with its only answer"),
        ({"messages": [SYSTEM]}, "no turn of the assistant"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "has no text"),
        ({"messages": [TURNS[0], {"role": "tool", "content": "3"}, TURNS[1]]}, "role = 'tool'; allowed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}, "a part of type 'image_url'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud800"}]}, "character 0 (U+D800) is no text"),
        ({"prompt": "a \udfff", "response": "b"}, "character 2 (U+DFFF) is no text"),
        ({"prompt": 3, "response": "b"}, "column 'prompt' = 3 is not a text"),
        ({"title": "b"}, "no conversation (columns: title)"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_line_with_its_place(row, line):
    with pytest.raises(ValueError) as caught:
        messages_of(row, "auto", "chats.jsonl row 7")
    assert str(caught.value).startswith("chats.jsonl row 7: ") and line in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff\u00a0\u2060", "\x00\x07"])
def test_a_turn_of_which_nothing_is_seen_is_empty(text):
    row = {"prompt": "Hi", "response": text}
    with pytest.raises(ValueError, match="row 3: empty text in a turn of role 'assistant'"):
        messages_of(row, "pairs", "row 3")


def test_half_a_character_in_a_text_is_one_line():
    with pytest.raises(ValueError, match="notes row 1: character 1 \\(U\\+D83D\\) is no text"):
        text_of({"text": "a\ud83d"}, "notes row 1")
    assert text_of({"text": "a😀"}, "") == text_of({"Text": "a😀"}, "") == "a😀"


def test_every_kind_but_text_has_conversations():
    assert [name for name, kind in kinds().items() if kind.conversation is None] == ["text"]


WORSE = {"role": "assistant", "content": "What?"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [WORSE]},
        {"chosen": TURNS, "rejected": [TURNS[0], WORSE]},
        # as UltraFeedback is published
        {"prompt": "Hi", "prompt_id": "7", "chosen": TURNS, "rejected": [TURNS[0], WORSE], "messages": TURNS,
         "score_chosen": 8.5},
        {"question": "Hi", "chosen": "Hello!", "rejected": "What?"},
    ],
)  # fmt: skip
def test_a_preference_in_every_layout_becomes_two_conversations(row):
    assert kind_of(row) == "preference" and has_rejected("preference")
    assert answers_of(row, "preference", "") == [TURNS, [TURNS[0], WORSE]]
    # what learns from answers alone learns from the chosen ones
    assert messages_of(row, "auto", "") == TURNS


def test_a_system_prompt_belongs_to_both_answers():
    row = {"system": "Be kind.", "question": "Hi", "chosen": "Hello!", "rejected": "What?"}
    assert answers_of(row, "preference", "") == [[SYSTEM, *TURNS], [SYSTEM, TURNS[0], WORSE]]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "Hi", "chosen": "Hello!"}, "no column 'rejected' (columns: prompt, chosen)"),
        ({"chosen": "Hello!", "rejected": "What?"}, "'chosen' is an answer alone and there is no prompt"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Hello!"}, "the chosen answer is also the rejected one"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": " "}, "empty text in a turn of role 'assistant'"),
        ({"chosen": TURNS, "rejected": [SYSTEM, TURNS[0], WORSE]}, "differ before their last answers"),
        ({"prompt": "Hi", "chosen": [], "rejected": "What?"}, "no messages ([])"),
    ],
)
def test_a_preference_that_cannot_be_used_is_one_line_with_its_place(row, line):
    with pytest.raises(ValueError) as caught:
        answers_of(row, "preference", "pairs.jsonl row 7")
    assert str(caught.value).startswith("pairs.jsonl row 7: ") and line in str(caught.value)
