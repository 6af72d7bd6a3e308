"""`dllm serve`: models behind an API that OpenAI's clients speak, and a page to watch them."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.cli.generation import add_chat_model_argument, add_device_argument, open_model
from dllm.cli.keys import add_key_argument, read_key

if TYPE_CHECKING:
    from dllm.serving.models import Served

HELP = "answer over HTTP, as OpenAI's API does, with a page to watch it"
EXAMPLES = """examples:
  dllm serve                            the largest chat run below results/, at http://127.0.0.1:8000
  dllm serve chat-large chat-base       two models side by side
  dllm serve chat-large --port 0        any free port
  dllm serve chat-large --host 0.0.0.0 --api-key-file key.txt

docs/serve.md has what it answers, with examples.
"""
TIME_LIMIT = 600.0
"""Seconds for which a request may wait and run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_chat_model_argument(parser, "models", "*")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (default: 8000; 0: any free one)")
    add_key_argument(parser, "that requests have to send")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="most rows together (default: 32)")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="most tokens together (default: 16384)"
    )
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="most requests that wait (default: 64)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help=f"for which a request may wait and run (default: {TIME_LIMIT:.0f})",
    )
    parser.add_argument(
        "--body-limit", type=int, default=2**20, metavar="BYTES", help="largest body of a request (default: 1 MiB)"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C. Raises ValueError, one line, for what cannot be served."""
    try:
        from dllm.serving.app import make_server
        from dllm.serving.guard import LOOPBACK, Limits
        from dllm.serving.run import address, bound, run_server
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("starlette", "uvicorn", "prometheus_client", "h11"):
            raise ValueError(f"the package {package!r} is not installed; run: pip install 'dllm[serve]'") from None
        raise
    for name in ("batch_size", "batch_tokens", "queue", "time_limit", "body_limit"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a finite number above 0")
    key = read_key(args.api_key_file) if args.api_key_file else None
    is_local = args.host in LOOPBACK
    made = bound(args.host, args.port)
    served = open_models(args)
    limits = Limits(body=args.body_limit)
    server = make_server(served, limits=limits, key=key, hosts=frozenset(LOOPBACK) if is_local else None)
    if not is_local:
        who = "with the key" if key else "without any key"
        _say(
            f"warning: --host {args.host}: everybody who reaches this machine may ask, {who}, and nothing is encrypted"
        )
    where = address(made, args.host)
    names = ", ".join(one.id for one in served)

    def ready() -> None:
        print(f"{names}: {where}", flush=True)
        _say("a page for the browser at this address, the API below /v1, its parameters at /docs; Ctrl-C ends it")

    run_server(server, made, grace=args.time_limit, ready=ready)
    return 0


def open_models(args: argparse.Namespace) -> list[Served]:
    """The models of the command line, each with its engine."""
    from dllm.chat.settings import chat_context, chat_generation, find_checkpoint
    from dllm.serving.engine import Engine, Turns
    from dllm.serving.models import Served

    checkpoints = list(dict.fromkeys(find_checkpoint(name) for name in args.models or [None]))
    models = []
    for checkpoint in checkpoints:
        _say(f"loading {checkpoint}")
        models.append(open_model(checkpoint, args.device))
    names = [model.backbone.sidecar.get("run") or _name(path) for path, model in zip(checkpoints, models, strict=True)]
    if len(set(names)) < len(names):
        names = checkpoints
    turns, served = Turns(), []
    for name, model in zip(names, models, strict=True):
        engine = Engine(
            model,
            name=name,
            batch_size=args.batch_size,
            batch_tokens=args.batch_tokens,
            queue=args.queue,
            time_limit=args.time_limit,
            turns=turns,
        )
        context = chat_context(model.backbone.sidecar, model.max_length)
        served.append(Served(name, model, engine, chat_generation(model.backbone.sidecar, context), context))
    return served


def _name(checkpoint: str) -> str:
    """What a checkpoint is called: its directory, or the run of which it is the model; a hub id as it is."""
    path = Path(checkpoint)
    if not path.exists():
        return checkpoint
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _say(text: str) -> None:
    print(f"dllm serve: {text}", file=sys.stderr, flush=True)
