"""Scoring: one-letter answers, and endings at equal standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bench.alternatives import monte_carlo
from bench.measure import Result, Row, compare, growth, interleaved, require
from bench.options import Options
from bench.workloads import ROOT, Request, answers, endings, laptop, letter_questions
from dllm.config import LikelihoodSettings, load_project
from dllm.core.canvas import Score
from dllm.core.noise import keyed_hash, token_hash
from dllm.language_model import DiffusionLM
from dllm.likelihood.designs import estimate, likelihood_design
from dllm.models.rotary import stock_rotary

SAME = "same trained weights, fp32, threads, prompts and targets; the mask token is ruled out on both sides"
LEAST_LENGTH, MOST_LENGTH = 5, 40
DRAWS = (8, 16, 32, 64, 96, 128, 192, 256)
"""Monte Carlo draws that are tried for equal standard error."""


def letters(options: Options) -> Result:
    """Four one-letter answers to each question."""
    trained = laptop(options)
    model = trained.model
    questions = letter_questions(trained, 2 if options.quick else 8)
    draws = 8 if options.quick else 128
    requests = [request for question in questions for request in question]

    ours, theirs = scores(model, requests), common(model, requests[:4], draws)
    alike = all(abs(a.nats - b) < 1e-3 for a, b in zip(ours, theirs, strict=False))
    alike &= all(abs(a.nats - plain(model, r)) < 1e-4 for a, r in zip(ours, requests, strict=True))
    correct = require(alike, "the nats of every answer equal one plain forward and, within 0.001, Monte Carlo")

    jobs = {
        "ours": lambda: scores(model, requests),
        "mc": lambda: common(model, requests, draws),
        "mc32": lambda: common(model, requests, min(32, draws)),
        "plain": lambda: [plain(model, request) for request in requests],
    }
    times = interleaved(jobs, options.repeats(5), at_most=20)
    passes = sum(score.passes for score in ours)
    facts = {"held_equal": SAME, "correct": correct}
    name, many = "one-letter answers, 4 choices", f"Monte Carlo {draws}, one request at a time"
    rows = [
        compare(
            [passes],
            [draws * len(requests)],
            name=name,
            against=many,
            unit="forward rows",
            target=options.target(200),
            **facts,
        ),
        compare(times["ours"], times["mc"], name=name, against=many, target=options.target(100), **facts),
        compare(times["ours"], times["mc32"], name=name, against="Monte Carlo 32, one request at a time", **facts),
        compare(times["ours"], times["plain"], name=name, against="plain: one exact forward per choice", **facts),
    ]
    points = {}
    for count in (1, 2) if options.quick else (1, 4, 12, 32):
        some = [r for question in letter_questions(trained, count)[:count] for r in question]
        sides = {
            "ours": lambda some=some: scores(model, some),
            f"Monte Carlo {draws}": lambda some=some: common(model, some, draws),
        }
        points[count] = interleaved(sides, options.repeats(3 if count < 12 else 2), warmup=int(count < 12), at_most=10)
    line = growth(
        points, name="letters-requests", title="One-letter answers", x_label="questions of 4 choices", y_label="seconds"
    )
    return Result(rows, [line], {"questions": len(questions), "draws": draws})


def endings_at_equal_error(options: Options) -> Result:
    """Endings of 5 to 40 tokens as `scorers.corrected` scores them, and Monte Carlo with draws that are no better."""
    trained = laptop(options)
    model = trained.model
    requests = endings(trained, [5, 12] if options.quick else list(range(LEAST_LENGTH, MOST_LENGTH + 1)))
    seeds, settings = 3 if options.quick else 8, corrected()
    ours, spread, draws = _as_precise(model, requests, settings, seeds, options)
    correct = _same_bound(ours, spread, options)
    once = [score.nats for score in scores(model, requests, settings)]
    alone = [plain_passes(model, request, settings) for request in requests]
    agree = all(abs(a - b) < 1e-3 * max(1, abs(b)) for a, b in zip(once, alone, strict=True))
    same = require(agree, "every bound is that of its passes made one by one, to 0.1 %")

    jobs = {
        "ours": lambda: scores(model, requests, settings),
        "mc": lambda: common(model, requests, draws),
        "plain": lambda: [plain_passes(model, request, settings) for request in requests],
        "mc32": lambda: common(model, requests, 8 if options.quick else 32),
        "mc128": lambda: common(model, requests, 8 if options.quick else 128),
    }
    times = interleaved(jobs, options.repeats(5), at_most=60)
    pairs = zip(ours.by_length(requests)[:3], spread.by_length(requests)[:3], strict=True)
    thirds = ", ".join(f"{a:.2f} against {b:.2f}" for a, b in pairs)
    note = f"{_errors(ours, spread, settings, draws)} By thirds of the target lengths: {thirds}."
    held = f"{SAME}; the standard error, measured over {2 * seeds} seeds, is at most Monte Carlo's"
    name = f"endings of {LEAST_LENGTH} to {MOST_LENGTH} tokens"
    rows = [
        compare(
            times["ours"],
            times["mc"],
            name=f"{name} at equal standard error",
            against=f"Monte Carlo {draws}, one request at a time",
            held_equal=held,
            correct=correct,
            note=note,
            target=options.target(15),
        ),
        compare(
            times["ours"],
            times["plain"],
            name=f"{name}, {settings.budget} passes each",
            against="plain: one forward per pass, logits everywhere",
            held_equal=f"{SAME}; the same masks and weights",
            correct=same,
        ),
    ]
    for count in (32, 128):
        error = spread.error * (draws / count) ** 0.5
        rows.append(
            compare(
                times["ours"],
                times[f"mc{count}"],
                name=f"{name}, {settings.budget} passes each",
                against=f"Monte Carlo {count}, one request at a time",
                held_equal=f"{SAME}; not the standard error, see the note",
                correct=correct,
                note=f"Root mean square standard error {ours.error:.2f} nats, Monte Carlo {error:.2f}.",
            )
        )
    for some, kind in zip(answers(trained), ("their own", "other"), strict=True):
        rows.append(_answers(model, some[:2] if options.quick else some, kind, 3 if options.quick else 5, options))
    points = {}
    for length in (5,) if options.quick else (5, 10, 20, 40):
        some = endings(trained, [length] * (2 if options.quick else 6))
        sides = {
            "ours": lambda some=some: scores(model, some, settings),
            f"Monte Carlo {draws}": lambda some=some: common(model, some, draws),
        }
        times = interleaved(sides, options.repeats(3), at_most=8)
        points[length] = {side: [t / len(some) for t in seconds] for side, seconds in times.items()}
    line = growth(
        points,
        name="endings-length",
        title="Endings, equal standard error",
        x_label="target length, tokens",
        y_label="seconds per request",
    )
    setup = {
        "requests": len(requests),
        "seeds": seeds,
        "settings": _label(settings),
        "standard errors by thirds of the target length, ours": ours.by_length(requests),
        "standard errors by thirds of the target length, Monte Carlo": spread.by_length(requests),
    }
    return Result(rows, [line], setup)


def corrected() -> LikelihoodSettings:
    """What `scorers.corrected` of the laptop configuration says: the settings that a user of that model has."""
    return load_project(ROOT / "config", ROOT / "config" / "laptop.yaml").scorers["corrected"].likelihood


def _as_precise(
    model: DiffusionLM, requests: list[Request], settings: LikelihoodSettings, seeds: int, options: Options
) -> tuple[Spread, Spread, int]:
    """Our spread; that of Monte Carlo with the most draws that are not more precise, or the fewest; and how many."""
    ours = spread_of(model, requests, settings, 2 * seeds)
    draws = DRAWS[0]
    theirs = common_spread(model, requests, draws, seeds)
    for more in DRAWS[1:2] if options.quick else DRAWS[1:]:
        other = common_spread(model, requests, more, seeds)
        if other.error < ours.error:
            break
        theirs, draws = other, more
    return ours, theirs, draws


def _answers(model: DiffusionLM, requests: list[Request], kind: str, seeds: int, options: Options) -> Row:
    """Whole answers: the model expects those behind their own prompts, and is surprised by those behind others."""
    settings = corrected()
    ours, spread, draws = _as_precise(model, requests, settings, seeds, options)
    jobs = {"ours": lambda: scores(model, requests, settings), "mc": lambda: common(model, requests, draws)}
    times = interleaved(jobs, options.repeats(3), at_most=10)
    correct = _same_bound(ours, spread, options)
    lengths = [len(request.target) for request in requests]
    return compare(
        times["ours"],
        times["mc"],
        name=f"answers of {min(lengths)} to {max(lengths)} tokens behind {kind} prompts at equal standard error",
        against=f"Monte Carlo {draws}, one request at a time",
        held_equal=f"{SAME}; the standard error, over {2 * seeds} seeds, as far as the note says",
        correct=correct,
        note=f"{_errors(ours, spread, settings, draws)} {spread.total / len(requests):.1f} nats an answer.",
    )


def _errors(ours: Spread, theirs: Spread, settings: LikelihoodSettings, draws: int) -> str:
    return (
        f"Root mean square standard error {ours.error:.2f} nats at {ours.passes:.0f} passes a request "
        f"({_label(settings)}), Monte Carlo {theirs.error:.2f} at {draws} draws."
    )


def _same_bound(ours: Spread, theirs: Spread, options: Options) -> str:
    unbiased = abs(ours.total - theirs.total) < 4 * math.hypot(ours.total_error, theirs.total_error)
    return require(unbiased or options.quick, "the summed bounds of both estimators agree within four standard errors")


@dataclass(frozen=True)
class Spread:
    """What repeated estimates of the same requests show: their mean and variance over seeds, and their passes."""

    means: list[float]
    variances: list[float]
    passes: float
    seeds: float

    @property
    def error(self) -> float:
        """Root mean square standard error of one estimate, nats."""
        return math.sqrt(sum(self.variances) / len(self.variances))

    @property
    def total(self) -> float:
        """The sum of the mean bounds, nats."""
        return sum(self.means)

    @property
    def total_error(self) -> float:
        """Standard error of `total`."""
        return math.sqrt(sum(self.variances) / self.seeds)

    def by_length(self, requests: Sequence[Request]) -> list[float]:
        """`error` in each third of the requests by target length, and of all of them."""
        order = sorted(range(len(requests)), key=lambda r: len(requests[r].target))
        third = max(1, len(order) // 3)
        parts = [order[:third], order[third : 2 * third], order[2 * third :], order]
        return [math.sqrt(sum(self.variances[r] for r in part) / max(1, len(part))) for part in parts]


def common_spread(model: DiffusionLM, requests: Sequence[Request], draws: int, seeds: int) -> Spread:
    """The same of Monte Carlo with `draws` masks, from its batches of 32: they are independent and equally many."""
    size = min(32, draws)
    settings = LikelihoodSettings(estimator="mc", mc_draws=size, mc_batch=size)
    batches = spread_of(model, requests, settings, seeds)
    variances = [variance * size / draws for variance in batches.variances]
    return Spread(batches.means, variances, float(draws), seeds * size / draws)


def spread_of(model: DiffusionLM, requests: Sequence[Request], settings: LikelihoodSettings, seeds: int) -> Spread:
    """The estimates of every request under `seeds` seeds."""
    every = [settings.model_copy(update={"seed": seed}) for seed in range(seeds)]
    drawn = [scores(model, requests, each) for each in every]
    nats = torch.tensor([[score.nats for score in each] for each in drawn], dtype=torch.float64)
    passes = sum(score.passes for each in drawn for score in each) / (len(requests) * seeds)
    return Spread(nats.mean(0).tolist(), nats.var(0).tolist(), passes, seeds)


def scores(model: DiffusionLM, requests: Sequence[Request], settings: LikelihoodSettings | None = None) -> list[Score]:
    """Ours: all requests together."""
    return model.nelbo([r.prompt for r in requests], [r.target for r in requests], settings)


def common(model: DiffusionLM, requests: Sequence[Request], draws: int) -> list[float]:
    """Theirs: Monte Carlo, one request after the other, in batches of 32 masks."""
    generator = torch.Generator().manual_seed(0)
    backbone = model.backbone
    return [
        monte_carlo(backbone.model, r.prompt, r.target, backbone.mask_id, draws=draws, generator=generator)
        for r in requests
    ]


@torch.no_grad()
def plain(model: DiffusionLM, request: Request) -> float:
    """The nll of a one-token target from one forward pass of its own."""
    backbone = model.backbone
    logits = _logits(backbone.model, torch.tensor([[*request.prompt, backbone.mask_id]]), backbone.mask_id)
    return -float(logits[0, -1].log_softmax(-1)[request.target[0]])


@torch.no_grad()
def plain_passes(model: DiffusionLM, request: Request, settings: LikelihoodSettings) -> float:
    """Our estimate of one request as a textbook would compute it: each mask of the design is a forward of its own."""
    backbone, target = model.backbone, torch.tensor(request.target)
    key = keyed_hash(settings.seed, token_hash(torch.tensor(request.prompt)), torch.tensor(0))
    design = likelihood_design(len(target), key, settings)
    rows = []
    for masked in design.masked:
        answer = torch.where(masked, backbone.mask_id, target)
        tokens = torch.cat([torch.tensor(request.prompt), answer])[None]
        logits = _logits(backbone.model, tokens, backbone.mask_id)[0, -len(target) :]
        rows.append(-logits.log_softmax(-1).gather(-1, target[:, None])[:, 0])
    return float(estimate(design, torch.stack(rows))[0])


def _label(settings: LikelihoodSettings) -> str:
    return f"{settings.estimator}, budget {settings.budget}"


@stock_rotary()
def _logits(model: nn.Module, tokens: torch.Tensor, mask_id: int) -> torch.Tensor:
    logits = model(input_ids=tokens).logits.float()
    logits[..., mask_id] = -torch.inf
    return logits
