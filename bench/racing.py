"""Multiple choice: how often another choice than the exact one wins, and what that takes."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench.likelihood import SAME, common, corrected, scores
from bench.measure import Result, compare, interleaved, require
from bench.options import Options
from bench.workloads import Laptop, Request, laptop
from dllm.config import LikelihoodSettings
from dllm.core.canvas import Score
from dllm.language_model import DiffusionLM
from dllm.likelihood.policy import ENUMERATION_LIMIT
from dllm.likelihood.racing import Question

Questions = list[list[Request]]


def racing(options: Options) -> Result:
    """Questions whose exact winner is known: by race, by a fixed budget, and by Monte Carlo as published."""
    trained = laptop(options)
    model, settings = trained.model, corrected()
    questions = ending_questions(trained, 3 if options.quick else 240)
    seeds, timed = (2, 2) if options.quick else (4, 12)
    fixed = settings.model_copy(update={"rounds": None})
    exact = winners(questions, scores(model, _all(questions), LikelihoodSettings(estimator="enumerate")))

    def published(draws: int) -> Callable[[int], list[Score]]:
        drawn = LikelihoodSettings(estimator="mc", mc_draws=draws, mc_batch=min(32, draws))
        return lambda seed: scores(model, _all(questions), drawn.model_copy(update={"seed": seed}))

    ways: dict[str, Callable[[int], list[Score]]] = {
        "race": lambda seed: race(model, questions, settings.model_copy(update={"seed": seed})),
        "fixed": lambda seed: scores(model, _all(questions), fixed.model_copy(update={"seed": seed})),
        "mc": published(8 if options.quick else 128),
        "mc32": published(8 if options.quick else 32),
    }
    wrong, passes = {}, {}
    for name, way in ways.items():
        found = [way(seed) for seed in range(seeds)]
        pairs = [pair for each in found for pair in zip(winners(questions, each), exact, strict=True)]
        wrong[name] = 100 * sum(a != b for a, b in pairs) / len(pairs)
        passes[name] = sum(score.passes for each in found for score in each) / len(_all(questions)) / seeds
    few = questions[:: max(1, len(questions) // timed)][:timed]
    alone = [score for question in few for score in race(model, [question], settings)]
    same = all(
        abs(a.nats - b.nats) < 1e-3  # a forward rounds by the size of its batch
        for a, b in zip(alone, race(model, few, settings), strict=True)
    )
    correct = require(same, "a question alone has the scores that it has in a batch, to 0.001 nats")
    draws = 8 if options.quick else 128
    jobs = {
        "ours": lambda: race(model, few, settings),
        "mc": lambda: common(model, _all(few), draws),
        "mc32": lambda: common(model, _all(few), min(32, draws)),
        "fixed": lambda: scores(model, _all(few), fixed),
    }
    times = interleaved(jobs, options.repeats(5), at_most=60)
    lengths = [len(request.target) for request in _all(questions)]
    note = (
        f"Another winner than by all masks, of {len(questions)} questions under {seeds} seeds: {wrong['race']:.1f} % "
        f"by race, {wrong['fixed']:.1f} % with {fixed.budget} passes each, {wrong['mc']:.1f} % with Monte Carlo 128, "
        f"{wrong['mc32']:.1f} % with 32. Different passes a choice: {passes['race']:.1f} by race, "
        f"{passes['fixed']:.1f} with the budget."
    )
    name = f"multiple choice, endings of {min(lengths)} to {max(lengths)} tokens, in rounds"
    facts = {"name": name, "held_equal": SAME, "correct": correct, "note": note}
    rows = [
        compare(
            times["ours"],
            times["mc"],
            against="Monte Carlo 128, one request at a time",
            target=options.target(20),
            **facts,
        ),
        compare(times["ours"], times["mc32"], against="Monte Carlo 32, one request at a time", **facts),
        compare(times["ours"], times["fixed"], against=f"{fixed.budget} passes for every choice", **facts),
    ]
    setup = {"questions": len(questions), "seeds": seeds, "timed questions": len(few), "other winners, %": wrong}
    return Result(rows, [], setup | {"different passes a choice": passes})


def race(model: DiffusionLM, questions: Questions, settings: LikelihoodSettings) -> list[Score]:
    """The scores of all choices, as `acc` compares them."""
    numbers = iter(range(len(_all(questions))))
    asked = [Question([next(numbers) for _ in question], {"acc": [1.0] * len(question)}) for question in questions]
    prompts, targets = zip(*((request.prompt, request.target) for request in _all(questions)), strict=True)
    return model.race(prompts, targets, asked, settings)[0]


def winners(questions: Questions, found: list[Score]) -> list[int]:
    """The number of the best choice of each question."""
    nats = iter(score.nats for score in found)
    values = [[next(nats) for _ in question] for question in questions]
    return [min(range(len(each)), key=each.__getitem__) for each in values]


def _all(questions: Questions) -> list[Request]:
    return [request for question in questions for request in question]


def ending_questions(laptop: Laptop, count: int) -> Questions:
    """Questions of several tokens a choice, few enough to go through all masks, from the benchmarks of the world."""
    if laptop.benchmarks is None:
        rows = [laptop.rows.row(number).tolist() for number in range(4 * count)]
        return [[Request(rows[4 * n][:20], rows[4 * n + k][20 : 25 + k]) for k in range(4)] for n in range(count)]
    encode, found = laptop.model.encode_prompt, []
    for line in (laptop.benchmarks / "hellaswag" / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = encode([{"role": "user", "content": row["ctx"]}])
        found.append([Request(prompt, list(encode(f" {ending}"))) for ending in row["endings"]])
    for line in (laptop.benchmarks / "winogrande" / "validation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before, behind = row["sentence"].split("_")
        prompts = [encode([{"role": "user", "content": before + row[name]}]) for name in ("option1", "option2")]
        found.append([Request(prompt, list(encode(behind))) for prompt in prompts])
    fit = [each for each in found if all(1 < len(request.target) <= ENUMERATION_LIMIT for request in each)]
    return fit[:: max(1, len(fit) // count)][:count]
