"""Training: a fine-tuning step on chat lengths against the common ways, and what each of our choices adds."""

from __future__ import annotations

from numpy import ndarray

from bench.alternatives import masked_loss_selected
from bench.measure import Growth, Result, Row, Times, compare, growth, interleaved, require
from bench.memory import peak_mib
from bench.options import Options
from bench.step import SAME, Sizes, Trainer, pool
from dllm.data.tokens import TokenRows

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
    ours = full.ours(rows)
    pairs = [(ours, full.common(rows, random)), (full.ours(grouped_rows), full.common(grouped_rows, grouped))]
    same = all(abs(a - b) < 1e-4 * abs(b) for a, b in pairs)
    correct = require(same, f"same loss ({ours:.5f}) to 1e-4, ours and theirs, on the same masks")
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


def _per_token(times: Times, rows: TokenRows) -> Times:
    useful = int(rows.offsets[-1])
    return {side: [1000 * t / useful for t in taken] for side, taken in times.items()}


def _padding(rows: TokenRows, batches: list[ndarray]) -> float:
    """Share of the positions of padded batches that are padding."""
    lengths = rows.lengths + 1
    positions = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / positions
