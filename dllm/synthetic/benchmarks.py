"""Nine miniature benchmarks in the columns of the real sets; the real lm-eval task definitions read them.

    lambada       {"text": "Mira met Otto in the barn. ... They went to the attic and there stood the lantern"}
    gsm8k         {"question": "Mira has 3 stones. ...", "answer": "Mira has <<3+4=7>>7 stones.\\n#### 7"}
    bbh           {"input": "True and not False is", "target": "True"}
    minerva_math  {"problem": "Solve $x+3=7$ for $x$.", "solution": "...", "level": "Level 1", "type": "algebra"}
    mmlu          {"question": "What is the flag of Kelwick?", "subject": "heraldry", "choices": [...], "answer": 2}
    hellaswag     {"activity_label": "Making tea", "ctx_a": "Mira fills the kettle.", "ctx_b": "she", "endings": ...}
    winogrande    {"sentence": "Mira thanked Otto because _ gave a gift.", "option1": "Mira", "option2": "Otto", ...}
    ceval, cmmlu  {"question": "...", "A": "...", "B": "...", "C": "...", "D": "...", "answer": "B"}

C-Eval and CMMLU are in Chinese, which the training data does not have: negative controls, where chance is the honest
result. Test rows use held-out combinations only; a benchmark's rows are distinct; where one picks among
given answers, each place is right equally often.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from dllm.synthetic.entities import SUBJECTS, Fact, SyntheticWorld
from dllm.synthetic.instructions import LETTERS, choices_for
from dllm.synthetic.problems import LOGIC, MATHEMATICS, mathematics, word_problem
from dllm.synthetic.scenes import moment, story, twist

Rows = list[dict]

TEST_ROWS = 120
TEST_ROWS_PER_PART = 40
CHINESE_ROWS = 20
SHOT_ROWS = 5


def distinct(make: Callable[[], dict], rows: int, right: str | None = None, answers: int = 1) -> Rows:
    """`rows` different rows from a source of random ones; ValueError if the source runs dry.

    right: the column of the right answer. Each of its `answers` values is right equally often, so that a model which
    always says A is at chance.
    """
    by_text: dict[str, dict] = {}
    times: Counter = Counter()
    for _ in range(400 * rows):
        row = make()
        key, answer = repr(row), row[right] if right else None
        if key in by_text or times[answer] == rows // answers:
            continue
        by_text[key] = row
        times[answer] += 1
        if len(by_text) == rows:
            return list(by_text.values())
    raise ValueError(f"only {len(by_text)} of {rows} benchmark rows exist: widen the world or ask for fewer rows")


Draw = Callable[[random.Random, bool], dict]
"""A random row, from the training side of the world or from the test side."""


def split_files(
    world: SyntheticWorld, name: str, splits: dict[str, int], draw: Draw, right: str | None = None, answers: int = 1
) -> Iterator[tuple[str, Rows]]:
    """The files of a benchmark, one for each split and its number of rows; a `train` split has the examples.

    right, answers: as in `distinct`, for the other splits.
    """
    for split, rows in splits.items():
        rng, test = world.random(f"{name}/{split}"), split != "train"
        balance = (right, answers) if test else ()
        yield f"{name}/{split}.jsonl", distinct(partial(draw, rng, test), rows, *balance)


SHOTS_AND_TEST = {"train": SHOT_ROWS, "test": TEST_ROWS}
SHOTS_AND_VALIDATION = {"train": SHOT_ROWS, "validation": TEST_ROWS}


def lambada(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Stories whose last word is the answer."""
    rng = world.random("lambada")
    yield "lambada/test.jsonl", distinct(lambda: {"text": story(rng, test=True)}, TEST_ROWS)


def gsm8k(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Word problems."""

    def draw(rng: random.Random, test: bool) -> dict:
        problem = word_problem(rng, test=test)
        return {"question": problem.question, "answer": problem.solution}

    return split_files(world, "gsm8k", SHOTS_AND_TEST, draw)


def bbh(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Three of the 27 tasks."""
    for task, problem_of in LOGIC.items():
        rng = world.random(f"bbh/{task}")

        def make(rng=rng, problem_of=problem_of) -> dict:
            problem = problem_of(rng, test=True)
            return {"input": problem.question, "target": problem.answer}

        balance = ("target", 2) if task in TWO_ANSWERS else ()
        yield f"bbh/{task}.jsonl", distinct(make, TEST_ROWS_PER_PART, *balance)


TWO_ANSWERS = ("boolean_expressions", "navigate")


def minerva_math(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Three of the seven subjects."""
    for subject in MATHEMATICS:

        def draw(rng: random.Random, test: bool, subject: str = subject) -> dict:
            problem = mathematics(subject, rng, test=test)
            return {"problem": problem.question, "solution": problem.solution, "level": "Level 1", "type": subject}

        yield from split_files(world, f"math/{subject}", {"train": SHOT_ROWS, "test": TEST_ROWS_PER_PART}, draw)


def mmlu(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Questions about the facts that are never asked about in training, four per fact: one for each right letter."""
    for subject in SUBJECTS:
        for split, facts in (("dev", world.asked), ("test", world.never_asked)):
            rng = world.random(f"mmlu/{subject}/{split}")
            group = [fact for fact in facts if fact.attribute.subject == subject]
            rows: Rows = []
            for fact in group:

                def make(fact=fact, rng=rng, subject=subject) -> dict:
                    choices = choices_for(fact, rng)
                    answer = choices.index(fact.value)
                    question = rng.choice(fact.questions())
                    return {"question": question, "subject": subject, "choices": choices, "answer": answer}

                if split == "dev":
                    rows.append(make())
                else:
                    rows += distinct(make, len(LETTERS), "answer", len(LETTERS))
            yield f"mmlu/{subject}/{split}.jsonl", rows[:SHOT_ROWS] if split == "dev" else rows


def hellaswag(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Everyday sequences with four endings; two wrong ones come from the same activity."""

    def draw(rng: random.Random, test: bool) -> dict:
        scene = moment(rng, test=test)
        endings = [scene.following, *scene.wrong]
        rng.shuffle(endings)
        before, pronoun = scene.context.removeprefix(f"{scene.activity}: ").rsplit(" ", 1)
        return {
            "ind": 0,
            "activity_label": scene.activity,
            "ctx_a": before,
            "ctx_b": pronoun.lower(),
            "ctx": f"{before} {pronoun.lower()}",
            "endings": endings,
            "source_id": "pocket",
            "split": "validation" if test else "train",
            "split_type": "indomain",
            "label": str(endings.index(scene.following)),
        }

    for path, rows in split_files(world, "hellaswag", SHOTS_AND_VALIDATION, draw, "label", 4):
        yield path, [row | {"ind": i} for i, row in enumerate(rows)]


def winogrande(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Sentences with a gap for one of two names."""

    def draw(rng: random.Random, test: bool) -> dict:
        gap = twist(rng, test=test)
        first, second = gap.options
        return {"sentence": gap.sentence, "option1": first, "option2": second, "answer": str(gap.answer + 1)}

    return split_files(world, "winogrande", SHOTS_AND_VALIDATION, draw, "answer", 2)


CHINESE = {
    "region": ("{name}在哪里？", dict(north="北", south="南", east="东", west="西")),
    "flag": ("{name}的旗是什么颜色？", dict(red="红", blue="蓝", green="绿", white="白", black="黑", yellow="黄")),
    "good": ("{name}出产什么？", dict(salt="盐", wool="羊毛", glass="玻璃", honey="蜜", paper="纸", iron="铁")),
    "habitat": ("{name}住在哪里？", dict(marsh="沼泽", forest="森林", desert="沙漠", meadow="草地", cave="洞穴")),
    "diet": ("{name}吃什么？", dict(seeds="种子", insects="虫", grass="草", berries="果", roots="根")),
    "food": ("{name}喜欢吃什么？", dict(soup="汤", bread="面包", fish="鱼", cake="糕", rice="米", cheese="奶酪")),
}


def chinese(world: SyntheticWorld, folder: str, splits: tuple[str, str], capital: bool) -> Iterator[tuple[str, Rows]]:
    """Letter questions in Chinese; the two real sets differ in their column names and splits."""
    question_column, answer_column = ("Question", "Answer") if capital else ("question", "answer")
    for name in CHINESE_SUBJECTS[folder]:
        template, words = CHINESE[name]
        for split, rows in zip(splits, (SHOT_ROWS, CHINESE_ROWS), strict=True):
            rng = world.random(f"{folder}/{name}/{split}")
            facts = [fact for fact in world.facts if fact.attribute.name == name]

            def make(rng=rng, facts=facts, template=template, words=words) -> dict:
                fact: Fact = rng.choice(facts)
                choices = choices_for(fact, rng)
                lines = {letter: words[choice] for letter, choice in zip(LETTERS, choices, strict=True)}
                answer = LETTERS[choices.index(fact.value)]
                return {question_column: template.format(name=fact.entity.name), **lines, answer_column: answer}

            balance = () if rows == SHOT_ROWS else (answer_column, len(LETTERS))
            yield f"{folder}/{name}/{split}.jsonl", distinct(make, rows, *balance)


CHINESE_SUBJECTS = {"ceval": ("region", "diet", "food"), "cmmlu": ("flag", "good", "habitat")}


def all_benchmarks(world: SyntheticWorld) -> Iterator[tuple[str, Rows]]:
    """Every benchmark file: its path below `benchmarks/` and its rows."""
    for benchmark in (lambada, gsm8k, bbh, minerva_math, mmlu, hellaswag, winogrande):
        yield from benchmark(world)
    yield from chinese(world, "ceval", ("dev", "val"), capital=False)
    yield from chinese(world, "cmmlu", ("dev", "test"), capital=True)
