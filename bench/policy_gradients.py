"""How noisy the gradients are that three log-likelihoods of an answer give, against a long-run gradient.

The start of a run of config/systems.yaml answers the same prompts many times. The long-run gradient is that of the
expected reward, from all of these answers and their exact log-probabilities under the sampler. Each likelihood then
sees small batches of them, as a training step would, once with each of several draws of its masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bench.measure import Result, say
from bench.options import Options
from bench.workloads import ROOT, system
from dllm.algorithms import algorithm_named
from dllm.config import PolicySettings, RunConfig, load_project, run_configs
from dllm.core.policy import group_advantages, token_shares
from dllm.data.tokens import open_rows
from dllm.language_model import DiffusionLM
from dllm.likelihood.answers import Answers, counted_tokens, forwards_of, policy_inputs
from dllm.objectives.grpo import GRPO, SampledNLL
from dllm.training.rollouts import Answering, Prompts, Rollouts
from dllm.training.setup import start_of

MICRO_BATCH = 32
"""Answers that are forwarded together."""
RUN = "sums-sampled-1"


def policy(options: Options) -> Result:
    """The gradients of one run's start."""
    if options.quick:
        return Result(skipped="a smoke run has no model that was shown sums")
    project = load_project(ROOT / "config", *(ROOT / "config" / name for name in ("laptop.yaml", "systems.yaml")))
    config = run_configs(project)[RUN]
    system(project.runs[RUN].init, f"{config.data_path}.json")
    found = measured(config, ROOT / project.workdir, prompts=8, answers=32, batches=3, draws=2)
    say(summary(found))
    return Result(setup=found)


def gradient(
    module: SampledNLL, rollouts: Rollouts, answers: Answers, settings: PolicySettings, draw: int, group: int
) -> Tensor:
    """The gradient of the surrogate of some answers at their own weights, all parameters in one row."""
    counted = counted_tokens(answers, settings)
    advantages = group_advantages(torch.tensor(rollouts.rewards), len(rollouts.rewards) // group, "none")
    shares, denominator = token_shares(counted, settings.loss_type, settings.generation.max_new_tokens)
    module.zero_grad()
    for low in range(0, len(answers), MICRO_BATCH):
        some = torch.arange(low, min(low + MICRO_BATCH, len(answers)))
        part = answers.taken(some)
        inputs = policy_inputs(
            part,
            forwards_of(part, draw, settings),
            advantages=advantages[some],
            shares=shares[some],
            mask_id=module.backbone.mask_id,
            temperature=settings.generation.temperature if settings.likelihood == "sampled" else 1.0,
        )
        GRPO(policy=settings).loss(module, inputs, denominator=denominator).loss.backward()
    rows = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in module.parameters()]
    return torch.cat(rows).double()


def part_of(rollouts: Rollouts, answers: Answers, of_prompt: int, first: int, count: int) -> tuple[Rollouts, Answers]:
    """The answers number `first` to `first + count` of every prompt."""
    prompts = len(rollouts.prompts)
    some = [prompt * of_prompt + first + number for prompt in range(prompts) for number in range(count)]
    rewards = [rollouts.rewards[number] for number in some]
    fields = {name: getattr(rollouts, name) for name in rollouts.__dataclass_fields__}
    return Rollouts(**(fields | {"rewards": rewards})), answers.taken(torch.tensor(some))


def measured(config: RunConfig, workdir: Path, prompts: int, answers: int, batches: int, draws: int) -> dict[str, Any]:
    """The table of the module's docstring."""
    settings = config.policy
    assert settings is not None
    backbone = start_of(config, workdir)
    module = SampledNLL(backbone).eval()
    lm = DiffusionLM(backbone, algorithm_named(config.algorithm))
    answering = Answering(config, lm, Accelerator(cpu=True), workdir)
    known = Prompts.of(config, open_rows(workdir / config.data_path, "train"), lm.max_length)
    rollouts = answering.rollouts(backbone, known, known.numbers[:prompts].tolist(), 0, answers)
    ids = {"eos_id": backbone.eos_id, "pad_id": backbone.pad_id}
    every = rollouts.answers(config.seed, block_size=settings.generation.block_size, **ids)
    exact = settings.model_copy(update={"likelihood": "sampled"})
    truth = gradient(module, rollouts, every, exact, 0, answers)
    # how well the long-run gradient itself is known: the cosine of its two halves
    halves = [
        gradient(module, *part_of(rollouts, every, answers, first, answers // 2), exact, 0, answers // 2)
        for first in (0, answers // 2)
    ]
    rows, group = [], settings.num_generations
    for likelihood in ("sampled", "bound", "d1"):
        own = settings.model_copy(update={"likelihood": likelihood, "passes": _passes(settings)})
        for batch in range(batches):
            some = part_of(rollouts, every, answers, batch * group, group)
            made = [
                gradient(module, *some, own, draw, group) for draw in range(1 if likelihood == "sampled" else draws)
            ]
            mean = torch.stack(made).mean(0)
            spread = sum(((one - mean) ** 2).sum().item() for one in made) / max(1, len(made) - 1)
            for one in made:
                rows.append(
                    {
                        "likelihood": likelihood,
                        "batch": batch,
                        "cosine": torch.cosine_similarity(one, truth, dim=0).item(),
                        "norm": (one.norm() / truth.norm()).item(),
                        "mask_noise": spread / mean.square().sum().item(),
                    }
                )
    return {
        "run": config.name,
        "prompts": prompts,
        "answers_per_prompt": answers,
        "answers_per_estimate": prompts * group,
        "passes": _passes(settings),
        "reward": rollouts.numbers()["reward"],
        "halves_cosine": torch.cosine_similarity(*halves, dim=0).item(),
        "estimates": rows,
    }


def _passes(settings: PolicySettings) -> int:
    """Passes of an answer: those of the sampler, for all."""
    return max(5, settings.generation.steps or settings.generation.max_new_tokens)


def summary(result: dict[str, Any]) -> str:
    """The means by likelihood, as a Markdown table."""
    lines = ["| likelihood | cosine | norm, of the long-run one | noise of the masks |", "|---|---:|---:|---:|"]
    for likelihood in dict.fromkeys(row["likelihood"] for row in result["estimates"]):
        rows = [row for row in result["estimates"] if row["likelihood"] == likelihood]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("cosine", "norm", "mask_noise")}
        lines.append(
            f"| `{likelihood}` | {mean['cosine']:.3f} | {mean['norm']:.2f} | {100 * mean['mask_noise']:.1f} % |"
        )
    return "\n".join(lines)
