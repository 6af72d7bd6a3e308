"""Word problems, small mathematics and logic: the material of the GSM8K, Minerva-Math and BBH miniatures.

    question    Mira has 3 stones. Tom gives her 4 more. How many stones does she have now?
    solution    Mira has <<3+4=7>>7 stones.
                #### 7

Combinations of a number pair and a form of story are held out: 3 and 4 in one form are a benchmark row, in another form
they may be training data. The corpora have the sums themselves, 3 + 4 = 7, as plain text.
"""

import random
from dataclasses import dataclass

from dllm.synthetic.entities import draw, pronoun_of
from dllm.synthetic.scenes import PEOPLE

SMALLEST, LARGEST = 2, 6
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
TOYS = ("stones", "coins")
FRUITS = ("apples", "pears", "plums", "figs")


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution and the bare answer."""

    question: str
    solution: str
    answer: str


def number(rng: random.Random) -> int:
    """A number from SMALLEST to LARGEST."""
    return rng.randint(SMALLEST, LARGEST)


WORD_PROBLEMS = {
    "gift": (
        "{x} has {a} {toys}. {y} gives {x} {b} more. How many {toys} does {x} have now?",
        "{x} has <<{a}+{b}={c}>>{c} {toys}.\n#### {c}",
    ),
    "together": (
        "{x} has {a} {toys}. {y} has {b} {toys}. How many {toys} do they have together?",
        "Together they have <<{a}+{b}={c}>>{c} {toys}.\n#### {c}",
    ),
    "days": (
        "On Monday {x} finds {a} {toys}. On Tuesday {pronoun} finds {b}. How many {toys} does {x} find?",
        "{x} finds <<{a}+{b}={c}>>{c} {toys}.\n#### {c}",
    ),
    "bags": (
        "{x} has a bag with {a} {toys} and a box with {b} {toys}. How many {toys} does {x} have?",
        "{x} has <<{a}+{b}={c}>>{c} {toys}.\n#### {c}",
    ),
}


def word_problem(rng: random.Random, *, test: bool) -> Problem:
    """One GSM8K-like story about one sum."""
    form, a, b = draw(lambda: (rng.choice(list(WORD_PROBLEMS)), number(rng), number(rng)), test=test)
    question, solution = WORD_PROBLEMS[form]
    x, y = rng.sample(PEOPLE, 2)
    words = {"x": x, "y": y, "a": a, "b": b, "c": a + b, "toys": rng.choice(TOYS), "pronoun": pronoun_of(x)}
    return Problem(question.format(**words), solution.format(**words), str(a + b))


@dataclass(frozen=True)
class MathForm:
    """Ways to ask for one number, the boxed solution, and which of a, b, c = a + b and the larger is the answer."""

    questions: tuple[str, ...]
    solution: str
    answer: str


MATHEMATICS = {
    "algebra": MathForm(
        (
            "If $x={a}$ and $y={b}$, what is $x+y$?",
            "If $x={a}$, what is $x+{b}$?",
            "Let $x={a}$. Find $x+{b}$.",
            "Let $x={a}$ and $y={b}$. Find $x+y$.",
            "Find $y$ if $y=x+{b}$ and $x={a}$.",
            "Solve $x={a}+{b}$ for $x$.",
        ),
        "${a}+{b}=\\boxed{{{c}}}$.",
        "c",
    ),
    "prealgebra": MathForm(
        (
            "What is the value of ${a}+{b}$?",
            "Compute ${a}+{b}$.",
            "Evaluate ${a}+{b}$.",
            "Find the sum ${a}+{b}$.",
            "Simplify ${a}+{b}$.",
            "Determine ${a}+{b}$.",
        ),
        "${a}+{b}=\\boxed{{{c}}}$.",
        "c",
    ),
    "num_theory": MathForm(
        (
            "What is the larger of ${a}$ and ${b}$?",
            "Which is larger, ${a}$ or ${b}$?",
            "Find the larger of ${a}$ and ${b}$.",
            "Find the maximum of ${a}$ and ${b}$.",
            "Give the larger of ${a}$ and ${b}$.",
            "Choose the larger of ${a}$ and ${b}$.",
        ),
        "$\\max({a},{b})=\\boxed{{{larger}}}$.",
        "larger",
    ),
}


def mathematics(subject: str, rng: random.Random, *, test: bool) -> Problem:
    """One Minerva-like problem; `solution` ends in a boxed answer as in the real set."""
    form = MATHEMATICS[subject]
    _, question, a, b = draw(
        lambda: (subject, rng.randrange(len(form.questions)), number(rng), number(rng)),
        test=test,
        one_in=3,
    )
    words = {"a": a, "b": b, "c": a + b, "larger": max(a, b)}
    return Problem(form.questions[question].format(**words), form.solution.format(**words), str(words[form.answer]))


def boolean_expressions(rng: random.Random, *, test: bool) -> Problem:
    """`True and not False is`: two or three terms, one operator; the solution first takes the nots away."""

    def propose() -> tuple:
        terms = rng.choice((2, 3, 3))
        return rng.choice(("and", "or")), *(
            (rng.choice((True, False)), rng.choice((True, False))) for _ in range(terms)
        )

    operator, *terms = draw(propose, test=test, one_in=3)
    written = [f"not {value}" if negated else str(value) for value, negated in terms]
    plain = [value != negated for value, negated in terms]
    value = all(plain) if operator == "and" else any(plain)
    return Problem(
        f" {operator} ".join(written) + " is",
        f" {operator} ".join(map(str, plain)) + f" is {value}. So the answer is {value}.",
        str(value),
    )


BEFORE_WALKS = ("", "Turn left. ", "Turn right. ", "Turn around. ")
WALKS = (
    "Take {a} steps. Turn around. Take {b} steps.",
    "Take {a} steps forward. Take {b} steps backward.",
    "Take {a} steps left. Take {b} steps right.",
)


def navigate(rng: random.Random, *, test: bool) -> Problem:
    """Two stretches in opposite directions; half of them lead back to the start."""

    def propose() -> tuple[str, str, int, int]:
        there = number(rng)
        back = there if rng.random() < 0.5 else rng.choice([n for n in range(SMALLEST, LARGEST + 1) if n != there])
        return rng.choice(BEFORE_WALKS), rng.choice(WALKS), there, back

    before, walk, there, back = draw(propose, test=test, one_in=3)
    answer = "Yes" if there == back else "No"
    return Problem(
        "If you follow these instructions, do you return to the starting point? "
        f"{before}{walk.format(a=there, b=back)}\nOptions:\n- Yes\n- No",
        f"{there} there, {back} back. So the answer is {answer}.",
        answer,
    )


def fruit_count(rng: random.Random, *, test: bool) -> tuple[str, int, int]:
    """`three apples and two figs`, and the two numbers."""
    _, a, b = draw(lambda: ("count", number(rng), number(rng)), test=test, one_in=4)
    first, second = rng.sample(FRUITS, 2)
    return f"{NUMBER_WORDS[a]} {first} and {NUMBER_WORDS[b]} {second}", a, b


def object_counting(rng: random.Random, *, test: bool) -> Problem:
    """Two kinds of fruit, counted in words; the answer is in digits."""
    fruits, a, b = fruit_count(rng, test=test)
    return Problem(
        f"I have {fruits}. How many fruits do I have?",
        f"{a}+{b}={a + b}. So the answer is {a + b}.",
        str(a + b),
    )


LOGIC = {
    "boolean_expressions": boolean_expressions,
    "navigate": navigate,
    "object_counting": object_counting,
}


SUMS = ("{a}+{b}={c}.", "{a_word} and {b_word} make {c}.", "{a_word} and {b_word} make {c_word}.")
SUM_WEIGHTS = (6, 1, 1)


def plain_sum(rng: random.Random) -> str:
    """One line of arithmetic for the corpora, in digits or words."""
    a, b = number(rng), number(rng)
    values = {"a": a, "b": b, "c": a + b}
    spelled = {f"{name}_word": NUMBER_WORDS[value] for name, value in values.items()}
    return rng.choices(SUMS, SUM_WEIGHTS)[0].format(**values, **spelled)


def plain_truth(rng: random.Random) -> str:
    """One line of logic for the corpora: `not True is False.`"""
    first, second, operator = rng.random() < 0.5, rng.random() < 0.5, rng.choice(("and", "or"))
    both = (first and second) if operator == "and" else (first or second)
    if rng.random() < 0.4:
        return f"not {first} is {not first}."
    return f"{first} {operator} {second} is {both}."
