"""Answers of a model that is being trained, and their rewards.

What is drawn is a function of the weights and of (seed, batch, prompt, number of the answer), where the answers to a
prompt that stands in a batch several times are numbered on, so that no two of them are drawn with the same noise. Every
process answers its share of the prompts and then knows all answers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy import ndarray
from torch.nn.utils.rnn import pad_sequence

from dllm.algorithms import resolved
from dllm.choices import CHECK_REFERENCE, REWARD_NAMED, REWARD_OF
from dllm.config import PolicySettings, RunConfig
from dllm.core.canvas import canvas_for
from dllm.core.noise import keyed_hash
from dllm.data.tokens import TokenRows
from dllm.language_model import DiffusionLM
from dllm.likelihood.answers import Answers
from dllm.models.backbone import Backbone
from dllm.sampling.recorded import add_seeded, answer_ends, recorded
from dllm.sampling.sampler import MaskedSampler

_ANSWER_STREAM, _MASK_STREAM = 21, 22

WARNED = 10
"""Most lines about rewards that went wrong, of one batch."""


@dataclass(frozen=True)
class Rollouts:
    """The answers to one batch of prompts, N of them, group by group.

    prompts: the rows of the dataset; rows: prompt and response of each answer; starts: where the response begins;
    drawn, visible: of each of the row's tokens, as of `sampling.recorded` (empty where it was not recorded);
    texts, rewards: of each answer, NaN where a reward raised; ended: whether it has an end; tokens: of its text;
    seconds: that drawing all of them took.
    """

    batch: int
    prompts: list[int]
    rows: list[list[int]]
    starts: list[int]
    drawn: list[list[int]]
    visible: list[list[int]]
    texts: list[str]
    rewards: list[float]
    ended: list[bool]
    tokens: list[int]
    seconds: float

    def numbers(self) -> dict[str, float]:
        """What is logged of them; the standard error is that over prompts."""
        rewards = numpy.array(self.rewards).reshape(len(self.prompts), -1)
        group = rewards.shape[1]
        means = numpy.array([row[~numpy.isnan(row)].mean() for row in rewards if not numpy.isnan(row).all()])
        distinct = [len(set(self.texts[low : low + group])) for low in range(0, len(self.texts), group)]
        return {
            "reward": float(means.mean()) if len(means) else float("nan"),
            "reward_standard_error": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0,
            "without_reward": int(numpy.isnan(rewards).sum()),
            "answer_tokens": float(numpy.mean(self.tokens)),
            "distinct": sum(distinct) / len(self.texts),
            "ended": float(numpy.mean(self.ended)),
            "generated_per_second": round(sum(self.tokens) / max(1e-9, self.seconds), 1),
        }

    def answers(self, seed: int, *, eos_id: int, pad_id: int, block_size: int) -> Answers:
        """The answers as their likelihoods take them; seed: of the masks."""
        tokens, drawn, visible = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
            for rows, fill in (
                (self.rows, pad_id),
                (self.drawn or [[-1]] * len(self.rows), -1),
                (self.visible or [[0]], 0),
            )
        )
        starts, lengths = torch.tensor(self.starts), torch.tensor([len(row) for row in self.rows])
        group = len(self.rows) // len(self.prompts)
        groups = keyed_hash(seed, _MASK_STREAM, self.batch, torch.tensor(self.prompts)).repeat_interleave(group)
        return Answers(
            tokens=tokens,
            prompts=starts,
            ends=answer_ends(tokens, starts, lengths, eos_id=eos_id, block_size=block_size),
            visible=visible.expand(len(tokens), -1),
            drawn=drawn,
            keys=keyed_hash(groups, torch.arange(group).repeat(len(self.prompts))),
            groups=groups,
        )


@dataclass(frozen=True)
class Prompts:
    """One split's prompts with their references.

    numbers [P]: rows that leave room for an answer; room: the longest prompt, in tokens.
    """

    rows: TokenRows
    numbers: ndarray
    left_out: int

    @classmethod
    def of(cls, config: RunConfig, rows: TokenRows, longest: int) -> Prompts:
        """The prompts of a split; longest: tokens of a row of the model.

        Raises ValueError, one line, for rows without prompts, and if no prompt leaves room for an answer.
        """
        if not len(rows) or not rows.prompts.all():
            raise ValueError(
                f"{config.data_path}: holds texts without prompts, and rewards compare an answer to a prompt with its "
                "reference; take a dataset of conversations"
            )
        most = min(config.length, longest)
        room = most - config.policy.generation.max_new_tokens
        numbers = (rows.prompts <= room).nonzero()[0]
        if not len(numbers):
            raise ValueError(
                f"{config.name}: no prompt of {config.data_path} leaves room for policy.generation.max_new_tokens = "
                f"{config.policy.generation.max_new_tokens} in rows of {most} tokens (the shortest has "
                f"{rows.prompts.min()}); raise length or lower max_new_tokens"
            )
        return cls(rows, numbers, len(rows) - len(numbers))

    def prompt(self, number: int) -> list[int]:
        """The tokens of a row's prompt."""
        return self.rows.row(number)[: self.rows.prompts[number]].tolist()

    def reference(self, number: int) -> list[int]:
        """The tokens of its own answer."""
        return self.rows.row(number)[self.rows.prompts[number] :].tolist()


class Answering:
    """What draws answers to prompts and rewards them, in every process of a run."""

    def __init__(self, config: RunConfig, lm: DiffusionLM, accelerator: Accelerator, workdir: Path):
        assert config.policy is not None  # checked with the config
        self.config, self.lm, self.accelerator = config, lm, accelerator
        self.policy: PolicySettings = config.policy
        self.names = [str(workdir / name) if ".py:" in name else name for name in self.policy.reward_funcs]
        self.weights = self.policy.reward_weights or [1.0] * len(self.names)
        self._reward: Callable[..., tuple[float, str]] = resolved(REWARD_OF)
        for name in self.names:
            resolved(REWARD_NAMED)(name)

    def check(self, prompts: Prompts) -> None:
        """Raise ValueError, one line, for a reference that a reward cannot be given by."""
        for number in prompts.numbers.tolist():
            prompt, reference = self._texts(prompts, number)
            for name in self.names:
                try:
                    resolved(CHECK_REFERENCE)(name, prompt, reference)
                except ValueError as error:
                    raise ValueError(
                        f"{self.config.data_path}: reward {name!r} cannot use the answer of row {number} as its "
                        f"reference ({error}): {reference[:80]!r}; take another reward or dataset"
                    ) from None

    def rollouts(
        self, backbone: Backbone, prompts: Prompts, numbers: Sequence[int], batch: int, group: int
    ) -> Rollouts:
        """`group` answers to each of the prompts `numbers`, drawn with the weights of a backbone, and their rewards."""
        started = time.perf_counter()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        texts = [tuple(prompts.prompt(number)) for number in numbers]
        seen = Counter[tuple[int, ...]]()
        before = []  # how often a prompt stood in the batch before
        for text in texts:
            before.append(seen[text])
            seen[text] += 1
        places = [(place, answer) for place in range(len(numbers)) for answer in range(group)]
        places.sort(key=lambda each: before[each[0]] * group + each[1])  # equal seeds side by side
        own = [(place, answer) for place, answer in places if (place * group + answer) % ranks == rank]
        drawn = self._drawn(
            backbone,
            [list(texts[place]) for place, _ in own],
            [self._seed(batch, before[place] * group + answer) for place, answer in own],
        )
        mine = [found | {"number": place * group + answer} for (place, answer), found in zip(own, drawn, strict=True)]
        seconds = time.perf_counter() - started
        warned = 0
        for found in mine:
            found |= self._rewarded(prompts, numbers[found["number"] // group], found)
            if found["says"] and (warned := warned + 1) <= WARNED:
                print(f"{self.config.name}: answer {found['number']} of batch {batch}: {found['says']}", flush=True)
        every = sorted(gather_object(mine), key=lambda found: found["number"])
        seconds = max(gather_object([seconds]))
        parts = ("rows", "starts", "drawn", "visible", "texts", "rewards", "ended", "tokens")
        return Rollouts(
            batch=batch,
            prompts=[int(number) for number in numbers],
            **{part: [found[part] for found in every] for part in parts},
            seconds=seconds,
        )

    def _seed(self, batch: int, answer: int) -> int:
        return int(keyed_hash(self.config.seed, _ANSWER_STREAM, batch, answer)) % 2**32

    @torch.no_grad()
    def _drawn(self, backbone: Backbone, rows: list[list[int]], seeds: list[int]) -> list[dict[str, Any]]:
        """One answer to each prompt, by a seed of its own: its row, and of `sampled` what was drawn when.

        All answers of a batch are drawn together, as many at a time as the settings allow; each is that of its row
        alone.
        """
        sampler, settings = self.lm.sampler, self.policy.generation
        assert isinstance(sampler, MaskedSampler)  # as the row of `grpo` says
        found: list[dict[str, Any]] = [{}] * len(rows)
        ids: dict[str, Any] = {"mask_id": backbone.mask_id, "pad_id": backbone.pad_id}
        new = settings.max_new_tokens
        if not rows:
            return []
        if self.policy.likelihood != "sampled":
            loop = sampler.loop(backbone, settings.batch_size, settings.batch_tokens)
            add_seeded(loop, canvas_for(rows, new, **ids), settings, seeds)
            while loop.busy:
                for done in loop.step()[1]:
                    prompt = rows[done.number]
                    row = {"rows": [*prompt, *done.tokens], "starts": len(prompt), "drawn": [], "visible": []}
                    found[done.number] = row
            return found
        together = max(1, min(settings.batch_size, settings.batch_tokens // (max(map(len, rows)) + new)))
        for low in range(0, len(rows), together):
            some, own = rows[low : low + together], seeds[low : low + together]
            made = recorded(sampler, backbone, canvas_for(some, new, device=backbone.device, **ids), settings, own)
            for number, prompt in enumerate(some):
                end = len(prompt) + new
                parts = {"rows": made.tokens, "drawn": made.drawn, "visible": made.visible}
                read = {name: part[number, :end].tolist() for name, part in parts.items()}
                found[low + number] = read | {"starts": len(prompt)}
        return found

    def _rewarded(self, prompts: Prompts, number: int, found: dict[str, Any]) -> dict[str, Any]:
        """Text, length and reward of an answer to the prompt of a row."""
        response = found["rows"][found["starts"] :]
        length = self.lm.answer_length(response)
        text = self.lm.decode(response).strip()
        prompt, reference = self._texts(prompts, number)
        value, says = self._reward(self.names, self.weights, prompt, text, reference)
        return {"texts": text, "tokens": length, "ended": length < len(response), "rewards": value, "says": says}

    def _texts(self, prompts: Prompts, number: int) -> tuple[str, str]:
        """Prompt and reference of a row."""
        prompt = self.lm.backbone.tokenizer.decode(prompts.prompt(number), skip_special_tokens=True)
        return prompt.strip(), self.lm.decode(prompts.reference(number)).strip()
