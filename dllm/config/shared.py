"""Settings that an entry and its job have in common: a job is an entry with every name replaced by a path."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from dllm.config.rules import AlgorithmName, adapter_error, budget_error, layout_error, raise_first, tokens_error
from dllm.config.settings import (
    DECODING_OPTIONS,
    AdapterSettings,
    EditSettings,
    GenerateSettings,
    OptimizerSettings,
    Settings,
    checked_options,
    option,
)


class RunSettings(Settings):
    """How one model is trained."""

    algorithm: AlgorithmName = option(
        "mdlm",
        "masked diffusion, the same block after block, masked LM, next-token prediction, or insertions, deletions and "
        "substitutions",
    )
    init: str = option(..., "model or run to start from")
    data: str = option(..., "dataset")
    length: int = option(512, "longest row, in tokens", gt=0)
    epochs: float | None = option(None, "passes over the data", gt=0)
    steps: int | None = option(None, "optimiser steps", gt=0)
    stop_after: int | None = option(None, "stop here although the schedule is laid out for all steps", gt=0)
    global_batch_size: int = option(512, "rows per optimiser step, whatever the number of devices", gt=0)
    micro_batch_size: int = option(64, "most rows per device and forward pass", gt=0)
    optimizer: OptimizerSettings = option(OptimizerSettings(), "optimiser and schedule")
    seed: int = option(42, "seed of order and noise")
    mlm_share: float = option(0.3, "share of tokens masked by `mlm`", gt=0, lt=1)
    evaluations: int = option(10, "evaluations (and checkpoints) over the run", gt=0)
    eval_rows: int | None = option(None, "use only the first rows of the test split", gt=0)
    eval_draws: int = option(1, "noise draws per test row", gt=0)
    micro_batch_tokens: int | None = option(
        None, "most tokens per device and forward pass; not used where the denominator is `micro_batch`", gt=0
    )
    layout: Literal["packed", "padded"] = option("packed", "rows laid end to end, or padded to the longest")
    head_chunk: int | None = option(None, "targets whose logits are held at a time; none means all", gt=0)
    activation_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory")
    compile: bool = option(False, "torch.compile of the backbone")
    edits: EditSettings = option(EditSettings(), "starts and times of `edit_flows`")
    adapter: AdapterSettings | None = option(None, "train LoRA adapters only; none: all weights")

    @model_validator(mode="after")
    def fits_together(self) -> RunSettings:
        raise_first(
            budget_error(self.epochs, self.steps),
            tokens_error(self.micro_batch_tokens, self.length),
            layout_error(self.algorithm, self.layout, self.head_chunk),
            adapter_error(self.adapter, self.optimizer),
        )
        return self


class TaskSettings(Settings):
    """One lm-eval task and what is reported of it."""

    task: str = option(..., "lm-eval task or group")
    revision: str | None = option(None, "pinned commit of the task's dataset on the hub, where it is not downloaded")
    metric: str = option("acc", "headline metric, as lm-eval names it")
    filter: str = option("none", "filter of the headline metric")
    generation: GenerateSettings = option(GenerateSettings(), "sampler of generative tasks")
    seed: int = option(1234, "seed of the examples in the prompt")


class SampleSettings(Settings):
    """Conversations with one model."""

    conversations: list[list[str]] = option(..., "user turns of each conversation", min_length=1)
    generation: GenerateSettings = option(GenerateSettings(), "sampler")


class SpeedSettings(Settings):
    """Numbers of steps and ways to decode that are compared on one model."""

    prompt: str = option("{question}", "how a question is put; {question} stands for it")
    answer: str = option(r"(.*)", "regular expression whose first group, in a reference answer, is the answer sought")
    steps: list[int] = option(..., "numbers of steps to compare", min_length=1)
    generation: GenerateSettings = option(GenerateSettings(), "sampler")
    options: dict[str, dict[str, Any]] = option(
        DECODING_OPTIONS, "faster decoding to compare with the exact one: name -> what it changes of `generation`"
    )

    @model_validator(mode="after")
    def known_options(self) -> SpeedSettings:
        checked_options(self.options, self.generation)
        return self
