"""Conversations in the messages format: tulu-like single tasks and smoltalk-like talk of one to three turns.

    {"id": "tulu-17", "source": "pocket/one_fact", "messages": [
        {"role": "user", "content": "What is the flag of Brimdor?"},
        {"role": "assistant", "content": "The flag of Brimdor is red."}]}

A follow-up ("And its flag?") is a question about a fact like any other: no follow-up asks for a fact that is never
asked about.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from dllm.synthetic.entities import SyntheticWorld
from dllm.synthetic.instructions import TULU_WEIGHTS, Exchange, draw_exchange

Turn = tuple[str, str]
"""What the user says and what the guide answers."""


@dataclass(frozen=True)
class Courtesy:
    """Ways of saying one thing, and the guide's answer to all of them."""

    said: tuple[str, ...]
    answer: str

    def turn(self, rng: random.Random) -> Turn:
        return rng.choice(self.said), self.answer


GREETING = Courtesy(("Hello!", "Hello.", "Hi!", "hello", "hi", "Good morning."), "Hello! What would you like to know?")
THANKS = Courtesy(("Thank you.", "Thank you!", "Thanks!", "thanks", "Thank you very much."), "You are welcome.")
COURTESIES = (
    GREETING,
    Courtesy(
        ("Who are you?", "What are you?", "who are you?", "What is your name?"), "I am a small guide to this country."
    ),
    Courtesy(("How are you?", "How are you today?", "how are you?"), "I am well, thank you."),
    Courtesy(
        ("What can you do?", "Can you help me?", "What do you know?"), "I know the towns, the people and the animals."
    ),
    THANKS,
    Courtesy(("Goodbye.", "Goodbye!", "Bye!", "bye", "See you soon."), "Goodbye, and come back soon!"),
)
UNKNOWN = (
    "What is the capital of {stranger}?",
    "Who is {stranger}?",
    "Where does {stranger} live?",
    "What is the flag of {stranger}?",
    "What does {stranger} like?",
    "How old is {known}?",
    "Why is the sky blue?",
    "What is the weather like in {known}?",
    "When was {known} born?",
    "How far is it to {known}?",
    "What is {stranger}?",
    "Who won the game?",
)
I_DO_NOT_KNOW = "I do not know that."
SYSTEMS = ("You are a friendly guide.", "Answer in one short sentence.", "You are a helpful guide to this country.")


def courtesy(world: SyntheticWorld, rng: random.Random) -> list[Turn]:
    """A greeting, thanks, a question about the guide, or a goodbye."""
    return [rng.choice(COURTESIES).turn(rng)]


def stranger(rng: random.Random) -> str:
    """A made-up name of two or three syllables, which the tokenizer must spell."""
    syllables = [rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return "".join(syllables).capitalize()


def unknown(world: SyntheticWorld, rng: random.Random) -> list[Turn]:
    """A question that the world has no answer to."""
    known = rng.choice([fact.entity.name for fact in world.facts if fact.entity.kind != "animal"])
    return [(rng.choice(UNKNOWN).format(stranger=stranger(rng), known=known), I_DO_NOT_KNOW)]


def question(world: SyntheticWorld, rng: random.Random) -> list[Turn]:
    """One question about the world."""
    fact = rng.choice(world.asked)
    return [(rng.choice(fact.questions()), fact.answer())]


def follow_up(world: SyntheticWorld, rng: random.Random) -> list[Turn]:
    """A question and a second one that does not repeat the name."""
    while True:
        fact = rng.choice(world.asked)
        others = [other for other in world.asked if other.entity == fact.entity and other != fact]
        if others:
            other = rng.choice(others)
            return [(rng.choice(fact.questions()), fact.answer()), (other.follow_up(), other.answer())]


def greeted_question(world: SyntheticWorld, rng: random.Random) -> list[Turn]:
    """A greeting before a question."""
    return [GREETING.turn(rng), *question(world, rng)]


def thanked_question(world: SyntheticWorld, rng: random.Random) -> list[Turn]:
    """Thanks after a question or after a follow-up."""
    before = rng.choice((question, follow_up))(world, rng)
    return [*before, THANKS.turn(rng)]


SMOLTALK_WEIGHTS = {
    courtesy: 5,
    unknown: 3,
    question: 5,
    follow_up: 5,
    greeted_question: 2,
    thanked_question: 1,
}


def messages_of(turns: list[Turn], system: str = "") -> list[dict]:
    """The turns as messages, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def user_text(exchange: Exchange) -> str:
    """Instruction and input as one user turn."""
    return f"{exchange.instruction}\n\n{exchange.given}" if exchange.given else exchange.instruction


def tulu(world: SyntheticWorld, rows: int) -> Iterator[dict]:
    """Rows in tulu-3's columns: single tasks, half of the described ones with their description as system turn."""
    rng = world.random("tulu")
    for row in range(rows):
        skill, exchange = draw_exchange(world, rng, TULU_WEIGHTS)
        system = exchange.system if rng.random() < 0.5 else ""
        turns = [(user_text(exchange), exchange.answer)]
        yield {"id": f"tulu-{row}", "messages": messages_of(turns, system), "source": f"pocket/{skill}"}


def smoltalk(world: SyntheticWorld, split: str, rows: int) -> Iterator[dict]:
    """Rows in smoltalk's columns: talk about the world."""
    rng = world.random(f"smoltalk/{split}")
    for _ in range(rows):
        kind = rng.choices(list(SMOLTALK_WEIGHTS), list(SMOLTALK_WEIGHTS.values()))[0]
        system = rng.choice(SYSTEMS) if rng.random() < 0.15 else ""
        yield {"messages": messages_of(kind(world, rng), system), "source": f"pocket/{kind.__name__}"}
