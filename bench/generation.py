"""Generation: the exact decode against the common sampler, then what parallel decoding and prefix reuse give up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench.alternatives import sample_row
from bench.measure import Growth, Result, Row, Times, compare, growth, interleaved, require
from bench.options import Options
from bench.workloads import chat_prompts, encoder, laptop
from dllm.algorithms import algorithm_named
from dllm.config import GenerateSettings
from dllm.core.canvas import canvas_for
from dllm.language_model import Answer, DiffusionLM
from dllm.sampling.sampler import MaskedSampler

SAME = "same trained weights, fp32, threads, prompts, canvas, blocks, greedy choice, one token per pass"
LONGEST_PROMPT = 32
"""Tokens: the laptop model's context of 160 less a canvas of 128."""


def generation(options: Options) -> Result:
    """Answers to a batch of ragged prompts, each token the same."""
    trained = laptop(options)
    model = trained.model
    count, new = (3, 16) if options.quick else (32, 128)
    prompts = chat_prompts(trained, count, LONGEST_PROMPT)
    answered: dict[str, list] = {}

    def job(side: str, ahead: str) -> None:
        settings = GenerateSettings(max_new_tokens=new, ahead=ahead)
        answer = model.answers if side == "ours" else partial(one_by_one, model)
        answered[f"{side} {ahead}"] = answer(prompts, settings)

    sides = [(side, ahead) for ahead in ("hidden", "visible") for side in ("ours", "theirs")]
    jobs = {f"{side} {ahead}": partial(job, side, ahead) for side, ahead in sides}
    # the answers that are compared are those that were timed; a round of theirs takes tens of seconds
    times = interleaved(jobs, options.repeats(3), warmup=int(options.quick), at_most=75)
    rows = []
    for ahead, how in (("hidden", "hidden from the model"), ("visible", "visible as masks")):
        ours, theirs = answered[f"ours {ahead}"], answered[f"theirs {ahead}"]
        same = [(a.text, a.tokens) for a in ours] == [(model.decode(t), model.answer_length(t)) for t in theirs]
        long = sum(answer.tokens for answer in ours) / count
        note = f"Answers take {long:.0f} tokens on average, {_passes(ours):.0f} passes instead of {new}."
        rows.append(
            compare(
                times[f"ours {ahead}"],
                times[f"theirs {ahead}"],
                name=f"generation, {new} tokens, block 32, {count} ragged prompts; later blocks {how}",
                against="one row at a time, full canvas, logits everywhere, no early stop",
                target=options.target(8),
                held_equal=f"{SAME}; what the model attends to",
                correct=require(
                    same, "every timed answer is the same text of the same number of tokens, up to its end"
                ),
                note=note + (" The laptop model is trained to be decoded so." if ahead == "hidden" else ""),
            )
        )
    tokens = [answer.tokens for answer in answered["ours hidden"]]
    setup = {"prompt tokens": [len(prompt) for prompt in prompts], "answer tokens": tokens}
    return Result([*rows, _never_ending(options)], _growth(model, prompts, options), setup)


def continuous(options: Options) -> Result:
    """Rows that end give their place to the next prompt, against batches that wait for their longest answer."""
    trained = laptop(options)
    model = trained.model
    size, count = (2, 6) if options.quick else (16, 96)
    prompts = chat_prompts(trained, count, LONGEST_PROMPT)
    settings = GenerateSettings(batch_size=size, max_new_tokens=32 if options.quick else 128)

    def batches() -> list[Answer]:
        groups = [prompts[low : low + size] for low in range(0, len(prompts), size)]
        return [answer for group in groups for answer in model.answers(group, settings)]

    together = partial(model.answers, prompts, settings)
    correct = require(
        [a.text for a in together()] == [a.text for a in batches()], "every answer is the same text in both orders"
    )
    times = interleaved({"ours": together, "theirs": batches}, options.repeats(5), at_most=25)
    row = compare(
        times["ours"],
        times["theirs"],
        name=f"continuous batching, {len(prompts)} prompts, {size} rows at a time",
        against="fixed batches, each until its last row ends",
        held_equal="same sampler, weights, settings and rows at a time; rows that end leave their batch on both sides",
        correct=correct,
    )
    return Result([row])


def parallel(options: Options) -> Result:
    """Several tokens per pass: how many passes, how much of the exact decode is kept, how long it takes."""
    trained = laptop(options)
    model = trained.model
    prompts = chat_prompts(trained, 4 if options.quick else 32, LONGEST_PROMPT)
    exact = GenerateSettings(max_new_tokens=32 if options.quick else 128)
    variants = {
        "half the passes": {"steps": exact.max_new_tokens // 2},
        "a quarter of the passes": {"steps": exact.max_new_tokens // 4},
        "threshold 0.9": {"reveal_rule": "threshold", "threshold": 0.9},
        "threshold 0.7": {"reveal_rule": "threshold", "threshold": 0.7},
        "factor 1": {"reveal_rule": "factor", "factor": 1.0},
        "entropy bound 0.1": {"reveal_rule": "entropy_bound", "entropy_bound": 0.1},
    }
    return _approximations(model, prompts, exact, variants, "one token per pass", options, "parallel")


def reuse(options: Options) -> Result:
    """Approximate reuse of keys and values outside the active block between refreshes."""
    trained = laptop(options)
    model = trained.model
    prompts = chat_prompts(trained, 4 if options.quick else 16, LONGEST_PROMPT)
    exact = GenerateSettings(ahead="visible", max_new_tokens=32 if options.quick else 128)
    variants = {
        "prefix, refreshed at every pass": {"reuse": "prefix", "refresh": 1},
        "prefix": {"reuse": "prefix"},
        "prefix, refreshed every 8 passes": {"reuse": "prefix", "refresh": 8},
        "dual": {"reuse": "dual"},
        "dual, refreshed every 8 passes": {"reuse": "dual", "refresh": 8},
    }
    return _approximations(model, prompts, exact, variants, "everything computed in every pass", options, "reuse")


def _approximations(
    model: DiffusionLM,
    prompts: list[list[int]],
    exact: GenerateSettings,
    variants: dict[str, dict],
    against: str,
    options: Options,
    name: str,
) -> Result:
    plans = {label: exact.model_copy(update=changes) for label, changes in variants.items()}
    jobs = {"exact": partial(model.answers, prompts, exact)}
    jobs |= {label: partial(model.answers, prompts, plan) for label, plan in plans.items()}
    answers = {label: job() for label, job in jobs.items()}
    times = interleaved(jobs, options.repeats(3), warmup=0, at_most=30)
    wanted = tokens_of(model.backbone, prompts, exact)
    rows, agreement, passes = [], [1.0], [_passes(answers["exact"])]
    for label, plan in plans.items():
        decoded = tokens_of(model.backbone, prompts, plan)
        share = _agreement(model, wanted, decoded)
        texts = sum(a.text == b.text for a, b in zip(answers[label], answers["exact"], strict=True)) / len(prompts)
        agreement.append(share)
        passes.append(_passes(answers[label]))
        rows.append(
            compare(
                times[label],
                times["exact"],
                name=f"{name}: {label}",
                against=against,
                held_equal="same weights, prompts, canvas and blocks; NOT the same tokens, see the note",
                correct="the exact decode is the reference; what agrees with it is counted, not assumed",
                note=f"{passes[-1]:.1f} passes per answer instead of {passes[0]:.1f}; {100 * texts:.0f} % of the "
                f"answers and {100 * share:.1f} % of their tokens are those of the exact decode.",
            )
        )
    curve = Growth(
        name=name,
        title="Agreement with the exact decode",
        x_label="passes per answer",
        y_label="share of equal tokens",
        x=passes,
        lines={"agreement": agreement},
        note=" | ".join(["exact", *plans]),
        log_x=False,
    )
    return Result(rows, [curve])


def _never_ending(options: Options) -> Row:
    """A model of random weights with a large vocabulary: nothing ends early, the head is what costs."""
    vocabulary, count, new = (500, 2, 8) if options.quick else (50_368, 4, 32)
    backbone = encoder(vocabulary, layers=2 if options.quick else 6, context=256)
    model = DiffusionLM(backbone, algorithm_named("mdlm"))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, vocabulary, (20 + 15 * n,), generator=generator).tolist() for n in range(count)]
    settings = GenerateSettings(max_new_tokens=new, early_stop=False)
    jobs = {
        "ours": lambda: tokens_of(backbone, prompts, settings),
        "theirs": lambda: one_by_one(model, prompts, settings),
    }
    correct = require(jobs["ours"]() == jobs["theirs"](), "every token of the canvas is the same")
    times = interleaved(jobs, options.repeats(3), warmup=0, at_most=25)
    return compare(
        times["ours"],
        times["theirs"],
        name=f"generation, {new} tokens, vocabulary {vocabulary:,}, {count} ragged prompts, random weights",
        against="one row at a time, logits everywhere",
        held_equal=SAME.replace("trained", "random"),
        correct=correct,
    )


def _growth(model: DiffusionLM, prompts: list[list[int]], options: Options) -> list[Growth]:
    """Seconds over the number of prompts, and over the length of the canvas."""
    counts, lengths = ((1,), (16,)) if options.quick else ((1, 4, 16, 32), (32, 64, 128))
    batch = {count: (prompts[:count], 32, 3 if count < 16 else 2) for count in counts}
    canvas = {new: (prompts[: 2 if options.quick else 4], new, 3) for new in lengths}
    lines = (
        (batch, "generation-batch", "Generation, 32 tokens", "prompts"),
        (canvas, "generation-canvas", "Generation, 4 prompts", "tokens of the canvas"),
    )
    return [
        growth(
            {x: _both(model, *point, options) for x, point in points.items()},
            name=name,
            title=title,
            x_label=label,
            y_label="seconds",
        )
        for points, name, title, label in lines
    ]


def _both(model: DiffusionLM, prompts: list[list[int]], new: int, rounds: int, options: Options) -> Times:
    settings = GenerateSettings(max_new_tokens=new, ahead="visible")
    jobs = {
        "ours": lambda: model.answers(prompts, settings),
        "one row at a time": lambda: one_by_one(model, prompts, settings),
    }
    return interleaved(jobs, options.repeats(rounds), warmup=0, at_most=8)


def one_by_one(model: DiffusionLM, prompts: list[list[int]], settings: GenerateSettings) -> list[list[int]]:
    """Theirs: the whole canvas of each prompt, one prompt after the other."""
    backbone = model.backbone
    sizes = settings.max_new_tokens, settings.block_size
    hide = settings.ahead == "hidden"
    return [sample_row(backbone.model, prompt, *sizes, backbone.mask_id, hide_ahead=hide) for prompt in prompts]


def tokens_of(backbone, prompts: list[list[int]], settings: GenerateSettings) -> list[list[int]]:
    """Ours, as token ids: every response, ends included."""
    canvas = canvas_for(prompts, settings.max_new_tokens, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    *_, last = MaskedSampler().denoise(backbone, canvas, settings)
    return last.responses()


def _passes(answers: Sequence[Answer]) -> float:
    return sum(answer.passes for answer in answers) / len(answers)


def _agreement(model: DiffusionLM, wanted: list[list[int]], decoded: list[list[int]]) -> float:
    """Share of the exact answers' tokens, their end included, that the other decode has at the same place."""
    same = total = 0
    for a, b in zip(wanted, decoded, strict=True):
        length = min(len(a), model.answer_length(a) + 1)
        same += sum(x == y for x, y in zip(a[:length], b[:length], strict=True))
        total += length
    return same / max(1, total)
