"""What the benchmark works on: the trained laptop model with its questions and texts, and encoders of chosen size."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from bench.measure import say
from bench.options import Options
from dllm.algorithms import algorithm_named
from dllm.data.tokens import TokenRows, open_rows
from dllm.language_model import DiffusionLM, load
from dllm.models.backbone import Backbone

ROOT = Path(__file__).resolve().parent.parent
LAPTOP_RUN = "chat-large"
CHAT_DATA = "chat--world--128"
VOCABULARY = 50_368
"""Size of ModernBERT's vocabulary, padded as published."""


@dataclass(frozen=True)
class Request:
    """A prompt and a target to be scored, token ids."""

    prompt: list[int]
    target: list[int]


@dataclass(frozen=True)
class Laptop:
    """The trained laptop model with held-out texts: rows of conversations, questions of four choices, benchmarks."""

    model: DiffusionLM
    rows: TokenRows
    questions: list[list[Request]]
    benchmarks: Path | None = None


def laptop(options: Options) -> Laptop:
    """The trained model (3 layers, 128 wide, a context of 160 tokens), fp32 on the CPU.

    The workflow makes it first if it is not there. A quick run without a work directory takes a tiny random one.
    """
    return _stand_in() if options.quick and options.workdir is None else _trained(options.workdir)


@cache
def _trained(workdir: Path | None) -> Laptop:
    directory = workdir or ROOT / "results" / "laptop"
    if not (directory / "runs" / LAPTOP_RUN / "model" / "config.json").exists():
        if workdir:
            raise ValueError(f"{directory}: no runs/{LAPTOP_RUN}/model there; give the laptop run's directory")
        _make([], f"runs/{LAPTOP_RUN}.json")
    model = load(directory / "runs" / LAPTOP_RUN / "model", device="cpu")
    benchmarks = directory / "downloads" / "pocket-world" / "benchmarks"
    files = sorted((benchmarks / "mmlu").glob("*/test.jsonl"))
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    questions = [_question(model, row) for row in rows]
    return Laptop(model, open_rows(directory / "data" / CHAT_DATA, "test"), questions, benchmarks)


def system(run: str, *more: str) -> tuple[Path, Path]:
    """Where a trained toy system is, and the benchmarks of its world.

    The workflow makes it first if it is not there, and more files, by their paths in its work directory.
    """
    directory = ROOT / "results" / "systems"
    targets = [target for target in (f"runs/{run}.json", *more) if not (directory / target).exists()]
    if targets:
        _make(["--configfile", "config/laptop.yaml", "config/systems.yaml"], *targets)
    return directory / "runs" / run / "model", directory / "downloads" / "pocket-world" / "benchmarks"


def _make(configuration: list[str], *targets: str) -> None:
    """Have the workflow make files, by their paths in its work directory."""
    say(f"{', '.join(targets)} not there; the workflow makes it first (some minutes, once).")
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "host", *configuration, "--", *targets]
    subprocess.run(command, cwd=ROOT, check=True)


def _question(model: DiffusionLM, row: dict) -> list[Request]:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    prompt = model.encode_prompt([{"role": "user", "content": f"{row['question']}\n{choices}\nAnswer:"}])
    return [Request(prompt, list(model.encode_prompt(letter))) for letter in "ABCD"]


@cache
def _stand_in() -> Laptop:
    """Random weights, random tokens: for a smoke run."""
    words = [f"w{number}" for number in range(59)]
    tokens = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(tokens, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]")
    backbone = replace(encoder(len(tokens), layers=2, width=64, context=160), tokenizer=fast)
    lengths = numpy.array([40 + number % 9 for number in range(64)])
    rows = rows_of_lengths(lengths, len(tokens), prompt_share=0.2)
    questions = [[Request(rows.row(n)[:20].tolist(), [letter]) for letter in (5, 6, 7, 8)] for n in range(8)]
    return Laptop(DiffusionLM(backbone, algorithm_named("mdlm")), rows, questions)


def letter_questions(laptop: Laptop, count: int) -> list[list[Request]]:
    """Questions, each with its four one-letter answers."""
    return laptop.questions[:: max(1, len(laptop.questions) // count)][:count]


def endings(laptop: Laptop, lengths: list[int]) -> list[Request]:
    """Held-out conversations cut before their last tokens: one request per wanted target length."""
    rows = laptop.rows
    long_enough = [n for n in range(len(rows)) if rows.lengths[n] >= max(lengths) + 8]
    requests = []
    for length, number in zip(lengths, long_enough[:: max(1, len(long_enough) // len(lengths))], strict=False):
        row = rows.row(number).tolist()
        requests.append(Request(row[:-length], row[-length:]))
    if len(requests) < len(lengths):
        raise ValueError(f"{len(requests)} held-out texts are long enough, {len(lengths)} are needed; ask for fewer")
    return requests


def answers(laptop: Laptop) -> tuple[list[Request], list[Request]]:
    """Held-out answers of 5 to 40 tokens, one of each length there is: behind their own prompts, and behind other ones.

    The second are what wrong choices are to a question: answers to another, about as long.
    """
    rows, of_length = laptop.rows, {}
    for number in range(len(rows)):
        prompt = int(rows.prompts[number])
        row = rows.row(number).tolist()
        if 5 <= len(row) - prompt <= 40:
            of_length.setdefault(len(row) - prompt, Request(row[:prompt], row[prompt:]))
    own = [request for _, request in sorted(of_length.items())]
    turned = [*own[1:], *own[-2:-1]]
    return own, [Request(mine.prompt, next_one.target) for mine, next_one in zip(own, turned, strict=True)]


def chat_prompts(laptop: Laptop, count: int, longest: int) -> list[list[int]]:
    """Ragged prompts of held-out conversations, up to where the answer begins, at most `longest` tokens each."""
    rows = laptop.rows
    fit = [n for n in range(len(rows)) if 0 < rows.prompts[n] <= longest]
    distinct = {tuple(rows.row(n)[: rows.prompts[n]].tolist()): None for n in fit}
    prompts = [list(prompt) for prompt in distinct]
    return prompts[:: max(1, len(prompts) // count)][:count]


def chat_lengths(count: int, seed: int = 0, mean: float = 350.0, longest: int = 1024) -> numpy.ndarray:
    """Row lengths of chat data: lognormal (sigma 0.7) around `mean`, at most `longest`."""
    random = numpy.random.default_rng(seed)
    sigma = 0.7
    drawn = random.lognormal(numpy.log(mean) - sigma**2 / 2, sigma, count)
    return numpy.clip(drawn.round(), 16, longest).astype(numpy.int64)


def rows_of_lengths(lengths: numpy.ndarray, vocabulary: int, seed: int = 0, prompt_share: float = 0.4) -> TokenRows:
    """Random tokens in rows of the given lengths; the first part of each is a prompt, which is never masked."""
    random = numpy.random.default_rng(seed)
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)])
    tokens = random.integers(5, vocabulary, int(offsets[-1]), dtype=numpy.int64)
    return TokenRows(tokens, offsets, (lengths * prompt_share).astype(numpy.int32))


def encoder(
    vocabulary: int = VOCABULARY, *, layers: int = 6, width: int = 256, context: int = 1024, seed: int = 0
) -> Backbone:
    """A stock ModernBERT with seeded random weights: a global layer in three, windows of 128 in the others."""
    config = ModernBertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=context,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    return as_backbone(config, ModernBertForMaskedLM, seed)


def as_backbone(config, kind: type, seed: int = 0, device: str = "cpu") -> Backbone:
    """A model of random weights as algorithms take it; without a tokenizer, mask token 4, end and padding 0."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = kind(config).to(device).eval()
    torch.random.set_rng_state(state)
    return Backbone(
        model=model,
        tokenizer=None,
        family="encoder",
        prediction="in_place",
        mask_id=4,
        eos_id=0,
        pad_id=0,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
    )
