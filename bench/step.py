"""One training step on rows of chat lengths: ours, and the common ways, on the same rows and masks."""

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

from bench.alternatives import masked_loss
from bench.options import Options
from bench.workloads import VOCABULARY, chat_lengths, encoder, rows_of_lengths
from dllm.config import ModelEntry, OptimizerSettings, Recipe, RunConfig
from dllm.core.batch import row_noise
from dllm.core.corrupt import exact_count
from dllm.core.memory import LOGITS_BYTES
from dllm.data.collate import ResponseEnd, collate, ended_lengths, epoch_batches
from dllm.data.tokens import TokenRows
from dllm.models.load import Backbone
from dllm.objectives.mdlm import MDLM
from dllm.training.devices import devices_for
from dllm.training.micro_batches import MicroBatch, TrainingSplit, micro_batches
from dllm.training.setup import scores_for

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

    def __init__(self, sizes: Sizes, *, bf16: bool = False, logits: int | None = None):
        """logits: how many rows of them are held at a time."""
        self.sizes, self.bf16 = sizes, bf16
        self.backbone: Backbone = encoder(
            sizes.vocabulary, layers=sizes.layers, width=sizes.width, context=sizes.longest + 64
        )
        self.budget = LOGITS_BYTES["cpu"] if logits is None else logits * sizes.vocabulary * (2 if bf16 else 4)
        self.config = run_config(sizes, bf16=bf16)
        AcceleratorState._reset_state(reset_partial_state=False)
        scores = scores_for(self.config, self.backbone)
        self.devices = devices_for(Accelerator(cpu=True), scores, self.config.optimizer, bf16=bf16)
        self.objective = MDLM(self.config.recipe)
        self.end = ResponseEnd("one", self.backbone.eos_id, longest=sizes.longest)

    def split(self, rows: TokenRows) -> TrainingSplit:
        """The rows as our training reads them."""
        return TrainingSplit(rows, self.objective, self.end, pad_id=self.backbone.pad_id, mask_id=self.backbone.mask_id)

    def parts(self, rows: TokenRows, steps: int = 1) -> Iterator[MicroBatch]:
        """Our micro-batches."""
        return micro_batches(self.split(rows), self.config, first=0, last=steps)

    def ours(self, rows: TokenRows) -> float:
        """Our step; returns its loss."""
        usual, LOGITS_BYTES["cpu"] = LOGITS_BYTES["cpu"], self.budget
        try:
            return float(self.devices.step(self.objective, self.parts(rows)).loss)
        finally:
            LOGITS_BYTES["cpu"] = usual

    def common(self, rows: TokenRows, batches: list[ndarray], loss: Callable[..., Tensor] = masked_loss) -> float:
        """The common step: `batches` of rows padded to their longest; returns its loss."""
        total, spent = float(self.split(rows).ended(numpy.concatenate(batches)).targets.sum()), 0.0
        for numbers in batches:
            tokens, attention, masked, share = self.padded(rows, numbers)
            with self._autocast():
                nats = loss(self.backbone.model, tokens, attention, masked, share, self.backbone.mask_id) / total
            nats.backward()
            spent += float(nats.detach())
        self.devices.update()
        return spent

    def padded(self, rows: TokenRows, numbers: ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens, attention, masked [B, L] and the weight of a nat [B] of these rows: the masks our pipeline draws."""
        batch = collate(
            rows, numbers, ended_lengths(rows, numbers, self.end, 0), pad_id=self.backbone.pad_id, end=self.end
        )
        noise = row_noise(SEED, 0, batch.sample_ids, batch.tokens.shape[1])
        corrupted = exact_count(batch.maskable, noise.level, noise.place)
        return batch.tokens, batch.attention, corrupted.masked, corrupted.weight

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext()


def run_config(sizes: Sizes, *, bf16: bool = False, **settings) -> RunConfig:
    """The config of our trainer; its learning rate is nearly 0, so that every step starts from the same weights."""
    optimizer = OptimizerSettings(learning_rate=1e-12, clip=1.0)
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
    pools = [rows_of_lengths(lengths[chosen], sizes.vocabulary) for chosen in (random, grouped)]
    cut = [numpy.arange(sizes.rows).reshape(-1, sizes.batch)] * 2
    return pools[0], list(cut[0]), pools[1], list(cut[1])


def _waste(lengths: ndarray) -> float:
    """Padded positions over real tokens of batches [N, B] of row lengths."""
    return float((lengths.max(1) * lengths.shape[1]).sum() / lengths.sum())
