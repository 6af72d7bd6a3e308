"""Steps against time and quality."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from dllm.chat.speed import (
    Question,
    compare,
    decoding_plans,
    is_correct,
    measure,
    read_questions,
    token_agreement,
)
from dllm.config import GenerateSettings, SpeedConfig


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
    expected = [Question("q0", "0"), Question("q1", "1")]
    assert read_questions(path, "#### (.*)", 2) == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet", "#### (.*)", 2) == expected


@pytest.mark.parametrize(
    ("content", "pattern", "words"),
    [
        ("", "(.*)", "no questions in it"),
        ('{"question": "a"}', "(.*)", "q.jsonl:1: not a row with question and answer"),
        ('{"question": "a", "answer": "b"}', "#### (.*)", "does not match '#### (.*)'"),
        ('{"question": "a", "answer": "b"}', "b", "has no group"),
        ('{"question": "a", "answer": "b"}', "(", "is not a regular expression"),
    ],
)
def test_wrong_questions_are_one_clear_line(tmp_path, content, pattern, words):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as fault:
        read_questions(path, pattern, 4)
    assert words in str(fault.value) and "\n" not in str(fault.value)


def test_rows_with_choices_are_asked_openly_from_several_files(tmp_path):
    for name, answer in (("b", 1), ("a", 0)):
        row = {"question": f"{name}?", "choices": ["left", "right"], "answer": answer}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    found = read_questions(tmp_path / "*.jsonl", r"(\w+)$", 5)
    assert [(question.text, question.answer) for question in found] == [("a?", "left"), ("b?", "right")]
    assert read_questions(tmp_path / "*.jsonl", r"(\w+)$", 1) == found[:1]
    with pytest.raises(ValueError, match="no such file of questions"):
        read_questions(tmp_path / "*.parquet", r"(.*)", 5)


def test_missing_questions_name_the_next_step(tmp_path):
    with pytest.raises(ValueError, match="no such file of questions"):
        read_questions(tmp_path / "q.jsonl", "(.*)", 4)


def speed_config(**changes) -> SpeedConfig:
    facts = {"run": "toy", "checkpoint": "m", "questions": "q", "steps": [16, 4]}
    return SpeedConfig(**facts, generation=GenerateSettings(max_new_tokens=16, block_size=8, **changes))


def test_fewer_steps_take_proportionally_fewer_passes(taught):
    questions = [Question("What is the capital of France?", "Paris"), Question("Who are you?", "Rome")]
    many, few = measure(taught, speed_config(early_stop=False), questions)
    assert (many.name, many.nfe, many.n, many.correct) == ("16", 16.0, 2, 1)
    assert (few.name, few.nfe) == ("4", 4.0)
    assert many.seconds > 0 and many.tokens == 7


def test_steps_that_cannot_fill_the_blocks_are_refused(taught):
    config = speed_config().model_copy(update={"steps": [1]})
    with pytest.raises(ValueError, match="steps = 1 is less than the 2 blocks"):
        list(measure(taught, config, [Question("Who are you?", "x")]))


def test_options_are_compared_with_the_exact_decode(taught):
    questions = [Question("What is the capital of France?", "Paris"), Question("Who are you?", "Rome")]
    options = {"all at once": {"reveal_rule": "threshold", "threshold": 0.0}, "fresh": {"reuse": "dual", "refresh": 1}}
    config = speed_config().model_copy(update={"options": options})
    found = {option.name: option for option in compare(taught, config, questions)}
    assert list(found) == ["exact", "half the steps", "all at once", "fresh"]
    exact = found["exact"]
    assert (exact.agreement, exact.token_agreement, exact.n, exact.correct, exact.tokens) == (1, 1, 2, 1, 7)
    assert found["fresh"].agreement == 1 and found["fresh"].nfe == exact.nfe
    assert found["all at once"].nfe <= 2 < exact.nfe and all(option.seconds > 0 for option in found.values())


def test_the_exact_decode_reveals_one_token_per_pass_and_reuses_nothing():
    config = speed_config(reveal_rule="threshold", threshold=0.5, reuse="dual", steps=2, temperature=0.5)
    plans = decoding_plans(config)
    exact = plans["exact"]
    assert (exact.steps, exact.reveal_rule, exact.reuse, exact.temperature) == (None, "confidence", "none", 0.5)
    assert plans["half the steps"].steps == 8 and plans["factor 1"].reveal_rule == "factor"
    assert {settings.temperature for settings in plans.values()} == {0.5}


def test_agreement_counts_tokens_position_by_position():
    assert token_agreement([([1, 2, 3], [1, 2, 3]), ([1, 2], [1, 3, 2])]) == 4 / 6
    assert token_agreement([([], [])]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"treshold": 0.5}, "options['x']: treshold is not a setting. Did you mean 'threshold'?"),
        ({"threshold": 2.0}, "options['x']: threshold = 2.0: input should be less than or equal to 1"),
        ({"reuse": "dual", "guidance": 1.0}, "options['x']: reuse = 'dual' does not go together with guidance = 1"),
        ({"refresh": 3}, "options['x']: refresh = 3 needs something to refresh"),
    ],
)
def test_a_wrong_option_is_named(changes, words):
    with pytest.raises(ValueError) as fault:
        SpeedConfig(run="toy", checkpoint="m", questions="q", steps=[16], options={"x": changes})
    assert words in str(fault.value)
