"""Training: a fine-tuning step on chat lengths against the common ways, and what each of our choices adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy
from numpy import ndarray

from bench.alternatives import masked_loss_selected
from bench.measure import Growth, Result, Row, Times, compare, growth, interleaved, require
from bench.memory import peak_mib
from bench.options import Options
from bench.step import SAME, SEED, Sizes, Trainer, pool
from dllm.core.batch import row_noise
from dllm.data.tokens import TokenRows
from dllm.training.micro_batches import MicroBatch, Prefetcher, one_step

UNIT = "ms per useful token"
EVERYWHERE = "logits and cross-entropy everywhere"
GROUPED = f"batches grouped by length, padded, {EVERYWHERE}"
OTHER_ROWS = f"{SAME}; rows of both sides drawn from the same lengths"


def sft(options: Options) -> Result:
    """A fine-tuning step on chat lengths."""
    sizes = Sizes.of(options)
    rows, random, grouped_rows, grouped = pool(sizes)
    full, half = Trainer(sizes), Trainer(sizes, bf16=True)
    correct, rounded = _checked(full, half, sizes)
    jobs = {
        "ours": lambda: full.ours(rows),
        "bf16": lambda: half.ours(rows),
        "random": lambda: full.common(rows, random),
        "selected": lambda: full.common(rows, random, masked_loss_selected),
        "grouped": lambda: full.common(grouped_rows, grouped),
        "grouped bf16": lambda: half.common(grouped_rows, grouped),
    }
    # each side has run before, for the check above; the common ways take tens of seconds a round
    seconds = interleaved(jobs, options.repeats(5), warmup=0, at_most=120)
    useful = {side: int((grouped_rows if "grouped" in side else rows).offsets[-1]) for side in jobs}
    times = {side: [1000 * t / useful[side] for t in taken] for side, taken in seconds.items()}
    waste = {"random": _padding(rows, random), "grouped": _padding(grouped_rows, grouped)}
    notes = {side: f"{share:.0%} of their positions are padding." for side, share in waste.items()}
    same = {"held_equal": SAME, "correct": correct}
    other = same | {"held_equal": OTHER_ROWS}
    half_products = {"held_equal": f"{OTHER_ROWS}; not the precision of products", "correct": rounded}
    comparisons = (  # our side, theirs, what theirs is, the wanted ratio, the facts
        ("ours", "random", f"random batches padded to the longest, {EVERYWHERE}, fp32", 8, same),
        ("ours", "selected", "the same, cross-entropy at masked positions only, fp32", None, same),
        ("ours", "grouped", f"{GROUPED}, fp32", 2.5, other),
        ("bf16", "grouped", f"{GROUPED}, fp32", 4.5, half_products),
        ("bf16", "grouped bf16", f"{GROUPED}, bf16 autocast", None, other | {"correct": rounded}),
    )
    name = f"SFT step, chat lengths, ModernBERT {sizes.layers} x {sizes.width}, vocabulary {sizes.vocabulary:,}"
    compared = []
    for mine, theirs, against, asked, facts in comparisons:
        title = f"{name}, {'fp32' if mine == 'ours' else 'bf16 autocast'}"
        facts = facts | {"note": notes.get(theirs, "") if mine == "ours" else "", "target": options.target(asked)}
        compared.append(compare(times[mine], times[theirs], name=title, against=against, unit=UNIT, **facts))
    setup = {"rows": sizes.rows, "useful tokens": useful, "padding": waste, "seconds per step": seconds}
    return Result(compared + _memory(sizes, options), _growth(options), setup)


def _checked(full: Trainer, half: Trainer, sizes: Sizes) -> tuple[str, str]:
    """That all ways have the same loss, and that bf16 autocast is close to it."""
    rows, random, grouped_rows, grouped = pool(sizes)
    total = float(full.split(rows).ended(numpy.arange(sizes.rows)).targets.sum())
    ours = full.ours(rows)
    pairs = [(ours, full.common(rows, random)), (ours, sum(full.plain(rows, part, total) for part in random))]
    pairs.append((full.ours(grouped_rows), full.common(grouped_rows, grouped)))
    same = all(abs(a - b) < 1e-4 * abs(b) for a, b in pairs)
    correct = require(same, f"same loss ({ours:.5f}) to 1e-4, ours, theirs and the textbook's, on the same masks")
    close = abs(half.ours(rows) - ours) < 0.01 * abs(ours)
    return correct, require(close, "the loss under bf16 autocast is that in fp32 to 1 %")


def _memory(sizes: Sizes, options: Options) -> list[Row]:
    """Peak memory of one step, each in a fresh process."""
    held = f"{SAME}; each in a process of its own, the memory after loading subtracted"
    rounded = f"{held}; not the precision of products"
    random = "random batches padded to the longest, logits everywhere, fp32"
    grouped = "batches grouped by length, padded, logits everywhere, fp32"
    comparisons = [  # our side, theirs, what ours is, what theirs is, the wanted ratio, what is equal
        ("ours", "random", "fp32", random, 4, held),
        ("ours", "grouped", "fp32", grouped, None, held),
        ("ours-chunked", "random", "fp32, head in chunks of 512", random, None, held),
        ("ours-bf16", "random", "bf16 autocast", random, None, rounded),
    ]
    comparisons = comparisons[:1] if options.quick else comparisons
    ways = {way for mine, theirs, *_ in comparisons for way in (mine, theirs)}
    peaks = {way: [peak_mib(way, quick=options.quick)] for way in ways}
    facts = {"unit": "MiB", "correct": "the steps of the rows above, one each"}
    name = f"peak memory of an SFT step, vocabulary {sizes.vocabulary:,}"
    return [
        compare(
            peaks[mine],
            peaks[theirs],
            name=f"{name}, {kind}",
            against=against,
            target=options.target(asked),
            held_equal=equal,
            **facts,
        )
        for mine, theirs, kind, against, asked, equal in comparisons
    ]


def _growth(options: Options) -> list[Growth]:
    """The time of a step over the mean row length and over the vocabulary, at small sizes."""
    quick = options.quick
    small = {"rows": 4, "batch": 2, "layers": 2} if quick else {"rows": 8, "batch": 8, "layers": 2}
    text = {"mean": 24, "longest": 64} if quick else {"mean": 150, "longest": 450, **small}
    lengths = (16, 32) if quick else (64, 128, 256, 512)
    vocabularies = (200, 400) if quick else (1_000, 8_000, 50_368)
    by_length = {n: {"mean": n, "longest": 3 * n, "vocabulary": 800, **small} for n in lengths}
    by_words = {v: {"vocabulary": v, **text} for v in vocabularies}
    facts = {"y_label": UNIT, "note": "ModernBERT with 2 layers, 8 rows a step, fp32."}
    lines = (
        (by_length, "training-length", "SFT step, vocabulary 800", "mean row length, tokens"),
        (by_words, "training-vocabulary", "SFT step, mean length 150", "vocabulary"),
    )
    return [
        growth(
            {x: _pair(Sizes.of(options, **changes), options) for x, changes in points.items()},
            name=name,
            title=title,
            x_label=label,
            **facts,
        )
        for points, name, title, label in lines
    ]


def _pair(sizes: Sizes, options: Options) -> Times:
    """Our step and the common one at other sizes, ms per useful token."""
    trainer = Trainer(sizes)
    rows, random, *_ = pool(sizes)
    jobs = {
        "ours": lambda: trainer.ours(rows),
        "random batches, padded, logits everywhere": lambda: trainer.common(rows, random),
    }
    return _per_token(interleaved(jobs, options.repeats(3), at_most=6), rows)


def packing(options: Options) -> Result:
    """Our step on packed rows, on padded rows, with the head in chunks, and with prefetched inputs."""
    sizes = Sizes.of(options, **({} if options.quick else {"vocabulary": 8_192}))
    rows, *_ = pool(sizes)
    trainers = {
        "packed": Trainer(sizes),
        "padded": Trainer(sizes, padded=True, micro_batch_tokens=None, micro_batch_size=4),
        "chunked": Trainer(sizes, logits=64 if options.quick else 512),
    }
    losses = [trainer.ours(rows) for trainer in trainers.values()]
    alike = max(losses) - min(losses) < 1e-4 * abs(losses[0])
    correct = require(alike, f"same loss ({losses[0]:.5f}) to 1e-4, packed, padded and in chunks")
    jobs = {side: lambda trainer=trainer: trainer.ours(rows) for side, trainer in trainers.items()}
    times = _per_token(interleaved(jobs, options.repeats(5), at_most=25), rows)
    name = f"SFT step, ModernBERT {sizes.layers} x {sizes.width}, vocabulary {sizes.vocabulary:,}"
    facts = {"unit": UNIT, "held_equal": SAME, "correct": correct}
    compared = [
        compare(
            times["packed"],
            times["padded"],
            name=f"{name}: packed rows",
            against="ours, rows of like length padded to the longest of 4",
            note="Both compute the head at masked positions only; without grouping by length padding costs far more.",
            **facts,
        ),
        compare(
            times["packed"],
            times["chunked"],
            name=f"{name}: plain head",
            against="ours, head and cross-entropy in chunks",
            note="Chunks are there to save memory, not time; below 1 they are faster.",
            **facts,
        ),
    ]
    return Result([*compared, _ungrouped(sizes, trainers["packed"], options), _prefetch(sizes, options)])


def _ungrouped(sizes: Sizes, packed: Trainer, options: Options) -> Row:
    """Forward and backward of one micro-batch of random lengths: packed against padded, with the same head."""
    rows, random, *_ = pool(sizes)
    split = packed.split(rows)
    whole = numpy.concatenate(random)
    inputs = split.inputs(split.ended(whole), lambda ids, width: row_noise(SEED, 0, ids, width))
    sides = {"packed": packed.devices.model, "padded": Trainer(sizes, padded=True).devices.model}

    def job(model) -> Callable[[], None]:
        def run() -> None:
            packed.objective.loss(model, inputs, denominator=1.0).loss.backward()
            model.zero_grad()

        return run

    times = interleaved({side: job(model) for side, model in sides.items()}, options.repeats(5), at_most=15)
    times = _per_token(times, rows)
    return compare(
        times["packed"],
        times["padded"],
        name="forward and backward of one micro-batch of random chat lengths, packed",
        against="ours, padded to the longest",
        unit=UNIT,
        held_equal=SAME,
        correct="the loss was compared above",
        note=f"{_padding(rows, [whole]):.0%} of the padded positions are padding.",
    )


def _prefetch(sizes: Sizes, options: Options) -> Row:
    """Inputs made by a thread ahead of the step, against inputs made in the step."""
    small = replace(sizes, layers=1, width=64, vocabulary=400, mean=60.0, longest=256)
    rows, *_ = pool(small)
    trainer = Trainer(small)
    steps = 4 if options.quick else 20

    def run(parts: Iterator[MicroBatch]) -> None:
        for _ in range(steps):
            trainer.devices.step(trainer.objective, one_step(parts))

    def ahead() -> None:
        with Prefetcher(trainer.parts(rows, steps)) as parts:
            run(parts)

    times = interleaved({"ahead": ahead, "in step": lambda: run(trainer.parts(rows, steps))}, options.repeats(7))
    return compare(
        times["ahead"],
        times["in step"],
        name=f"{steps} steps with inputs made ahead by a thread (1 layer, 64 wide)",
        against="inputs made in the step",
        held_equal=SAME,
        correct="the same micro-batches in the same order (tests)",
        note="On a CPU the thread takes its time from the same cores; on an accelerator it hides behind the step.",
    )


def _per_token(times: Times, rows: TokenRows) -> Times:
    useful = int(rows.offsets[-1])
    return {side: [1000 * t / useful for t in taken] for side, taken in times.items()}


def _padding(rows: TokenRows, batches: list[ndarray]) -> float:
    """Share of the positions of padded batches that are padding."""
    lengths = rows.lengths + 1
    positions = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / positions
