"""What `dllm evaluate` is told: one checkpoint, one benchmark, and every rule of its scoring. Imports no torch."""

from __future__ import annotations

from typing import Literal

from dllm.config import GenerateSettings, Scorer, Settings, option


class EvaluationConfig(Settings):
    """One number of the results table before it is known. Paths are relative to the work directory."""

    run: str = option(..., "name of the evaluated row; the scores are written to evals/<run>/<benchmark>.json")
    checkpoint: str = option(..., "directory of the model")
    model_kind: Literal["dllm", "hf"] = option(
        "dllm", "a diffusion model, or an autoregressive one through lm-eval's `hf`"
    )
    benchmark: str = option(..., "name of the benchmark")
    task: str = option(..., "lm-eval task or group")
    task_directory: str | None = option(
        None, "directory of task files: `miniature`, or a path; none means lm-eval's own task"
    )
    data: str | None = option(
        None, "directory the task files read as {DATA}; of a stock task: the fetched snapshot of its dataset"
    )
    revision: str | None = option(None, "pinned commit of a stock task's dataset, where there is no snapshot")
    shots: int | None = option(None, "examples in the prompt; none keeps the task's own number", ge=0)
    fewshot_as_multiturn: bool = option(False, "examples as turns of the conversation, not as one user turn")
    chat_template: bool = option(True, "wrap prompts in the chat template, exactly as in training")
    metric: str = option("acc", "headline metric, as lm-eval names it")
    filter: str = option("none", "filter of the headline metric")
    further_metrics: list[str] = option([], "metrics that must be there too: `acc_norm` or `exact_match,strict-match`")
    chance: float | None = option(None, "score of guessing, as a share", ge=0, le=1)
    limit: int | None = option(None, "score only the first documents of each task", gt=0)
    generation: GenerateSettings = option(GenerateSettings(), "sampler of generative tasks")
    scorer: Scorer = option(Scorer(), "rules of the likelihood")
    seed: int = option(1234, "seed of the drawn examples")
