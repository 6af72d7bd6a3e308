"""`dllm evaluate`: score a checkpoint on benchmarks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dllm.numbers import environment_number

HELP = "score a checkpoint on benchmarks"
EXAMPLES = """examples:
  dllm evaluate results/laptop/configs/evals/chat-large/mmlu.yaml
      one benchmark; writes results/laptop/evals/chat-large/mmlu.json and mmlu.samples.jsonl
  dllm evaluate results/laptop/configs/evals/chat-large/*.yaml
      several, in one process: the model is loaded once
  accelerate launch --num_processes 8 -m dllm evaluate results/paper/configs/evals/chat-large/mmlu.yaml
      one process per device shares the requests; the first one writes the scores
  dllm evaluate CONFIG --shard 0/2 & dllm evaluate CONFIG --shard 1/2 & wait; dllm evaluate CONFIG --merge
      the same by hand, for instance as two jobs of a cluster

A killed evaluation goes on where it was: start the same command again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dllm evaluate`."""
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="resolved evaluation config, written by the workflow below configs/evals/",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="work directory (default: the one whose `configs` holds the config, else here)",
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="compute only part I (from 0) of N; do not write scores"
    )
    parser.add_argument("--merge", action="store_true", help="score the stored answers; do not compute any")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:1 (default: an accelerator if there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the scores, print a line per benchmark. Raises ValueError, one line, for a user's mistake."""
    if args.shard and args.merge:
        raise ValueError("--shard and --merge do not go together; compute the shards first, then merge")
    # lm-eval and datasets draw a bar per subtask; ours counts all of them
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from dllm.config import EvaluationConfig, read_config

    configs = [(Path(path), read_config(path, EvaluationConfig)) for path in args.configs]
    workdirs = [workdir_of(path, args.workdir) for path, _ in configs]

    from dllm.cli.progress import ProgressLine
    from dllm.evaluation.evaluate import evaluate_benchmark
    from dllm.provenance import file_lock

    shard, score, wait = _share(args)
    device = _device(args.device)
    for (_, config), workdir in zip(configs, workdirs, strict=True):
        progress = ProgressLine(f"{config.run} {config.benchmark}", "answer")
        # one process at a time works on a part: a process that waited reads the stored answers
        part = f"evaluate-{config.run}-{config.benchmark}-{shard[0]}-of-{shard[1]}"
        with file_lock(workdir / ".work" / "locks" / part):
            result = evaluate_benchmark(
                config,
                workdir,
                shard=shard,
                compute=not args.merge,
                wait=wait,
                score=score,
                device=device,
                progress=progress,
            )
        progress.close()
        if score:
            print(summary_line(result), flush=True)
    return 0


def summary_line(result: dict) -> str:
    """Headline metric with its interval, n and chance level, in percent."""
    score = result["metrics"][result["metric"]]
    interval = f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" if score["low"] is not None else ""
    chance = f", chance {100 * result['chance']:.0f}" if result["chance"] is not None else ""
    return (
        f"{result['run']} {result['benchmark']}: {result['metric']} {100 * score['value']:.1f}{interval}"
        f" (n {score['n']}{chance}, {result['wall_seconds']:.0f} s)"
    )


def workdir_of(config: Path, given: str | None) -> Path:
    """The work directory a config belongs to: as given, else above its `configs`, else here."""
    if given:
        return Path(given)
    for parent in config.resolve().parents:
        if parent.name == "configs":
            return parent.parent
    return Path(".")


def _shard(text: str) -> tuple[int, int]:
    try:
        index, shards = (int(part) for part in text.split("/"))
    except ValueError:
        index, shards = -1, 0
    if not 0 <= index < shards:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, for instance 0/2")
    return index, shards


def _share(args: argparse.Namespace) -> tuple[tuple[int, int], bool, bool]:
    """(shard, score, wait) of this process: as the options say, else as the launcher's environment says."""
    if args.shard:
        return args.shard, False, False
    rank, world_size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    if args.merge or world_size == 1:
        return (0, 1), rank == 0, False
    return (rank, world_size), rank == 0, rank == 0


def _device(name: str) -> str:
    from dllm.core.devices import best_device, known_device

    if name != "auto":
        return str(known_device(name))
    device = best_device()
    return f"cuda:{environment_number('LOCAL_RANK', 0)}" if device.type == "cuda" else str(device)
