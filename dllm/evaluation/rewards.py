"""Rewards of answers that can be checked: one function each, (prompt, answer, reference) -> a number.

The reference is the row's own answer, as the dataset has it. `dllm.choices.REWARDS` lists the rewards, each with the
function that reads its reference and raises ValueError, one line, for one that it cannot use. Answers are text of a
model: nothing of them is run but in the sandbox, and no pattern takes long on any of them.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from dllm.algorithms import resolved
from dllm.choices import REWARDS

_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212]\$?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A number; a minus sign behind a letter, digit or bracket is one between two numbers, as in `3-7`."""
_LONGEST = 40
"""Most digits of a number: no arithmetic on what a model repeats without end."""


def _last_number(text: str) -> Fraction | None:
    """The number behind the last `####` of a text, or its last one."""
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    digits = found[-1].replace(",", "").replace("$", "").replace("\u2212", "-") if found else ""
    return Fraction(digits) if digits and len(digits) <= _LONGEST else None


def reference_number(prompt: str, reference: str) -> Fraction:
    """The number that is asked for: that of GSM8K stands behind `####`."""
    wanted = _last_number(reference)
    if wanted is None:
        raise ValueError("there is no number in it")
    return wanted


def number(prompt: str, answer: str, reference: str) -> float:
    """1 if the answer's number is exactly the reference's."""
    return float(_last_number(answer) == reference_number(prompt, reference))


def _inside(boxed: str) -> str:
    """What a box of a text holds; the benchmark also finds \\fbox, and does not open it."""
    from lm_eval.tasks.minerva_math import utils

    return str(utils.remove_boxed(boxed.replace("\\fbox", "\\boxed", 1) if boxed.startswith("\\fbox") else boxed))


def reference_mathematics(prompt: str, reference: str) -> str:
    """The boxed answer, as the benchmark MATH normalises it."""
    from lm_eval.tasks.minerva_math import utils

    boxed = utils.last_boxed_only_string(reference)
    if boxed is None:
        raise ValueError("there is no \\boxed{...} in it")
    return str(utils.normalize_final_answer(_inside(boxed)))


def mathematics(prompt: str, answer: str, reference: str) -> float:
    """1 if the answer is equivalent to the reference's boxed one, by the parser of the benchmark MATH."""
    from lm_eval.tasks.minerva_math import utils

    wanted = reference_mathematics(prompt, reference)
    boxed = utils.last_boxed_only_string(answer)
    found = _inside(boxed) if boxed else utils.get_unnormalized_answer(answer)
    return float(utils.is_equiv(utils.normalize_final_answer(found), wanted))


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _arithmetic(text: str) -> tuple[Fraction, Counter[Fraction]]:
    """The value of an expression of whole numbers, + - * / and brackets, and the numbers in it. Raises ValueError."""
    used: Counter[Fraction] = Counter()

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used[Fraction(node.value)] += 1
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not plain arithmetic")

    if len(text) > 200:
        raise ValueError("too long")
    try:
        return value(ast.parse(text.strip(), mode="eval").body), used
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(type(error).__name__) from None


def _last_equation(text: str) -> tuple[str, str]:
    """Left and right side of the last `expression = number` of a text, or two empty strings."""
    found = re.findall(r"([\d \t+\-*/()]{1,200})=[ \t]*(-?\d{1,12})(?!\.?\d)", text)
    return found[-1] if found else ("", "")


def reference_equation(prompt: str, reference: str) -> tuple[Fraction, Counter[Fraction]]:
    """The number to be reached and the numbers to be used, from an equation such as `(3 + 5) * 2 = 16`."""
    left, right = _last_equation(reference)
    if not right:
        raise ValueError("there is no equation such as (3 + 5) * 2 = 16 in it")
    try:
        value, numbers = _arithmetic(left)
    except ValueError as error:
        raise ValueError(
            f"there is no equation such as (3 + 5) * 2 = 16 in it, but {left.strip()!r}: {error}"
        ) from None
    if value != Fraction(right):
        raise ValueError(f"there is an equation in it that is wrong: {left.strip()} = {right}")
    return value, numbers


def countdown(prompt: str, answer: str, reference: str) -> float:
    """1 if the answer's last equation reaches the number with every given number used once; 0.1 for any equation."""
    wanted, numbers = reference_equation(prompt, reference)
    left, right = _last_equation(answer)
    try:
        value, used = _arithmetic(left)
    except ValueError:
        return 0.0
    return 1.0 if value == wanted == Fraction(right) and used == numbers else 0.1


def _grid(text: str, symbols: str) -> str:
    """The last sixteen cells in a row of a text, without spaces and frames; empty without such cells.

    Four lines of four are looked for first, and a point that ends a word is no cell: what is said before a puzzle is
    not a part of it.
    """
    between = r"[\s|+-]*"
    for within in (r"[ \t|]*", between):
        row = within.join([f"[{symbols}]"] * 4)
        found = re.findall(rf"(?<![\w.]){between.join([row] * 4)}(?![ \t|]*\d)", text)
        if found:
            return re.sub(r"[\s|+-]", "", found[-1])
    return ""


def reference_grid(prompt: str, reference: str) -> tuple[str, str]:
    """The puzzle in the prompt, `.`, `_` or `0` where a cell is empty, and its solution, 16 digits from 1 to 4."""
    puzzle, solution = _grid(prompt, "0-4._"), _grid(reference, "1-4")
    if not solution:
        raise ValueError("there are no 16 digits from 1 to 4 in it")
    if not any(cell in "0._" for cell in puzzle):
        raise ValueError("its prompt has no puzzle: 16 cells, `.`, `_` or `0` where one is empty")
    return puzzle, solution


def sudoku(prompt: str, answer: str, reference: str) -> float:
    """The share of the empty cells of a 4 x 4 puzzle that are filled as in the solution."""
    puzzle, solution = reference_grid(prompt, reference)
    filled = _grid(answer, "1-4")
    empty = [place for place, cell in enumerate(puzzle) if cell in "0._"]
    return sum(filled[place] == solution[place] for place in empty) / len(empty) if filled else 0.0


def reference_tests(prompt: str, reference: str) -> str:
    """The tests of a program: Python with at least one `assert`."""
    try:
        tests = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(reference)))
    except SyntaxError as error:
        raise ValueError(f"it is not Python ({error.msg})") from None
    if not tests:
        raise ValueError("there is no assert in it")
    return reference


def code(prompt: str, answer: str, reference: str) -> float:
    """1 if the answer's program, or what is in its last code fence, passes the reference's tests in the sandbox."""
    from dllm.evaluation.sandbox import run_program

    fenced = re.findall(r"```\w*[ \t]*\n(.*?)```", answer, re.DOTALL)
    program = fenced[-1] if fenced else answer
    return float(run_program(f"{program}\n{reference_tests(prompt, reference)}").passed)


_FORMS = {
    "####": re.compile(r"####\s*-?\d[\d,.]*\s*$"),
    "\\boxed{": re.compile(r"\\boxed\{[^}]+\}"),
    "</answer>": re.compile(r"<answer>(?:(?!</?answer>).)+</answer>\s*$", re.DOTALL),
    "```": re.compile(r"```[^`]+```"),
}
"""Marks of an answer's form, and what an answer of that form has."""


def reference_form(prompt: str, reference: str) -> list[str]:
    """The marks that the reference has, in a form that an answer could have."""
    marks = [mark for mark in _FORMS if _FORMS[mark].search(reference)]
    if not marks:
        raise ValueError(f"there is none of {', '.join(_FORMS)} in it as an answer has them")
    return marks


def form(prompt: str, answer: str, reference: str) -> float:
    """1 if the answer has the form of the reference: its number behind ####, boxed, in a tag, or a code fence."""
    return float(all(_FORMS[mark].search(answer) for mark in reference_form(prompt, reference)))


def reference_length(prompt: str, reference: str) -> int:
    """The reference's characters."""
    if not reference.strip():
        raise ValueError("it is empty")
    return len(reference)


def length(prompt: str, answer: str, reference: str) -> float:
    """1 for an answer that is no longer than the reference, falling to 0 at twice its length."""
    most = reference_length(prompt, reference)
    return min(1.0, max(0.0, 2 - len(answer) / most))


# --------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _own(path: str, name: str) -> Callable[..., Any]:
    """A function of a file on this disk. Raises ValueError, one line."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"reward_funcs = '{path}:{name}': there is no such file; check the path")
    called = f"reward_{file.stem}_{abs(hash(str(file.resolve())))}"
    spec = importlib.util.spec_from_file_location(called, file)
    assert spec is not None and spec.loader is not None  # of a file that is there
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # where dataclasses look for the names of a class
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"reward_funcs = '{path}:{name}': the file cannot be read as Python ({said[:200]})") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"reward_funcs = '{path}:{name}': the file has no function {name}")
    if wrong := _cannot_be_called(found):
        raise ValueError(
            f"reward_funcs = '{path}:{name}': the function {wrong}; allowed: def {name}(prompt, answer, reference), "
            "which returns a number"
        )
    return found


def _cannot_be_called(function: Callable[..., Any]) -> str:
    """Why a function is no reward, "" if it may be one."""
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return "returns no number but something that has to be waited for"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are not written in Python do not tell
        return ""
    try:
        signature.bind("", "", "")
    except TypeError:
        return f"cannot be called with three texts, but takes {signature}"
    return ""


def reward_named(name: str) -> Callable[[str, str, str], float]:
    """The function of a reward: one of the table, or `file.py:function`. Raises ValueError, one line, if none is."""
    if name in REWARDS:
        return resolved(REWARDS[name].score)
    return _own(*name.rsplit(":", 1))


def check_reference(name: str, prompt: str, reference: str) -> None:
    """Raise ValueError if a reward of the table cannot use a reference."""
    if name in REWARDS:
        resolved(REWARDS[name].reference)(prompt, reference)


def reward_of(
    names: Sequence[str], weights: Sequence[float], prompt: str, answer: str, reference: str
) -> tuple[float, str]:
    """The weighted sum of some rewards, and "" or, with NaN, what went wrong: a reward that raises costs its answer."""
    total = 0.0
    for name, weight in zip(names, weights, strict=True):
        try:
            given = reward_named(name)(prompt, answer, reference)
            if isinstance(given, str | bytes | bytearray):
                raise TypeError(f"{given!r:.40} is text and no number")
            value = float(given)
        except (Exception, SystemExit) as error:  # rewards are a user's own functions, and answers are anything
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return math.nan, f"reward {name} raised {said[:200]}"
        if not math.isfinite(value):
            return math.nan, f"reward {name} is {value}"
        total += weight * value
    return total, ""
