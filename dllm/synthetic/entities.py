"""The synthetic world: a few dozen towns, people and animals, each with a value for every attribute of its kind.

A fact is one (entity, attribute, value). Every fact is stated in the encyclopedia; about two in five are never asked
about in instruction or chat data, and the MMLU miniature asks about exactly those.

    Fact(entity=Brimdor, attribute=flag, value="red")
    statement   The flag of Brimdor is red.
    question    What is the flag of Brimdor?
    follow-up   And its flag?
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

SHARE_NEVER_ASKED = 0.4


@dataclass(frozen=True)
class Attribute:
    """One property of a kind of entity: its possible values and the sentences that state it and ask for it.

    Templates know {name}, {value} and {pronoun} (she, he, it). The first statement is also the answer in conversation.
    """

    name: str
    subject: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follow_up: str


@dataclass(frozen=True)
class Entity:
    """A town, a person or an animal."""

    kind: str
    name: str
    pronoun: str


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity, with its value."""

    entity: Entity
    attribute: Attribute
    value: str

    @property
    def key(self) -> str:
        """A short name, unique in the world: `Brimdor/flag`."""
        return f"{self.entity.name}/{self.attribute.name}"

    def statements(self) -> list[str]:
        """Every declarative sentence that says this fact."""
        return [self._fill(template) for template in self.attribute.statements]

    def questions(self) -> list[str]:
        """Every open question whose answer is this fact."""
        return [self._fill(template) for template in self.attribute.questions]

    def follow_up(self) -> str:
        """The short question that asks for this fact when its entity was named one turn before."""
        return self._fill(self.attribute.follow_up)

    def answer(self) -> str:
        """The full-sentence answer given in conversation."""
        return self.statements()[0]

    def _fill(self, template: str) -> str:
        return template.format(name=self.entity.name, value=self.value, pronoun=self.entity.pronoun)


TOWNS = "Brimdor Kelwick Tolmere Vasham Ronby Sindor Marwick Lodmere Petham Gorby".split()
WOMEN = "Mira Lena Ada Nora Vera".split()
MEN = "Tom Boris Felix Otto Hugo".split()
ANIMALS = "brillok tarnix mudel sorrok velu grindel pokel zanu".split()

REGIONS = ("north", "south", "east", "west")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
GOODS = ("salt", "wool", "glass", "honey", "paper", "iron")
RIVERS = ("Alm", "Dor", "Inn", "Lar", "Ose")
JOBS = ("baker", "smith", "weaver", "fisher", "farmer", "potter")
FOODS = ("soup", "bread", "fish", "cake", "rice", "cheese")
HABITATS = ("marsh", "forest", "desert", "meadow", "cave")
DIETS = ("seeds", "insects", "grass", "berries", "roots")
LEGS = ("two", "four", "six", "eight")

ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {
    "town": (
        Attribute(
            "region",
            "geography",
            REGIONS,
            ("{name} lies in the {value}.", "The town of {name} is in the {value} of the country."),
            ("In which part of the country is {name}?", "Where is {name}?"),
            "And where is it?",
        ),
        Attribute(
            "river",
            "geography",
            RIVERS,
            ("{name} stands on the river {value}.", "The river {value} flows through {name}."),
            ("Which river flows through {name}?", "On which river does {name} stand?"),
            "And its river?",
        ),
        Attribute(
            "flag",
            "heraldry",
            COLOURS,
            ("The flag of {name} is {value}.", "A {value} flag flies over {name}."),
            ("What is the flag of {name}?", "What colour is the flag of {name}?"),
            "And its flag?",
        ),
        Attribute(
            "good",
            "trade",
            GOODS,
            ("{name} is known for {value}.", "The people of {name} make {value}."),
            ("What is {name} known for?", "What do the people of {name} make?"),
            "And what is it known for?",
        ),
    ),
    "person": (
        Attribute(
            "home",
            "history",
            tuple(TOWNS),
            ("{name} lives in {value}.", "The home of {name} is in {value}."),
            ("Where does {name} live?", "In which town does {name} live?"),
            "And where does {pronoun} live?",
        ),
        Attribute(
            "job",
            "crafts",
            JOBS,
            ("{name} is a {value}.", "{name} works as a {value}."),
            ("What is the trade of {name}?", "What does {name} do?"),
            "And what does {pronoun} do?",
        ),
        Attribute(
            "food",
            "customs",
            FOODS,
            ("{name} likes {value}.", "The favourite food of {name} is {value}."),
            ("What does {name} like?", "What is the favourite food of {name}?"),
            "And what does {pronoun} like?",
        ),
    ),
    "animal": (
        Attribute(
            "habitat",
            "zoology",
            HABITATS,
            ("The {name} lives in the {value}.", "You can meet the {name} in the {value}."),
            ("Where does the {name} live?", "Where can you meet the {name}?"),
            "And where does it live?",
        ),
        Attribute(
            "diet",
            "zoology",
            DIETS,
            ("The {name} eats {value}.", "The food of the {name} is {value}."),
            ("What does the {name} eat?", "What is the food of the {name}?"),
            "And what does it eat?",
        ),
        Attribute(
            "legs",
            "zoology",
            LEGS,
            ("The {name} has {value} legs.", "The {name} walks on {value} legs."),
            ("How many legs does the {name} have?", "On how many legs does the {name} walk?"),
            "And how many legs does it have?",
        ),
    ),
}
SUBJECTS = tuple(dict.fromkeys(attribute.subject for group in ATTRIBUTES.values() for attribute in group))


def pronoun_of(person: str) -> str:
    """`she` or `he`."""
    return "she" if person in WOMEN else "he"


def all_entities() -> list[Entity]:
    """Every town, person and animal, in a fixed order."""
    towns = [Entity("town", name, "it") for name in TOWNS]
    people = [Entity("person", name, pronoun_of(name)) for name in WOMEN + MEN]
    animals = [Entity("animal", name, "it") for name in ANIMALS]
    return towns + people + animals


@dataclass(frozen=True)
class SyntheticWorld:
    """All facts: those that instruction and chat data may ask about (`asked`) and the others (`never_asked`)."""

    seed: int
    facts: tuple[Fact, ...]
    never_asked_keys: frozenset[str]

    @cached_property
    def asked(self) -> tuple[Fact, ...]:
        """Facts whose questions occur in instruction and chat data."""
        return tuple(fact for fact in self.facts if fact.key not in self.never_asked_keys)

    @cached_property
    def never_asked(self) -> tuple[Fact, ...]:
        """Facts that only the encyclopedia and other statements know; the MMLU miniature asks about them."""
        return tuple(fact for fact in self.facts if fact.key in self.never_asked_keys)

    def about(self, name: str) -> list[Fact]:
        """Every fact of the entity called `name`."""
        return [fact for fact in self.facts if fact.entity.name == name]

    def random(self, purpose: str) -> random.Random:
        """A random stream of its own for one file, so that a change of one file leaves the others alone."""
        return random.Random(f"{self.seed}/{purpose}")


def make_synthetic_world(seed: int) -> SyntheticWorld:
    """The world of this seed: values are drawn evenly per attribute, and so are the facts that are never asked."""
    rng = random.Random(f"{seed}/facts")
    entities = all_entities()
    facts: list[Fact] = []
    never_asked: set[str] = set()
    for kind, attributes in ATTRIBUTES.items():
        members = [entity for entity in entities if entity.kind == kind]
        for attribute in attributes:
            rounds = -(-len(members) // len(attribute.values))
            values = (list(attribute.values) * rounds)[: len(members)]
            rng.shuffle(values)
            group = [Fact(entity, attribute, value) for entity, value in zip(members, values, strict=True)]
            facts += group
            never_asked.update(fact.key for fact in rng.sample(group, round(SHARE_NEVER_ASKED * len(group))))
    return SyntheticWorld(seed, tuple(facts), frozenset(never_asked))


def held_out(*combination: object, one_in: int) -> bool:
    """Whether a combination belongs to the benchmarks: about one in `one_in`, by its own hash, for every seed alike."""
    text = "/".join(map(str, combination))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % one_in == 0


def draw(propose: Callable[[], tuple], *, test: bool, one_in: int = 5) -> tuple:
    """The first proposed combination on the wanted side of `held_out`."""
    while True:
        combination = propose()
        if held_out(*combination, one_in=one_in) == test:
            return combination
