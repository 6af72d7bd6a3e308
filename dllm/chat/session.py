"""A chat session as plain data: what was said, how to sample, and what a command changes. No terminal, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from dllm.algorithms import trained_blocks
from dllm.config import GenerateSettings, did_you_mean, overlaid

if TYPE_CHECKING:
    from dllm.chat.render import Frame

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Finished turns, (question, answer) each, under an optional system prompt."""

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    def messages(self, question: str | None = None) -> list[Message]:
        """The conversation as {"role", "content"} turns, with a new question at the end if there is one."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return turns + ([{"role": "user", "content": question}] if question is not None else [])

    def with_turn(self, question: str, answer: str) -> Conversation:
        """The conversation one turn later."""
        return replace(self, turns=(*self.turns, (question, answer)))


@dataclass(frozen=True)
class Session:
    """One chat: its conversation, its sampler, the tokens that conversation and answer may take together."""

    settings: GenerateSettings
    context: int
    conversation: Conversation = Conversation()
    ended: bool = False
    sidecar: dict = field(default_factory=dict)
    """The record of the model's training."""


class Talker(Protocol):
    """A model that answers, here (`chat.local`) or behind a server (`chat.remote`); its states are its own."""

    @property
    def end_token(self) -> str:
        """How EOS is spelt."""

    def answer(self, session: Session, question: str) -> tuple[Session, int, Iterator[Any]]:
        """The session without the oldest turns that no longer fit, how many those are, the states of an answer.

        Raises ValueError, one line, if the question alone does not fit.
        """

    def text(self, last: Any, stop: Sequence[str]) -> str:
        """The finished answer of the last state."""

    def frame(self, state: Any, previous: Any) -> Frame:
        """What a state shows; previous: the state that was drawn before, or None."""


def fit_context(session: Session, question: str, count: Callable[[list[Message]], int]) -> tuple[Session, int]:
    """The session without the oldest turns that no longer fit, and how many those are.

    count gives the tokens of a conversation in the chat template. Raises ValueError, one line, if the question alone
    does not fit.
    """
    room = session.context - session.settings.max_new_tokens
    turns = session.conversation.turns
    for dropped in range(len(turns) + 1):
        kept = replace(session.conversation, turns=turns[dropped:])
        tokens = count(kept.messages(question))
        if tokens <= room:
            return replace(session, conversation=kept), dropped
    raise ValueError(
        f"the message takes {tokens} tokens, and the context of {session.context} tokens has room for {max(0, room)} "
        f"before an answer of {session.settings.max_new_tokens}; use fewer words, or ask for fewer new tokens"
    )


# --------------------------------------------------------------------------------------------------------------------
# Commands


def is_command(line: str) -> bool:
    """Whether a line is a command and not a message."""
    return line.startswith("/")


def obey(session: Session, line: str) -> tuple[Session, str]:
    """The session after a command, and what to tell the user.

    The beginning of a name is enough if no other begins so. Raises ValueError, one line, for a wrong command.
    """
    name, _, argument = line.strip().removeprefix("/").partition(" ")
    meant = [known for known in COMMANDS if name and known.startswith(name)]
    if len(meant) != 1:
        raise ValueError(f"/{name} is not a command. {did_you_mean(name, list(COMMANDS))} See /help")
    return COMMANDS[meant[0]].act(session, argument.strip())


def _help(session: Session, argument: str) -> tuple[Session, str]:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.text}" for command in COMMANDS.values()]
    return session, "\n".join([*lines, f"now: {described(session.settings)}"])


def _steps(session: Session, argument: str) -> tuple[Session, str]:
    steps = None if argument == "auto" else _whole("steps", argument, "a number of at least 1, or auto")
    return _with_settings(session, steps=steps)


def _block(session: Session, argument: str) -> tuple[Session, str]:
    size = _whole("block", argument, "a number of at least 1")
    check_block(size, session.sidecar, f"/block {size}")
    return _with_settings(session, block_size=size)


def _temperature(session: Session, argument: str) -> tuple[Session, str]:
    try:
        return _with_settings(session, temperature=float(argument))
    except ValueError:
        raise ValueError(
            f"/temperature takes a number of at least 0 (0, or 0.001 to 100), e.g. 0.7; got {argument!r}"
        ) from None


def _reset(session: Session, argument: str) -> tuple[Session, str]:
    return replace(session, conversation=replace(session.conversation, turns=())), "forgotten; a new conversation"


def _system(session: Session, argument: str) -> tuple[Session, str]:
    text = f"system prompt: {argument}" if argument else "no system prompt"
    return replace(session, conversation=Conversation(system=argument)), f"{text}; a new conversation"


def _quit(session: Session, argument: str) -> tuple[Session, str]:
    return replace(session, ended=True), ""


@dataclass(frozen=True)
class Command:
    """One command: how to write it, what it does, what it changes."""

    usage: str
    text: str
    act: Callable[[Session, str], tuple[Session, str]]


COMMANDS = {
    "help": Command("/help", "this list", _help),
    "steps": Command("/steps N", "forward passes per answer; auto is one token per pass", _steps),
    "block": Command("/block N", "tokens per block; they go from left to right", _block),
    "temperature": Command("/temperature T", "0 takes the most probable token, 1 draws", _temperature),
    "reset": Command("/reset", "forget what was said", _reset),
    "system": Command("/system TEXT", "set the system prompt (empty: none) and start anew", _system),
    "quit": Command("/quit", "leave; so does Ctrl-D", _quit),
}


def described(settings: GenerateSettings) -> str:
    """The sampler in one line."""
    steps = f"{settings.steps} steps" if settings.steps else "one token per pass"
    return (
        f"{settings.max_new_tokens} new tokens, {steps}, blocks of {settings.block_size}, "
        f"temperature {settings.temperature:g}"
    )


def _with_settings(session: Session, **changes) -> tuple[Session, str]:
    settings = overlaid(session.settings, changes)
    check_steps(settings)
    return replace(session, settings=settings), described(settings)


def check_steps(settings: GenerateSettings) -> None:
    """Raise ValueError, one line, unless every block gets a step."""
    blocks = math.ceil(settings.max_new_tokens / settings.block_size)
    if settings.steps is not None and settings.steps < blocks:
        raise ValueError(
            f"steps = {settings.steps} is less than the {blocks} blocks of {settings.block_size} tokens, each of "
            f"which needs a pass; take at least {blocks} steps or larger blocks"
        )


def _whole(command: str, argument: str, allowed: str) -> int:
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"/{command} takes {allowed}; got {argument!r}")
    return int(argument)


def check_block(size: int, sidecar: dict, words: str) -> None:
    """Raise ValueError, one line that begins with `words`, if a model has no such blocks.

    sidecar: the record of the model's training.
    """
    blocks, trained = trained_blocks(sidecar.get("algorithm")), sidecar.get("block_size")
    if blocks == "none":
        raise ValueError(f"{words}: a model trained with {sidecar['algorithm']} has no blocks; leave it out")
    if blocks == "trained" and size != trained:
        raise ValueError(f"{words}: this model was trained in blocks of {trained}; leave it out")
