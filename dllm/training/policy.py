"""Learning from rewards: the micro-batches of a run whose rows the model writes itself.

A batch of prompts is answered with the current weights, and serves `num_iterations` steps. A checkpoint between two
steps on the same answers holds these and their known log-likelihoods, so that a run that goes on repeats them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dllm.algorithms import algorithm_named
from dllm.config import RunConfig
from dllm.core.policy import PolicyInputs, group_advantages, token_shares, weighed_advantages
from dllm.data.collate import epoch_batches
from dllm.data.tokens import TokenRows
from dllm.language_model import DiffusionLM
from dllm.likelihood.answers import Answers, Forwards, counted_tokens, forwards_of, policy_inputs
from dllm.models.backbone import Backbone
from dllm.objectives.grpo import GRPO, SampledNLL, log_likelihoods
from dllm.objectives.objective import Objective
from dllm.training.devices import Devices
from dllm.training.micro_batches import Limits, MicroBatch, cut_rows, evaluated_rows
from dllm.training.preferences import learns_from_pairs
from dllm.training.rollouts import Answering, Prompts, Rollouts

EVALUATION = -1
"""The batch whose seeds evaluations use, the same ones each time."""

SHOWN = 3
"""Test prompts whose answers an evaluation logs."""


class Policy:
    """A run's answers: drawn, rewarded, cut into micro-batches, and evaluated on test prompts."""

    def __init__(
        self,
        config: RunConfig,
        backbone: Backbone,
        devices: Devices,
        objective: Objective,
        splits: tuple[TokenRows, TokenRows],
        copies: tuple[Backbone | None, Backbone | None],
        workdir: Path,
    ):
        """splits: rows for training and for tests; copies: as of `policy_copies`.

        Raises ValueError, one line, for rows or rewards that cannot be used.
        """
        assert config.policy is not None  # checked with the config
        assert isinstance(objective, GRPO)  # as its row says
        self.config, self.backbone, self.devices, self.objective = config, backbone, devices, objective
        self.settings = config.policy
        self.whole, self.start = copies
        lm = DiffusionLM(backbone, algorithm_named(config.algorithm))
        self.answering = Answering(config, lm, devices.accelerator, workdir)
        self.train, self.test = (Prompts.of(config, rows, lm.max_length) for rows in splits)
        for prompts in (self.train, self.test):
            self.answering.check(prompts)
        if self.train.left_out:
            left, most = self.train.left_out, self.settings.generation.max_new_tokens
            devices.accelerator.print(
                f"{config.name}: {left} prompts leave no room for {most} tokens, and are left out"
            )
        self._check_limit()
        self.current: Rollouts | None = None
        self.known: dict[str, list[list[list[float]]]] = {}
        """`old` and `reference`: log-likelihoods, iteration by iteration and answer by answer."""
        self._order: tuple[int, Any] = (-1, None)
        self._layout: tuple[Any, Any] = (None, None)

    def _check_limit(self) -> None:
        """Raise ValueError, one line, if an answer may come that does not fit into a micro-batch, however late."""
        most, policy, generation = self.config.micro_batch_tokens, self.settings, self.settings.generation
        new = generation.max_new_tokens
        passes = min(new, generation.steps or new) if policy.likelihood == "sampled" else policy.passes
        row = int(self.train.rows.prompts[self.train.numbers].max()) + new
        if most is not None and most < passes * row:
            raise ValueError(
                f"{self.config.name}: micro_batch_tokens = {most} is smaller than an answer, for which likelihood = "
                f"{policy.likelihood!r} forwards up to {passes} rows of {row} tokens; allowed: {passes * row} and up; "
                "raise it, or lower max_new_tokens"
            )

    def micro_batches(self, first: int, last: int) -> Iterator[MicroBatch]:
        """This process' micro-batches of the steps `first` to `last` - 1; each is made when it is asked for."""
        for step in range(first, last):
            batch, iteration = divmod(step, self.settings.num_iterations)
            if self.current is None or self.current.batch != batch:
                self._begin(batch)
            yield from self._parts(iteration)

    def evaluate(self, *, final: bool) -> dict[str, Any]:
        """Rewards of answers to test prompts, `num_generations_eval` to each, and the first answer to a few."""
        numbers = self.test.numbers[evaluated_rows(self.config, len(self.test.numbers), final=final)]
        group = self.settings.num_generations_eval
        rollouts = self._rollouts(self.test, numbers.tolist(), EVALUATION, group)
        if not any(rollouts.ended):
            raise ValueError(
                f"{self.config.name}: none of {len(rollouts.ended)} answers ends within "
                f"policy.generation.max_new_tokens = {self.settings.generation.max_new_tokens}; raise it, or start "
                "from a model trained on answers"
            )
        if all(reward != reward for reward in rollouts.rewards):
            raise ValueError(
                f"{self.config.name}: none of {len(rollouts.rewards)} answers has a reward; policy.reward_funcs = "
                f"{self.settings.reward_funcs} raised for each, as the lines above say; mend the reward"
            )
        tokenizer = self.backbone.tokenizer
        firsts = zip(numbers[:SHOWN].tolist(), rollouts.texts[::group], rollouts.rewards[::group], strict=False)
        shown = [
            {
                "prompt": tokenizer.decode(self.test.prompt(number), skip_special_tokens=True).strip(),
                "answer": text,
                "reward": reward if reward == reward else None,
            }
            for number, text, reward in firsts
        ]
        return rollouts.numbers() | {"samples": shown}

    def numbers(self) -> dict[str, float]:
        """What is logged of the answers of the last step."""
        return self.current.numbers() if self.current else {}

    def state(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint after `step` steps holds: nothing where the next step draws new answers."""
        if self.current is None or step % self.settings.num_iterations == 0:
            return None
        return {"rollouts": asdict(self.current), "known": self.known}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` gave."""
        self.current = Rollouts(**state["rollouts"]) if state else None
        self.known = state["known"] if state else {}

    def _rollouts(self, prompts: Prompts, numbers: list[int], batch: int, group: int) -> Rollouts:
        """Answers drawn with the current weights, in the precision of training."""
        backbone = self.backbone
        if self.whole is not None:
            backbone = self.whole
            self.devices.write_whole(backbone.model)
        training = backbone.model.training
        backbone.model.eval()
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=self.devices.bf16):
            rollouts = self.answering.rollouts(backbone, prompts, numbers, batch, group)
        backbone.model.train(training)
        return rollouts

    def _begin(self, batch: int) -> None:
        """Answer the prompts of a batch, and work out what later steps on the answers have to know of these weights."""
        settings = self.settings
        self.current = self._rollouts(self.train, self._prompts(batch), batch, settings.num_generations)
        later = range(settings.num_iterations)
        # the first step's weights are those that drew the answers: their ratio is 1, and nothing has to be known
        self.known = {}
        if settings.loss_type != "wd1":  # which has no ratios
            self.known["old"] = [[], *(self._values(number, self.devices.model) for number in later[1:])]
        if self.start is not None:
            start = SampledNLL(self.start)
            self.known["reference"] = [self._values(number, start) for number in later]

    def _prompts(self, batch: int) -> list[int]:
        """The prompts of a batch: a pure function of its number."""
        size = self.config.global_batch_size // self.settings.num_generations
        per_epoch = max(1, len(self.train.numbers) // size)
        epoch, place = divmod(batch, per_epoch)
        if self._order[0] != epoch:
            lengths = self.train.rows.prompts[self.train.numbers]
            self._order = (epoch, epoch_batches(lengths, size, self.config.seed, epoch, grouped=False))
        return [int(number) for number in self.train.numbers[self._order[1][place]]]

    @torch.no_grad()
    def _values(self, iteration: int, model: nn.Module) -> list[list[float]]:
        """The log-likelihoods of every answer under the weights of a module, as a step of an iteration has them."""
        _, forwards, _ = self._laid_out(iteration)
        table = torch.zeros(len(forwards.counts), int(forwards.counts.max()))
        for numbers, inputs in self._cut(iteration):
            device = self.devices.accelerator.device
            with torch.autocast(device.type, torch.bfloat16, enabled=self.devices.bf16):
                values = log_likelihoods(model, inputs.to(device)).float().cpu()
            for number, own in zip(numbers, values.split(forwards.counts[numbers].tolist()), strict=True):
                table[number, : len(own)] = own
        table = self.devices.summed(table)
        return [row[:count].tolist() for row, count in zip(table, forwards.counts.tolist(), strict=True)]

    def _laid_out(self, iteration: int) -> tuple[Answers, Forwards, Tensor]:
        """All answers, what is forwarded for them, and how many tokens of each count."""
        assert self.current is not None
        key = (self.current.batch, iteration)
        if self._layout[0] != key:
            block = self.settings.generation.block_size
            ids: dict[str, Any] = {"eos_id": self.backbone.eos_id, "pad_id": self.backbone.pad_id}
            answers = self.current.answers(self.config.seed, block_size=block, **ids)
            made = (answers, forwards_of(answers, iteration, self.settings), counted_tokens(answers, self.settings))
            self._layout = (key, made)
        return self._layout[1]

    def _cut(self, iteration: int) -> Iterator[tuple[numpy.ndarray, PolicyInputs]]:
        """This process' answers, micro-batch by micro-batch: their numbers and inputs."""
        assert self.current is not None
        answers, forwards, counted = self._laid_out(iteration)
        settings, config, accelerator = self.settings, self.config, self.devices.accelerator
        rewards = torch.tensor(self.current.rewards)
        advantages = group_advantages(rewards, len(self.current.prompts), settings.scale_rewards)
        if settings.loss_type == "wd1":
            advantages = weighed_advantages(advantages, ~rewards.isnan(), len(self.current.prompts))
        shares, _ = token_shares(counted, settings.loss_type, settings.generation.max_new_tokens)
        passes = int((forwards.length > 0).sum(-1).max())
        limits = Limits(max(1, config.micro_batch_size // passes), config.micro_batch_tokens)
        cuts = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
        for numbers in cut_rows(forwards.length.sum(-1).numpy(), limits, **cuts):
            some = torch.from_numpy(numbers)
            inputs = policy_inputs(
                answers.taken(some),
                forwards.taken(some),
                advantages=advantages[some],
                shares=shares[some],
                mask_id=self.backbone.mask_id,
                temperature=settings.generation.temperature if settings.likelihood == "sampled" else 1.0,
            )
            yield numbers, inputs

    def _parts(self, iteration: int) -> Iterator[MicroBatch]:
        """This process' micro-batches of one step."""
        assert self.current is not None
        settings, counted = self.settings, self._laid_out(iteration)[2]
        _, denominator = token_shares(counted, settings.loss_type, settings.generation.max_new_tokens)
        tokens, cut = sum(map(len, self.current.rows)), list(self._cut(iteration))
        for number, (numbers, inputs) in enumerate(cut):
            known: dict[str, Any] = {
                name: torch.tensor([value for answer in numbers for value in values[iteration][answer]])
                for name, values in self.known.items()
                if values[iteration]
            }
            inputs = replace(inputs, **known)
            yield MicroBatch(inputs, denominator, number == len(cut) - 1, numbers, tokens)


def policy_copies(
    config: RunConfig, backbone: Backbone, device: torch.device, *, sharded: bool
) -> tuple[Backbone | None, Backbone | None]:
    """Copies of a backbone at its start: one for the whole weights of a model that is in shards, one that stays.

    None where there is no need. They are made before anything is cut into shards or loaded from a checkpoint.
    """

    def frozen() -> Backbone:
        model = copy.deepcopy(backbone.model).to(device).eval()
        return replace(backbone, model=model.requires_grad_(False))

    policy = config.policy
    compared = learns_from_pairs(config) or (policy is not None and policy.beta > 0)
    return (frozen() if policy and sharded else None), (frozen() if compared else None)
