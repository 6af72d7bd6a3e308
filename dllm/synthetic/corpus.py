"""The two pretraining corpora: an encyclopedia (Wikitext-like, one line per row) and web pages (one document per row).

wikitext      {"text": " = Brimdor = \\n"}
              {"text": ""}
              {"text": "Brimdor lies in the north. The flag of Brimdor is red. The people of Brimdor make wool. \\n"}
openwebtext   {"text": "Making tea: Mira fills the kettle. She boils the water. She warms the cup."}
"""

import random
from collections.abc import Callable, Iterator

from dllm.synthetic.entities import SyntheticWorld
from dllm.synthetic.instructions import letter_of_word
from dllm.synthetic.problems import fruit_count, plain_sum, plain_truth
from dllm.synthetic.scenes import PEOPLE, story, twist, whole_activity

SENTENCES_PER_LINE = 3
SHARE_OF_SUM_ARTICLES = 0.2


def entity_article(world: SyntheticWorld, rng: random.Random) -> list[str]:
    """The lines of one article: title, empty line, two paragraphs of facts in random order and wording."""
    facts = world.about(rng.choice(world.facts).entity.name)
    rng.shuffle(facts)
    name = facts[0].entity.name
    sentences = [rng.choice(fact.statements()) for fact in facts]
    return article(name[0].upper() + name[1:], sentences)


def article(title: str, sentences: list[str]) -> list[str]:
    """Title, empty line and paragraphs, as Wikitext's rows show them."""
    paragraphs = [
        " ".join(sentences[start : start + SENTENCES_PER_LINE]) + " \n"
        for start in range(0, len(sentences), SENTENCES_PER_LINE)
    ]
    return [f" = {title} = \n", "", *paragraphs]


def wikitext(world: SyntheticWorld, split: str, articles: int) -> Iterator[dict]:
    """Rows of the encyclopedia; every line makes sense alone, since rows may be shuffled or packed."""
    rng = world.random(f"wikitext/{split}")
    for _ in range(articles):
        of_sums = rng.random() < SHARE_OF_SUM_ARTICLES
        sums = article("Sums", [plain_sum(rng) for _ in range(SENTENCES_PER_LINE)]) if of_sums else None
        for line in sums or entity_article(world, rng):
            yield {"text": line}


def journey(world: SyntheticWorld, rng: random.Random) -> str:
    """A web page about one entity, in the words of a traveller."""
    facts = world.about(rng.choice(world.facts).entity.name)
    told = [rng.choice(fact.statements()) for fact in rng.sample(facts, 2)]
    return f"{rng.choice(OPENINGS).format(person=rng.choice(PEOPLE))} {' '.join(told)}"


OPENINGS = ("Welcome!", "A letter from {person}.", "Did you know?", "{person} writes:", "News of the day.")


def market(rng: random.Random) -> str:
    """A count of fruit."""
    fruits, a, b = fruit_count(rng, test=False)
    return f"{fruits} are {a + b} fruits: {a}+{b}={a + b}."


def explanation(rng: random.Random) -> str:
    """A schema sentence with its gap filled."""
    sentence = twist(rng, test=False)
    return f"{sentence.opening} {sentence.ending}"


def lettered_list(world: SyntheticWorld, rng: random.Random) -> str:
    """A list with letters, and a question about one of them with its answer."""
    asked = letter_of_word(world, rng)
    return f"{asked.instruction} {asked.answer}"


def several(line: Callable[[random.Random], str], rng: random.Random) -> str:
    """A few lines of a kind."""
    return " ".join(line(rng) for _ in range(SENTENCES_PER_LINE))


PAGES: tuple[tuple[int, Callable[[SyntheticWorld, random.Random], str]], ...] = (
    (5, lambda world, rng: story(rng, test=False) + "."),
    (3, lambda world, rng: whole_activity(rng)),
    (5, lambda world, rng: explanation(rng)),
    (6, lambda world, rng: several(plain_sum, rng)),
    (2, lambda world, rng: several(plain_truth, rng)),
    (2, lettered_list),
    (1, lambda world, rng: market(rng)),
    (4, journey),
)
"""Kinds of web pages: how often each is drawn, and what it says."""


def openwebtext(world: SyntheticWorld, split: str, documents: int) -> Iterator[dict]:
    """Rows of web pages: stories, everyday sequences, schemas, sums and pages about the world."""
    rng = world.random(f"openwebtext/{split}")
    for _ in range(documents):
        page = rng.choices([page for _, page in PAGES], [weight for weight, _ in PAGES])[0]
        yield {"text": page(world, rng)}
