"""Instructions and their answers, one small function per skill, and the Alpaca-like data made of them.

    {"instruction": "What is the flag of Brimdor?", "input": "", "output": "The flag of Brimdor is red.", "text": "..."}

Prompts of benchmark-like skills are exactly what lm-eval shows for the real task. Facts that are never asked about
(entities.py) appear only as statements ("Tell me about Brimdor."), and of scenes and numbers only the combinations
that are not held out.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dllm.synthetic.entities import RIVERS, Fact, SyntheticWorld
from dllm.synthetic.problems import (
    FRUITS,
    LARGEST,
    LOGIC,
    MATHEMATICS,
    NUMBER_WORDS,
    SMALLEST,
    mathematics,
    number,
    word_problem,
)
from dllm.synthetic.scenes import moment, story, twist

LETTERS = "ABCD"


@dataclass(frozen=True)
class Exchange:
    """One instruction with its answer; `given` is Alpaca's input column, `system` a system turn for chats."""

    instruction: str
    answer: str
    given: str = ""
    system: str = ""


def gsm8k_prompt(question: str) -> str:
    """What lm-eval's gsm8k shows."""
    return f"Question: {question}\nAnswer:"


def bbh_prompt(question: str) -> str:
    """What lm-eval's bbh tasks show."""
    return f"Q: {question}\nA: Let's think step by step."


def minerva_prompt(question: str) -> str:
    """What lm-eval's minerva_math tasks show."""
    return f"Problem:\n{question}\n\nSolution:"


def mmlu_prompt(question: str, choices: list[str]) -> str:
    """What lm-eval's mmlu tasks show."""
    return f"{question}\n{lettered(choices)}\nAnswer:"


def mmlu_description(subject: str) -> str:
    """The description lm-eval puts before mmlu questions; with a chat template it becomes the system turn."""
    return f"The following are multiple choice questions (with answers) about {subject}."


BBH_DESCRIPTIONS = {
    "boolean_expressions": "Evaluate the result of a random Boolean expression.",
    "navigate": (
        "Given a series of navigation instructions, determine whether one would end up back at the starting point."
    ),
    "object_counting": "Questions that involve enumerating objects and asking the model to count them.",
}


def lettered(choices: list[str]) -> str:
    """Four choices on four lines, after their letters."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))


def choices_for(fact: Fact, rng: random.Random) -> list[str]:
    """The value of the fact and three other values of its attribute, shuffled."""
    others = [value for value in fact.attribute.values if value != fact.value]
    choices = [fact.value, *rng.sample(others, 3)]
    rng.shuffle(choices)
    return choices


def one_fact(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """An open question about a fact that may be asked."""
    fact = rng.choice(world.asked)
    return Exchange(rng.choice(fact.questions()), fact.answer())


def tell(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A request for everything about an entity: all its facts, stated in their order."""
    facts = world.about(rng.choice(world.facts).entity.name)
    statements = " ".join(fact.answer() for fact in facts)
    return Exchange(rng.choice(TELL).format(name=_with_article(facts[0])), statements)


TELL = ("Tell me about {name}.", "What do you know about {name}?", "Say something about {name}.")


def _with_article(fact: Fact) -> str:
    return f"the {fact.entity.name}" if fact.entity.kind == "animal" else fact.entity.name


def letter_of_fact(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """An MMLU-like question about a fact that may be asked."""
    fact = rng.choice(world.asked)
    choices = choices_for(fact, rng)
    prompt = mmlu_prompt(rng.choice(fact.questions()), choices)
    system = mmlu_description(fact.attribute.subject)
    return Exchange(prompt, LETTERS[choices.index(fact.value)], system=system)


def letter_of_word(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """Which letter stands before a word: what a letter task needs beyond knowledge."""
    attribute = rng.choice(world.facts).attribute
    choices = rng.sample(attribute.values, 4)
    place = rng.randrange(4)
    if rng.random() < 0.9:
        return Exchange(f"Which letter stands before {choices[place]}?\n{lettered(choices)}\nAnswer:", LETTERS[place])
    return Exchange(f"Which word stands after {LETTERS[place]}?\n{lettered(choices)}\nAnswer:", choices[place])


def story_sum(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A GSM8K-like word problem."""
    problem = word_problem(rng, test=False)
    return Exchange(gsm8k_prompt(problem.question), problem.solution)


def boxed_answer(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A Minerva-like problem with the final sentence its metric reads."""
    problem = mathematics(rng.choice(list(MATHEMATICS)), rng, test=False)
    final = f"Final Answer: The final answer is ${problem.answer}$. I hope it is correct."
    return Exchange(minerva_prompt(problem.question), f"{problem.solution}\n{final}")


def logic(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A BBH-like question."""
    task = rng.choice(list(LOGIC))
    problem = LOGIC[task](rng, test=False)
    return Exchange(bbh_prompt(problem.question), problem.solution, system=BBH_DESCRIPTIONS[task])


def last_word(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A story to be finished by one word."""
    opening, word = story(rng, test=False).rsplit(" ", 1)
    return Exchange(opening, word)


def next_step(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """An everyday sequence to be continued by its next step."""
    scene = moment(rng, test=False)
    return Exchange(scene.context, scene.following)


def because(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A schema sentence to be finished."""
    sentence = twist(rng, test=False)
    return Exchange(sentence.opening, sentence.ending)


def plain_sum(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A sum in a plain question."""
    a, b = number(rng), number(rng)
    return Exchange(rng.choice(ASK_SUM).format(a=a, b=b), f"{a}+{b}={a + b}.")


ASK_SUM = ("How much is {a} + {b}?", "Add {a} and {b}.", "What do {a} and {b} make?", "What is {a}+{b}?")


def edit(world: SyntheticWorld, rng: random.Random) -> Exchange:
    """A small task on given words: Alpaca's input column at work."""
    words = rng.sample(FRUITS + RIVERS, 3)
    value = rng.randrange(len(NUMBER_WORDS))
    given = " ".join(words)
    return rng.choice(
        (
            Exchange("Repeat the words.", given, given),
            Exchange("Write the words in reverse order.", " ".join(reversed(words)), given),
            Exchange("What is the first word?", words[0], given),
            Exchange("What is the last word?", words[-1], given),
            Exchange("Write the number as a word.", NUMBER_WORDS[value], str(value)),
            Exchange("Write the number in digits.", str(value), NUMBER_WORDS[value]),
        )
    )


Skill = Callable[[SyntheticWorld, random.Random], Exchange]
SKILLS: dict[Skill, tuple[int, int]] = {
    one_fact: (5, 6),
    tell: (2, 3),
    letter_of_fact: (1, 3),
    letter_of_word: (1, 2),
    story_sum: (2, 7),
    boxed_answer: (2, 6),
    logic: (2, 9),
    last_word: (2, 8),
    next_step: (2, 3),
    because: (2, 9),
    plain_sum: (1, 5),
    edit: (2, 2),
}
"""Each skill with its weights in the Alpaca-like and in the tulu-like data."""
ALPACA_WEIGHTS, TULU_WEIGHTS = ({skill: pair[data] for skill, pair in SKILLS.items()} for data in (0, 1))


def draw_exchange(world: SyntheticWorld, rng: random.Random, weights: dict[Skill, int]) -> tuple[str, Exchange]:
    """The name of a skill drawn by weight, and one exchange of it."""
    skill = rng.choices(list(weights), list(weights.values()))[0]
    return skill.__name__, skill(world, rng)


def alpaca(world: SyntheticWorld, rows: int) -> Iterator[dict]:
    """Rows in Alpaca's four columns."""
    rng = world.random("alpaca")
    for _ in range(rows):
        _, exchange = draw_exchange(world, rng, ALPACA_WEIGHTS)
        given = f"\nInput: {exchange.given}" if exchange.given else ""
        yield {
            "instruction": exchange.instruction,
            "input": exchange.given,
            "output": exchange.answer,
            "text": f"Instruction: {exchange.instruction}{given}\nResponse: {exchange.answer}",
        }


def sums(world: SyntheticWorld, split: str, rows: int) -> Iterator[dict]:
    """Sums with short answers that can be checked; those of the test split are held out of all data."""
    rng = world.random(f"sums/{split}")
    for _ in range(rows):
        problem = mathematics("prealgebra", rng, test=split == "test")
        written = problem.solution.partition("=")[0].strip("$")
        yield {"prompt": problem.question, "response": f"{written}={problem.answer}."}


def sum_pairs(world: SyntheticWorld, split: str, rows: int) -> Iterator[dict]:
    """Sums with a right and a wrong answer, which differ in the number alone; test sums are held out of all data."""
    rng = world.random(f"sum_pairs/{split}")
    for row in sums(world, split, rows):
        written, right = row["response"].rstrip(".").split("=")
        wrong = rng.choice([number for number in range(2 * SMALLEST, 2 * LARGEST + 1) if str(number) != right])
        yield {"prompt": row["prompt"], "chosen": row["response"], "rejected": f"{written}={wrong}."}
