"""On a CUDA device: training throughput, MFU and memory, generated tokens and scored requests per second.

ModernBERT-base and -large in their published sizes with random weights, built here: nothing is fetched.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from functools import cache

import numpy
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import ModernBertConfig, ModernBertForMaskedLM

from bench.alternatives import masked_loss, sample_batch
from bench.measure import Result, compare, interleaved
from bench.options import Options
from bench.step import Sizes, run_config
from bench.workloads import VOCABULARY, as_backbone, chat_lengths, rows_of_lengths
from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.core.batch import row_noise
from dllm.core.canvas import canvas_for
from dllm.core.corrupt import exact_count
from dllm.data.collate import collate
from dllm.data.tokens import TokenRows
from dllm.likelihood.scorer import MaskedScorer
from dllm.models.load import Backbone
from dllm.objectives.mdlm import MDLM
from dllm.sampling.sampler import MaskedSampler
from dllm.training.devices import Devices, devices_for
from dllm.training.micro_batches import MicroBatch, TrainingSplit, micro_batches
from dllm.training.setup import scores_for

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}
"""Dense bf16 FLOP/s of a device whose name holds the key, from the makers' data sheets (without sparsity)."""

FORMULA = (
    "FLOPs of a step = 6 N per token of the row (N: parameters of the layers without embedding and head), "
    "6 H per token whose logits are computed (H: parameters of the head, the tied output matrix included), "
    "12 D per token, layer and key it attends to (D: width; keys: the row's length, in sliding layers at most the "
    "window). MFU = FLOPs per second over the device's dense bf16 peak. Recomputation is not counted."
)

SIZES = {
    "ModernBERT-base": {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "heads": 12},
    "ModernBERT-large": {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "heads": 16},
}
ROW_TOKENS = 32_768
"""Tokens of a global batch, and of the widest packed micro-batch."""
PADDED_ROWS = 8
"""Rows of a padded batch of the common way."""
TINY = {"a tiny model": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "heads": 2}}
"""What a smoke run takes, on the CPU: every line runs, and no number means anything."""


def gpu(options: Options) -> Result:
    """Training, generation and scoring of both models on the device, or the reason why not."""
    if not torch.cuda.is_available() and not options.quick:
        return Result(skipped="no CUDA device in this machine; nothing about GPUs was measured")
    rows, setup = [], {"device": _device_name(), "peak FLOP/s": peak_flops(), "formula": FORMULA}
    for name in TINY if options.quick else SIZES:
        for length in (64,) if options.quick else (512, 1024):
            row, facts = _training(name, length, options)
            rows += row
            setup[f"{name}, length {length}"] = facts
            _forget()
        row, facts = _inference(name, options)
        rows += row
        setup[f"{name}, generation and scoring"] = facts
        _forget()
    return Result(rows, [], setup)


def peak_flops() -> float | None:
    """The device's dense bf16 FLOP/s, None if it is not in the table."""
    name = _device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def step_flops(backbone: Backbone, lengths: numpy.ndarray, predicted: int) -> float:
    """FLOPs of forward and backward over rows of these lengths with `predicted` logits; see FORMULA."""
    model, config = backbone.model, backbone.model.config
    layers = sum(p.numel() for p in model.model.layers.parameters())
    head = sum(p.numel() for p in model.head.parameters()) + config.vocab_size * config.hidden_size
    keys = 0
    for kind in config.layer_types:
        reach = lengths if kind == "full_attention" else numpy.minimum(lengths, config.local_attention + 1)
        keys += int((lengths * reach).sum())
    return 6.0 * layers * int(lengths.sum()) + 6.0 * head * predicted + 12.0 * config.hidden_size * keys


@cache
def _backbone(name: str) -> Backbone:
    sizes = dict((SIZES | TINY)[name])
    config = ModernBertConfig(
        vocab_size=VOCABULARY if name in SIZES else 128,
        num_attention_heads=sizes.pop("heads"),
        max_position_embeddings=2048,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        **sizes,
    )
    return as_backbone(config, ModernBertForMaskedLM, device=_device())


def _training(name: str, length: int, options: Options) -> tuple[list, dict]:
    """A packed step in bf16 autocast against one in padded batches of 8 rows: the rows of the table and the facts."""
    backbone, objective = _backbone(name), MDLM()
    vocabulary, row_tokens = backbone.vocab_size, 512 if options.quick else ROW_TOKENS
    # uneven rows, as chat data has them, at most `length` tokens
    lengths = chat_lengths(4096, mean=0.6 * length, longest=length)
    lengths = lengths[: int(numpy.searchsorted(numpy.cumsum(lengths), row_tokens))]
    rows = rows_of_lengths(lengths, vocabulary, prompt_share=0.0)
    config = run_config(Sizes(vocabulary, rows=len(lengths), longest=length), bf16=True, micro_batch_tokens=row_tokens)
    AcceleratorState._reset_state(reset_partial_state=True)
    devices = devices_for(Accelerator(), scores_for(config, backbone), config.optimizer, bf16=True)
    split = TrainingSplit(rows, objective, None, pad_id=backbone.pad_id, mask_id=backbone.mask_id)
    parts: list[MicroBatch] = list(micro_batches(split, config, first=0, last=1))
    if _device() == "cuda":
        parts = [replace(part, inputs=part.inputs.pin_memory()) for part in parts]
    jobs = {
        "ours": lambda: devices.step(objective, parts),
        "theirs": lambda: _padded_step(devices, backbone, rows),
    }
    times = interleaved(jobs, options.repeats(10), warmup=3, at_most=60)
    memory = {side: _peak_gib(job) for side, job in jobs.items()}
    tokens, peak = int(lengths.sum()), peak_flops()
    rate = step_flops(backbone, lengths, sum(len(part.inputs.row) for part in parts)) / statistics.median(times["ours"])
    facts = {
        "tokens per second": tokens / statistics.median(times["ours"]),
        "model FLOP/s": rate,
        "MFU": rate / peak if peak else None,
        "peak memory, GiB": memory["ours"],
        "common way, tokens per second": tokens / statistics.median(times["theirs"]),
        "common way, peak memory, GiB": memory["theirs"],
        "rows": len(lengths),
        "tokens": tokens,
    }
    mfu = f"MFU {facts['MFU']:.1%}, " if peak else "MFU unknown (no peak FLOP/s for this device), "
    note = f"{mfu}{facts['tokens per second']:,.0f} tokens/s, peak memory {memory['ours']:.1f} GiB. {FORMULA}"
    title = f"{name}, rows of at most {length} tokens, packed, bf16 autocast, {_device_name()}"
    common = {
        "against": f"random batches of {PADDED_ROWS} padded to the longest, logits everywhere, bf16 autocast",
        "held_equal": "same weights, rows, masks, precision of products, optimiser; inputs of ours are made ahead, as "
        "in training",
        "correct": "same loss on the CPU (case sft)",
    }
    rows_found = [compare(times["ours"], times["theirs"], name=f"training step, {title}", note=note, **common)]
    if _device() == "cuda":
        peaks = [memory["ours"]], [memory["theirs"]]
        rows_found.append(compare(*peaks, name=f"peak memory, {title}", unit="GiB", **common))
    return rows_found, facts


def _padded_step(devices: Devices, backbone: Backbone, rows: TokenRows) -> None:
    """The common way: batches of rows padded to their longest, logits at every position."""
    total = float(rows.lengths.sum())
    for numbers in numpy.split(numpy.arange(len(rows)), range(PADDED_ROWS, len(rows), PADDED_ROWS)):
        batch = collate(rows, numbers, rows.lengths[numbers], pad_id=backbone.pad_id, end=None)
        noise = row_noise(0, 0, batch.sample_ids, batch.tokens.shape[1])
        corrupted = exact_count(batch.maskable, noise.level, noise.place)
        batch = batch.to(_device())
        masked, weight = corrupted.masked.to(_device()), corrupted.weight.to(_device())
        with torch.autocast(_device(), torch.bfloat16):
            loss = masked_loss(backbone.model, batch.tokens, batch.attention, masked, weight, backbone.mask_id)
        (loss / total).backward()
    devices.update()


def _inference(name: str, options: Options) -> tuple[list, dict]:
    """Generated tokens and scored requests per second, in bf16 weights; the alternative runs on fewer rows."""
    backbone = _backbone(name)
    backbone.model.to(torch.bfloat16).eval()
    random = numpy.random.default_rng(0)
    count, longest, new = (2, 40, 16) if options.quick else (128, 256, 128)
    lengths = random.integers(32, longest, count)
    prompts = [random.integers(5, backbone.vocab_size, int(n)).tolist() for n in lengths]
    targets = [random.integers(5, backbone.vocab_size, int(n)).tolist() for n in random.integers(5, 40, count)]
    settings = GenerateSettings(max_new_tokens=new, block_size=min(32, new), early_stop=False, batch_size=count)

    def generate() -> None:
        ids = {"mask_id": backbone.mask_id, "pad_id": backbone.pad_id, "device": _device()}
        for _ in MaskedSampler().denoise(backbone, canvas_for(prompts, settings.max_new_tokens, **ids), settings):
            pass

    def one_row() -> None:
        with torch.device(_device()):
            sample_batch(backbone.model, prompts[:1], new, settings.block_size, backbone.mask_id, backbone.pad_id)

    def score() -> None:
        MaskedScorer().nelbo(backbone, prompts, targets, LikelihoodSettings())

    times = interleaved({"generate": generate, "one row": one_row, "score": score}, options.repeats(3), at_most=90)
    per_token = {
        "ours": [t / (len(prompts) * settings.max_new_tokens) for t in times["generate"]],
        "theirs": [t / settings.max_new_tokens for t in times["one row"]],
    }
    facts = {
        "generated tokens per second": 1 / statistics.median(per_token["ours"]),
        "scored requests per second": len(prompts) / statistics.median(times["score"]),
    }
    row = compare(
        per_token["ours"],
        per_token["theirs"],
        name=f"generation, {new} tokens, {count} ragged prompts, {name}, bf16, {_device_name()}",
        against="one row at a time, full canvas, logits everywhere (one of the prompts)",
        unit="s per token",
        held_equal="same weights, precision, canvas, blocks; nothing ends early; not the same batch",
        correct="identical tokens on the CPU (case generation)",
        note=f"{facts['generated tokens per second']:,.0f} generated tokens/s, "
        f"{facts['scored requests per second']:,.1f} scored requests/s (targets of 5 to 39 tokens, budget 64).",
    )
    backbone.model.float()
    return [row], facts


def _peak_gib(job) -> float:
    if _device() == "cpu":
        job()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    job()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def _forget() -> None:
    _backbone.cache_clear()
    gc.collect()
    if _device() == "cuda":
        torch.cuda.empty_cache()
