"""How many forward passes the answers to a question, or a generated answer, take."""

from __future__ import annotations

import math

from dllm.config import GenerateSettings, LikelihoodSettings
from dllm.likelihood.policy import likelihood_passes


def question_passes(choices: int, length: int, one_prompt: bool, settings: LikelihoodSettings) -> float:
    """Passes for all answers of a question: those of one prompt and length share the input with everything masked.

    Of several answers that are scored in rounds, half are taken to go on after each round.
    """
    rounds = settings.rounds if choices > 1 and settings.rounds else [settings.budget]
    budgets = [settings.model_copy(update={"budget": budget}) for budget in rounds]
    each = math.fsum(likelihood_passes(length, own) * 0.5**number for number, own in enumerate(budgets))
    return choices * each - (choices - 1 if one_prompt and choices > 1 else 0)


def generation_passes(settings: GenerateSettings) -> int:
    """Most passes of an answer: one per token, or `steps`; an early end takes fewer, and so do parallel rules.

    Remasking may take more than one per token; edits are taken to need one more pass for each block.
    """
    blocks = math.ceil(settings.max_new_tokens / settings.block_size)
    passes = max(blocks, settings.steps or settings.max_new_tokens)
    if settings.remask == "none":
        passes = min(settings.max_new_tokens, passes)
    if settings.edit_threshold is not None:
        passes += blocks
    return passes * (2 if settings.guidance else 1)
