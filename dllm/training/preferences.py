"""Learning from preferences: the micro-batches of a run whose rows are pairs of a chosen and a rejected answer.

Which pairs a step takes and how their answers are masked are functions of (seed, epoch, pair). What the start makes of
the same masks is computed as a micro-batch is made, so that a checkpoint holds nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import pad

from dllm.algorithms import algorithm_named
from dllm.config import RunConfig
from dllm.core.noise import keyed_hash
from dllm.core.policy import PolicyInputs, preference_margins
from dllm.data.collate import ResponseEnd, collate, ended_lengths, epoch_batches
from dllm.data.tokens import TokenRows, open_pairs
from dllm.likelihood.answers import Answers, bound, policy_inputs
from dllm.models.backbone import Backbone
from dllm.objectives.grpo import SampledNLL, log_likelihoods
from dllm.training.devices import Devices
from dllm.training.micro_batches import EVALUATION_SEED, Limits, MicroBatch, cut_rows, evaluated_rows, steps_per_epoch

_PAIR_STREAM = 31


def learns_from_pairs(config: RunConfig) -> bool:
    """Whether a run's rows are pairs of answers."""
    return "preferences" in algorithm_named(config.algorithm).takes


@dataclass(frozen=True)
class Pairs:
    """One split's prompts with a chosen and a rejected answer each; end: how answers end."""

    chosen: TokenRows
    rejected: TokenRows
    end: ResponseEnd
    pad_id: int

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> ndarray:
        """Tokens of the longer row of each pair, [N]."""
        return numpy.maximum(self.chosen.lengths, self.rejected.lengths)

    def answers(self, numbers: ndarray, seed: int) -> Answers:
        """The answers of some pairs, the rejected one behind the chosen one; seed: of the masks."""
        parts = []
        for rows in (self.chosen, self.rejected):
            ended = ended_lengths(rows, numbers, self.end, 0)
            if self.end.kind == "fill":  # to the longer answer of the pair
                ended = self.lengths[numbers]
            batch = collate(rows, numbers, ended, pad_id=self.pad_id, end=self.end)
            parts.append((batch.tokens, torch.from_numpy(rows.prompts[numbers]).long(), torch.from_numpy(ended).long()))
        width = max(tokens.shape[1] for tokens, _, _ in parts)
        tokens = torch.stack([pad(part[0], (0, width - part[0].shape[1]), value=self.pad_id) for part in parts], 1)
        starts, ends = (torch.stack([part[place] for part in parts], 1).flatten() for place in (1, 2))
        groups = keyed_hash(seed, _PAIR_STREAM, torch.from_numpy(numbers)).repeat_interleave(2)
        tokens = tokens.flatten(0, 1)
        nothing = torch.full_like(tokens, -1)
        return Answers(tokens, starts, ends, visible=nothing, drawn=nothing, keys=groups, groups=groups)


class Preferences:
    """A run's pairs: cut into micro-batches, and evaluated on test pairs."""

    def __init__(
        self,
        config: RunConfig,
        backbone: Backbone,
        devices: Devices,
        start: Backbone | None,
        end: ResponseEnd | None,
        workdir: Path,
    ):
        """start: what the model is compared with; end: how responses end.

        Raises ValueError, one line, for rows without rejected answers, and for a budget that no pair fits into.
        """
        assert start is not None and end is not None  # of such a run, whose rows have prompts
        self.config, self.backbone, self.devices = config, backbone, devices
        self.settings, self.start = config.preferences, SampledNLL(start)
        directory = workdir / config.data_path
        self.train, self.test = (
            Pairs(*open_pairs(directory, split), end=replace(end, extra_blocks=0), pad_id=backbone.pad_id)
            for split in ("train", "test")
        )
        most = 2 * self.settings.passes * config.length
        if config.micro_batch_tokens is not None and config.micro_batch_tokens < most:
            raise ValueError(
                f"{config.name}: micro_batch_tokens = {config.micro_batch_tokens} is smaller than a pair, for which "
                f"preferences.passes = {self.settings.passes} forwards up to {most} tokens; raise it, or lower length"
            )

    def micro_batches(self, first: int, last: int) -> Iterator[MicroBatch]:
        """This process' micro-batches of the steps `first` to `last` - 1; each is made when it is asked for."""
        config, (known, batches) = self.config, (-1, numpy.zeros(0))
        per_epoch = steps_per_epoch(config, len(self.train))
        for step in range(first, last):
            epoch, position = divmod(step, per_epoch)
            if epoch != known:
                size, lengths = config.global_batch_size, self.train.lengths
                known, batches = epoch, epoch_batches(lengths, size, config.seed, epoch, grouped=True)
            numbers = batches[position]
            tokens = int(sum(rows.lengths[numbers].sum() for rows in (self.train.chosen, self.train.rejected)))
            cut = list(self._cut(self.train, numbers, config.seed, epoch))
            for number, (places, inputs) in enumerate(cut):
                last_of_step = number == len(cut) - 1
                yield MicroBatch(self._compared(inputs), float(len(numbers)), last_of_step, numbers[places], tokens)

    def evaluate(self, *, final: bool) -> dict[str, Any]:
        """Margins of test pairs, at the same masks each time.

        accuracy: the share that is further apart, the right way round, than under the start, a tie counting as half;
        preferred: the share whose chosen answer is the likelier one.
        """
        numbers = evaluated_rows(self.config, len(self.test), final=final)
        ranks = self.devices.accelerator.num_processes
        padded = numpy.resize(numbers, -(-len(numbers) // ranks) * ranks)
        table = torch.zeros(len(padded), 2, dtype=torch.float64)
        for places, inputs in self._cut(self.test, padded, EVALUATION_SEED, 0):
            inputs = self._compared(inputs)
            new = self._values(self.devices.model, inputs)
            apart = (inputs.share * inputs.advantage * new).view(-1, 2).sum(-1)
            table[places] = torch.stack([preference_margins(new, inputs), apart], -1).double()
        margins, apart = self.devices.summed(table)[: len(numbers)].unbind(-1)
        rewards = self.settings.beta * margins
        return {
            "reward_margin": float(rewards.mean()),
            "reward_margin_standard_error": float(rewards.std() / len(rewards) ** 0.5) if len(rewards) > 1 else 0.0,
            "accuracy": float((rewards.sign() + 1).mean() / 2),
            "preferred": float((apart.sign() + 1).mean() / 2),
        }

    def numbers(self) -> dict[str, float]:
        """What is logged beside the loss: nothing."""
        return {}

    def state(self, step: int) -> None:
        """What a checkpoint after `step` steps holds: nothing."""

    def load_state(self, state: None) -> None:
        """Go on from what `state` gave."""

    def _cut(self, pairs: Pairs, numbers: ndarray, seed: int, epoch: int) -> Iterator[tuple[ndarray, PolicyInputs]]:
        """This process' pairs, micro-batch by micro-batch: their places in `numbers`, and inputs."""
        answers = pairs.answers(numbers, seed)
        forwards = bound(answers, epoch, self.settings)
        accelerator, config = self.devices.accelerator, self.config
        forwarded = forwards.length.view(len(numbers), -1)  # of both answers
        passes = int((forwarded > 0).sum(-1).max())
        limits = Limits(max(1, config.micro_batch_size // passes), config.micro_batch_tokens)
        cuts = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
        for places in cut_rows(forwarded.sum(-1).numpy(), limits, **cuts):
            some = (2 * torch.from_numpy(places)[:, None] + torch.arange(2)).flatten()
            yield (
                places,
                policy_inputs(
                    answers.taken(some),
                    forwards.taken(some),
                    advantages=torch.tensor([1.0, -1.0]).repeat(len(places)),
                    shares=torch.ones(len(some)),
                    mask_id=self.backbone.mask_id,
                    temperature=1.0,
                ),
            )

    def _compared(self, inputs: PolicyInputs) -> PolicyInputs:
        """The inputs with the start's log-likelihoods, at the very masks of the model's."""
        return replace(inputs, reference=self._values(self.start, inputs))

    @torch.no_grad()
    def _values(self, model: nn.Module, inputs: PolicyInputs) -> Tensor:
        """The log-likelihoods [M] of answers under the weights of a module, on the host."""
        device = self.devices.accelerator.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.devices.bf16):
            return log_likelihoods(model, inputs.to(device)).float().cpu()
