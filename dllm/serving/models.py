"""A model that is served: its id, its engine, and how it samples unless a request says otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dllm.algorithms import trained_blocks
from dllm.config import GenerateSettings, overlaid
from dllm.language_model import DiffusionLM
from dllm.sampling.edits import EditSampler
from dllm.serving.engine import Engine
from dllm.serving.errors import ApiError
from dllm.serving.schemas import ModelCard, ModelFacts


@dataclass(frozen=True)
class Served:
    """context: most tokens of a conversation and its answer together; defaults: how `dllm chat` samples with it."""

    id: str
    model: DiffusionLM
    engine: Engine
    defaults: GenerateSettings
    context: int

    def settings(self, changes: dict[str, Any]) -> GenerateSettings:
        """The sampler of a request. Raises ValueError, one line, for what the model cannot do."""
        settings = overlaid(self.defaults, changes)
        sidecar = self.model.backbone.sidecar
        blocks = trained_blocks(sidecar.get("algorithm"))
        if "block_size" in changes and blocks == "none":
            raise ValueError(f"block_size = {settings.block_size}: this model has no blocks; leave it out")
        if "block_size" in changes and blocks == "trained" and settings.block_size != self.defaults.block_size:
            raise ValueError(
                f"block_size = {settings.block_size}: this model was trained in blocks of {self.defaults.block_size}; "
                "leave it out"
            )
        count = math.ceil(settings.max_new_tokens / settings.block_size)
        if settings.steps is not None and settings.steps < count:
            raise ValueError(
                f"steps = {settings.steps}: each of the {count} blocks of {settings.block_size} tokens needs a pass; "
                f"take {count} steps at least, or larger blocks"
            )
        return settings

    def check_context(self, turns: Sequence[dict[str, str]], settings: GenerateSettings) -> None:
        """Raise ValueError, one line, if a conversation and its answer take more than the model was trained with."""
        with self.engine.encoding:
            tokens = len(self.model.encode_prompt(turns))
        room = self.context - settings.max_new_tokens
        if tokens > room:
            raise ApiError(
                400,
                f"the conversation has {tokens} tokens; with max_tokens = {settings.max_new_tokens} the model's "
                f"context of {self.context} tokens leaves {max(0, room)}; leave out old turns or lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )

    def card(self, created: int) -> ModelCard:
        """What `GET /v1/models` says of it."""
        backbone = self.model.backbone
        defaults = self.defaults.model_dump(exclude={"batch_size", "batch_tokens", "early_stop"})
        defaults["max_tokens"] = defaults.pop("max_new_tokens")
        facts = ModelFacts(
            algorithm=self.model.algorithm.name,
            context=self.context,
            parameters=sum(weights.numel() for weights in backbone.model.parameters()),
            mask_token=backbone.tokenizer.mask_token,
            end_token=backbone.tokenizer.eos_token,
            end_of_turn=self.model.end_of_turn,
            edits=isinstance(self.model.sampler, EditSampler),
            chat=bool(backbone.tokenizer.chat_template),
            defaults=defaults,
        )
        return ModelCard(id=self.id, object="model", created=created, owned_by="dllm", dllm=facts)
