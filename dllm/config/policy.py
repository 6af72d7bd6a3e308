"""Settings of learning from rewards (`grpo`) and preferences (`dpo`). What TRL has a name for has that name here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_validator, model_validator

from dllm.choices import POLICY_LIKELIHOODS, REWARDS, SURE_OF_PLACE
from dllm.config.settings import MANY, GenerateSettings, Settings, known, names_schema, option
from dllm.config.sources import content_digest, seen_from

PolicyLikelihoodName = Annotated[str, AfterValidator(known(POLICY_LIKELIHOODS)), names_schema(POLICY_LIKELIHOODS)]

LEAST_PASSES = {"bound": 5}
"""Fewest passes with which a likelihood can be estimated, where that is more than one."""


class PolicySettings(Settings):
    """How `grpo` learns from rewards: several answers to a prompt, each compared with the others (docs/rl.md)."""

    reward_funcs: list[str] = option(
        ..., "rewards, which are added up: names, or a function of your own as `file.py:function`", min_length=1
    )
    reward_weights: list[float] | None = option(None, "what each reward counts; none: 1")
    num_generations: int = option(8, "answers to a prompt, a group; it divides `global_batch_size`", le=2**16)
    num_generations_eval: int = option(1, "answers to each held-out prompt in an evaluation", gt=0, le=2**16)
    num_iterations: int = option(1, "optimiser steps on the answers of one batch of prompts", gt=0, le=MANY)
    likelihood: PolicyLikelihoodName = option(
        "sampled",
        "log-likelihood of an answer: of its tokens as the sampler drew them (`sampled`, exact), its bound at masks "
        "that old and new weights share (`bound`), or of all its tokens at once (`d1`, as published)",
    )
    passes: int = option(8, "forward passes of an answer in a training step, of `bound` and `d1`", gt=0, le=MANY)
    p_mask_prompt: float = option(0.15, "share of the prompt that `d1` masks", ge=0, le=1)
    epsilon: float = option(
        0.2, "ratios of new to old likelihood are clipped at 1 - epsilon and 1 + epsilon", ge=0, lt=1
    )
    beta: float = option(
        0.0, "weight of the KL divergence from the start; above 0 the start is kept in memory", ge=0, le=100
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo", "wd1"] = option(
        "grpo",
        "mean over an answer's tokens, then over answers; mean over all tokens; sum over `max_new_tokens`; or "
        "log-likelihoods weighed in place of ratios",
    )
    scale_rewards: Literal["group", "none"] = option(
        "none", "whether advantages are divided by their group's deviation"
    )
    generation: GenerateSettings = option(
        GenerateSettings(temperature=1.0, reveal_rule="entropy"), "sampler of the answers"
    )
    bound_data: str | None = option(
        None, "dataset on whose test rows the bound is evaluated, to see what else changes; none: on those of `data`"
    )

    @field_validator("num_generations")
    @classmethod
    def a_group_has_several_answers(cls, number: int) -> int:
        if number < 2:
            raise ValueError("an answer is compared with the others of its prompt; input should be at least 2")
        return number

    @model_validator(mode="after")
    def fits_together(self) -> PolicySettings:
        weights, least = self.reward_weights, LEAST_PASSES.get(self.likelihood, 1)
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights = {weights} for {len(self.reward_funcs)} reward_funcs; state one weight for each"
            )
        if weights is not None and not any(weights):
            raise ValueError(f"reward_weights = {weights} count no reward; state one that is not 0, or leave them out")
        for name in self.reward_funcs:
            if name not in REWARDS and ".py:" not in name:
                raise ValueError(
                    f"reward_funcs = {name!r} is not a reward; allowed: {', '.join(REWARDS)}, or a function of your "
                    "own as file.py:function"
                )
        if self.passes < least:
            raise ValueError(
                f"passes = {self.passes} with likelihood = {self.likelihood!r}: at least {least} are needed"
            )
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature = 0 draws the same answer again and again; set it above 0, e.g. 1.0"
            )
        if self.likelihood == "sampled" and (error := _inexact(self.generation)):
            raise ValueError(error)
        return self


class PreferenceSettings(Settings):
    """How `dpo` learns from chosen and rejected answers (docs/rl.md)."""

    beta: float = option(0.1, "what a nat away from the start counts; more keeps the model nearer to it", gt=0, le=100)
    passes: int = option(
        8, "forward passes of an answer in a training step, at masks that model and start share", ge=5, le=MANY
    )


def _inexact(generation: GenerateSettings) -> str | None:
    """Why the likelihood `sampled` is not that of a sampler, or None."""
    allowed: dict[str, tuple[Any, ...]] = {"reveal_rule": SURE_OF_PLACE, "top_p": (1.0,), "guidance": (0.0,)}
    allowed |= {"reuse": ("none",), "remask": ("none",), "edit_threshold": (None,)}
    for name, values in allowed.items():
        if (value := getattr(generation, name)) not in values:
            return (
                f"generation.{name} = {value!r} with likelihood = 'sampled', which knows the probability of each token "
                f"and not of such a choice; allowed: {', '.join(map(str, values))}; or take likelihood: bound"
            )
    return None


def own_reward(name: str, root: Path) -> Path | None:
    """The file of a reward that is a function of one, absolute or below `root`; None for a reward of the table."""
    return root / Path(name.rpartition(":")[0]).expanduser() if ".py:" in name else None


def own_rewards(policy: PolicySettings, root: Path, workdir: Path) -> dict[str, Any]:
    """`policy` as a job in `workdir` finds its files, and `policy_content`, their digest, if there are any."""
    seen, files = {}, []
    for name in policy.reward_funcs:
        if file := own_reward(name, root):
            stated, _, function = name.rpartition(":")
            seen[name] = f"{seen_from(file, stated, workdir)}:{function}"
            files.append(file)
    names = [seen.get(name, name) for name in policy.reward_funcs]
    content = {"policy_content": content_digest(files)} if files else {}
    return {"policy": policy.model_copy(update={"reward_funcs": names}), **content}
