"""Multiple choice in rounds: a choice gets passes only as long as it may still be the best one.

Each round scores the choices that are left with passes and random numbers of its own, the same for all choices of a
question, so that differences are less noisy than values. A choice is out when it is behind the best one by more than
its error allows, by every rule that is still open (`acc`: nats; `acc_norm`: nats by length). The test of a round is
one-sided, of the difference in units of its standard error, at a level of `ERROR` divided by the number of tests that a
question may need: its choices but one, times the rounds. By Bonferroni's inequality a question then loses its best
choice with a probability of at most `ERROR` by each rule, as far as differences are normal.
Sources: Maron and Moore 1997, The racing algorithm, Artificial Intelligence Review 11 (rounds, one level for all
tests); Moore and Lee 1994, Efficient algorithms for minimizing cross validation error (differences in place of values).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy

from dllm.config import LikelihoodSettings
from dllm.core.canvas import Score
from dllm.core.noise import keyed_hash
from dllm.likelihood.requests import Rows

ERROR = 0.05
"""Probability, by one rule, that a question loses its best choice before the last round."""

Estimates = tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]
"""Nats [N], their noise [N, E], the length of which is their standard error, and passes [N]."""


@dataclass(frozen=True)
class Question:
    """What is to be compared: the numbers of K requests; by rule, what the nats of each are divided by [K]."""

    requests: Sequence[int]
    divisors: Mapping[str, Sequence[float]]

    def by(self, rule: str) -> dict[int, float]:
        """What the nats of each request are divided by."""
        return dict(zip(self.requests, self.divisors[rule], strict=True))


@dataclass(frozen=True)
class Verdict:
    """How a race ended: the rounds it took, and by rule the probability that another choice is the best.

    A rule that is not in `doubt` is decided.
    """

    rounds: int
    doubt: dict[str, float]


def race(
    estimates: Callable[[Rows, Rows, LikelihoodSettings, Rows], Estimates],
    prompts: Rows,
    targets: Rows,
    questions: Sequence[Question],
    settings: LikelihoodSettings,
) -> tuple[list[Score], list[Verdict]]:
    """The scores of all choices, each from the passes of its rounds, and a verdict per question.

    estimates: of some prompts and targets, given settings and the prompts that random numbers follow from: that of the
    first choice. A score is the mean over its rounds, weighted by their passes, or what a round says that took all
    masks.
    """
    like = {choice: prompts[question.requests[0]] for question in questions for choice in question.requests}
    nats, passes = numpy.zeros(len(prompts)), numpy.zeros(len(prompts), dtype=numpy.int64)
    noise: list[numpy.ndarray] = [numpy.zeros(0)] * len(prompts)
    open_rules = [dict.fromkeys(question.divisors, list(question.requests)) for question in questions]
    rounds, budgets, spent = [0] * len(questions), settings.rounds or [settings.budget], 0
    for number, budget in enumerate(budgets):
        left = sorted({choice for rules in open_rules for choices in rules.values() for choice in choices})
        seed = settings.seed if number == 0 else int(keyed_hash(settings.seed, number))
        own = settings.model_copy(update={"budget": budget, "seed": seed})
        few = ([prompts[r] for r in left], [targets[r] for r in left])
        spent += budget
        for request, value, error, count in zip(left, *estimates(*few, own, [like[r] for r in left]), strict=True):
            share = budget / spent if error.any() else 1.0
            nats[request] += share * (value - nats[request])
            noise[request] = numpy.concatenate([(1 - share) * noise[request], share * error])
            passes[request] += count
        for index, question in enumerate(questions):
            level = NormalDist().inv_cdf(1 - ERROR / max(1, len(question.requests) - 1) / len(budgets))
            rounds[index] += bool(open_rules[index])
            after = {
                rule: _left(nats, noise, choices, question.by(rule), level)
                for rule, choices in open_rules[index].items()
            }
            open_rules[index] = {rule: choices for rule, choices in after.items() if len(choices) > 1}
    scores = scores_of(nats, noise, passes)
    doubts = [
        {rule: _doubt(nats, noise, choices, question.by(rule)) for rule, choices in rules.items()}
        for question, rules in zip(questions, open_rules, strict=True)
    ]
    return scores, [Verdict(*verdict) for verdict in zip(rounds, doubts, strict=True)]


def _behind(
    nats: numpy.ndarray, noise: list[numpy.ndarray], choices: list[int], by: dict[int, float]
) -> list[tuple[int, float, float]]:
    """(choice, how far it is behind the best one, the standard error of that), the best one first."""
    value = {choice: nats[choice] / by[choice] for choice in choices}
    best = min(choices, key=value.__getitem__)
    return [
        (choice, value[choice] - value[best], length_of(noise[choice] / by[choice] - noise[best] / by[best]))
        for choice in sorted(choices, key=lambda choice: choice != best)
    ]


def _left(
    nats: numpy.ndarray, noise: list[numpy.ndarray], choices: list[int], by: dict[int, float], level: float
) -> list[int]:
    """The choices that are not out."""
    (best, *_), *others = _behind(nats, noise, choices, by)
    return [best, *(choice for choice, gap, error in others if gap < level * error)]


def _doubt(nats: numpy.ndarray, noise: list[numpy.ndarray], choices: list[int], by: dict[int, float]) -> float:
    """The probability, one half at most, that the best choice is not the best."""
    return min(
        0.5, math.fsum(NormalDist().cdf(-gap / error) for _, gap, error in _behind(nats, noise, choices, by)[1:])
    )


def scores_of(nats: numpy.ndarray, noise: Iterable[numpy.ndarray], passes: numpy.ndarray) -> list[Score]:
    """The scores of some `Estimates` [N]."""
    return [Score(*score) for score in zip(nats.tolist(), map(length_of, noise), passes.tolist(), strict=True)]


def length_of(noise: numpy.ndarray) -> float:
    """Rounded once, so that zeros behind it change nothing."""
    return math.sqrt(math.fsum((noise**2).tolist()))
