"""`dllm chat`: talk to a model and watch it denoise."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.cli.generation import (
    add_chat_model_argument,
    add_device_argument,
    add_generation_arguments,
    open_model,
    with_options,
)
from dllm.cli.keys import add_key_argument, read_key
from dllm.cli.main import bug_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dllm.chat.session import Session, Talker

HELP = "talk to a model and watch it denoise"
EXAMPLES = """examples:
  dllm chat                                  the largest chat run below results/
  dllm chat chat-large --steps 16            a run by its name, with fewer steps
  dllm chat chat-large --reveal-rule factor  reveal all tokens that are sure enough, in fewer passes
  dllm chat results/laptop/runs/chat-large/model
  dllm chat chat-large --once "Hello!"       one answer, then leave
  dllm chat --server http://127.0.0.1:8000   a model of dllm serve
  printf 'Hello!\\nWho are you?\\n' | dllm chat

In the chat, /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.
Where output is not a terminal, only the finished turns are printed, one per line.
"""
FRAMES_PER_SECOND = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_chat_model_argument(parser, "model", "?")
    parser.add_argument("--once", metavar="TEXT", help="answer this and leave")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--server", metavar="URL", help="talk to a server (dllm serve); MODEL is one of its models")
    add_key_argument(parser, "of the server")
    add_device_argument(parser)
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the end of the input; 2 if a message could not be answered, 70 if that was a bug."""
    from rich.console import Console

    from dllm.chat.session import Conversation

    if args.server and args.device:
        raise ValueError(f"--device {args.device} is for a model of this process; leave it out, or --server")
    if args.api_key_file and not args.server:
        raise ValueError("--api-key-file is for --server; give both or neither")
    if args.once is not None and not args.once.strip():
        raise ValueError("--once is empty; give the message to answer, or leave it out to chat")
    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    talker, session, title = _remote(args) if args.server else _local(args, console, live)
    settings = with_options(session.settings, args, session.sidecar)
    session = replace(session, settings=settings, conversation=Conversation(system=args.system))
    show = Live(console, talker) if live else Plain()
    if args.once is not None:
        return Chat(talker, session, replace(show, bare=True)).once(args.once)
    if live:
        _greet(console, title, session)
    return Chat(talker, session, show).talk(_lines(live))


def _local(args: argparse.Namespace, console: Console, live: bool) -> tuple[Talker, Session, tuple[str, str]]:
    """A model of this process, its session, its name and a line about it."""
    from dllm.chat.local import Local
    from dllm.chat.session import Session
    from dllm.chat.settings import chat_context, chat_generation, find_checkpoint

    checkpoint = find_checkpoint(args.model)
    with _waiting(console, f"loading {checkpoint}", live):
        model = open_model(checkpoint, args.device)
    sidecar = model.backbone.sidecar
    context = chat_context(sidecar, model.max_length)
    name = sidecar.get("run") or Path(checkpoint).name
    size = _size(sum(p.numel() for p in model.backbone.model.parameters()))
    about = f"{size} parameters, context of {context} tokens, {model.backbone.device}"
    return Local(model), Session(chat_generation(sidecar, context), context, sidecar=sidecar), (name, about)


def _remote(args: argparse.Namespace) -> tuple[Talker, Session, tuple[str, str]]:
    """A model of a server, its session, its name and a line about it."""
    from dllm.chat.remote import plain, remote

    key = read_key(args.api_key_file).decode() if args.api_key_file else None
    talker = remote(args.server, key, args.model)
    facts, session = talker.card["dllm"], talker.session()
    about = f"{_size(facts['parameters'])} parameters, context of {session.context} tokens, {args.server}"
    return talker, session, (plain(talker.card["id"]), about)


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.0f} M" if parameters >= 1e7 else f"{parameters / 1e3:,.0f} k"


class Chat:
    """The loop: read a line, obey or answer it, say what went wrong."""

    def __init__(self, talker: Talker, session: Session, show: Live | Plain):
        self.talker, self.session, self.show = talker, session, show
        self.has_trimmed = False

    def once(self, text: str) -> int:
        """Answer one message. Raises ValueError, one line, if it does not fit."""
        self.answer(text)
        return 0

    def talk(self, lines: Iterator[str]) -> int:
        """Answer every line until the lines or the session end."""
        from dllm.chat.session import is_command, obey

        status = 0
        for line in lines:
            try:
                if is_command(line):
                    self.session, reply = obey(self.session, line)
                    self.show.note(reply)
                elif line:
                    self.show.question(line)
                    self.answer(line)
            except ValueError as error:
                status = 2
                self.show.error(" ".join(str(error).split()))
            except Exception as error:  # only this message fails: what was said before must not be lost
                status = 70
                self.show.error(bug_line(error))
                if os.environ.get("DLLM_DEBUG"):
                    self.show.note(traceback.format_exc())
            if self.session.ended:
                break
        return 0 if isinstance(self.show, Live) else status

    def answer(self, question: str) -> None:
        """Denoise an answer and keep the turn; an interrupted one is forgotten."""
        session, dropped, states = self.talker.answer(self.session, question)
        if dropped and not self.has_trimmed:
            self.has_trimmed = True
            self.show.note("the context is full: the oldest turns are forgotten from now on")
        try:
            last = self.show.answer(states)
        except KeyboardInterrupt:
            if self.show.bare:
                raise
            self.show.note("stopped; this turn is forgotten")
            return
        text = self.talker.text(last, session.settings.stop)
        self.show.finished(text)
        self.session = replace(session, conversation=session.conversation.with_turn(question, text))


@dataclass(frozen=True)
class Plain:
    """Finished turns only, one per line; for pipes and files."""

    bare: bool = False

    def question(self, text: str) -> None:
        """Show the question."""
        print(f"You: {text}", flush=True)

    def answer(self, states: Iterator[Any]) -> Any:
        """Show the states of an answer and return the last one."""
        for state in states:
            last = state
        return last

    def finished(self, text: str) -> None:
        """Show the finished answer."""
        print(text if self.bare else f"Bot: {' '.join(text.split())}", flush=True)

    def note(self, text: str) -> None:
        """Show a remark of the program."""
        if text:
            print(text, file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Show a mistake, one line."""
        print(f"dllm chat: error: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Live:
    """The canvas in place while it is denoised, then the answer in its colours."""

    console: Console
    talker: Talker
    bare: bool = False
    clock: Callable[[], float] = time.perf_counter

    def question(self, text: str) -> None:
        """Show the question."""
        if not sys.stdin.isatty():  # otherwise the terminal shows what was typed
            self.console.print(f"You: {text}", style="bold", markup=False)

    def answer(self, states: Iterator[Any]) -> Any:
        """Show the states of an answer and return the last one."""
        from rich.live import Live as Display

        begin, drawn, previous = self.clock(), -1.0, None
        with Display(console=self.console, auto_refresh=False, vertical_overflow="crop") as display:
            for state in states:
                now = self.clock()
                if now - drawn >= 1 / FRAMES_PER_SECOND:
                    display.update(self._frame(state, previous, now - begin), refresh=True)
                    drawn, previous = now, state
            display.vertical_overflow = "visible"
            display.update(self._frame(state, None, self.clock() - begin), refresh=True)
        return state

    def finished(self, text: str) -> None:
        """Show the finished answer."""
        if not text:
            self.console.print("(an empty answer)", style="dim")

    def note(self, text: str) -> None:
        """Show a remark of the program."""
        if text:
            self.console.print(text, style="dim", markup=False)

    def error(self, text: str) -> None:
        """Show a mistake, one line."""
        self.console.print(text, style="#d55e00", markup=False)

    def _frame(self, state: Any, previous: Any, seconds: float) -> Text:
        """What a state shows, and the status line."""
        from rich.text import Text

        from dllm.chat.render import canvas_text, status

        frame = self.talker.frame(state, previous)
        shown = list(frame.pieces)
        if shown:  # a word-level token brings the space before it, also at the start
            shown[0] = replace(shown[0], text=shown[0].text.lstrip())
        revealed = sum(piece.state != "masked" for piece in shown)
        text = Text("" if self.bare else "Bot: ", "bold")
        body = canvas_text(shown, self.talker.end_token)
        body.rstrip()
        return Text.assemble(text, body, "\n", status(frame.step, frame.passes, revealed, seconds))


def _greet(console: Console, title: tuple[str, str], session: Session) -> None:
    from dllm.chat.render import legend
    from dllm.chat.session import described

    name, about = title
    console.print(f"{name}", style="bold", markup=False, end="")
    console.print(f"  {about}", style="dim", markup=False)
    console.print(f"{described(session.settings)}; /help: commands", style="dim", markup=False)
    console.print(legend(colours=not console.no_color))


def _waiting(console: Console, text: str, live: bool):
    from contextlib import nullcontext

    return console.status(text) if live else nullcontext()


def _lines(live: bool) -> Iterator[str]:
    """What the user says, line by line, until the end of the input."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not text must not end the others
        yield from (line.strip() for line in sys.stdin)
        return
    read = _prompt() if live else _plain_prompt
    while True:
        try:
            yield read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("(Ctrl-D or /quit leaves)", file=sys.stderr)


def _prompt() -> Callable[[], str]:
    """prompt_toolkit's line editor with history and the commands on Tab, or the plain one without it."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.formatted_text import FormattedText
    except ModuleNotFoundError:
        return _plain_prompt
    from dllm.chat.session import COMMANDS

    completer = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(completer=completer, complete_while_typing=False)
    return lambda: session.prompt(FormattedText([("bold", "You: ")]))


def _plain_prompt() -> str:
    print("You: ", end="", file=sys.stderr, flush=True)
    return input()
