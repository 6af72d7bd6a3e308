"""Denoising steps and faster decoding against time and quality, measured on questions with known answers."""

from __future__ import annotations

import glob
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dllm.chat.session import check_steps
from dllm.choices import parallel_rules
from dllm.config import GenerateSettings, SpeedConfig, overlaid
from dllm.language_model import Answer, DiffusionLM
from dllm.provenance import how_to_make

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A question and the answer sought."""

    text: str
    answer: str


@dataclass(frozen=True)
class Measurement:
    """All questions answered with one number of steps or one decoding option.

    nfe: forward passes per answer; seconds and tokens over all answers; correct: right answers out of n. Agreement with
    the exact decode (one token per pass, nothing reused): share of answers that are the exact ones, token for token;
    token_agreement: share of tokens that are, position by position. Both are None where nothing was compared.
    """

    name: str
    nfe: float
    seconds: float
    tokens: int
    correct: int
    n: int
    agreement: float | None = None
    token_agreement: float | None = None


def read_questions(path: str | Path, pattern: str, limit: int) -> list[Question]:
    """The first questions of jsonl or parquet files of {"question", "answer"} rows; the answer is `pattern`'s group.

    path: may hold `*`, for several files. Of rows with "choices", the answer is the number of one of them.
    Raises ValueError, one line, for a missing file, a row without them, or an answer that `pattern` does not match.
    """
    path, expression = Path(path), _expression(pattern)
    files = sorted(Path(name) for name in glob.glob(str(path))) if "*" in str(path) else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path}: no such file of questions, {how_to_make(path)}")
    questions: list[Question] = []
    rows = ((source, number, line) for source in files for number, line in enumerate(_lines(source), 1))
    for file, number, line in rows:
        if len(questions) == limit:
            break
        if line.strip():
            questions.append(_question(line, expression, f"{file}:{number}"))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def _lines(path: Path) -> list[str]:
    """A file's rows, each as a line of JSON."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return [json.dumps(row) for row in parquet.read_table(path, columns=["question", "answer"]).to_pylist()]
    return path.read_text(encoding="utf-8").splitlines()


def is_correct(text: str, sought: str, pattern: str) -> bool:
    """Whether an answer says what is sought: by the last match of `pattern`, else as a whole.

    If a number is expected and the match is not a number, the last number of the answer counts. Thousands separators, a
    final full stop and capital letters make no difference.
    """
    matches = [match.group(1) for match in _expression(pattern).finditer(text) if match.group(1).strip()]
    said = matches[-1] if matches else text
    if NUMBER.fullmatch(_plain(sought)) and not NUMBER.fullmatch(_plain(said)):
        said = (NUMBER.findall(text) or [""])[-1]
    return _plain(said) == _plain(sought)


def measure(model: DiffusionLM, config: SpeedConfig, questions: list[Question]) -> Iterator[Measurement]:
    """One measurement per number of steps, which is its name, after a warm-up that is not timed.

    Raises ValueError, one line, if a number of steps is less than the blocks of the canvas.
    """
    plans = {str(steps): overlaid(config.generation, {"steps": steps}) for steps in config.steps}
    for settings in plans.values():
        check_steps(settings)
    model.generate(_prompts(config, questions)[: config.generation.batch_size], settings)
    for name, settings in plans.items():
        yield _measured(model, config, questions, name, settings)[0]


def compare(model: DiffusionLM, config: SpeedConfig, questions: list[Question]) -> Iterator[Measurement]:
    """The exact decode, half the steps and the options of the config, each after a warm-up that is not timed.

    Raises ValueError, one line, if an option has fewer steps than the canvas has blocks.
    """
    exact: list[Answer] = []
    for name, settings in decoding_plans(config).items():
        model.generate(_prompts(config, questions)[: min(8, settings.batch_size)], settings)
        measured, answers = _measured(model, config, questions, name, settings)
        exact = exact or answers
        pairs = [(one.ids, other.ids) for one, other in zip(answers, exact, strict=True)]
        share = sum(one == other for one, other in pairs) / len(pairs)
        yield replace(measured, agreement=share, token_agreement=token_agreement(pairs))


def decoding_plans(config: SpeedConfig) -> dict[str, GenerateSettings]:
    """The compared settings by name, the exact decode first. Raises ValueError, one line, for too few steps."""
    exact = overlaid(config.generation, {"steps": None, "reuse": "none", "refresh": None})
    if exact.reveal_rule in parallel_rules():
        exact = overlaid(exact, {"reveal_rule": "confidence"})
    blocks = math.ceil(exact.max_new_tokens / exact.block_size)
    half = {"half the steps": {"steps": max(blocks, exact.max_new_tokens // 2)}}
    plans = {"exact": exact} | {name: overlaid(exact, changes) for name, changes in (half | config.options).items()}
    for settings in plans.values():
        check_steps(settings)
    return plans


def token_agreement(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Share of positions at which two answers have the same token, over all pairs; 1 if there is no token at all."""
    same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    total = sum(max(len(one), len(other)) for one, other in pairs)
    return same / total if total else 1.0


def _prompts(config: SpeedConfig, questions: list[Question]) -> list[list[dict]]:
    texts = [config.prompt.replace("{question}", question.text) for question in questions]
    return [[{"role": "user", "content": text}] for text in texts]


def _measured(
    model: DiffusionLM, config: SpeedConfig, questions: list[Question], name: str, settings: GenerateSettings
) -> tuple[Measurement, list[Answer]]:
    prompts = _prompts(config, questions)
    start = _clock(model.backbone.device)
    answers = model.answers(prompts, settings)
    seconds, count = _clock(model.backbone.device) - start, len(answers)
    right = sum(is_correct(a.text, q.answer, config.answer) for a, q in zip(answers, questions, strict=True))
    tokens, passes = (sum(getattr(answer, field) for answer in answers) for field in ("tokens", "passes"))
    return Measurement(name, passes / count, seconds, tokens, right, count), answers


def _clock(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _question(line: str, expression: re.Pattern, where: str) -> Question:
    try:
        row = json.loads(line)
        question, reference = row["question"], row["answer"]
        if "choices" in row:
            reference = row["choices"][reference]
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(f"{where}: not a row with question and answer; is this the right file?") from None
    match = expression.search(reference)
    if match is None:
        raise ValueError(f"{where}: answer = {reference!r} does not match {expression.pattern!r}; correct the pattern")
    return Question(question, match.group(1).strip())


def _expression(pattern: str) -> re.Pattern:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer = {pattern!r} is not a regular expression ({error})") from None
    if expression.groups < 1:
        raise ValueError(f"answer = {pattern!r} has no group; put what is sought in parentheses, e.g. '#### (.*)'")
    return expression


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d)", "", text).strip().rstrip(".").casefold()
