"""Training: a fine-tuning step on chat lengths against the common ways, and what each of our choices adds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy import ndarray
from torch import Tensor

from bench.alternatives import masked_loss, masked_loss_selected
from bench.measure import Growth, Result, Row, Times, compare, growth, interleaved, require
from bench.memory import peak_mib
from bench.options import Options
from bench.workloads import VOCABULARY, chat_lengths, encoder, rows_of_lengths
from dllm.config import ModelEntry, OptimizerSettings, Recipe, RunConfig
from dllm.core.batch import row_noise
from dllm.core.corrupt import exact_count
from dllm.core.losses import dense_masked_loss
from dllm.data.collate import ResponseEnd, collate, epoch_batches
from dllm.data.tokens import TokenRows
from dllm.models.load import Backbone
from dllm.objectives.mdlm import MDLM
from dllm.training.engine import Engine, scores_for
from dllm.training.pipeline import Ahead, Part, Source, training_parts
from dllm.training.step import training_step

SAME = (
    "same stock model, weights, fp32 parameters, AdamW, clipping, global batch of 16 rows, masks, loss and threads; "
    "padding is never trained on"
)
ROWS, BATCH = 16, 16
"""Rows of the global batch, and of one padded micro-batch: as many as a laptop's memory holds (published: 48)."""
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """The model and data of a comparison."""

    vocabulary: int = VOCABULARY
    layers: int = 6
    width: int = 256
    rows: int = ROWS
    batch: int = BATCH
    mean: float = 350.0
    longest: int = 1024

    @classmethod
    def of(cls, options: Options, **changes) -> Sizes:
        """The real sizes, or tiny ones."""
        tiny = cls(400, 2, 64, 6, 2, 24.0, 64)
        return replace(tiny if options.quick else cls(), **changes)


class Trainer:
    """One model with its optimiser, and steps on the same rows in our way and in the common ways."""

    def __init__(self, sizes: Sizes, *, bf16: bool = False, **settings):
        self.sizes, self.bf16 = sizes, bf16
        self.backbone: Backbone = encoder(
            sizes.vocabulary, layers=sizes.layers, width=sizes.width, context=sizes.longest + 64
        )
        self.config = run_config(sizes, bf16=bf16, **settings)
        AcceleratorState._reset_state(reset_partial_state=False)
        scores = scores_for(self.config, self.backbone.model, "in_place")
        self.engine = Engine(Accelerator(cpu=True), scores, self.config.optimizer, bf16=bf16)
        self.objective = MDLM(self.config.recipe)
        self.end = ResponseEnd("one", self.backbone.eos_id, longest=sizes.longest)

    def source(self, rows: TokenRows) -> Source:
        """The rows as our pipeline reads them."""
        return Source(rows, self.objective, self.end, pad_id=self.backbone.pad_id, mask_id=self.backbone.mask_id)

    def parts(self, rows: TokenRows, steps: int = 1) -> Iterator[Part]:
        """Our micro-batches."""
        return training_parts(self.source(rows), self.config, first=0, last=steps)

    def ours(self, rows: TokenRows) -> float:
        """Our step; returns its loss."""
        return float(training_step(self.engine, self.objective, self.parts(rows)).loss)

    def common(self, rows: TokenRows, batches: list[ndarray], loss: Callable[..., Tensor] = masked_loss) -> float:
        """The common step: `batches` of rows padded to their longest; returns its loss."""
        total, spent = float(self.source(rows).counted(numpy.concatenate(batches)).sum()), 0.0
        for numbers in batches:
            tokens, attention, masked, share = self.padded(rows, numbers)
            with self._autocast():
                nats = loss(self.backbone.model, tokens, attention, masked, share, self.backbone.mask_id) / total
            nats.backward()
            spent += float(nats.detach())
        self.engine.update()
        return spent

    def padded(self, rows: TokenRows, numbers: ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens, attention, masked [B, L] and the weight of a nat [B] of these rows: the masks our pipeline draws."""
        batch = collate(rows, numbers, pad_id=self.backbone.pad_id, end=self.end)
        noise = row_noise(SEED, 0, batch.sample_ids, batch.tokens.shape[1])
        corrupted = exact_count(batch.maskable, noise.level, noise.place)
        return batch.tokens, batch.attention, corrupted.masked, corrupted.weight

    def plain(self, rows: TokenRows, numbers: ndarray, total: float) -> float:
        """The textbook loss of these rows, without a gradient: the oracle of the tests."""
        tokens, attention, masked, share = self.padded(rows, numbers)
        with torch.no_grad():
            corrupted = torch.where(masked, self.backbone.mask_id, tokens)
            logits = self.backbone.model(input_ids=corrupted, attention_mask=attention.long()).logits
            return float(dense_masked_loss(logits, tokens, masked, share)) / total

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext()


def run_config(sizes: Sizes, *, bf16: bool = False, **settings) -> RunConfig:
    """What our trainer is told; learning rate 0, so that every step of a comparison starts from the same weights."""
    optimizer = OptimizerSettings(learning_rate=1e-30, clip=1.0)
    recipe = Recipe(autocast="bf16" if bf16 else "none", response_end="one")
    named = dict.fromkeys(("name", "init", "init_path", "data", "data_path", "recipe_name"), "bench")
    tokens = max(int(sizes.batch * sizes.mean), sizes.longest)
    budget = {"micro_batch_tokens": tokens, "micro_batch_size": sizes.rows}
    sized = {"global_batch_size": sizes.rows, "length": sizes.longest, "seed": SEED, "steps": 1, "epochs": None}
    rest = {"stop_after": None, "mlm_share": 0.15, "evaluations": 1, "eval_rows": None, "eval_draws": 1}
    model = ModelEntry(new={"model_type": "modernbert"}, tokenizer="bench")
    facts = {"algorithm": "mdlm", "model": model, "recipe": recipe, "optimizer": optimizer}
    return RunConfig(**{**named, **sized, **rest, **facts, **budget, **settings})


@cache
def pool(sizes: Sizes) -> tuple[TokenRows, list[ndarray], TokenRows, list[ndarray]]:
    """Rows with random batches, and rows with length-grouped ones; both drawn from the same chat lengths.

    Grouping needs a pool much larger than a batch, as in practice: of the window's sorted batches those at evenly
    spread ranks are taken, so that lengths are distributed as among the random rows.
    """
    count = sizes.rows // sizes.batch
    window = max(32 * sizes.batch, 256)
    lengths = chat_lengths(window, SEED, sizes.mean, sizes.longest - 1)
    # of many random draws the one whose padding is nearest to their mean: neither lucky nor unlucky
    draws = [numpy.random.default_rng(draw).permutation(window)[: sizes.rows] for draw in range(100)]
    waste = numpy.array([_waste(lengths[draw].reshape(-1, sizes.batch)) for draw in draws])
    random = draws[int(abs(waste - waste.mean()).argmin())]
    batches = epoch_batches(lengths, sizes.batch, SEED, 0, grouped=True)
    by_length = batches[numpy.argsort(lengths[batches].mean(1))]
    grouped = by_length[(numpy.arange(count) * 2 + 1) * len(by_length) // (2 * count)].reshape(-1)
    found = [rows_of_lengths(lengths[chosen], sizes.vocabulary) for chosen in (random, grouped)]
    cut = [numpy.arange(sizes.rows).reshape(-1, sizes.batch)] * 2
    return found[0], list(cut[0]), found[1], list(cut[1])


def sft(options: Options) -> Result:
    """A fine-tuning step on chat lengths."""
    sizes = Sizes.of(options)
    rows, random, grouped_rows, grouped = pool(sizes)
    full, half = Trainer(sizes), Trainer(sizes, bf16=True)
    total = float(full.source(rows).counted(numpy.arange(sizes.rows)).sum())

    ours = full.ours(rows)
    near = lambda a, b, share: abs(a - b) < share * abs(b)  # noqa: E731
    same = near(ours, full.common(rows, random), 1e-4)
    same &= near(ours, sum(full.plain(rows, part, total) for part in random), 1e-4)
    same &= near(full.ours(grouped_rows), full.common(grouped_rows, grouped), 1e-4)
    correct = require(same, f"same loss ({ours:.5f}) to 1e-4, ours, theirs and the textbook's, on the same masks")
    close = near(half.ours(rows), ours, 0.01)
    rounded = require(close, "the loss under bf16 autocast is that in fp32 to 1 %")

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
    useful = {name: int((grouped_rows if "grouped" in name else rows).offsets[-1]) for name in jobs}
    times = {name: [1000 * t / useful[name] for t in taken] for name, taken in seconds.items()}
    name = f"SFT step, chat lengths, ModernBERT {sizes.layers} x {sizes.width}, vocabulary {sizes.vocabulary:,}"
    unit = "ms per useful token"
    facts = {"held_equal": SAME, "correct": correct, "unit": unit}
    waste = {"random": _padding(rows, random), "grouped": _padding(grouped_rows, grouped)}
    other_rows = f"{SAME}; rows of both sides drawn from the same lengths"
    rows_found = [
        compare(
            times["ours"],
            times["random"],
            name=f"{name}, fp32",
            against="random batches padded to the longest, logits and cross-entropy everywhere, fp32",
            target=options.target(8),
            note=f"{waste['random']:.0%} of their positions are padding.",
            **facts,
        ),
        compare(
            times["ours"],
            times["selected"],
            name=f"{name}, fp32",
            against="the same, cross-entropy at masked positions only, fp32",
            **facts,
        ),
        compare(
            times["ours"],
            times["grouped"],
            name=f"{name}, fp32",
            against="batches grouped by length, padded, logits and cross-entropy everywhere, fp32",
            target=options.target(2.5),
            note=f"{waste['grouped']:.0%} of their positions are padding.",
            **facts | {"held_equal": other_rows},
        ),
        compare(
            times["bf16"],
            times["grouped"],
            name=f"{name}, bf16 autocast",
            against="batches grouped by length, padded, logits and cross-entropy everywhere, fp32",
            target=options.target(4.5),
            **facts | {"held_equal": f"{other_rows}; not the precision of products", "correct": rounded},
        ),
        compare(
            times["bf16"],
            times["grouped bf16"],
            name=f"{name}, bf16 autocast",
            against="batches grouped by length, padded, logits and cross-entropy everywhere, bf16 autocast",
            **facts | {"held_equal": other_rows, "correct": rounded},
        ),
    ]
    rows_found += _memory(sizes, options)
    setup = {"rows": sizes.rows, "useful tokens": useful, "padding": waste, "seconds per step": seconds}
    return Result(rows_found, _growth(options), setup)


def _memory(sizes: Sizes, options: Options) -> list[Row]:
    """Peak memory of one step, each in a fresh process."""
    held = f"{SAME}; each in a process of its own, the memory after loading subtracted"
    name = f"peak memory of an SFT step, vocabulary {sizes.vocabulary:,}"
    facts = {"unit": "MiB", "held_equal": held, "correct": "the steps of the rows above, one each"}
    random = "random batches padded to the longest, logits everywhere, fp32"
    ours, theirs = [peak_mib("ours", quick=options.quick)], [peak_mib("random", quick=options.quick)]
    rows = [compare(ours, theirs, name=f"{name}, fp32", against=random, target=options.target(4), **facts)]
    if options.quick:
        return rows
    chunked, half, grouped = ([peak_mib(way)] for way in ("ours-chunked", "ours-bf16", "grouped"))
    against = "batches grouped by length, padded, logits everywhere, fp32"
    rounded = facts | {"held_equal": f"{held}; not the precision of products"}
    return [
        *rows,
        compare(ours, grouped, name=f"{name}, fp32", against=against, **facts),
        compare(chunked, theirs, name=f"{name}, fp32, head in chunks of 512", against=random, **facts),
        compare(half, theirs, name=f"{name}, bf16 autocast", against=random, **rounded),
    ]


def _growth(options: Options) -> list[Growth]:
    small = {"rows": 4 if options.quick else 8, "batch": 2 if options.quick else 8, "layers": 2}
    lengths = (16, 32) if options.quick else (64, 128, 256, 512)
    vocabularies = (200, 400) if options.quick else (1_000, 8_000, 50_368)
    by_length = {n: _pair(Sizes.of(options, mean=n, longest=3 * n, vocabulary=800, **small), options) for n in lengths}
    by_words = {
        v: _pair(
            Sizes.of(options, mean=24 if options.quick else 150, longest=64 if options.quick else 450, vocabulary=v)
            if options.quick
            else Sizes.of(options, mean=150, longest=450, vocabulary=v, **small),
            options,
        )
        for v in vocabularies
    }
    unit = "ms per useful token"
    note = "ModernBERT with 2 layers, 8 rows a step, fp32."
    return [
        growth(
            by_length,
            name="training-length",
            title="SFT step, vocabulary 800",
            x_label="mean row length, tokens",
            y_label=unit,
            note=note,
        ),
        growth(
            by_words,
            name="training-vocabulary",
            title="SFT step, mean length 150",
            x_label="vocabulary",
            y_label=unit,
            note=note,
        ),
    ]


def _pair(sizes: Sizes, options: Options) -> Times:
    """Our step and the common one at other sizes, ms per useful token."""
    trainer = Trainer(sizes)
    rows, random, *_ = pool(sizes)
    jobs = {
        "ours": lambda: trainer.ours(rows),
        "random batches, padded, logits everywhere": lambda: trainer.common(rows, random),
    }
    times = interleaved(jobs, options.repeats(3), at_most=6)
    return {side: [1000 * t / int(rows.offsets[-1]) for t in taken] for side, taken in times.items()}


def packing(options: Options) -> Result:
    """Our step on packed rows, on padded rows, with the head in chunks, compiled, and with prefetched inputs."""
    sizes = Sizes.of(options, **({} if options.quick else {"vocabulary": 8_192}))
    rows, *_ = pool(sizes)
    packed, padded = Trainer(sizes), Trainer(sizes, layout="padded", micro_batch_tokens=None, micro_batch_size=4)
    chunked = Trainer(sizes, head_chunk=64 if options.quick else 512)
    losses = [trainer.ours(rows) for trainer in (packed, padded, chunked)]
    alike = max(losses) - min(losses) < 1e-4 * abs(losses[0])
    correct = require(alike, f"same loss ({losses[0]:.5f}) to 1e-4, packed, padded and in chunks")
    jobs = {
        "packed": lambda: packed.ours(rows),
        "padded": lambda: padded.ours(rows),
        "chunked": lambda: chunked.ours(rows),
    }
    times = _per_token(interleaved(jobs, options.repeats(5), at_most=25), rows)
    name = f"SFT step, ModernBERT {sizes.layers} x {sizes.width}, vocabulary {sizes.vocabulary:,}"
    facts = {"unit": "ms per useful token", "held_equal": SAME, "correct": correct}
    found = [
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
    return Result([*found, _ungrouped(sizes, packed, options), _prefetch(sizes, options)])


def compilation(options: Options) -> Result:
    """torch.compile of the backbone; skipped where there is no C++ compiler."""
    if options.quick:
        return Result(skipped="a smoke run does not compile")
    sizes = Sizes.of(options, vocabulary=8_192, rows=8, layers=4)
    rows, *_ = pool(sizes)
    eager, compiled = Trainer(sizes), Trainer(sizes, compile=True)
    try:
        loss = compiled.ours(rows)
    except Exception as fault:  # the compiler's errors have no common class, and they all mean the same here
        return Result(skipped=f"torch.compile does not work here: {str(fault).strip().splitlines()[0][:200]}")
    correct = require(abs(loss - eager.ours(rows)) < 1e-3 * abs(loss), "same loss to 1e-3, compiled or not")
    jobs = {"compiled": lambda: compiled.ours(rows), "eager": lambda: eager.ours(rows)}
    times = _per_token(interleaved(jobs, options.repeats(5), at_most=20), rows)
    row = compare(
        times["compiled"],
        times["eager"],
        name=f"SFT step, ModernBERT {sizes.layers} x {sizes.width}, vocabulary {sizes.vocabulary:,}: torch.compile",
        against="ours, not compiled",
        unit="ms per useful token",
        held_equal=SAME,
        correct=correct,
        note="Compilation itself, about a minute, is not counted.",
    )
    return Result([row])


def _ungrouped(sizes: Sizes, packed: Trainer, options: Options) -> Row:
    """Forward and backward of one micro-batch of random lengths: packed against padded, with the same head."""
    rows, random, *_ = pool(sizes)
    source = packed.source(rows)
    whole = numpy.concatenate(random)
    inputs = source.inputs(whole, 0, sizes.longest, lambda ids, width: row_noise(SEED, 0, ids, width))
    other = Trainer(sizes, layout="padded")
    sides = {"packed": packed.engine.model, "padded": other.engine.model}

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
        unit="ms per useful token",
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

    def run(parts: Iterator[Part]) -> None:
        for _ in range(steps):
            training_step(trainer.engine, trainer.objective, _one_step(parts))

    def ahead() -> None:
        with Ahead(trainer.parts(rows, steps)) as parts:
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


def _waste(lengths: ndarray) -> float:
    """Padded positions over real tokens of batches [N, B] of row lengths."""
    return float((lengths.max(1) * lengths.shape[1]).sum() / lengths.sum())


def _one_step(parts: Iterator[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        if part.last:
            return


def _per_token(times: Times, rows: TokenRows) -> Times:
    useful = int(rows.offsets[-1])
    return {side: [1000 * t / useful for t in taken] for side, taken in times.items()}


def _padding(rows: TokenRows, batches: list[ndarray]) -> float:
    """Share of the positions of padded batches that are padding."""
    lengths = rows.lengths + 1
    positions = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / positions
