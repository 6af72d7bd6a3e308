"""A session is plain data: what was said, how to sample, what a command changes."""

import pytest

from dllm.chat.session import COMMANDS, Conversation, Session, check_steps, fit_context, obey
from dllm.config import GenerateSettings

SETTINGS = GenerateSettings(max_new_tokens=32, block_size=8)


def session(*turns, system="", context=100) -> Session:
    return Session(SETTINGS, context, Conversation(system, turns))


def words(messages) -> int:
    return sum(len(message["content"].split()) for message in messages)


def test_a_conversation_becomes_messages():
    conversation = Conversation("be kind").with_turn("Hello!", "Hi.")
    assert [m["role"] for m in conversation.messages("And?")] == ["system", "user", "assistant", "user"]
    assert conversation.messages()[-1] == {"role": "assistant", "content": "Hi."}


def test_turns_that_fit_are_kept():
    before = session(("a b", "c"), context=40)
    assert fit_context(before, "d e", words) == (before, 0)


def test_the_oldest_turns_are_dropped_and_the_system_prompt_stays():
    before = session(("a a a", "b"), ("c c", "d"), ("e", "f"), system="be kind", context=40)
    after, dropped = fit_context(before, "g", words)
    assert dropped == 1 and after.conversation == Conversation("be kind", (("c c", "d"), ("e", "f")))
    assert words(after.conversation.messages("g")) == 8


def test_a_question_that_does_not_fit_alone_is_refused():
    with pytest.raises(
        ValueError, match="takes 9 tokens, and the context of 40 tokens has room for 8 before an answer of 32"
    ):
        fit_context(session(("a", "b"), context=40), "x " * 9, words)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/steps 16", "steps", 16),
        ("/steps auto", "steps", None),
        ("/block 16", "block_size", 16),
        ("/temperature 0.7", "temperature", 0.7),
        ("/temp 1", "temperature", 1.0),
    ],
)
def test_a_command_changes_one_setting(line, field, value):
    after, reply = obey(session(), line)
    assert getattr(after.settings, field) == value
    assert after.settings.model_copy(update={field: getattr(SETTINGS, field)}) == SETTINGS
    assert "new tokens" in reply


def test_reset_forgets_the_turns_and_system_starts_anew():
    before = session(("a", "b"), system="be kind")
    assert obey(before, "/reset")[0].conversation == Conversation("be kind")
    assert obey(before, "/system be short")[0].conversation == Conversation("be short")
    assert obey(before, "/system")[0].conversation == Conversation()


def test_quit_ends_and_help_lists_every_command():
    assert obey(session(), "/quit")[0].ended and obey(session(), "/q")[0].ended
    after, reply = obey(session(), "/help")
    assert after == session() and all(command.usage in reply for command in COMMANDS.values())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/rset", "Did you mean 'reset'?"),
        ("/s 4", "/s is not a command"),
        ("/", "is not a command"),
        ("/steps many", "a number of at least 1, or auto; got 'many'"),
        ("/steps 0", "got '0'"),
        ("/steps 3", "steps = 3 is less than the 4 blocks of 8 tokens"),
        ("/block", "got ''"),
        ("/temperature hot", "got 'hot'"),
        ("/temperature nan", "got 'nan'"),
        ("/temperature -1", "at least 0"),
        ("/temperature 1e39", "got '1e39'"),
        ("/temperature 1e-39", "got '1e-39'"),
        ("/steps 99999999999999999999", "less than or equal to 1000000"),
    ],
)
def test_a_wrong_command_is_one_clear_line(line, words):
    with pytest.raises(ValueError) as fault:
        obey(session(), line)
    assert words in str(fault.value) and "\n" not in str(fault.value)


def test_a_smaller_block_that_the_steps_cannot_fill_is_refused():
    before, _ = obey(session(), "/steps 4")
    with pytest.raises(ValueError, match="take at least 8 steps"):
        obey(before, "/block 4")
    check_steps(SETTINGS)
