"""Stories, everyday sequences and sentence schemas: the material of the LAMBADA, HellaSwag and Winogrande miniatures.

A story ends in a word that only its context decides:

    Mira met Otto in the barn. Otto had seen a lantern in the attic. They went to the attic and there stood the lantern

Combinations are held out: (two people, story), (person, activity), (two names, schema). No benchmark row occurs in
training.
"""

import random
from dataclasses import dataclass

from dllm.synthetic.entities import MEN, WOMEN, draw, held_out, pronoun_of

PEOPLE = tuple(WOMEN + MEN)
ROOMS = ("kitchen", "garden", "cellar", "barn", "attic", "hall")
THINGS = ("lantern", "basket", "hammer", "ladder", "kettle", "broom")

STORIES = (
    "{a} left the {thing} in the {room} and met {b}. {b} asked for the {thing}. {a} said that it was in the {room}",
    "{a} met {b} in the {room}. {b} had seen a {thing} in the {other}. "
    "They went to the {other} and there stood the {thing}",
    "{a} gave the {thing} to {b}. {b} took it to the {room}. Later {a} wanted the {thing} back and asked {b}",
    "There was one {thing} in the {room}. {a} took it and {b} found nothing. So the {thing} belongs to {a}",
)
ACTIVITIES = {
    "Baking bread": ("mixes flour and water", "kneads the dough", "waits an hour", "heats the oven", "bakes the loaf"),
    "Washing clothes": (
        "fills the tub",
        "rubs the shirts",
        "rinses the soap away",
        "hangs up the shirts",
        "folds them",
    ),
    "Catching fish": ("walks to the river", "takes a worm", "throws the line", "waits for a bite", "pulls out a fish"),
    "Lighting a fire": (
        "gathers dry sticks",
        "builds a ring",
        "strikes a match",
        "blows on the flame",
        "warms both hands",
    ),
    "Painting a fence": ("cleans the boards", "opens the pot", "dips the brush", "paints the boards", "lets them dry"),
    "Planting a tree": ("digs a hole", "sets the tree in", "fills in the earth", "waters the roots", "ties the stem"),
    "Writing a letter": ("takes a sheet", "dips the pen", "writes a line", "signs the page", "seals the letter"),
    "Making tea": ("fills the kettle", "boils the water", "warms the cup", "pours the tea", "drinks the tea"),
}


@dataclass(frozen=True)
class Schema:
    """A sentence with a gap `_` for one of two names, and how it goes on after the first and after the second.

    With people only the sentence tells who is meant; with objects the word helps too (a bag has room, an anvil weighs).
    """

    opening: str
    after_first: str
    after_second: str
    names: str


SCHEMAS = (
    Schema("The {a} does not fit into the {b} because the _", "is far too big.", "has no more room.", "objects"),
    Schema("The {a} broke the {b} because the _", "was very heavy.", "had thin walls.", "objects"),
    Schema("{a} thanked {b} because _", "got a fine gift.", "helped all day long.", "people"),
    Schema("{a} carried {b} because _", "was very strong.", "could not walk alone.", "people"),
    Schema("{a} taught {b} because _", "knew the letters well.", "wanted to read books.", "people"),
    Schema("{a} gave {b} a coat because _", "owned two coats.", "felt very cold.", "people"),
    Schema("{a} followed {b} because _", "was lost.", "knew the way home.", "people"),
)
BIG_OBJECTS = ("trunk", "piano", "statue", "barrel", "anvil", "drum")
SMALL_OBJECTS = ("cart", "chest", "crate", "drawer", "bag", "box")


def story(rng: random.Random, *, test: bool) -> str:
    """One story without its final full stop; its last word follows from the context."""
    template, first, second = draw(lambda: (rng.choice(STORIES), *rng.sample(PEOPLE, 2)), test=test)
    room, other = rng.sample(ROOMS, 2)
    return template.format(a=first, b=second, thing=rng.choice(THINGS), room=room, other=other)


@dataclass(frozen=True)
class Moment:
    """One step of an activity: what was done, what comes next, and endings that do not come next."""

    activity: str
    person: str
    done: str
    following: str
    wrong: tuple[str, ...]

    @property
    def context(self) -> str:
        """`Making tea: Mira fills the kettle. She`: the HellaSwag prompt, to be continued by `following`."""
        return f"{self.activity}: {self.person} {self.done}. {pronoun_of(self.person).capitalize()}"


def moment(rng: random.Random, *, test: bool) -> Moment:
    """A random step of a random activity; two of its three wrong endings come from the same activity.

    Training also leaves out every second transition; only the web pages have those.
    """
    while True:
        activity, person = draw(lambda: (rng.choice(list(ACTIVITIES)), rng.choice(PEOPLE)), test=test, one_in=4)
        steps = ACTIVITIES[activity]
        position = rng.randrange(len(steps) - 1)
        if test or not held_out("transition", activity, position, one_in=2):
            break
    same = [step for step in steps if step not in steps[position : position + 2]]
    elsewhere = [step for name, others in ACTIVITIES.items() if name != activity for step in others]
    wrong = [*rng.sample(same, 2), rng.choice(elsewhere)]
    endings = tuple(f"{step}." for step in wrong)
    return Moment(activity, person, steps[position], f"{steps[position + 1]}.", endings)


def whole_activity(rng: random.Random) -> str:
    """A whole sequence as one paragraph, from its first step or a later one to its end."""
    activity, person = draw(lambda: (rng.choice(list(ACTIVITIES)), rng.choice(PEOPLE)), test=False, one_in=4)
    steps = ACTIVITIES[activity]
    first = rng.randrange(len(steps) - 1)
    pronoun = pronoun_of(person).capitalize()
    sentences = [f"{person} {steps[first]}."] + [f"{pronoun} {step}." for step in steps[first + 1 :]]
    return f"{activity}: " + " ".join(sentences)


@dataclass(frozen=True)
class Twist:
    """A schema with its names filled in: `sentence` has a gap `_`, `options[answer]` belongs there."""

    sentence: str
    options: tuple[str, str]
    answer: int

    @property
    def opening(self) -> str:
        """The sentence up to and including the right name."""
        return self.sentence[: self.sentence.index("_")] + self.options[self.answer]

    @property
    def ending(self) -> str:
        """What follows the gap."""
        return self.sentence[self.sentence.index("_") + 1 :].strip()


def twist(rng: random.Random, *, test: bool) -> Twist:
    """One schema sentence; which option comes first is random."""

    def propose() -> tuple[int, str, str]:
        number = rng.randrange(len(SCHEMAS))
        if SCHEMAS[number].names == "people":
            first, second = rng.sample(PEOPLE, 2)
        else:
            first, second = rng.choice(BIG_OBJECTS), rng.choice(SMALL_OBJECTS)
        return number, first, second

    number, first, second = draw(propose, test=test)
    schema = SCHEMAS[number]
    meant = rng.randrange(2)
    ending = (schema.after_first, schema.after_second)[meant]
    sentence = schema.opening.format(a=first, b=second) + " " + ending
    if rng.random() < 0.5:
        return Twist(sentence, (first, second), meant)
    return Twist(sentence, (second, first), 1 - meant)
