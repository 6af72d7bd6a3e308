"""`dllm speed`: denoising steps and faster decoding against time and quality."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dllm.cli.generation import add_device_argument, open_recorded

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
        "--output", metavar="FILE", help="the file to write (default: speed/RUN.json in the work directory)"
    )
    parser.add_argument(
        "--workdir", default=".", metavar="DIR", help="directory that the config's paths start from (default: here)"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print one line per number of steps and per option, write the file."""
    from dllm.config import SpeedConfig, digest, read_config

    config = read_config(args.config, SpeedConfig)
    workdir = Path(args.workdir)
    from dllm.chat.speed import compare, decoding_plans, measure, read_questions
    from dllm.provenance import collect, write_atomically

    decoding_plans(config)
    questions = read_questions(workdir / config.questions, config.answer, config.limit)
    model = open_recorded(workdir, config.checkpoint, args.device)
    points, options = [], []
    for measurement in measure(model, config, questions):
        points.append({"steps": int(measurement.name), "metric": METRIC} | measured(measurement))
        print(f"{measurement.name:>5} steps: {line(points[-1])}", flush=True)
    for measurement in compare(model, config, questions):
        agreement: dict[str, Any] = {"agreement": measurement.agreement, "token_agreement": measurement.token_agreement}
        options.append({"name": measurement.name} | agreement | measured(measurement))
        print(
            f"{measurement.name}: {line(options[-1])}, {100 * agreement['agreement']:.1f} % of answers and "
            f"{100 * agreement['token_agreement']:.1f} % of tokens as in the exact decode",
            flush=True,
        )
    facts = collect(config_digest=digest(config), device=str(model.backbone.device), settings=config.model_dump())
    result = {"run": config.run, "points": points, "options": options, "provenance": facts}
    write_atomically(args.output or workdir / "speed" / f"{config.run}.json", json.dumps(result, indent=1) + "\n")
    return 0


def measured(measurement) -> dict:
    """A measurement as the report reads it: seconds over all answers, quality with its 95 % Wilson interval."""
    from dllm.numbers import wilson_interval

    low, high = wilson_interval(measurement.correct, measurement.n)
    return {
        "nfe": measurement.nfe,
        "seconds": measurement.seconds,
        "tokens_per_second": measurement.tokens / measurement.seconds,
        "quality": measurement.correct / measurement.n,
        "quality_low": low,
        "quality_high": high,
        "n": measurement.n,
    }


def line(measurement: dict) -> str:
    """A measurement for the terminal."""
    return (
        f"{measurement['nfe']:.1f} passes per answer, {measurement['seconds']:.2f} s, "
        f"{measurement['tokens_per_second']:.0f} tokens/s, {METRIC} {100 * measurement['quality']:.1f} % "
        f"[{100 * measurement['quality_low']:.1f}, {100 * measurement['quality_high']:.1f}] of {measurement['n']}"
    )
