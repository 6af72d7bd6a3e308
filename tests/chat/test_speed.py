"""Steps against time and quality."""

import json

import pytest

from dllm.chat.settings import SpeedConfig
from dllm.chat.speed import Question, is_correct, measure, read_questions
from dllm.config import GenerateSettings


@pytest.mark.parametrize(
    ("text", "sought", "pattern", "correct"),
    [
        ("Mira has 7.\n#### 7", "7", "#### (.*)", True),
        ("#### 3\n#### 1,007.", "1007", "#### (.*)", True),
        ("She has 3 + 4 = 7 stones.", "7", "#### (.*)", True),
        ("She has 7 stones, not 3.", "7", "#### (.*)", False),
        ("#### seven, or 7", "7", "#### (.*)", True),
        ("none", "7", "#### (.*)", False),
        ("", "7", "#### (.*)", False),
        ("paris", "Paris.", "(.*)", True),
        ("Rome.", "Paris.", "(.*)", False),
        ("Paris", "Paris", "#### (.*)", True),
    ],
)
def test_an_answer_is_right_if_it_says_what_is_sought(text, sought, pattern, correct):
    assert is_correct(text, sought, pattern) == correct


def test_questions_are_the_first_rows_with_the_answer_sought(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_questions(path, "#### (.*)", 2) == [Question("q0", "0"), Question("q1", "1")]


@pytest.mark.parametrize(
    ("content", "pattern", "words"),
    [
        ("", "(.*)", "no questions in it"),
        ('{"question": "a"}', "(.*)", "q.jsonl:1: not a row with question and answer"),
        ('{"question": "a", "answer": "b"}', "#### (.*)", "does not match '#### (.*)'"),
        ('{"question": "a", "answer": "b"}', "b", "has no group"),
        ('{"question": "a", "answer": "b"}', "(", "is no regular expression"),
    ],
)
def test_wrong_questions_are_one_clear_line(tmp_path, content, pattern, words):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as fault:
        read_questions(path, pattern, 4)
    assert words in str(fault.value) and "\n" not in str(fault.value)


def test_missing_questions_name_the_next_step(tmp_path):
    with pytest.raises(ValueError, match="no such file of questions"):
        read_questions(tmp_path / "q.jsonl", "(.*)", 4)


def speed_config(**changes) -> SpeedConfig:
    facts = {"run": "toy", "checkpoint": "m", "questions": "q", "steps": [16, 4]}
    return SpeedConfig(**facts, generation=GenerateSettings(max_new_tokens=16, block_size=8, **changes))


def test_fewer_steps_take_proportionally_fewer_passes(taught):
    questions = [Question("What is the capital of France?", "Paris"), Question("Who are you?", "Rome")]
    many, few = measure(taught, speed_config(early_stop=False), questions)
    assert (many.steps, many.nfe, many.n, many.correct) == (16, 16.0, 2, 1)
    assert (few.steps, few.nfe) == (4, 4.0)
    assert many.seconds > 0 and many.tokens == 7


def test_steps_that_cannot_fill_the_blocks_are_refused(taught):
    config = speed_config().model_copy(update={"steps": [1]})
    with pytest.raises(ValueError, match="steps = 1 is less than the 2 blocks"):
        list(measure(taught, config, [Question("Who are you?", "x")]))
