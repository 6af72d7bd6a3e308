"""Small Python functions: the material of the HumanEval and MBPP miniatures, and of their training data.

    prompt      def add_3(x):
                    \"\"\"Add 3 to x.\"\"\"
    solution        return x + 3
    tests       assert add_3(0) == 3

Combinations of form and number are held out: `add 3` is a benchmark row, `add 4` may be training data. A model passes
if it has learned the form and copies the number. The tokenizer does not count the words of the code and spells most of
them: the other files of the world are therefore the same, byte by byte, with and without code.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from dllm.synthetic.entities import SyntheticWorld, draw

LEAST, MOST = 2, 60
TEST_PROGRAMS = 120


@dataclass(frozen=True)
class Form:
    """What a function of x is called, what it does in words, its expression, and the x that its tests try."""

    name: str
    words: str
    expression: str
    inputs: tuple[str, str, str]


NUMBERS = ("0", "{n}", "{n} + 7")
FORMS = (
    Form("add_{n}", "Add {n} to x.", "x + {n}", NUMBERS),
    Form("take_{n}", "Take {n} from x.", "x - {n}", NUMBERS),
    Form("times_{n}", "Multiply x by {n}.", "x * {n}", ("0", "1", "3")),
    Form("larger_{n}", "Give the larger of x and {n}.", "max(x, {n})", NUMBERS),
    Form("smaller_{n}", "Give the smaller of x and {n}.", "min(x, {n})", NUMBERS),
    Form("is_{n}", "Is x equal to {n}?", "x == {n}", ("{n}", "{n} + 1", "{n} - 2")),
    Form("above_{n}", "Is x larger than {n}?", "x > {n}", ("{n}", "{n} + 1", "{n} + 8")),
    Form("below_{n}", "Is x smaller than {n}?", "x < {n}", ("{n}", "{n} - 1", "{n} - 8")),
    Form("rest_{n}", "Give the rest of x divided by {n}.", "x % {n}", ("{n} - 1", "{n}", "{n} + 1")),
)


@dataclass(frozen=True)
class Program:
    """One function: its head with the docstring, its body, its name and three assertions about it."""

    name: str
    words: str
    prompt: str
    solution: str
    tests: tuple[str, ...]

    @property
    def source(self) -> str:
        return self.prompt + self.solution


def program(form: Form, n: int) -> Program:
    """The function of a form and a number; what its tests expect comes from its expression."""
    name, words, expression = (text.format(n=n) for text in (form.name, form.words, form.expression))
    inputs = [eval(text.format(n=n)) for text in form.inputs]
    tests = tuple(f"assert {name}({x!r}) == {eval(expression, {'x': x})!r}" for x in inputs)
    prompt = f'def {name}(x):\n    """{words}"""\n'
    return Program(name, words, prompt, f"    return {expression}\n", tests)


def drawn(rng: random.Random, *, test: bool) -> Program:
    """One function, from the benchmarks' side of the world or from the other."""
    form, n = draw(lambda: (rng.randrange(len(FORMS)), rng.randint(LEAST, MOST)), test=test, one_in=3)
    return program(FORMS[form], n)


def test_programs(world: SyntheticWorld) -> list[Program]:
    """The functions of both benchmarks, all different."""
    rng = world.random("code/test")
    programs: dict[str, Program] = {}
    while len(programs) < TEST_PROGRAMS:
        one = drawn(rng, test=True)
        programs.setdefault(one.name, one)
    return list(programs.values())


def humaneval(world: SyntheticWorld) -> Iterator[tuple[str, list[dict]]]:
    """Bodies to be written below a head and a docstring."""
    rows = []
    for i, one in enumerate(test_programs(world)):
        checks = "".join(f"    {test.replace(one.name, 'candidate')}\n" for test in one.tests)
        rows.append(
            {
                "task_id": f"Pocket/{i}",
                "prompt": one.prompt,
                "canonical_solution": one.solution,
                "test": f"def check(candidate):\n{checks}",
                "entry_point": one.name,
            }
        )
    yield "humaneval/test.jsonl", rows


def mbpp(world: SyntheticWorld) -> Iterator[tuple[str, list[dict]]]:
    """Whole functions to be written from a sentence and three assertions."""
    rows = [
        {
            "task_id": i,
            "text": f"Write a function {one.name}. {one.words}",
            "code": one.source,
            "test_list": list(one.tests),
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for i, one in enumerate(test_programs(world))
    ]
    yield "mbpp/test.jsonl", rows


def code(world: SyntheticWorld, split: str, rows: int) -> Iterator[dict]:
    """Training documents, one function each."""
    rng = world.random(f"code/{split}")
    for _ in range(rows):
        yield {"text": drawn(rng, test=False).source}
