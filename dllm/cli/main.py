"""The command `dllm`: finds the verb, prints help, turns a user's mistake into one line.

Exit status: 0 done, 2 a user's mistake, 70 a bug of dllm, 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from traceback import extract_tb
from types import FrameType, ModuleType
from typing import Any, NoReturn

from dllm.surroundings import check_surroundings

VERBS = (
    *("tune", "plan", "check", "download", "prepare", "train", "evaluate", "lm-eval", "sample", "speed", "chat"),
    *("serve", "report", "export", "push"),
)
"""Each is a module of this package, imported only when it is used."""

RENAMED = {"pins": "check"}
"""What a verb was called once, and what does its work now."""

EXAMPLES = """examples:
  dllm chat                              talk to the largest chat model below results/
  dllm chat chat-large                   talk to the run of this name, here one of `make report`
  dllm sample chat-large "Hello!"        print one answer
  dllm tune MODEL chats.jsonl            make a chatbot of a model and a file
  dllm serve                             the same behind OpenAI's API and a page
  dllm plan config/paper.yaml            what the full reproduction would cost
  dllm check config/paper.yaml           whether all that it takes from the hub is there and fits
  dllm VERB --help                       what a verb takes; dllm --version prints the version

DLLM_DEBUG=1 shows the traceback of an error, NO_COLOR=1 turns colours off."""


class UsageError(ValueError):
    """A command line that cannot be understood: one line with the next step."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and a misspelt option is recognised."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Options may come between the other arguments, unless there are sub-commands."""
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            return super().parse_args(args, namespace)
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message.replace('unrecognized arguments:', 'unknown argument')}{self._hint(message)}")

    def _hint(self, message: str) -> str:
        options = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], options, n=1) if word.startswith("--") else []
            if near and near[0] != word and "unrecognized" in message:
                return f". Did you mean {near[0]}?"
        return f"; see {self.prog} --help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process by default) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    name = " ".join(["dllm", *words[:1]]) if words and words[0] in VERBS else "dllm"
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, partial(_interrupt, name))
    try:
        status = None
        if arguments is None and os.environ.get("DLLM_WARM"):
            from dllm.cli.ask import ask

            status = ask(words)
        if status is None:
            status = _dispatch(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # nobody reads the rest of the buffer; the interpreter must not try again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _say(name, "interrupted")
        return 128 + signal.SIGINT
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("DLLM_DEBUG"):
            raise
        _say(name, f"error: {_one_line(error)}")
        return 2
    except Exception as error:
        if os.environ.get("DLLM_DEBUG"):
            raise
        if _is_out_of_memory(error):
            _say(name, f"error: out of memory ({_one_line(error)}); ask for smaller batches or shorter rows")
            return 2
        _say(name, f"error: {bug_line(error)}")
        return 70


def _interrupt(name: str, number: int, frame: FrameType | None) -> None:
    """Ends at once in an import, which leaves nothing half done: an exception in one can meet C++ that aborts."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _say(name, "interrupted")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Let standard streams that were closed, or that cannot show a character, take every line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a character still gets the line; a stream that can do that already is left, since
        # Python asks for its place in a file, which it has not in a job of a warm process
        if isinstance(stream, TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def bug_line(error: Exception) -> str:
    """The line for an unexpected error: what it is, and where it was raised in this package."""
    frames = extract_tb(error.__traceback__)
    own = [frame for frame in frames if "dllm" in Path(frame.filename).parts] or frames
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    text = f"{type(error).__name__}: {_one_line(error)[:200]}"
    return f"this is a bug of dllm ({text}{where}); DLLM_DEBUG=1 shows where it comes from, please report it"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def verb_parser(verb: str, module: ModuleType) -> Parser:
    """The parser of a verb: its arguments, a description, examples."""
    parser = Parser(
        prog=f"dllm {verb}",
        description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
        epilog=getattr(module, "EXAMPLES", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def verb_module(verb: str) -> ModuleType:
    """The module of a verb."""
    return import_module(f"dllm.cli.{verb.replace('-', '_')}")


def overview() -> str:
    """What `dllm --help` prints."""
    verbs = "\n".join(f"  {verb:<10} {verb_module(verb).HELP}" for verb in VERBS)
    return (
        "usage: dllm VERB [ARGUMENT ...]\n\n"
        "Diffusion language models: train, sample, score, chat, and report about it.\n\n"
        f"verbs:\n{verbs}\n\n{EXAMPLES}"
    )


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    verb, *rest = words
    if verb in ("-V", "--version"):
        from dllm import __version__

        print(f"dllm {__version__}")
        return 0
    if verb not in VERBS:
        what = "an option" if verb.startswith("-") else "a verb"
        near = difflib.get_close_matches(verb, [*VERBS, "--help", "--version"], n=1)
        near = [RENAMED[verb]] if verb in RENAMED else near
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(VERBS)}."
        raise UsageError(f"{verb!r} is not {what} of dllm. {hint}")
    module = verb_module(verb)
    if getattr(module, "PASSES_ON", False) and rest not in (["-h"], ["--help"]):
        check_surroundings()
        return module.run(argparse.Namespace(arguments=rest))
    try:
        args = verb_parser(verb, module).parse_args(rest)
    except SystemExit as end:  # argparse leaves this way after --help
        return int(end.code or 0)
    check_surroundings()
    return module.run(args)


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is not installed; install dllm with its dependencies"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or f"at work in {os.getcwd()}"
        return f"{where}: {error.strerror}; make room and start the same command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _say(name: str, text: str) -> None:
    try:
        shown = text.encode(errors="backslashreplace").decode()  # a path may be bytes that are not text
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
    except OSError:
        pass  # standard error is closed as well
