"""The devices of a run: how its processes share weights, gradients and optimiser states in a step.

The trainer, and whatever else trains, asks only this: train on micro-batches, add numbers up over the processes, save
and load. Everything is whole in every process, or cut into shards; the accelerate configuration that launched the
processes says which (`config/accelerate`). DeepSpeed and fully_shard are told by us and not by `Accelerator.prepare`:
that one wants a data loader, sets a precision of its own, and shards on GPUs only, where the same code should run in a
test on two CPU processes.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, distributed, nn

from dllm.config import OptimizerSettings, RunConfig, launch_error
from dllm.core.batch import LossTerms
from dllm.core.memory import reuse_memory
from dllm.core.precision import WidenedWeights, has_fast_bf16
from dllm.objectives.objective import Objective
from dllm.training.micro_batches import MicroBatch
from dllm.training.optimizer import build_optimizers

BUCKET = 50_000_000
"""Most gradients that DeepSpeed collects before it sends them: 200 MB of fp32."""

DATA_PARALLEL = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
"""No buffer of our backbones ever changes, and gradients need not be held twice."""


def asked_dtype(config: RunConfig) -> str:
    """`bf16` or `fp32`: in what a run's recipe wants matrix products computed."""
    return "bf16" if "bf16" in (config.recipe.autocast, config.recipe.parameters) else "fp32"


def product_dtype(config: RunConfig, device: torch.device) -> str:
    """`bf16` or `fp32`: in what they are computed on a device; bf16 only where it is fast."""
    return asked_dtype(config) if has_fast_bf16(device) else "fp32"


@dataclass(frozen=True)
class StepNumbers:
    """What this process' share of a step gave: loss and summed nll (nats) on the device, the number of predicted
    tokens, the global batch's tokens on disk, the gradient norm before clipping (of the whole step), and `sums` of the
    loss terms."""

    loss: Tensor
    nll: Tensor
    masked: int
    tokens: int
    gradient_norm: Tensor
    sums: dict[str, Tensor]


class Devices(ABC):
    """A module that scores and its optimisers, spread over the processes of an accelerator; subclasses are final."""

    model: nn.Module
    """What is called: the module that scores, or a wrapper of it."""
    optimizers: list
    layout: str
    """What a checkpoint depends on: only one of the same layout can be loaded."""

    def __init__(self, accelerator: Accelerator, scores: nn.Module, settings: OptimizerSettings, *, bf16: bool = False):
        """bf16: matrix products in bfloat16 (autocast); weights stay as they are.

        scores: the module that scores; its parameters may become shards. Raises ValueError, one line, for an optimiser
        or weights that cannot be sharded.
        """
        self.accelerator, self.scores, self.bf16, self.clip = accelerator, scores, bf16, settings.clip
        reuse_memory(accelerator.device.type)
        self._prepare(settings)
        self._hosts = _host_group() if accelerator.num_processes > 1 else None

    @abstractmethod
    def _prepare(self, settings: OptimizerSettings) -> None:
        """Set `model`, `optimizers` and `layout`."""

    def step(self, objective: Objective, parts: Iterable[MicroBatch], *, scale: float = 1.0) -> StepNumbers:
        """Train on the micro-batches of one step: at least one, the last one marked as such.

        scale: what the loss is multiplied by for the gradient (a wrapper that averages over processes wants their
        number where the denominator counts the global batch). The host never waits for the device.
        """
        loss: Any = 0.0
        nll: Any = 0.0
        masked = tokens = 0
        sums: dict[str, Tensor] = {}
        for part in parts:
            with self._accumulating(part.last):
                terms = self.forward(objective, part)
                self._backward(terms.loss * scale)
            loss, nll = loss + terms.loss.detach(), nll + terms.nll
            masked, tokens = masked + terms.masked, part.tokens
            sums |= {name: sums.get(name, 0.0) + value for name, value in terms.sums.items()}
        return StepNumbers(loss, nll, masked, tokens, self.update(), sums)

    def forward(self, objective: Objective, part: MicroBatch) -> LossTerms:
        """The terms of a micro-batch, in the run's precision."""
        device = self.accelerator.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return objective.loss(self.model, part.inputs.to(device), denominator=part.denominator)

    def summed(self, values: Tensor) -> Tensor:
        """values added up over all processes, back where they came from."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").to(values.device)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process; the hosts agree among themselves and no device is waited for."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor([int(flag)])
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=self._hosts)
        return bool(flags)

    @abstractmethod
    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch; `last` of its step."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss, averaged over the processes, to those of the step."""

    @abstractmethod
    def update(self) -> Tensor:
        """Clip the gradients, step the optimisers, forget the gradients; the norm before clipping, on the device."""

    @abstractmethod
    def _whole(self, parameter: Tensor) -> Tensor:
        """A parameter in full, in every process; all processes ask together."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write what trains, the optimisers and the random states; all processes call it."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""

    @torch.no_grad()
    def write_whole(self, model: nn.Module) -> None:
        """Write the weights, whole, into a copy of the model in every process; all processes call it."""
        copies = dict(model.named_parameters())
        for name, parameter in self.scores.model.named_parameters():
            copies[name].copy_(self._whole(parameter))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """State of the module that scores, whole and on the CPU, in the main process (empty in others).

        All processes call it. Frozen parameters are left out; tied ones are one tensor under two names.
        """
        state: dict[str, Tensor] = {}
        known: dict[int, Tensor | None] = {}
        frozen = {id(p) for p in self.scores.parameters() if not p.requires_grad}
        for name, value in self.scores.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor) or id(value) in frozen:
                continue
            if id(value) not in known:
                full = self._whole(value).detach()
                known[id(value)] = full.cpu().contiguous() if self.accelerator.is_main_process else None
            if self.accelerator.is_main_process:
                state[name] = known[id(value)]
        return state


class Replicated(Devices):
    """Everything whole in every process: one device, or DistributedDataParallel."""

    layout = "replicated"

    def _prepare(self, settings: OptimizerSettings) -> None:
        accelerator, scores = self.accelerator, self.scores
        half = any(p.dtype == torch.bfloat16 for p in scores.parameters())
        slow = half and not has_fast_bf16(accelerator.device)
        self.model = accelerator.prepare(WidenedWeights(scores) if slow else scores)
        self.optimizers = [accelerator.prepare(o) for o in build_optimizers(scores, settings)]
        if any(not p.requires_grad for p in scores.parameters()):
            accelerator.register_save_state_pre_hook(_drop_frozen)
            accelerator.register_load_state_pre_hook(_load_trained)

    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        alone = last or self.accelerator.num_processes == 1
        return contextlib.nullcontext() if alone else self.accelerator.no_sync(self.model)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def _whole(self, parameter: Tensor) -> Tensor:
        return parameter

    def save(self, directory: Path) -> None:
        self.accelerator.save_state(str(directory))

    def load(self, directory: Path) -> None:
        self.accelerator.load_state(str(directory))


def _drop_frozen(models: list[nn.Module], weights: list[dict], directory: str) -> None:
    """Frozen weights are those of the start, whose content the run's state is bound to: they are not saved again."""
    for model, state in zip(models, weights, strict=True):
        trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        trained |= {name for name, _ in model.named_buffers()}
        for name in [name for name in state if name not in trained]:
            del state[name]


def _load_trained(models: list[nn.Module], directory: str) -> None:
    """The other half of `_drop_frozen`; accelerate finds nothing left to load."""
    from safetensors.torch import load_file

    model = models.pop()
    state = load_file(Path(directory) / "model.safetensors")
    _, unexpected = model.load_state_dict(state, strict=False)
    loaded = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in loaded]
    if wrong := [*missing, *unexpected]:
        raise ValueError(f"{directory}/model.safetensors: does not fit this run ({wrong[0]})")


class DeepSpeedZero(Devices):
    """DeepSpeed ZeRO: optimiser states (stage 1), gradients too (2), weights too (3) in shards (arXiv:1910.02054)."""

    def _prepare(self, settings: OptimizerSettings) -> None:
        import deepspeed
        import deepspeed.ops
        from accelerate import DeepSpeedPlugin

        config = dict(DeepSpeedPlugin().deepspeed_config)  # of the launching configuration
        accelerator, scores, stage = self.accelerator, self.scores, config["zero_optimization"]["stage"]
        self.layout = f"zero{stage} on {accelerator.num_processes} processes"
        _check(f"zero{stage}", scores, settings)
        if accelerator.device.type == "cpu":  # gloo serves; no communication kernel is compiled for a test
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        size = sum(p.numel() for p in scores.parameters())
        bucket = min(BUCKET, size + size % 2)  # an odd one is refused
        buckets = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        config |= {
            # the trainer counts batches and denominators itself, and says which micro-batch is the last of a step
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "train_batch_size": accelerator.num_processes,
            "gradient_clipping": settings.clip,
            "zero_optimization": buckets | config["zero_optimization"],
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW everywhere, also where states are offloaded
            # fp32 master weights, and autocast as in every other subclass: no operation has rules of its own
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
            "torch_autocast": {"enabled": self.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }
        (adamw,) = build_optimizers(scores, settings)
        if stage == 3:  # weight by weight: left to `initialize`, the whole model would be on each device for once
            deepspeed.init_distributed()
            deepspeed.zero.Init(module=scores, config_dict_or_path=config)
            for buffer in scores.buffers():
                buffer.data = buffer.data.to(accelerator.device)
        self.model, optimizer, *_ = deepspeed.initialize(model=scores, optimizer=adamw, config=config)
        self.optimizers = [optimizer]

    @contextlib.contextmanager
    def _accumulating(self, last: bool):
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def _backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self) -> Tensor:
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm(), device=self.accelerator.device)

    def _whole(self, parameter: Tensor) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def save(self, directory: Path) -> None:
        self.model.save_checkpoint(str(directory), tag="zero")
        self.accelerator.save_state(str(directory))  # the random states

    def load(self, directory: Path) -> None:
        self.model.load_checkpoint(str(directory), tag="zero")
        self.accelerator.load_state(str(directory))


class FullyShard(Devices):
    """PyTorch's fully_shard (FSDP2): weights, gradients and optimiser states in shards, a layer gathered at a time."""

    layout = "fsdp"

    def _prepare(self, settings: OptimizerSettings) -> None:
        from accelerate import FullyShardedDataParallelPlugin
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        accelerator, scores = self.accelerator, self.scores
        self.model = scores
        _check("fsdp", scores, settings)
        plugin = FullyShardedDataParallelPlugin()  # of the launching configuration
        options = {
            "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload,
        }
        inner: Any = scores.model
        for layer in _layers(inner):
            fully_shard(layer, **options)
        fully_shard(scores, **options)  # embeddings and head, which may share a matrix
        self.optimizers = build_optimizers(scores, settings)

    def _accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        # gradients are sent with every micro-batch: kept until the last they would be whole, which is what does not fit
        return contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return self._whole(norm)

    def _whole(self, parameter: Tensor) -> Tensor:
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter

    def save(self, directory: Path) -> None:
        import torch.distributed.checkpoint as sharded

        sharded.save(self._state(), checkpoint_id=str(directory / "shards"))
        self.accelerator.save_state(str(directory))  # the random states

    def load(self, directory: Path) -> None:
        import torch.distributed.checkpoint as sharded
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._state()
        try:
            sharded.load(state, checkpoint_id=str(directory / "shards"))
        except CheckpointException as error:  # it does not derive from Exception
            raise RuntimeError(" ".join(str(error).split())[:200]) from None
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"],
            options=self._options(),
        )
        self.accelerator.load_state(str(directory))

    def _state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizers = get_state_dict(self.model, self.optimizers, options=self._options())
        return {"model": model, "optimizers": optimizers}

    @staticmethod
    def _options():
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(ignore_frozen_params=True, strict=False)


def devices_for(
    accelerator: Accelerator, scores: nn.Module, settings: OptimizerSettings, *, bf16: bool = False
) -> Devices:
    """The devices that the processes were launched for; arguments and errors as in `Devices`."""
    kind: type[Devices] = Replicated
    if _launched("DEEPSPEED"):
        kind = DeepSpeedZero
    elif _launched("FSDP") and distributed.is_initialized():
        kind = FullyShard
    return kind(accelerator, scores, settings, bf16=bf16)


def cuts_weights() -> bool:
    """Whether the processes were launched to hold shards of the weights."""
    if _launched("DEEPSPEED"):
        from accelerate import DeepSpeedPlugin

        return DeepSpeedPlugin().deepspeed_config["zero_optimization"]["stage"] == 3
    return _launched("FSDP")


def _launched(name: str) -> bool:
    """Whether `accelerate launch` asked for DeepSpeed or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def _host_group() -> distributed.ProcessGroup | None:
    """A process group over CPUs; None, the default one, where that is one already."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")


def _check(launch: str, scores: nn.Module, settings: OptimizerSettings) -> None:
    """Raise ValueError, one line, for what cannot be sharded."""
    quantized = any(not p.is_floating_point() for p in scores.parameters())
    half = launch.startswith("zero") and any(p.dtype == torch.bfloat16 for p in scores.parameters())
    error = launch_error(launch, settings.name, quantized=quantized, parameters="bf16" if half else "fp32")
    if error:
        raise ValueError(error)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a stock model: the longest list of modules of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
    return list(max(lists, key=len, default=[]))
