"""The finished artifact of a run: whether it is there, what it depends on, and how it is written.

`runs/<name>` holds the stock model with its sidecar, the config, the metrics and the provenance; `runs/<name>.json` is
its record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from dllm import provenance
from dllm.algorithms import algorithm_named, resolved
from dllm.config import RunConfig, digest, read_yaml, write_when_changed
from dllm.models.adapters import merge_adapter, save_adapter
from dllm.models.backbone import Backbone
from dllm.models.load import SIDECAR
from dllm.objectives.objective import part_of_state
from dllm.training.devices import Devices, asked_dtype, product_dtype
from dllm.training.setup import adapted, start_of

UNWRITABLE = (OSError, RuntimeError, SafetensorError)
"""What writing to a full disk raises; torch says RuntimeError."""


def input_paths(config: RunConfig) -> list[str]:
    """The artifacts a run reads, below the work directory: its data, and its init's artifact."""
    data = dict.fromkeys([config.data_path, config.bound_path])
    return [*data, config.init_path.removesuffix("/model")]


def input_digests(config: RunConfig, workdir: Path) -> dict[str, str]:
    """The digest of each artifact that a run reads, by its path."""
    return {path: provenance.input_digest(workdir / path) for path in input_paths(config)}


def state_key(config: RunConfig, workdir: Path, device: torch.device) -> str:
    """Digest of everything that decides the run's numbers, so that nothing resumes from foreign state."""
    inputs = list(input_digests(config, workdir).values())
    key = {"config": digest(config), "inputs": inputs}
    if product_dtype(config, device) != asked_dtype(config):
        key["products"] = product_dtype(config, device)
    return digest(key)[:16]


def check_free(config: RunConfig, target: Path) -> None:
    """Raise ValueError if a finished run of this name is there: it may be another configuration's."""
    if not (target / "config.yaml").exists():
        return
    old = read_yaml(target / "config.yaml")
    new = config.once_had | config.model_dump(mode="json")
    old = config.once_had | old
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if changed:
        what = ", ".join(changed)
        raise ValueError(
            f"{target}: holds a run of another configuration (it differs in {what}); pass --replace to "
            "train this one and put it there when it is finished, or give the run another name"
        )
    raise ValueError(f"{target}: this run is finished already; pass --replace to train it again")


def is_finished(config: RunConfig, workdir: Path) -> bool:
    """Whether the artifact of this very configuration, from these very inputs, is there."""
    target = workdir / "runs" / config.name
    record = Path(f"{target}.json")
    if not (record.exists() and target.exists()):
        return False
    written = provenance.read_record(record)
    return written["config_digest"] == digest(config) and written["inputs"] == input_digests(config, workdir)


@dataclass(frozen=True)
class Trained:
    """A run that has reached its last step. tokens: trained on, over all steps; parameters: how many there are."""

    config: RunConfig
    backbone: Backbone
    devices: Devices
    metrics: Path
    wall_seconds: float
    tokens: int
    parameters: int


def write_artifact(trained: Trained, weights: dict[str, Tensor], workdir: Path) -> None:
    """Write the artifact in a scratch place, move it to its name, then write its record.

    weights: of the module that scores, whole (`Devices.weights`).
    """
    config = trained.config
    target = workdir / "runs" / config.name
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "model").mkdir(parents=True)
    _write_model(trained, part_of_state(weights, "model"), workdir, scratch)
    sidecar = _sidecar(trained)
    if save := resolved(algorithm_named(config.algorithm).save):
        sidecar |= save(config, trained.devices.scores, weights, scratch / "model")
    (scratch / "model" / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    write_when_changed(scratch / "config.yaml", config)
    shutil.copy2(trained.metrics, scratch / "metrics.jsonl")
    inputs = input_digests(config, workdir)
    facts = _provenance(trained, inputs)
    (scratch / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    provenance.replace_directory(scratch, target)
    provenance.write_record(target, kind="run", name=config.name, config_digest=digest(config), inputs=inputs)


def _write_model(trained: Trained, state: dict[str, Tensor], workdir: Path, scratch: Path) -> None:
    """Write the stock model and its tokenizer; of a run with an adapter, the adapter and the merged model."""
    config, model = trained.config, trained.backbone.model
    if all(parameter.requires_grad for parameter in model.parameters()):
        model.save_pretrained(scratch / "model", state_dict=state)
    else:
        # the start once more, as it was: under a back-end with shards, this process holds a part of it only
        whole = adapted(config, start_of(config, workdir), trained.devices.accelerator.device).model
        whole.load_state_dict(state, strict=False)
        if config.adapter is not None:
            save_adapter(model, state, scratch / "adapter")
            whole = merge_adapter(whole)
        whole.save_pretrained(scratch / "model")
    trained.backbone.tokenizer.save_pretrained(scratch / "model")


def _sidecar(trained: Trained) -> dict:
    """What loading, sampling and scoring have to know of how the model was trained."""
    config, entry = trained.config, trained.config.model
    return {
        "algorithm": config.algorithm,
        "run": config.name,
        "family": trained.backbone.family,
        "prediction": trained.backbone.prediction,
        "response_end": config.recipe.response_end,
        "block_size": config.recipe.block_size,
        "block_anchor": config.recipe.block_anchor,
        "length": config.length,
        "products": product_dtype(config, trained.devices.accelerator.device),
        "special_tokens": {"mask": entry.mask_token, "eos": entry.end_token, "end_of_turn": entry.end_of_turn},
        "chat_template": entry.chat_template,
    }


def _provenance(trained: Trained, inputs: dict[str, str]) -> dict:
    """Where the artifact comes from; inputs as in `input_digests`."""
    config, accelerator = trained.config, trained.devices.accelerator
    return provenance.collect(
        run=config.name,
        seed=config.seed,
        config_digest=digest(config),
        data_digest=inputs[config.data_path],
        device=str(accelerator.device),
        products=product_dtype(config, accelerator.device),
        hardware=_hardware(accelerator),
        processes=accelerator.num_processes,
        wall_seconds=round(trained.wall_seconds, 1),
        tokens=trained.tokens,
        parameters=trained.parameters,
    )


def _hardware(accelerator: Accelerator) -> str:
    """The accelerators a run used, or else the processor."""
    if accelerator.device.type != "cuda":
        return provenance.hardware()
    return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}, {provenance.hardware()}"


@contextmanager
def writing(config: RunConfig, place: Path, what: str) -> Iterator[None]:
    """Raise one line about what could not be written to `place`.

    On a full disk the errors have many names and say little.
    """
    try:
        yield
    except UNWRITABLE as error:
        existing = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{config.name}: {what} could not be written to {place}, where {free:,.0f} MiB are free ({reason[:200]}); "
            "make room and start the same command again: it goes on from the last complete checkpoint"
        ) from None
