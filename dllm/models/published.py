"""Checkpoints of the published families (`dllm.families`): their config.json and tensors as those of stock classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.families import FAMILIES, OWN_CLASS, Family, Names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SIDECAR = "dllm.json"
"""The file in which training notes how a checkpoint was trained."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""A layer's or expert's number in a tensor name."""

# --------------------------------------------------------------------------------------------------------------------
# config.json


def published_config(directory: str | Path) -> dict:
    """The content of a checkpoint's config.json; empty if it is missing or cannot be read."""
    try:
        raw = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def family_of(directory: str | Path) -> Family | None:
    """The family that a checkpoint's config.json names as its architecture; None for any other checkpoint."""
    stated = published_config(directory).get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else None
    known = (*FAMILIES.values(), *OWN_CLASS.values())
    return next((family for family in known if first in family.architectures), None)


def is_encoder(directory: str | Path) -> bool:
    """Whether a checkpoint's config.json names a masked-LM class."""
    stated = published_config(directory).get("architectures")
    return isinstance(stated, list) and any("MaskedLM" in str(name) for name in stated)


def names_of(place: str | Path) -> list[str]:
    """What a checkpoint, given by its hub id or directory, is called.

    By itself or its place, in config.json, in the manifest of a download, in the title of the card.
    """
    names, directory = [str(place)], Path(place)
    if directory.is_dir():
        names = [directory.name, str(published_config(directory).get("_name_or_path"))]
        for name, pattern in (("manifest.json", r'"hub": "(.*)"'), ("README.md", r"^# *(.*)")):
            try:
                named = re.search(pattern, (directory / name).read_text(encoding="utf-8"), re.MULTILINE)
            except (OSError, UnicodeDecodeError):
                continue
            names += [named[1]] if named else []
    return names


def is_called(edition: str, *places: str | Path) -> bool:
    """Whether a checkpoint's names hold that of an edition of its family, LLaDA2.1 say: config.json does not tell."""
    pattern = re.compile(rf"{re.escape(edition)}(?!\d)", re.IGNORECASE)
    return any(pattern.search(name) for place in places for name in names_of(place))


def published_decoding(family: Family, *places: str | Path) -> dict[str, Any]:
    """Settings of the sampler that a checkpoint was published with; none for most."""
    found = [settings for edition, settings in family.decoding.items() if is_called(edition, *places)]
    return found[0] if found else {}


def refuse_other_routing(family: Family, place: str | Path) -> None:
    """Raise ValueError, one line, for a checkpoint of LLaDA2.2, which has the class name of LLaDA2.0 and 2.1.

    place: its hub id or directory; config.json of LLaDA2.2 has `expert_capacity`.
    """
    if family.name == "LLaDA2" and (published_config(place).get("expert_capacity") or is_called("LLaDA2.2", place)):
        raise ValueError(
            f"{place}: LLaDA2.2 chooses experts block by block (expert_capacity), which no class of transformers does, "
            "and is decoded with deletions and insertions inside a block; take LLaDA2.1"
        )


def stock_config(family: Family, raw: dict):
    """The stock configuration that does what a published config.json says.

    Raises ValueError, one line, for a setting that is missing or that the stock class cannot follow.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    for key, value in family.requires.items():
        if raw.get(key, value) != value and (raw[key] or value):  # null, false and [] all say no
            raise ValueError(
                f"config.json: {key} = {raw[key]!r} is not a {family.name} setting that {family.stock} can follow; "
                f"allowed: {value!r}"
            )
    missing = [key for key, stock in family.settings.items() if raw.get(key) is None and stock not in family.fixed]
    if missing:
        raise ValueError(f"config.json: {missing[0]} is missing; a {family.name} needs it: fetch the checkpoint again")
    settings = {stock: raw[key] for key, stock in family.settings.items() if raw.get(key) is not None}
    tokens = {key: raw[key] for key in ("eos_token_id", "pad_token_id") if raw.get(key) is not None}
    try:
        return AutoConfig.for_model(family.stock, **family.fixed | settings | family.also(raw) | tokens)
    except (StrictDataclassError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json: cannot be used ({reason[:200]}); fetch the checkpoint again") from None


# --------------------------------------------------------------------------------------------------------------------
# Tensors


def stock_tensors(family: Family, config, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Published tensors under their stock names, each split where the stock class holds several.

    A name that the family does not know is left unchanged: the loader then reports it.
    """
    renamed = {}
    for name, tensor in tensors:
        targets = _renamed(name, family.names)
        if len(targets) == 1:
            renamed[targets[0]] = tensor
        else:
            renamed |= zip(targets, tensor.split(_query_key_value_rows(config)), strict=True)
    return renamed


def published_tensors(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stock_tensors`."""
    from torch import cat

    joined = {targets: name for name, targets in family.names.items() if isinstance(targets, tuple)}
    names: Names = {target: name for name, target in family.names.items() if isinstance(target, str)}
    names |= {part: name for parts, name in joined.items() for part in parts}
    renamed: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_position_in(joined)):
        renamed.setdefault(_renamed(name, names)[0], []).append(tensors[name])
    return {name: parts[0] if len(parts) == 1 else cat(parts) for name, parts in renamed.items()}


def read_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint's safetensors files, mapped from disk one after another.

    Raises ValueError, one line, if a file that the index names is not there.
    """
    from safetensors import safe_open

    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for name in files:
        if not (directory / name).exists():
            raise ValueError(f"{directory}: {name} is missing; fetch the checkpoint again")
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                yield key, file.get_tensor(key)


def save_published(model: PreTrainedModel, directory: str | Path, *, like: str | Path) -> None:
    """Write a stock model as a checkpoint of the family that `like` belongs to: its tensor names, its config.json.

    Raises ValueError, one line, if `like` is not a published checkpoint, or has other sizes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    family = family_of(like)
    if family is None:
        raise ValueError(f"{like}: not a published checkpoint; allowed: a directory of {', '.join(FAMILIES)}")
    stated = (Path(like) / "config.json").read_bytes()  # `like` may be `directory`
    config = stock_config(family, published_config(like))
    for setting in ("model_type", *family.settings.values()):
        if setting not in ("rope_theta", "partial_rotary_factor") and getattr(config, setting) != getattr(
            model.config, setting
        ):
            raise ValueError(
                f"{setting} = {getattr(model.config, setting)!r} of the model is not that of {like} "
                f"({getattr(config, setting)!r}); give the checkpoint that it was loaded from"
            )
    # transformers' own classes hold the experts of a layer in one tensor and save them one by one
    tensors = published_tensors(family, revert_weight_conversion(model, model.state_dict()))
    model.save_pretrained(directory, state_dict=tensors, save_original_format=False)
    (Path(directory) / "config.json").write_bytes(stated)


def _renamed(name: str, names: Names) -> tuple[str, ...]:
    """The name or names that a map gives a tensor; its own if the map has none."""
    targets = names.get(NUMBER.sub("*", name), name)
    targets = (targets,) if isinstance(targets, str) else targets
    return tuple(target.replace("*", "{}").format(*NUMBER.findall(name)) for target in targets)


def _query_key_value_rows(config) -> list[int]:
    keys = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, keys, keys]


def _position_in(joined: dict[tuple[str, ...], str]) -> Callable[[str], int]:
    """Sorts the parts of a joined tensor into their order."""
    order = {part: position for parts in joined for position, part in enumerate(parts)}
    return lambda name: order.get(NUMBER.sub("*", name), 0)
