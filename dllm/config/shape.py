"""Sizes of an architecture, for planning."""

from __future__ import annotations

from pydantic import model_validator

from dllm.config.settings import Settings, option


class Shape(Settings):
    """Sizes of a published architecture, as its config.json states them: known before the weights are fetched."""

    model_type: str = option(..., "architecture, as transformers names it")
    layers: int = option(..., "layers", gt=0)
    width: int = option(..., "size of the hidden states", gt=0)
    heads: int = option(..., "attention heads", gt=0)
    kv_heads: int | None = option(None, "heads of keys and values; none: as many as `heads`", gt=0)
    head_width: int | None = option(None, "size of a head; none means width / heads", gt=0)
    intermediate: int = option(..., "inner size of the feed-forward part", gt=0)
    vocabulary: int = option(..., "rows of the embedding", gt=0)
    positions: int = option(..., "longest row, in tokens", gt=0)
    token_types: int = option(0, "kinds of segments with an embedding of their own", ge=0)
    window: int | None = option(None, "positions that a local layer sees", gt=0)
    global_every: int = option(1, "one layer in this many sees all positions; the others are local", gt=0)
    global_head_width: int | None = option(None, "size of a head in those layers; none means the same", gt=0)
    global_kv_heads: int | None = option(None, "heads of keys, which are the values too, in those layers", gt=0)
    tied: bool = option(True, "the embedding is the output matrix too")
    experts: int | None = option(None, "experts of a feed-forward part that chooses among them", gt=0)
    active_experts: int = option(0, "how many of them a token passes", ge=0)
    expert_intermediate: int = option(0, "inner size of an expert", ge=0)
    shared_experts: int = option(0, "further experts that every token passes", ge=0)
    dense_layers: int = option(0, "first layers whose feed-forward part has no experts", ge=0)

    @model_validator(mode="after")
    def experts_with_sizes(self) -> Shape:
        active, inner = self.active_experts, self.expert_intermediate
        if bool(self.experts) != bool(active and inner) or active > (self.experts or 0):
            raise ValueError(
                f"experts = {self.experts} with active_experts = {active} and expert_intermediate = {inner}; state all "
                "three or none, and no more active ones than there are"
            )
        return self
