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
from typing import TYPE_CHECKING

from dllm.cli.generation import add_device_argument, add_generation_arguments, open_model, with_options
from dllm.cli.main import bug_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dllm.chat.session import Session
    from dllm.core.canvas import Canvas
    from dllm.language_model import DiffusionLM

HELP = "talk to a model and watch it denoise"
EXAMPLES = """examples:
  dllm chat                                  the largest chat run below results/
  dllm chat chat-large --steps 16            a run by its name, with fewer steps
  dllm chat chat-large --reveal-rule factor  reveal all tokens that are sure enough, in fewer passes
  dllm chat results/laptop/runs/chat-large/model
  dllm chat chat-large --once "Hello!"       one answer, then leave
  printf 'Hello!\\nWho are you?\\n' | dllm chat

In the chat, /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.
Where output is not a terminal, only the finished turns are printed, one per line.
"""
FRAMES_PER_SECOND = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="run below results/, model directory or hub id (default: largest chat run)",
    )
    parser.add_argument("--once", metavar="TEXT", help="answer this and leave")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    add_device_argument(parser)
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Chat until the end of the input; 2 if a message could not be answered, 70 if that was a bug."""
    from rich.console import Console

    from dllm.chat.session import Conversation, Session
    from dllm.chat.settings import chat_context, chat_generation, find_checkpoint

    checkpoint = find_checkpoint(args.model)
    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    with _waiting(console, f"loading {checkpoint}", live):
        model = open_model(checkpoint, args.device)
    context = chat_context(model.backbone.sidecar, model.max_length)
    settings = with_options(chat_generation(model.backbone.sidecar, context), args, model.backbone.sidecar)
    session = Session(settings, context, Conversation(system=args.system), sidecar=model.backbone.sidecar)
    show = Live(console, model) if live else Plain()
    if args.once is not None:
        return Chat(model, session, replace(show, bare=True)).once(args.once)
    if live:
        _greet(console, model, checkpoint, session)
    return Chat(model, session, show).talk(_lines(live))


class Chat:
    """The loop: read a line, obey or answer it, say what went wrong."""

    def __init__(self, model: DiffusionLM, session: Session, show: Live | Plain):
        self.model, self.session, self.show = model, session, show
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
        from dllm.chat.session import fit_context

        session, dropped = fit_context(self.session, question, lambda turns: len(self.model.encode_prompt(turns)))
        if dropped and not self.has_trimmed:
            self.has_trimmed = True
            self.show.note("the context is full: the oldest turns are forgotten from now on")
        canvases = self.model.stream([session.conversation.messages(question)], session.settings)
        try:
            last = self.show.answer(canvases)
        except KeyboardInterrupt:
            if self.show.bare:
                raise
            self.show.note("stopped; this turn is forgotten")
            return
        text = self.model.decode(last.responses()[0], session.settings.stop).strip()
        self.show.finished(text)
        self.session = replace(session, conversation=session.conversation.with_turn(question, text))


@dataclass(frozen=True)
class Plain:
    """Finished turns only, one per line; for pipes and files."""

    bare: bool = False

    def question(self, text: str) -> None:
        """Show the question."""
        print(f"You: {text}", flush=True)

    def answer(self, canvases: Iterator[Canvas]) -> Canvas:
        """Show the canvases and return the last one."""
        for canvas in canvases:
            last = canvas
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
    model: DiffusionLM
    bare: bool = False
    clock: Callable[[], float] = time.perf_counter

    def question(self, text: str) -> None:
        """Show the question."""
        if not sys.stdin.isatty():  # otherwise the terminal shows what was typed
            self.console.print(f"You: {text}", style="bold", markup=False)

    def answer(self, canvases: Iterator[Canvas]) -> Canvas:
        """Show the canvases and return the last one."""
        from rich.live import Live as Display

        begin, drawn, previous = self.clock(), -1.0, None
        with Display(console=self.console, auto_refresh=False, vertical_overflow="crop") as display:
            for canvas in canvases:
                now = self.clock()
                if now - drawn >= 1 / FRAMES_PER_SECOND:
                    display.update(self._frame(canvas, previous, now - begin), refresh=True)
                    drawn, previous = now, canvas
            display.vertical_overflow = "visible"
            display.update(self._frame(canvas, None, self.clock() - begin), refresh=True)
        return canvas

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

    def _frame(self, canvas: Canvas, previous: Canvas | None, seconds: float) -> Text:
        """The canvas, cut at the end of the answer once no mask is left before it, and the status line."""
        from rich.text import Text

        from dllm.chat.render import canvas_text, pieces, status

        tokenizer = self.model.backbone.tokenizer
        shown = pieces(canvas, tokenizer.decode, previous=previous)
        known = next((i for i, piece in enumerate(shown) if piece.state == "masked"), len(shown))
        tokens = canvas.responses()[0][:known]
        size = self.model.answer_length(tokens)
        if size < known:
            shown = shown[:size]
        if shown and size:  # a word-level token brings the space before it, also at the start
            shown = [replace(shown[0], text=shown[0].text.lstrip()), *shown[1:]]
        revealed = sum(piece.state != "masked" for piece in shown)
        text = Text("" if self.bare else "Bot: ", "bold")
        body = canvas_text(shown, tokenizer.eos_token)
        body.rstrip()
        line = status(canvas.step, canvas.nfe, revealed, seconds)
        return Text.assemble(text, body, "\n", line)


def _greet(console: Console, model: DiffusionLM, checkpoint: str, session: Session) -> None:
    from dllm.chat.render import legend
    from dllm.chat.session import described

    parameters = sum(p.numel() for p in model.backbone.model.parameters())
    size = f"{parameters / 1e6:.0f} M" if parameters >= 1e7 else f"{parameters / 1e3:,.0f} k"
    name = model.backbone.sidecar.get("run") or Path(checkpoint).name
    console.print(f"{name}", style="bold", markup=False, end="")
    console.print(f"  {size} parameters, context of {session.context} tokens, {model.backbone.device}", style="dim")
    console.print(f"{described(session.settings)}; /help lists the commands", style="dim", markup=False)
    console.print(legend(colours=not console.no_color))


def _waiting(console: Console, text: str, live: bool):
    from contextlib import nullcontext

    return console.status(text) if live else nullcontext()


def _lines(live: bool) -> Iterator[str]:
    """What the user says, line by line, until the end of the input."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text must not end the others
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
