"""The prepared model and its optimisers: the one place that knows how devices share the work of a step.

The trainer, and whatever else trains, asks only this: run a micro-batch backwards, finish the step, add numbers up over
the devices, save and load. Data parallelism, ZeRO and FSDP differ in `backends`, behind this, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, distributed, nn

from dllm.config import OptimizerSettings, RunConfig
from dllm.core.batch import LossTerms
from dllm.models.backbone import Backbone, TokenNLL
from dllm.objectives.objective import Objective
from dllm.training.backends import backend_for
from dllm.training.pipeline import Part

DATA_PARALLEL = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
"""No buffer of our backbones ever changes, and gradients need not be held twice."""


def scores_for(config: RunConfig, backbone: Backbone, make: Callable[[Backbone], nn.Module] = TokenNLL) -> nn.Module:
    """The module that is trained, in training mode, with the run's choices of memory and compilation.

    make: makes it, from the model and its prediction. Raises ValueError, one line, if the architecture does not offer
    activation checkpointing.
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
    return make(backbone).train()


class Engine:
    """A module that scores and its optimisers, prepared for all devices of an accelerator."""

    def __init__(self, accelerator: Accelerator, scores: nn.Module, settings: OptimizerSettings, *, bf16: bool = False):
        """bf16: matrix products in bfloat16 (autocast); weights stay as they are."""
        self.accelerator, self.bf16 = accelerator, bf16
        self.backend = backend_for(accelerator, scores, settings, bf16=bf16)
        self.model, self.optimizers = self.backend.model, self.backend.optimizers
        self._hosts = _host_group() if self.ranks > 1 else None

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        """How many processes share a step."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.accelerator.is_main_process

    def forward(self, objective: Objective, part: Part) -> LossTerms:
        """The terms of a micro-batch, in the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return objective.loss(self.model, part.inputs.to(self.device), denominator=part.denominator)

    def accumulate(self, objective: Objective, part: Part, *, scale: float) -> LossTerms:
        """Forward and backward of `scale` times the loss; the processes' gradients are averaged."""
        with self.backend.part(part.last):
            terms = self.forward(objective, part)
            self.backend.backward(terms.loss * scale)
        return terms

    def update(self) -> Tensor:
        """Clip the gradients, step the optimisers, forget the gradients; returns the norm before clipping."""
        return self.backend.update()

    def summed(self, values: Tensor) -> Tensor:
        """values added up over all processes, back where they came from."""
        if self.ranks == 1:
            return values
        return self.accelerator.reduce(values.to(self.device), "sum").to(values.device)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process; the hosts agree among themselves and no device is waited for."""
        if self.ranks == 1:
            return flag
        told = torch.tensor([int(flag)])
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=self._hosts)
        return bool(told)

    def weights(self) -> dict[str, Tensor]:
        """What was trained, whole and on the CPU, in the main process (empty in others); all processes call it."""
        return self.backend.weights()

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def save(self, directory: Path) -> None:
        """Write weights, optimisers and random states; all processes call it."""
        self.backend.save(directory)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        self.backend.load(directory)


def _host_group() -> distributed.ProcessGroup | None:
    """A process group over CPUs; None, the default one, where that is one already."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
