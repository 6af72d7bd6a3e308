"""Rules that several settings obey together, each checked in one place. A function returns the error's text, or None.

What an algorithm allows is in its row of `dllm.algorithms`.
"""

from __future__ import annotations

from typing import Literal

from dllm.algorithms import algorithm_named
from dllm.config.policy import PolicySettings
from dllm.config.settings import AdapterSettings, OptimizerSettings


def budget_error(epochs: float | None, steps: int | None) -> str | None:
    """The line for a run whose length is stated twice or not at all."""
    return "needs exactly one of `epochs` and `steps`" if (epochs is None) == (steps is None) else None


def tokens_error(micro_batch_tokens: int | None, length: int) -> str | None:
    """The line for a token budget that is smaller than the longest row."""
    if micro_batch_tokens is None or micro_batch_tokens >= length:
        return None
    return (
        f"micro_batch_tokens = {micro_batch_tokens} is smaller than the longest row, length = {length}; "
        f"allowed: {length} and up; raise it or lower length"
    )


def adapter_error(adapter: AdapterSettings | None, optimizer: OptimizerSettings) -> str | None:
    """The line for an optimiser that is not for adapters."""
    if adapter is None or optimizer.name == "adamw":
        return None
    return (
        f"optimizer.name = {optimizer.name!r} is not for adapters, whose matrices are thin and start at zero; "
        "allowed: adamw"
    )


def launch_error(
    launch: str, optimizer: str, *, quantized: bool = False, parameters: Literal["fp32", "bf16"] = "fp32"
) -> str | None:
    """The line for a launch that cannot run an optimiser, quantized weights or bf16 master weights."""
    if launch in ("cpu", "gpu", "ddp"):
        return None
    if optimizer == "muon":
        return (
            f"optimizer.name = 'muon' needs whole matrices, which launch = {launch!r} cuts into shards; allowed there: "
            "adamw; or launch with cpu or ddp"
        )
    if quantized:
        return f"adapter.kind = 'qlora' is not for launch = {launch!r}; allowed: cpu, ddp; or take kind: lora"
    if parameters == "bf16" and launch != "fsdp":
        return (
            f"recipe.parameters = 'bf16' is not for launch = {launch!r}, whose master weights are fp32; take a recipe "
            "with parameters: fp32, or launch with ddp or fsdp"
        )
    return None


def policy_error(algorithm: str, policy: PolicySettings | None, global_batch_size: int) -> str | None:
    """The line for rewards without an algorithm that learns from them, the reverse, and groups that are cut."""
    learns = "policy" in algorithm_named(algorithm).takes
    if policy is None:
        return f"algorithm = {algorithm!r} needs `policy`: what is rewarded (docs/rl.md)" if learns else None
    if not learns:
        return f"policy is not for algorithm = {algorithm!r}, which learns from no rewards; leave it out, or set grpo"
    if global_batch_size % policy.num_generations:
        return (
            f"global_batch_size = {global_batch_size} counts answers and does not divide by policy.num_generations = "
            f"{policy.num_generations}; change one of them"
        )
    return None


def raise_first(*errors: str | None) -> None:
    """Raise ValueError with the first error there is."""
    for error in errors:
        if error is not None:
            raise ValueError(error)
