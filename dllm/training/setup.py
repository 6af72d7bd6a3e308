"""What a run is made of: its backbone, its objective and the module that is trained; refusals before any long work."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from torch import nn

from dllm.algorithms import algorithm_named, resolved
from dllm.config import RunConfig
from dllm.core.precision import has_fast_bf16
from dllm.data.collate import ResponseEnd
from dllm.data.tokens import TokenRows
from dllm.models.adapters import attach_adapter
from dllm.models.backbone import Backbone, TokenNLL
from dllm.models.diffusion_gemma import process_steps
from dllm.models.load import load_backbone
from dllm.models.published import family_of
from dllm.numbers import environment_number
from dllm.objectives.objective import Objective
from dllm.training.devices import cuts_weights


def objective_of(config: RunConfig, backbone: Backbone, *, exact: bool = False) -> Objective:
    """The run's objective; `exact` swaps in the least noisy unbiased estimate, for evaluation."""
    bound = {"corruption": "exact", "weight": "elbo", "time_low": 0.0, "time_high": 1.0}
    recipe = config.recipe.model_copy(update=bound) if exact else config.recipe
    algorithm = algorithm_named(config.algorithm)
    known = {"max_length": backbone.max_length, "vocab_size": backbone.vocab_size, **vars(config)}
    known |= {"passes": process_steps(backbone), "bos_id": getattr(backbone.tokenizer, "bos_token_id", None)}
    return algorithm.part("objective")(recipe, **{name: known[name] for name in algorithm.takes})


def start_of(config: RunConfig, workdir: Path) -> Backbone:
    """The backbone that a run starts from; one that is trained causally predicts the next token."""
    dtype = torch.bfloat16 if config.recipe.parameters == "bf16" else torch.float32
    causal = algorithm_named(config.algorithm).causal
    backbone = load_backbone(workdir / config.init_path, dtype=dtype, entry=config.model, causal=causal)
    return replace(backbone, prediction="next") if causal else backbone


def adapted(config: RunConfig, backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone with the run's adapter, if it has one."""
    if config.adapter is None:
        return backbone
    return attach_adapter(
        backbone,
        config.adapter,
        seed=config.seed,
        device=device,
        bf16=config.recipe.autocast == "bf16" and has_fast_bf16(device),
        causal=algorithm_named(config.algorithm).causal,
    )


def scores_for(config: RunConfig, backbone: Backbone) -> nn.Module:
    """The module that is trained, in training mode, with the run's choices of memory and compilation.

    Raises ValueError, one line, if the architecture does not offer activation checkpointing.
    """
    model = backbone.model
    if config.activation_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(
                f"{config.name}.activation_checkpointing = True, which {type(model).__name__} does not offer; "
                "switch it off and lower micro_batch_size or micro_batch_tokens"
            )
        renamed = getattr(model, "activation_checkpointing_enable", None)  # its name in newer transformers
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.compile:
        model.base_model.compile(dynamic=True)  # in place: names of weights stay as they are
    if config.compile or cuts_weights():
        backbone = replace(backbone, shortens=False)  # the compiler and DeepSpeed's layers expect plain tensors
    module = resolved(algorithm_named(config.algorithm).module)
    return (module(config, backbone) if module else TokenNLL(backbone)).train()


def response_end_of(config: RunConfig, rows: TokenRows, backbone: Backbone) -> ResponseEnd | None:
    """How responses end; None for text, which has no prompts."""
    if not rows.prompts.any():
        return None
    recipe = config.recipe
    kind = "one" if algorithm_named(config.algorithm).causal else recipe.response_end
    return ResponseEnd(
        kind, backbone.eos_id, recipe.block_size, recipe.extra_blocks, config.seed, longest=config.length
    )


def check_inputs(config: RunConfig, backbone: Backbone, rows: TokenRows, init: Path) -> None:
    """Raise ValueError, one line, if the rows do not fit the model, or the model at `init` not the algorithm.

    Rows and their ends must fit the model's positions, and have its vocabulary; a published model that attends
    block-causally is trained in no other way.
    """
    family = family_of(init)
    if family is not None and family.block_size is not None and config.algorithm != family.algorithm:
        raise ValueError(
            f"{config.name}: algorithm = {config.algorithm!r} is not for {config.init}: {family.name} attends "
            f"block-causally; allowed: {family.algorithm}; set algorithm: {family.algorithm}, or start from another "
            "model"
        )
    trained, starts = backbone.sidecar.get("algorithm", "mdlm"), algorithm_named(config.algorithm).starts
    if starts and trained not in starts:
        raise ValueError(
            f"{config.name}: algorithm = {config.algorithm!r} cannot start from a model trained with {trained!r}, "
            f"whose answers it does not know how to score; allowed: {', '.join(starts)}"
        )
    room = backbone.max_length - algorithm_named(config.algorithm).prefix_positions
    if config.length > room:
        raise ValueError(
            f"{config.name}: length = {config.length} is longer than the model allows ({room}); "
            "lower `length` or start from another model"
        )
    highest = int(rows.tokens[: 1 << 20].max()) if len(rows.tokens) else 0
    if highest >= backbone.vocab_size:
        raise ValueError(
            f"{config.data_path}: holds token id {highest}, the model knows {backbone.vocab_size}; "
            "the data was prepared with another tokenizer: prepare it again"
        )


def check_budget(config: RunConfig, objective: Objective) -> None:
    """Raise ValueError if the tokens that an objective forwards for the longest row may not fit into a micro-batch."""
    most = objective.forward_lengths(numpy.array([config.length]), numpy.array([0])).item()
    if config.micro_batch_tokens is not None and config.micro_batch_tokens < most:
        raise ValueError(
            f"{config.name}: micro_batch_tokens = {config.micro_batch_tokens} is smaller than the longest row, for "
            f"which algorithm = {config.algorithm!r} forwards up to {most} tokens; allowed: {most} and up; raise it or "
            "lower length"
        )


def check_world(accelerator: Accelerator) -> None:
    """Raise ValueError if this process was launched as one of several, but accelerate sees no other."""
    name = "DLLM_PROCESSES" if "DLLM_PROCESSES" in os.environ else "WORLD_SIZE"  # the launcher knows best
    launched = environment_number(name, 1)
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{name} = {launched}, but accelerate sees {accelerator.num_processes} process(es): each would train "
            "alone; on CPUs use distributed_type: MULTI_GPU with use_cpu: true in the accelerate configuration"
        )
