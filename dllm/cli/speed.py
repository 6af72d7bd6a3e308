"""`dllm speed`: denoising steps and faster decoding against time and quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dllm.cli.generation import add_device_argument, open_model

HELP = "measure denoising steps and decoding options against seconds and quality"
EXAMPLES = """examples:
  dllm speed configs/speed/chat-large.yaml --output speed/chat-large.json
      for each number of steps in the config: answer its questions, count the right ones, take the time; the same
      for each decoding option (threshold, factor, entropy bound, reuse, ...), next to the exact decode
"""
METRIC = "exact match"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", metavar="CONFIG", help="speed config, written by the workflow below configs/speed/")
    parser.add_argument(
        "--output", metavar="FILE", help="where to write (default: speed/RUN.json in the work directory)"
    )
    parser.add_argument("--workdir", default=".", metavar="DIR", help="where the config's paths begin (default: here)")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print one line per number of steps and per option, write the file."""
    from dllm.chat.settings import SpeedConfig
    from dllm.config import digest, read_config

    config = read_config(args.config, SpeedConfig)
    workdir = Path(args.workdir)
    from dllm.chat.speed import compare, decoding_plans, measure, read_questions
    from dllm.provenance import collect, write_atomically

    decoding_plans(config)
    questions = read_questions(workdir / config.questions, config.answer, config.limit)
    model = open_model(str(workdir / config.checkpoint), args.device)
    points = []
    for found in measure(model, config, questions):
        points.append(point(found))
        print(line(points[-1]), flush=True)
    options = []
    for found in compare(model, config, questions):
        options.append(compared(found))
        print(compared_line(options[-1]), flush=True)
    facts = collect(config_digest=digest(config), device=str(model.backbone.device), settings=config.model_dump())
    result = {"run": config.run, "points": points, "options": options, "provenance": facts}
    write_atomically(args.output or workdir / "speed" / f"{config.run}.json", json.dumps(result, indent=1) + "\n")
    return 0


def point(found) -> dict:
    """A measurement as the report reads it: seconds over all answers, quality with its 95 % Wilson interval."""
    from dllm.evaluation.scores import wilson_interval

    low, high = wilson_interval(found.correct, found.n)
    return {
        "steps": found.steps,
        "nfe": found.nfe,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
        "quality": found.correct / found.n,
        "quality_low": low,
        "quality_high": high,
        "metric": METRIC,
        "n": found.n,
    }


def compared(found) -> dict:
    """A decoding option as the report reads it; agreement is that with the exact decode."""
    from dllm.evaluation.scores import wilson_interval

    low, high = wilson_interval(found.correct, found.n)
    return {
        "name": found.name,
        "nfe": found.nfe,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
        "quality": found.correct / found.n,
        "quality_low": low,
        "quality_high": high,
        "agreement": found.agreement,
        "token_agreement": found.token_agreement,
        "n": found.n,
    }


def compared_line(option: dict) -> str:
    """An option for the terminal."""
    return (
        f"{option['name']}: {option['nfe']:.1f} passes per answer, {option['seconds']:.2f} s, "
        f"{option['tokens_per_second']:.0f} tokens/s, {METRIC} {100 * option['quality']:.1f} % "
        f"[{100 * option['quality_low']:.1f}, {100 * option['quality_high']:.1f}] of {option['n']}, "
        f"{100 * option['agreement']:.1f} % of answers and {100 * option['token_agreement']:.1f} % of tokens "
        "as in the exact decode"
    )


def line(point: dict) -> str:
    """A point for the terminal."""
    return (
        f"{point['steps']:>5} steps: {point['nfe']:.1f} passes per answer, {point['seconds']:.2f} s, "
        f"{point['tokens_per_second']:.0f} tokens/s, {METRIC} {100 * point['quality']:.1f} % "
        f"[{100 * point['quality_low']:.1f}, {100 * point['quality_high']:.1f}] of {point['n']}"
    )
