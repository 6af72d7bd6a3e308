"""The equations: FLOPs, seconds, memory and disk of training, scoring and generating.

GiB are 2^30 bytes, GB 10^9. Nothing here knows the workflow; `project` puts a configuration's numbers in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dllm.algorithms import algorithm_named
from dllm.config import BenchmarkSize, GenerateSettings, Recipe, RunEntry, Scorer, Shape
from dllm.core.memory import logits_at_once
from dllm.families import DIFFUSION_GEMMA, RENOISING_PASSES
from dllm.planning.data import Prepared
from dllm.planning.hardware import Hardware
from dllm.planning.passes import generation_passes, question_passes
from dllm.planning.shapes import (
    TRAINING,
    adapter_parameters,
    forward_flops,
    head_flops,
    head_width,
    is_gated,
    muon_flops,
    parameters,
)

GIB = 2**30

TRAINING_PROCESS_GIB = 0.62
"""Resident memory of a training process before its tensors: Python, torch, transformers, accelerate."""

SCORING_PROCESS_GIB = 0.50
"""The same of an evaluation, with lm-eval."""

CPU_SLACK = 3.0
"""Memory that a CPU process holds for each byte of tensors alive at the peak: its allocator keeps what rows of other
lengths left behind. Calibrated on the laptop run, like the two constants above."""

CPU_BF16_GIB = 0.25
"""What a CPU holds more with bf16 weights: its matrix products keep reordered copies."""

CUDA_GIB = 1.5
"""Context, kernels and workspaces on an accelerator."""

GPU_HOST_GIB = 5.0
"""Resident memory of a process that drives an accelerator, before its weights pass through it."""

QLORA_BYTES = 0.52
"""Bytes of a weight in four bits, with its share of the doubly quantized scales (arXiv:2305.14314)."""

HEAD_ROWS = 4096
"""Positions whose logits are held at once while scoring."""


@dataclass(frozen=True)
class Place:
    """Where a job runs: `devices` accelerators on `nodes` machines, or `cores` of a processor."""

    hardware: Hardware
    devices: int = 0
    cores: int = 1
    nodes: int = 1

    @property
    def units(self) -> int:
        """What the hardware's peak counts for: accelerators, or cores."""
        return self.devices if self.hardware.is_gpu else self.cores


@dataclass(frozen=True)
class Cost:
    """One job: tokens read, FLOPs, forward passes, wall seconds, memory of the host (per machine) and of a device,
    disk it leaves, and disk it needs meanwhile on top (all GiB)."""

    tokens: float = 0.0
    flops: float = 0.0
    passes: float = 0.0
    seconds: float = 0.0
    host_gib: float = 0.0
    device_gib: float = 0.0
    kept_gib: float = 0.0
    scratch_gib: float = 0.0
    steps: int = 0


# --------------------------------------------------------------------------------------------------------------------
# Training


def training_steps(run: RunEntry, rows: float) -> int:
    """Optimiser steps of a run on `rows` rows, as the trainer lays them out."""
    policy = run.policy
    prompts = run.global_batch_size // (policy.num_generations if policy else 1)
    per_epoch = max(1, int(rows) // prompts) * (policy.num_iterations if policy else 1)
    total = run.steps or max(1, round((run.epochs or 0) * per_epoch))
    return min(total, run.stop_after or total)


def training(
    run: RunEntry, recipe: Recipe, shape: Shape, data: Prepared, place: Place, test_rows: int | None = None
) -> Cost:
    """A training run; test_rows: of its dataset's entry.

    FLOPs = tokens x 3 F(n) + masked x 3 H + evaluation, F and H the forward FLOPs of a token and of the head (6 N and
    12 L d n in all); with activation checkpointing 4 F(n), as the layers run forward once more; with adapters one less,
    as frozen matrices have no gradients. Muon adds its own per step.
    Seconds = start-up + FLOPs / (devices x peak x utilisation) + steps x overhead.
    """
    steps, longest = training_steps(run, data.train.rows), min(run.length, data.train.longest)
    rows = steps * run.global_batch_size
    mean = data.train.tokens / max(1.0, data.train.rows)
    end = _end_tokens(run, recipe, data)
    algorithm = algorithm_named(run.algorithm)
    share, causal = algorithm.predicted_share(run), algorithm.causal
    targets = data.train.targets / max(1.0, data.train.rows) + end
    width, doubled = min(run.length, data.train.weighted_length + end), 2 if algorithm.blocks == "trained" else 1
    forward, head = forward_flops(shape, width, causal=causal), head_flops(shape)
    checkpointing, times = run.activation_checkpointing, TRAINING - (run.adapter is not None)
    forwarded = forwarded_tokens(run, recipe, mean + end, targets)
    flops = rows * (forwarded * forward * (times + checkpointing) + targets * share * head * times)
    flops += rows * algorithm.previews * targets * (forward + head)
    evaluated = _evaluated_rows(run, data, test_rows) * run.eval_draws
    test_mean = data.test.tokens / max(1.0, data.test.rows)
    test_share = data.test.targets / max(1.0, data.test.tokens)
    test_targets = test_mean * test_share + end
    scored = forwarded_tokens(run, recipe, test_mean + end, test_targets)
    scoring = evaluated * (scored * forward + test_targets * share * head)
    if run.policy:
        flops = rows * _answer_flops(run, shape, mean + end - targets)
        drawn = evaluated / run.eval_draws * run.policy.num_generations_eval
        scoring += drawn * _drawn_flops(mean + end - targets, run.policy.generation, shape)
    if pairs := "preferences" in algorithm.takes:
        # both answers, and the start; test pairs are forwarded through both
        both = 2 * run.preferences.passes * (forwarded * forward + targets * share * head)
        flops = rows * both * (times + checkpointing + 1)
        scoring += evaluated / run.eval_draws * 2 * both
    muon = steps * muon_flops(shape) if run.optimizer.name == "muon" else 0.0
    rate = place.hardware.tflops(_precision(recipe)) * 1e12 * place.hardware.training
    micro_tokens = _micro_batch_tokens(run, recipe, place, doubled * (longest + end))
    in_all = run.global_batch_size * _rows_of_one(run) * forwarded
    accumulation = max(1.0, in_all / max(1, place.devices) / micro_tokens)
    seconds = place.hardware.startup_seconds + ((flops + scoring) / place.units + muon) / rate
    seconds += steps * place.hardware.step_seconds * math.ceil(accumulation)
    weights = _bytes(recipe) * parameters(shape).total / GIB
    device = _training_gib(run, recipe, shape, micro_tokens, share * targets / (mean + end), place.devices)
    device += weights if pairs or (run.policy and run.policy.beta) else 0.0  # the start
    host, device = _host_and_device_gib(place, recipe, device, weights, data.train.rows + data.test.rows)
    return Cost(
        tokens=rows * mean * (1 + pairs),
        flops=flops + scoring + muon * max(1, place.devices),
        passes=steps,
        seconds=seconds,
        host_gib=host,
        device_gib=device,
        kept_gib=weights,
        scratch_gib=_checkpoints_gib(run, recipe, shape),
        steps=steps,
    )


def _host_and_device_gib(
    place: Place, recipe: Recipe, tensors: float, weights: float, rows: float
) -> tuple[float, float]:
    """Memory of a training run's host and device, by that of its tensors and weights (GiB) and the number of rows."""
    rows_gib = 40 * rows / GIB
    if place.hardware.is_gpu:
        processes = max(1, place.devices // place.nodes)
        return processes * (GPU_HOST_GIB + 2 * weights + rows_gib), tensors + CUDA_GIB
    host = TRAINING_PROCESS_GIB + rows_gib + CPU_SLACK * tensors
    return host + (CPU_BF16_GIB if recipe.parameters == "bf16" else 0.0), 0.0


def _checkpoints_gib(run: RunEntry, recipe: Recipe, shape: Shape) -> float:
    """Disk of the two checkpoints that are kept: weights that train, and the optimiser's states."""
    trained = _bytes(recipe) * parameters(shape).total if run.adapter is None else 4 * _trained(run, shape)
    return 2 * trained / GIB * (2 if run.optimizer.name == "muon" else 3)


def _rows_of_one(run: RunEntry) -> int:
    """Rows that are forwarded for one of the global batch: its passes, of which a pair of answers has twice as many."""
    if run.policy:
        exact = run.policy.likelihood == "sampled"
        return math.ceil(generation_passes(run.policy.generation)) if exact else run.policy.passes
    return 2 * run.preferences.passes if "preferences" in algorithm_named(run.algorithm).takes else 1


def _drawn_flops(prompt: float, settings: GenerateSettings, shape: Shape) -> float:
    """FLOPs of one answer that is drawn."""
    drawn = generated_answers(prompt, 1, settings, causal=False, hides=False)
    return drawn.tokens * forward_flops(shape, drawn.length, causal=False) + drawn.scored * head_flops(shape)


def _answer_flops(run: RunEntry, shape: Shape, prompt: float) -> float:
    """FLOPs of an answer in one step of `grpo`: its share of being drawn, and the passes of its log-likelihood.

    Those run forward and backward, once more under the old weights in all steps on the same answers but the first, and
    under the start's where the divergence from it counts.
    """
    assert run.policy is not None
    policy, new = run.policy, run.policy.generation.max_new_tokens
    row, exact = prompt + new, policy.likelihood == "sampled"
    passes = generation_passes(policy.generation) if exact else policy.passes
    read = new if exact else passes * new * (0.5 if policy.likelihood == "bound" else 1.0)
    times: float = TRAINING - (run.adapter is not None) + run.activation_checkpointing
    times += (policy.num_iterations - 1) / policy.num_iterations + (policy.beta > 0)
    once = passes * row * forward_flops(shape, row, causal=False) + read * head_flops(shape)
    return once * times + _drawn_flops(prompt, policy.generation, shape) / policy.num_iterations


def forwarded_tokens(run: RunEntry, recipe: Recipe, row: float, targets: float) -> float:
    """Tokens that go through the layers for a row of `row` tokens, `targets` of which are targets.

    Block diffusion forwards a corrupted copy of the targets too, but not of the prompt, and nothing sees the last block
    clean (`core.attention_pattern.BlockRows.doubled`). With blocks counted from the row's start, the first holds some
    prompt.
    """
    if algorithm_named(run.algorithm).blocks != "trained" or targets <= 0:
        return row
    prompt = row - targets
    shared = min(prompt, (recipe.block_size - 1) / 2) if recipe.block_anchor == "row" else 0.0
    blocks = math.ceil((targets + shared) / recipe.block_size)
    last = targets + shared - (blocks - 1) * recipe.block_size
    return row + targets + shared - last


def _evaluated_rows(run: RunEntry, data: Prepared, test_rows: int | None) -> float:
    """Test rows read over a run: at its start, `evaluations` times on the way, and at its end."""
    most = min(data.test.rows, test_rows or data.test.rows)
    some = min(data.test.rows, run.eval_rows or most)
    return (run.evaluations + 1) * some + most


def _end_tokens(run: RunEntry, recipe: Recipe, data: Prepared) -> float:
    """EOS tokens that end a mean response; 0 in text."""
    if data.train.targets >= data.train.tokens:
        return 0.0
    kind = "one" if algorithm_named(run.algorithm).causal else recipe.response_end
    if kind == "block":
        return (recipe.block_size + 1) / 2 + recipe.extra_blocks * recipe.block_size / 2
    mean = data.train.tokens / max(1.0, data.train.rows)
    return 0.15 * mean if kind == "fill" else 1.0  # rows of a batch have nearly equal lengths


def _precision(recipe: Recipe) -> str:
    return "bf16" if "bf16" in (recipe.autocast, recipe.parameters) else "fp32"


def _bytes(recipe: Recipe) -> int:
    """Bytes of a master weight."""
    return 2 if recipe.parameters == "bf16" else 4


def _micro_batch_tokens(run: RunEntry, recipe: Recipe, place: Place, row: float) -> float:
    """Tokens of the largest micro-batch: the stated budget, or as many of the longest rows as there may be."""
    one = _rows_of_one(run)
    per_rank = max(1, run.global_batch_size // max(1, place.devices)) * one
    rows = min(per_rank, max(one, run.micro_batch_size))
    if run.micro_batch_tokens and recipe.denominator != "micro_batch":
        return min(run.micro_batch_tokens, per_rank * row)
    return rows * row


def _training_gib(
    run: RunEntry, recipe: Recipe, shape: Shape, tokens: float, masked_share: float, devices: int
) -> float:
    """Weights, gradients, optimiser states and activations of one device, in GiB.

    A token keeps about 10 d + 2 i values per layer (4 i where gated): inputs of the norms and products, queries, keys,
    values, attention output (Korthikanti et al. 2022, arXiv:2205.05198, without the attention matrix); with
    checkpointing the input of each layer, and one layer in full. Logits and their gradient are fp32.
    """
    element = 2 if devices and _precision(recipe) == "bf16" else 4
    states = _states(run, recipe, shape, max(1, devices), copies=element < _bytes(recipe))
    layer = tokens * (10 * shape.width + (4 if is_gated(shape) else 2) * shape.intermediate) * element
    if run.activation_checkpointing:
        activations = layer + shape.layers * tokens * shape.width * 4
    else:
        activations = shape.layers * layer
    masked = tokens * min(1.0, 1.5 * masked_share)  # half as many again as on average
    held = logits_at_once(shape.vocabulary, element, "cuda" if devices else "cpu")
    logits = min(masked, held) * shape.vocabulary * (4 + 4 + element)
    return (states + activations + logits) / GIB


def _trained(run: RunEntry, shape: Shape) -> int:
    """Parameters with a gradient."""
    return parameters(shape).total if run.adapter is None else adapter_parameters(shape, run.adapter.rank)


def _states(run: RunEntry, recipe: Recipe, shape: Shape, devices: int, *, copies: bool) -> float:
    """Bytes of weights, gradients and optimiser states on one of `devices`; copies: autocast keeps bf16 matrices.

    ZeRO shards the moments (stage 1), gradients too (2), weights too (3, as FSDP does), and keeps the trained weights
    once more, in shards (Rajbhandari et al. 2020, arXiv:1910.02054). Sharded weights are whole one layer at a time.
    """
    count, trained = parameters(shape), _trained(run, shape)
    master = _bytes(recipe) if run.adapter is None else 4
    quantized = count.layers if run.adapter and run.adapter.kind == "qlora" else 0
    weights = count.total * _bytes(recipe) - quantized * (_bytes(recipe) - QLORA_BYTES)
    if run.adapter is not None:
        weights += trained * master
    gradients = trained * master
    moments = (2 * trained - (count.layers if run.optimizer.name == "muon" else 0)) * master
    if run.launch.startswith("zero"):
        moments += trained * master
    cut = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(run.launch, 0)
    sizes = [moments, gradients, weights]
    states = sum(size / devices if number < cut else size for number, size in enumerate(sizes))
    at_once: float = count.total - quantized
    if cut == 3 and devices > 1:
        at_once = max(count.layers / shape.layers, count.embedding)
        states += at_once * _bytes(recipe)
    return states + (2 * at_once if copies else 0)


# --------------------------------------------------------------------------------------------------------------------
# Scoring and generating


@dataclass(frozen=True)
class Answers:
    """Requests as forward work: passes of rows, tokens forwarded, positions scored, forward batches, row length."""

    passes: float
    tokens: float
    scored: float
    batches: float
    length: float


def likelihood_answers(size: BenchmarkSize, documents: int, scorer: Scorer, *, causal: bool, rows: int = 32) -> Answers:
    """Scored answers. A causal model takes one pass per answer, or per question where answers are one token long; rows:
    how many of it are scored together."""
    prompt, length = size.prompt_tokens, size.answer_tokens
    row = prompt + length
    passes: float
    if causal:
        passes = documents * (1 if length == 1 and size.one_prompt else size.choices)
        return Answers(passes, passes * row, passes * row, passes / rows, row)
    if scorer.special_tokens != "exact":
        length += 1  # SEP joins the answer
    passes = documents * question_passes(size.choices, length, size.one_prompt, scorer.likelihood)
    scored = passes * max(1.0, length / 2)
    if size.greedy:
        passes += documents * size.choices * length
        scored += documents * size.choices * length
    batches = passes * row / scorer.likelihood.batch_tokens
    return Answers(passes, passes * row, scored, max(1.0, batches), row)


def generated_answers(
    prompt: float, documents: int, settings: GenerateSettings, *, causal: bool, hides: bool
) -> Answers:
    """Free answers, without an early end. hides: the canvas grows block by block, its later blocks are not forwarded.

    A causal model reads the prompt once and then forwards one token per pass, against its cache.
    """
    new, block = settings.max_new_tokens, min(settings.block_size, settings.max_new_tokens)
    together = min(settings.batch_size, documents)
    together = max(1, min(together, int(settings.batch_tokens // (prompt + new))))
    batches = math.ceil(documents / together)
    if causal:
        return Answers(documents * new, documents * (prompt + new), documents * new, batches * new, prompt + new)
    passes = generation_passes(settings)
    canvas = (new + block) / 2 if hides else new
    row = prompt + canvas
    forwarded = passes * row
    if settings.reuse != "none":
        refreshes = math.ceil(new / block) if settings.refresh is None else math.ceil(passes / settings.refresh)
        part = block if settings.reuse == "dual" or hides else (new + block) / 2
        forwarded = refreshes * row + max(0, passes - refreshes) * part
    return Answers(
        passes=documents * passes,
        tokens=documents * forwarded,
        scored=documents * passes * (block + 1) / 2,
        batches=batches * passes,
        length=row,
    )


def renoised_answers(prompt: float, documents: int, settings: GenerateSettings) -> Answers:
    """Free answers in canvases of random tokens, row by row, without an early end: each pass forwards one canvas.

    What is before a canvas is read once. A canvas has the published size, or that of the answer if this is smaller.
    """
    new = settings.max_new_tokens
    size = min(new, DIFFUSION_GEMMA.block_size or new)
    canvases = math.ceil(new / size)
    passes = settings.steps or canvases * RENOISING_PASSES
    return Answers(
        passes=documents * (passes + canvases),
        tokens=documents * (prompt + (canvases - 1) * size + passes * size),
        scored=documents * passes * size,
        batches=documents * (passes + canvases),
        length=prompt + new,
    )


def scoring(answers: Answers, shape: Shape, place: Place, *, precision: str = "fp32", causal: bool = False) -> Cost:
    """Forward work: seconds = start-up + max(FLOPs / rate, batches x bytes of the weights / bandwidth) + overheads.

    precision: as of a `Scorer`; `mixed` leaves embedding and LM head of a diffusion model in fp32.
    Weights in bf16 pass from the file to the device as they are stored.
    """
    element = 2 if precision == "bf16" or (causal and precision == "mixed") else 4
    count = parameters(shape)
    layers = 4 if precision == "fp32" else 2
    weights = layers * count.layers + element * (count.total - count.layers)
    body = answers.tokens * forward_flops(shape, answers.length, causal=causal)
    head = answers.scored * head_flops(shape)
    flops = body + head
    hardware = place.hardware
    unit = 1e12 * hardware.inference * place.units
    kinds = {2: "bf16", 4: "fp32"}
    work = body / (hardware.tflops(kinds[layers]) * unit) + head / (hardware.tflops(kinds[element]) * unit)
    reading = answers.batches * weights / (hardware.bandwidth_gbs * 1e9)
    seconds = hardware.startup_seconds + max(work, reading) + answers.batches * hardware.pass_seconds
    batch_tokens = answers.tokens / max(1.0, answers.batches)
    inner = shape.intermediate * (2 if is_gated(shape) else 1)
    activations = batch_tokens * (6 * shape.width + inner) * element
    logits = min(HEAD_ROWS, answers.scored / max(1.0, answers.batches)) * shape.vocabulary * 4 * 3
    if causal:
        logits = batch_tokens * shape.vocabulary * (element + 4)
        rows = answers.passes / answers.batches  # whose keys and values are kept
        activations += rows * answers.length * 2 * shape.layers * head_width(shape) * shape.heads * element
    tensors = (weights + activations + logits) / GIB
    if hardware.is_gpu:
        host, device = GPU_HOST_GIB + 2 * weights / GIB, CUDA_GIB + tensors
    else:
        host, device = SCORING_PROCESS_GIB + CPU_SLACK * tensors, 0.0
    return Cost(
        tokens=answers.tokens,
        flops=flops,
        passes=answers.passes,
        seconds=seconds,
        host_gib=host,
        device_gib=device,
    )
