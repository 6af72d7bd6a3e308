"""What a model's entry has to say, read off a checkpoint: its family, its special tokens and its chat template."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.models.headless import lacks_head
from dllm.models.load import read_sidecar
from dllm.models.published import family_of, published_config
from dllm.models.tokenizers import chat_text, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of causal classes."""


def entry_settings(directory: Path, prediction: str | None = None) -> dict[str, Any]:
    """Settings of a `ModelEntry` for the checkpoint in a directory, without its source.

    A checkpoint of ours says them itself, and so does one of a published family; of others the tokenizer tells mask,
    padding (the end of text) and template. prediction: as of the entry; None: `next` for a causal model. Raises
    ValueError, one line, for a checkpoint that cannot be trained.
    """
    sidecar, family = read_sidecar(directory), family_of(directory)
    if family is not None and family.loader is not None:
        raise ValueError(
            f"{directory}: {family.name} is trained by an experiment with algorithm: {family.algorithm} "
            "(docs/checkpoints.md), and not by `dllm tune`: write one, or start from another model"
        )
    known = sidecar or (family.sidecar() if family else {})
    settings = sidecar_settings(known) if known else _of_stock_class(directory, prediction)
    if prediction is not None and prediction != settings["prediction"] and known:
        raise ValueError(
            f"{directory}: prediction = {prediction!r}, but this model was trained with {settings['prediction']!r}; "
            "leave the option out"
        )
    return settings


def sidecar_settings(sidecar: dict) -> dict[str, Any]:
    """Settings of a `ModelEntry`, from the sidecar of a checkpoint."""
    tokens = {"mask_token": "mask", "end_token": "eos", "end_of_turn": "end_of_turn"}
    settings = {key: sidecar["special_tokens"].get(name, "") for key, name in tokens.items()}
    settings |= {key: sidecar[key] for key in ("family", "prediction")}
    return settings | {"chat_template": sidecar.get("chat_template", "bert")}


def _of_stock_class(directory: Path, prediction: str | None) -> dict[str, Any]:
    architecture = (published_config(directory).get("architectures") or [""])[0]
    decoder = architecture.endswith(CAUSAL)
    if not decoder and prediction == "next":
        raise ValueError(
            f"{directory}: prediction = 'next' is for causal models, and {architecture or 'this encoder'} fills in "
            "masks; leave the option out"
        )
    tokenizer = read_tokenizer(directory)
    ends = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.sep_token)
    end = next((token for token in ends if token and token != tokenizer.mask_token), None)
    if end is None or (tokenizer.mask_token is None and not decoder):
        lacks = "mask" if end is not None else "padding or end"
        raise ValueError(f"{directory}: its tokenizer has no {lacks} token, which diffusion needs; take another model")
    own = decoder and bool(tokenizer.chat_template)
    return {
        "family": "decoder" if decoder else "encoder",
        "prediction": (prediction or "next") if decoder else "in_place",
        "mask_token": tokenizer.mask_token or "[MASK]",
        "end_token": end,
        "end_of_turn": _end_of_turn(tokenizer) if own else "[/Answer]",
        "chat_template": "own" if own else "bert",
    }


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer's own template writes right behind an answer."""
    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    behind = chat_text(tokenizer, turns, add_generation_prompt=False).rpartition(answer)[2].strip()
    special = [token for token in tokenizer.all_special_tokens if behind.startswith(token)]
    return max(special, key=len, default=behind.splitlines()[0] if behind else tokenizer.eos_token)


def described(directory: Path) -> str:
    """A checkpoint in a few words: class, parameters, longest row."""
    config = published_config(directory)
    name = (config.get("architectures") or [config.get("model_type", "a model")])[0]
    count = parameters(directory)
    return f"{name}, {count / 1e6:,.{1 if count < 1e7 else 0}f} M parameters" + (
        ", saved without an LM head" if lacks_head(directory) else ""
    )


def parameters(directory: Path) -> int:
    """Parameters of a checkpoint, by the headers of its files of weights. Raises ValueError for none or a
    damaged one."""
    total = 0
    for path in directory.glob("*.safetensors"):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length) if length < path.stat().st_size else "")
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: no file of weights, or a damaged one; fetch or train it again") from None
    total = total or sum(path.stat().st_size for path in directory.glob("pytorch_model*.bin")) // 4
    if not total:
        raise ValueError(f"{directory}: no weights (model.safetensors); the checkpoint is incomplete: make it again")
    return total
