"""Rewards of answers: what they give, and that nothing a model writes stops them."""

import math

import pytest

from dllm.choices import REWARDS
from dllm.evaluation.rewards import check_reference, reference_grid, reward_named, reward_of

EXAMPLES = {
    "number": (
        "How many?",
        "Mira has <<3+4=7>>7 stones.\n#### 7",
        {"so 3 + 4\n#### 7": 1, "7": 1, "7.0": 1, "10-7": 1, "-7": 0, "8": 0, "": 0},
    ),
    "math": (
        "",
        "$3+4=\\boxed{\\frac{1}{2}}$",
        {"$\\boxed{\\frac12}$": 1, "$\\boxed{0.5}$ or so": 1, "$\\fbox{0.5}$": 1, "none": 0, "": 0},
    ),
    "countdown": (
        "Reach 16 with 3, 5, 2.",
        "(3 + 5) * 2 = 16",
        {
            **{"2*(5+3) = 16": 1, "Step 1\n2*(5+3) = 16": 1, "3+5+2 = 10": 0.1, "8 * 2 = 16": 0.1},
            **{"2*(5+3) = 16.5": 0, "2**9 = 16": 0, "16": 0, "1/0 = 16": 0, "": 0},
        },
    ),
    "sudoku": (
        "1 2 3 .\n3 4 1 2\n2 1 4 3\n4 3 2 .",
        "1234341221434321",
        {"1234 3412 2143 4321": 1, "Answer 1\n1234341221434321": 1, "1234 3412 2143 4322": 0.5, "1234": 0, "": 0},
    ),
    "code": (
        "Write double.",
        "assert double(2) == 4",
        {
            "def double(x):\n    return x + x": 1,
            "Sure:\n```python\ndouble = lambda x: 2 * x\n```": 1,
            "```py\ndouble = lambda x: 2 * x\n```": 1,
            "import sys; sys.exit(0)": 0,
        },
    ),
    "format": ("", "3 and 4 are\n#### 7", {"so\n#### 12": 1, "12": 0, "####": 0}),
    "length": ("", "four", {"four": 1, "": 1, "fourfo": 0.5, "fourfour": 0, "four" * 9: 0}),
}


def test_every_reward_has_examples():
    assert set(EXAMPLES) == set(REWARDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_reward_of_the_table_gives_what_its_examples_say(name):
    prompt, reference, answers = EXAMPLES[name]
    check_reference(name, prompt, reference)
    assert {a: reward_named(name)(prompt, a, reference) for a in answers} == pytest.approx(answers)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        *(("number", text) for text in ("#### 1,234", "so -5", "\u22125", "#### -$5", ".5")),
        *(("math", text) for text in ("\\boxed{-1,234}", "\\fbox{5}", "\\boxed{\\frac{1}{2}}")),
        ("countdown", "With 3 and 5:\n3 + 5 = 8"),
        *(("format", text) for text in ("\\boxed{\\frac{1}{2}}", "<answer>x < 3</answer>", "#### 1,234.5")),
        ("length", "four"),
    ],
)
def test_a_reference_is_itself_worth_everything(name, reference):
    check_reference(name, "", reference)
    assert reward_of([name], [1.0], "", reference, reference) == (1.0, "")


@pytest.mark.parametrize(("text", "worth"), [("5", "5"), ("-5", "-5"), ("\u22125", "-5"), ("3-5", "5"), (".5", "0.5")])
def test_a_minus_sign_belongs_to_a_number_unless_it_stands_between_two(text, worth):
    assert reward_of(["number"], [1.0], "", text, worth) == (1.0, "")
    assert reward_of(["number"], [1.0], "", text, f"{worth}1") == (0.0, "")


@pytest.mark.parametrize("before", ["Solve this sudoku.\n", "Puzzle 1\n", "A 4 x 4 grid: ", ""])
@pytest.mark.parametrize("frame", ["{} {} {} {}\n", "{}{}{}{}", "| {} {} | {} {} |\n"])
def test_what_is_said_before_a_puzzle_is_not_a_part_of_it(before, frame):
    cells, solution = "123.34122143432.", "1234341221434321"
    prompt = before + "".join(frame.format(*cells[low : low + 4]) for low in range(0, 16, 4))
    assert reference_grid(prompt, solution) == (cells, solution)


@pytest.mark.parametrize(
    ("name", "reference", "says"),
    [
        ("countdown", "3 + 5 = 9", "wrong: 3 [+] 5 = 9"),
        ("countdown", "-3 + 5 = 2", "'-3 [+] 5': not plain arithmetic"),
        ("format", "#### $5", "as an answer has them"),
    ],
)
def test_a_reference_that_no_answer_could_equal_is_said_to_be_so(name, reference, says):
    with pytest.raises(ValueError, match=says):
        check_reference(name, "", reference)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "code"])
def test_no_answer_stops_a_reward(name):
    prompt, reference, _ = EXAMPLES[name]
    hostile = [
        "9" * 5000,
        "(" * 5000,
        "#### " * 2000,
        "1+" * 3000 + "=1",
        "\\boxed{" * 1000,
        "=" * 9999,
        "9" * 30 + "**9**9 = 1",
    ]
    for answer in hostile:
        value, said = reward_of([name], [1.0], prompt, answer, reference)
        assert said == "" and 0 <= value <= 1


@pytest.mark.parametrize("name", REWARDS)
def test_a_reference_that_a_reward_cannot_use_is_said_to_be_so(name):
    with pytest.raises(ValueError, match="it is|there|its prompt"):
        check_reference(name, "What?", "")


def test_rewards_are_added_up_by_their_weights_and_one_that_raises_costs_its_answer(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "def short(prompt, answer, reference):\n    return 1 / len(answer)\n"
        "def endless(prompt, answer, reference):\n    return float('inf')\n"
        "def ends(prompt, answer, reference):\n    raise SystemExit(0)\n"
        "def text(prompt, answer, reference):\n    return '1'\n"
        "def nothing(prompt, answer, reference):\n    print('seen')\n"
        "def sure(prompt, answer, reference):\n    return answer == reference\n"
    )
    names = ["number", f"{own}:short"]
    assert reward_of(names, [1.0, 0.5], "", "7", "7") == (1.5, "")
    value, said = reward_of(names, [1.0, 0.5], "", "", "7")
    assert math.isnan(value) and said == f"reward {own}:short raised ZeroDivisionError: division by zero"
    value, said = reward_of([f"{own}:endless"], [1.0], "", "", "7")
    assert math.isnan(value) and said.endswith("is inf")
    for name, says in {"ends": "SystemExit: 0", "text": "'1' is text and no number", "nothing": "NoneType"}.items():
        value, said = reward_of([f"{own}:{name}"], [1.0], "", "", "7")
        assert math.isnan(value) and says in said
    assert reward_of([f"{own}:sure"], [1.0], "", "7", "7") == (1.0, "")


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (None, "f", "there is no such file"),
        ("def g(", "f", "cannot be read as Python"),
        ("def g(): pass", "f", "has no function f"),
        ("raise SystemExit(0)", "f", "cannot be read as Python .SystemExit: 0."),
        ("def f(prompt, answer): return 1", "f", "cannot be called with three texts, but takes .prompt, answer."),
        ("def f(*, prompt, answer, reference): return 1", "f", "cannot be called with three texts"),
        ("async def f(prompt, answer, reference): return 1", "f", "returns no number"),
        ("def f(prompt, answer, reference): yield 1", "f", "returns no number"),
    ],
)
def test_a_file_without_the_reward_is_refused_in_one_line(tmp_path, text, name, says):
    own = tmp_path / "mine.py"
    if text is not None:
        own.write_text(text)
    with pytest.raises(ValueError, match=says):
        reward_named(f"{own}:{name}")


def test_a_file_may_define_dataclasses_and_more_arguments_with_defaults(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Scale:\n"
        "    most: float = 2.0\n\ndef f(prompt, answer, reference, scale=Scale()):\n    return scale.most\n"
    )
    assert reward_of([f"{own}:f"], [1.0], "", "", "") == (2.0, "")
