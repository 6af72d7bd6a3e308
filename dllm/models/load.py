"""One loader for every checkpoint: family -> Auto class, `is_causal` off, bidirectionality proved at start-up."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import nn

from dllm.config import ModelEntry
from dllm.models.forward import is_bidirectional
from dllm.models.tokenizers import load_tokenizer

SIDECAR = "dllm.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Backbone:
    """A model, its tokenizer and the ids that diffusion needs."""

    model: nn.Module
    tokenizer: Any
    family: Literal["encoder", "decoder"]
    prediction: Literal["in_place", "next"]
    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    max_length: int
    sidecar: dict = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_backbone(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    entry: ModelEntry | None = None,
    causal: bool = False,
) -> Backbone:
    """The checkpoint at a directory (or pinned on the hub) as a backbone, in evaluation mode.

    entry tells family and special tokens of a checkpoint that carries no sidecar; causal keeps a decoder as it is
    (for next-token training). Raises ValueError, one line, for a missing or damaged checkpoint, a tokenizer
    without a mask token, and a model that turns out not to be bidirectional.
    """
    directory = _local_directory(path_or_hub_id, revision)
    sidecar = read_sidecar(directory)
    config = _config(directory)
    family = entry.family if entry else sidecar.get("family") or _family(config)
    model = _model(directory, config, family, dtype, causal)
    if entry is None and sidecar:
        tokens = sidecar["special_tokens"]
        entry = ModelEntry(
            new={}, tokenizer="saved", mask_token=tokens["mask"], end_token=tokens["eos"], chat_template="own"
        )
    tokenizer = load_tokenizer(directory, entry)
    if tokenizer.mask_token_id is None and not causal:
        raise ValueError(f"{directory}: the tokenizer has no mask token; set mask_token in the model's entry")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "they are not from the same checkpoint"
        )
    model = model.to(device).eval()
    if not causal and not is_bidirectional(model, config.vocab_size):
        raise ValueError(
            f"{directory}: {type(model).__name__} attends to the left only although is_causal is off; "
            "diffusion needs a bidirectional model: use another attention implementation or transformers >= 5.2"
        )
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        family=family,
        prediction=sidecar.get("prediction", entry.prediction if entry else "in_place"),
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id,
        pad_id=tokenizer.pad_token_id,
        vocab_size=config.vocab_size,
        max_length=longest_row(config),
        sidecar=sidecar,
    )


def read_sidecar(directory: str | Path) -> dict:
    """What dLLM noted beside a checkpoint; empty for a foreign one. Raises ValueError if it is damaged."""
    path = Path(directory) / SIDECAR
    if not path.exists():
        return {}
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(sidecar["special_tokens"][key], str) for key in ("mask", "eos"))
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged; train or fetch this checkpoint again")
    return sidecar


def longest_row(config) -> int:
    """Longest row in tokens that a model's positions allow."""
    positions = getattr(config, "max_position_embeddings", None) or 2048
    # RoBERTa counts positions from pad_token_id + 1
    return positions - config.pad_token_id - 1 if config.model_type == "roberta" else positions


def new_model(entry: ModelEntry, tokenizer) -> nn.Module:
    """A stock model with seeded random weights, sized by `entry.new`, with the tokenizer's vocabulary.

    Raises ValueError, one line, for an unknown architecture or setting.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    settings = dict(entry.new)
    kind = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind)
    except ValueError:
        raise ValueError(
            f"new.model_type = {kind!r} is no architecture of transformers; e.g. bert, modernbert"
        ) from None
    unknown = sorted(k for k in settings if not hasattr(config, k))
    if unknown:
        raise ValueError(f"new.{unknown[0]} = {settings[unknown[0]]!r} is no setting of {kind}; see its config class")
    end, tokens = tokenizer.convert_tokens_to_ids(entry.end_token), {}
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        tokens[key] = end
    if tokenizer.cls_token_id is not None:
        tokens |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    tokens["vocab_size"] = -(-len(tokenizer) // 8) * 8
    auto = AutoModelForMaskedLM if entry.family == "encoder" else AutoModelForCausalLM
    generator_state = torch.random.get_rng_state()
    try:
        # stock classes draw from the CPU's global generator, which is put back below; other devices' are left alone
        torch.random.default_generator.manual_seed(entry.seed)
        return auto.from_config(AutoConfig.for_model(kind, **settings | tokens))
    except (ValueError, TypeError, LookupError, StrictDataclassError) as fault:
        reason = " ".join(str(fault).split())
        raise ValueError(f"new: no {kind} as {entry.family} can be made of these settings ({reason[:200]})") from None
    finally:
        torch.random.set_rng_state(generator_state)


def _local_directory(path_or_hub_id: str | Path, revision: str | None) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith((".", "/", "~")):
        raise ValueError(f"{path_or_hub_id}: no checkpoint there; give a directory with config.json, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        first = str(fault).strip().splitlines()[0]
        raise ValueError(
            f"{path_or_hub_id}: neither a directory here nor to be had from the hub ({first}); "
            "check the name, the revision and the network"
        ) from None


def _config(directory: Path):
    from transformers import AutoConfig

    if not (directory / "config.json").exists():
        raise ValueError(f"{directory}: no config.json; this is not a checkpoint directory")
    if not any((directory / name).exists() for name in WEIGHTS):
        raise ValueError(f"{directory}: no weights ({WEIGHTS[0]}); the checkpoint is incomplete: make it again")
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as fault:
        raise ValueError(f"{directory}/config.json: cannot be used ({str(fault).splitlines()[0]})") from None


def _family(config) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return "encoder" if "MaskedLM" in architecture or not architecture else "decoder"


def _model(directory: Path, config, family: str, dtype: torch.dtype | None, causal: bool) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if family == "decoder" and not causal:
        config.is_causal = False  # on the config: set on the modules, it would stay causal under padding
    auto = AutoModelForMaskedLM if family == "encoder" else AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(
            directory, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as fault:
        first = str(fault).strip().splitlines()[0]
        raise ValueError(f"{directory}: the weights cannot be loaded ({first}); fetch or train them again") from None
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and draws them at random
        raise ValueError(
            f"{directory}: the weights lack {missing[0]} ({len(missing)} in all) that {type(model).__name__} needs; "
            "this is another kind of checkpoint, or a damaged one: fetch or train it again"
        )
    return model
