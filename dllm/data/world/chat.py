"""Conversations in the messages format: tulu-like single tasks and smoltalk-like talk of one to three turns.

    {"id": "tulu-17", "source": "pocket/one_fact", "messages": [
        {"role": "user", "content": "What is the flag of Brimdor?"},
        {"role": "assistant", "content": "The flag of Brimdor is red."}]}

A follow-up ("And its flag?") is a question about a fact like any other: no follow-up asks for a fact that is never
asked about.
"""

import random
from collections.abc import Iterator

from dllm.data.world.entities import World
from dllm.data.world.instructions import Exchange, draw_exchange

TULU_WEIGHTS = {
    "one_fact": 6,
    "tell": 3,
    "letter_of_fact": 7,
    "letter_of_word": 5,
    "story_sum": 7,
    "boxed_answer": 5,
    "logic": 7,
    "last_word": 7,
    "next_step": 3,
    "because": 5,
    "plain_sum": 3,
    "edit": 2,
}
SMALLTALK = (
    (("Hello!", "Hello.", "Hi!", "hello", "hi", "Good morning."), "Hello! What would you like to know?"),
    (("Who are you?", "What are you?", "who are you?", "What is your name?"), "I am a small guide to this country."),
    (("How are you?", "How are you today?", "how are you?"), "I am well, thank you."),
    (("What can you do?", "Can you help me?", "What do you know?"), "I know the towns, the people and the animals."),
    (("Thank you.", "Thank you!", "Thanks!", "thanks", "Thank you very much."), "You are welcome."),
    (("Goodbye.", "Goodbye!", "Bye!", "bye", "See you soon."), "Goodbye, and come back soon!"),
)
GREETINGS, THANKS = SMALLTALK[0], SMALLTALK[4]
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

Turns = list[tuple[str, str]]


def smalltalk(world: World, rng: random.Random) -> Turns:
    """A greeting, thanks, a question about the guide, or a goodbye."""
    asked, answer = rng.choice(SMALLTALK)
    return [(rng.choice(asked), answer)]


def unknown(world: World, rng: random.Random) -> Turns:
    """A question that the world has no answer to; strangers have made-up names, which the tokenizer must spell."""
    stranger = "".join(
        rng.choice("BDFGKLMNPRST") + rng.choice("aeiou") if i == 0 else rng.choice("bdfgklmnprst") + rng.choice("aeiou")
        for i in range(rng.randint(2, 3))
    )
    known = rng.choice([fact.entity.name for fact in world.facts if fact.entity.kind != "animal"])
    return [(rng.choice(UNKNOWN).format(stranger=stranger, known=known), I_DO_NOT_KNOW)]


def question(world: World, rng: random.Random) -> Turns:
    """One question about the world."""
    fact = rng.choice(world.asked)
    return [(rng.choice(fact.questions()), fact.answer())]


def follow_up(world: World, rng: random.Random) -> Turns:
    """A question and a second one that does not repeat the name."""
    while True:
        fact = rng.choice(world.asked)
        others = [other for other in world.asked if other.entity == fact.entity and other != fact]
        if others:
            other = rng.choice(others)
            return [*[(rng.choice(fact.questions()), fact.answer())], (other.follow_up(), other.answer())]


def greeted_question(world: World, rng: random.Random) -> Turns:
    """A greeting before a question."""
    return [(rng.choice(GREETINGS[0]), GREETINGS[1]), *question(world, rng)]


def thanked_question(world: World, rng: random.Random) -> Turns:
    """Thanks after a question or after a follow-up."""
    before = rng.choice((question, follow_up))(world, rng)
    return [*before, (rng.choice(THANKS[0]), THANKS[1])]


SMOLTALK_WEIGHTS = {
    smalltalk: 5,
    unknown: 3,
    question: 5,
    follow_up: 5,
    greeted_question: 2,
    thanked_question: 1,
}


def messages_of(turns: Turns, system: str = "") -> list[dict]:
    """The turns as messages, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def user_text(exchange: Exchange) -> str:
    """Instruction and input as one user turn."""
    return f"{exchange.instruction}\n\n{exchange.given}" if exchange.given else exchange.instruction


def tulu(world: World, rows: int) -> Iterator[dict]:
    """Rows in tulu-3's columns: single tasks, half of the described ones with their description as system turn."""
    rng = world.random("tulu")
    for row in range(rows):
        skill, exchange = draw_exchange(world, rng, TULU_WEIGHTS)
        system = exchange.system if rng.random() < 0.5 else ""
        turns = [(user_text(exchange), exchange.answer)]
        yield {"id": f"tulu-{row}", "messages": messages_of(turns, system), "source": f"pocket/{skill}"}


def smoltalk(world: World, split: str, rows: int) -> Iterator[dict]:
    """Rows in smoltalk's columns: talk about the world."""
    rng = world.random(f"smoltalk/{split}")
    for _ in range(rows):
        kind = rng.choices(list(SMOLTALK_WEIGHTS), list(SMOLTALK_WEIGHTS.values()))[0]
        system = rng.choice(SYSTEMS) if rng.random() < 0.15 else ""
        yield {"messages": messages_of(kind(world, rng), system), "source": f"pocket/{kind.__name__}"}
