"""Generation: the exact decode against the common sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from bench.alternatives import sample_batch
from bench.measure import Growth, Result, Row, Times, compare, growth, interleaved, require
from bench.options import Options
from bench.workloads import Laptop, chat_prompts, encoder, laptop
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
        answered[f"{side} {ahead}"] = SIDES[side](model, prompts, settings)

    jobs = {f"{side} {ahead}": partial(job, side, ahead) for ahead in ("hidden", "visible") for side in SIDES}
    # the answers that are compared are those that were timed; a round of theirs takes tens of seconds
    times = interleaved(jobs, options.repeats(3), warmup=int(options.quick), at_most=75)
    rows = []
    for ahead, how in (("hidden", "hidden from the model"), ("visible", "visible as masks")):
        ours = answered[f"ours {ahead}"]
        long = sum(answer.tokens for answer in ours) / count
        note = f"Answers take {long:.0f} tokens on average, {_passes(ours):.0f} passes instead of {new}."
        for side, against in (
            ("one by one", "one row at a time, full canvas, logits everywhere, no early stop"),
            ("batched", "all rows in one padded batch, full canvas, logits everywhere, no early stop"),
        ):
            theirs = answered[f"{side} {ahead}"]
            same = [(a.text, a.tokens) for a in ours] == [(model.decode(t), model.answer_length(t)) for t in theirs]
            rows.append(
                compare(
                    times[f"ours {ahead}"],
                    times[f"{side} {ahead}"],
                    name=f"generation, {new} tokens, block 32, {count} ragged prompts; later blocks {how}",
                    against=against,
                    target=options.target(8 if side == "one by one" else 4),
                    held_equal=f"{SAME}; what the model attends to",
                    correct=require(
                        same, "every timed answer is the same text of the same number of tokens, up to its end"
                    ),
                    note=note + (" The laptop model is trained to be decoded so." if ahead == "hidden" else ""),
                )
            )
    tokens = [answer.tokens for answer in answered["ours hidden"]]
    setup = {"prompt tokens": [len(prompt) for prompt in prompts], "answer tokens": tokens}
    return Result([*rows, *_never_ending(trained, prompts, options)], _growth(model, prompts, options), setup)


def _never_ending(trained: Laptop, prompts: list[list[int]], options: Options) -> Iterator[Row]:
    """Every token of the canvas, against a batched sampler: nothing ends early.

    The laptop's model, and one of random weights with a large vocabulary, whose head is what costs.
    """
    vocabulary, count, new = (500, 2, 8) if options.quick else (50_368, 16, 32)
    backbone = encoder(vocabulary, layers=2 if options.quick else 6, context=256)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(5, vocabulary, (20 + 4 * n,), generator=generator).tolist() for n in range(count)]
    large = DiffusionLM(backbone, algorithm_named("mdlm"))
    trained_block = trained.model.backbone.sidecar.get("block_size", 32)
    own = trained.model, prompts[:count], 16 if options.quick else 64, trained_block
    for what, ahead, (model, given, tokens, block) in (
        ("laptop model, later blocks hidden", "hidden", own),
        ("laptop model, later blocks visible", "visible", own),
        (f"vocabulary {vocabulary:,}, random weights", "visible", (large, drawn, new, 32)),
    ):
        settings = GenerateSettings(max_new_tokens=tokens, block_size=block, ahead=ahead, early_stop=False)
        jobs = {
            "ours": partial(tokens_of, model.backbone, given, settings),
            "theirs": partial(batched, model, given, settings),
        }
        correct = require(jobs["ours"]() == jobs["theirs"](), "every token of the canvas is the same")
        times = interleaved(jobs, options.repeats(5), warmup=0, at_most=30)
        yield compare(
            times["ours"],
            times["theirs"],
            name=f"generation, {tokens} tokens, all of them, block {block}, {len(given)} ragged prompts; {what}",
            against="all rows in one padded batch, full canvas, logits everywhere",
            held_equal=SAME.replace("trained ", ""),
            correct=correct,
            target=options.target(2),
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


def batched(model: DiffusionLM, prompts: list[list[int]], settings: GenerateSettings) -> list[list[int]]:
    """Theirs at its best: the whole canvas of all prompts together."""
    backbone = model.backbone
    sizes = settings.max_new_tokens, settings.block_size
    hide = settings.ahead == "hidden"
    return sample_batch(backbone.model, prompts, *sizes, backbone.mask_id, backbone.pad_id, hide_ahead=hide)


def one_by_one(model: DiffusionLM, prompts: list[list[int]], settings: GenerateSettings) -> list[list[int]]:
    """Theirs as published: the whole canvas of each prompt, one prompt after the other."""
    return [batched(model, [prompt], settings)[0] for prompt in prompts]


def tokens_of(backbone, prompts: list[list[int]], settings: GenerateSettings) -> list[list[int]]:
    """Ours, as token ids: every response, ends included."""
    canvas = canvas_for(prompts, settings.max_new_tokens, mask_id=backbone.mask_id, pad_id=backbone.pad_id)
    *_, last = MaskedSampler().denoise(backbone, canvas, settings)
    return last.responses()


def _passes(answers: Sequence[Answer]) -> float:
    return sum(answer.passes for answer in answers) / len(answers)


SIDES = {"ours": DiffusionLM.answers, "one by one": one_by_one, "batched": batched}
"""Who answers: (model, prompts, settings) -> answers, or their tokens."""
