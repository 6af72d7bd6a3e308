"""`dllm sample`: one answer, or the conversations and the filmstrip of the report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dllm.cli.generation import (
    add_device_argument,
    add_generation_arguments,
    open_model,
    open_recorded,
    with_options,
)

HELP = "answer prompts, edit a text, or write the report's conversations and filmstrip"
EXAMPLES = """examples:
  dllm sample chat-large "What is the capital of France?"
      one answer of the run results/*/runs/chat-large
  dllm sample results/laptop/runs/chat-large/model --raw "The capital of France is"
      continue the text itself, without the chat template
  cat questions.txt | dllm sample chat-large
      one answer per line
  dllm sample chat-large --prompt "Hello!" "Who are you?" --output hello.json
      conversations of one turn each, and how the first answer came about
  dllm sample chat-large --reveal-rule threshold --threshold 0.8 "What is the capital of France?"
      reveal all tokens with a probability of at least 80 % in one pass, which takes fewer passes
  dllm sample chat-large --reuse dual --refresh 8 "What is the capital of France?"
      compute the text outside the active block in every eighth pass only (an approximation)
  dllm sample encoder-edits --edit "Gorby is known is for for" "What is Gorby known for?"
      edit a wrong answer into a better one, pass by pass (a model trained with edit_flows)
  dllm sample encoder-edits --edit "The zanu walks legs." --steps 8
      edit a text that has no question, in eight passes
  dllm sample --config configs/samples/chat-large.yaml --output samples/chat-large.json
      write what the report shows; the paths in the config are below --workdir
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run below results/, model directory or hub id")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer (default: the lines of stdin)")
    parser.add_argument("--prompt", nargs="+", default=[], metavar="PROMPT", help="the same, as an option")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument(
        "--edit",
        metavar="DRAFT",
        help="edit this text, as an answer to the PROMPT if there is one, and show every pass that changes it",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="sample config, written by the workflow below configs/samples/"
    )
    parser.add_argument("--output", metavar="FILE", help="write conversations and filmstrip here, as JSON")
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="directory that the config's paths start from (default: here)"
    )
    add_device_argument(parser)
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the answers, or write the file."""
    if args.config:
        return _write_configured(args)
    if args.model is None:
        raise ValueError('needs a MODEL and a PROMPT, or --config, e.g. dllm sample chat-large "Hello!"')
    if args.output and args.raw:
        raise ValueError("--output writes conversations, and --raw does not make any; leave one of them out")
    if args.edit is not None:
        return _edit(args)
    prompts = [*args.prompts, *args.prompt] or _lines()
    from dllm.chat.settings import chat_context, chat_generation, find_checkpoint

    model = open_model(find_checkpoint(args.model), args.device)
    sidecar = model.backbone.sidecar
    settings = with_options(chat_generation(sidecar, chat_context(sidecar, model.max_length)), args, sidecar)
    if args.output:
        from dllm.config import SampleConfig

        config = SampleConfig(
            run=sidecar.get("run", args.model),
            checkpoint=args.model,
            conversations=[[prompt] for prompt in prompts],
            film_prompt=prompts[0],
            generation=settings,
        )
        return _write(model, config, args.output)
    if not args.raw:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    for text in model.generate(prompts, settings):
        print(text)
    return 0


def _edit(args: argparse.Namespace) -> int:
    """Print the draft, a line per pass that changes it, and the finished text."""
    prompts = [*args.prompts, *args.prompt]
    if len(prompts) > 1:
        raise ValueError(f"--edit takes one draft and at most one PROMPT, got {len(prompts)}; give them one by one")
    if not args.edit.strip():
        raise ValueError("--edit needs a text; to start from an empty text, leave the option out")
    if args.output:
        raise ValueError("--output writes conversations, and --edit does not make any; leave one of them out")
    from rich.console import Console
    from rich.text import Text

    from dllm.chat.render import edit_text
    from dllm.chat.settings import chat_context, chat_generation, find_checkpoint
    from dllm.sampling.edits import edit_pieces

    model = open_model(find_checkpoint(args.model), args.device)
    sidecar = model.backbone.sidecar
    # a text is corrected with the most probable tokens; only an empty text would get the same token in every gap
    usual = chat_generation(sidecar, chat_context(sidecar, model.max_length)).model_copy(update={"temperature": 0.0})
    settings = with_options(usual, args, sidecar)
    prompt = prompts[0] if prompts else None
    if prompt is not None and not args.raw:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompt = [*system, {"role": "user", "content": prompt}]
    console = Console(highlight=False)
    colours = console.is_terminal and not console.no_color

    def decode(tokens: list[int]) -> str:
        text = model.backbone.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.replace(model.end_of_turn, "") if model.end_of_turn else text

    for canvas in model.edits(args.edit, prompt, settings):
        pieces = [(kind, text) for kind, text in edit_pieces(canvas, decode) if text.strip() or kind == "kept"]
        if canvas.step == 0 or any(kind != "kept" for kind, _ in pieces):
            line = edit_text(pieces, colours=colours)
            line.rstrip()
            console.print(Text.assemble((f"{canvas.step:>3}  ", "dim"), line), soft_wrap=True)
    console.print(model.decode(canvas.responses()[0], settings.stop).strip(), soft_wrap=True, markup=False)
    return 0


def _lines() -> list[str]:
    if sys.stdin.isatty():
        raise ValueError('needs a PROMPT, e.g. dllm sample chat-large "Hello!"')
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise ValueError("standard input is empty; give at least one line to answer")
    return lines


def _write_configured(args: argparse.Namespace) -> int:
    given = [f"--{name}" for name in ("prompt", "system", "raw", "edit") if getattr(args, name)]
    given += ["MODEL"] if args.model else []
    if given:
        raise ValueError(f"--config already states these; leave out {', '.join(given)}")
    from dllm.config import SampleConfig, read_config

    config = read_config(args.config, SampleConfig)
    config = config.model_copy(update={"generation": with_options(config.generation, args)})
    output = args.output or Path(args.workdir) / "samples" / f"{config.run}.json"
    return _write(open_recorded(args.workdir, config.checkpoint, args.device), config, output)


def _write(model, config, output) -> int:
    from dllm.chat.samples import samples
    from dllm.provenance import write_atomically

    made = samples(model, config)
    write_atomically(output, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(f"{config.run}: {len(made['conversations'])} conversations, {len(made['film']['frames'])} frames: {output}")
    return 0
