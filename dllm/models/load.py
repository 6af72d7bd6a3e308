"""One loader for every checkpoint: family -> Auto class, `is_causal` off, bidirectionality proved at start-up."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dllm.algorithms import resolved
from dllm.config import ModelEntry, merge_first
from dllm.core.memory import reuse_memory
from dllm.core.precision import has_fast_bf16, hold_products_in_bf16
from dllm.families import FAMILIES, OWN_CLASS, Family
from dllm.models.backbone import Backbone
from dllm.models.diffusion_gemma import new_diffusion_gemma
from dllm.models.edit_heads import load_edit_heads
from dllm.models.hidden import COUNTS_FROM_PADDING, base_of
from dllm.models.published import (
    SIDECAR,
    family_of,
    published_config,
    published_decoding,
    read_tensors,
    refuse_other_routing,
    save_published,
    stock_config,
    stock_tensors,
)
from dllm.models.self_tests import head_is_whole, is_bidirectional
from dllm.models.tokenizers import chat_template, first_sentence, read_tokenizer, set_up_tokenizer
from dllm.provenance import how_to_make
from dllm.surroundings import unusable_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_backbone(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] | None = None,
    entry: ModelEntry | None = None,
    causal: bool = False,
) -> Backbone:
    """The checkpoint at a directory (or pinned on the hub) as a backbone, in evaluation mode.

    dtype of its weights: fp32 by default, "auto" as they are stored; those that need no other are mapped from disk.
    entry gives family and special tokens of a checkpoint without sidecar that does not belong to a published family;
    causal keeps a decoder as it is (for next-token training). An autoregressive decoder whose tokenizer has no mask
    token is given the entry's, with the mean of all embeddings for its own. A model trained with edit_flows knows its
    edit heads. Raises ValueError, one line, for a missing or damaged checkpoint, a tokenizer without a mask token, and
    a model that turns out not to be bidirectional.
    """
    directory = local_directory(path_or_hub_id, revision)
    sidecar, published = read_sidecar(directory), family_of(directory)
    if published is not None and published.loader is not None:  # trained or not, it keeps its class
        check_entry(entry, published, directory)
        options: Any = {"device": device, "dtype": dtype, "entry": entry, "causal": causal, "sidecar": sidecar}
        return resolved(published.loader)(directory, published, stock_config_of(directory, published), **options)
    published = None if sidecar else published
    if published is not None:
        refuse_other_routing(published, str(path_or_hub_id))
        decoding = published_decoding(published, str(path_or_hub_id), directory)
        sidecar = published.sidecar() | ({"generation": decoding} if decoding else {})
        check_entry(entry, published, directory)
    config = stock_config_of(directory, published)
    family = entry.family if entry else sidecar.get("family") or _family(config)
    model = _model(directory, config, family, dtype, causal, published)
    if entry is None and sidecar:
        tokens = sidecar["special_tokens"]
        entry = ModelEntry(
            new={}, tokenizer="saved", family=family, mask_token=tokens["mask"], end_token=tokens["eos"],
            chat_template="own",
        )  # fmt: skip
    tokenizer, new_tokens = _tokenizer(directory, entry, model, causal, published)
    if published is not None and (expand_id := tokenizer.get_added_vocab().get(published.expand_token)) is not None:
        sidecar |= {"algorithm": "expand", "expand_id": expand_id, "generation": {"reveal_rule": "entropy"}}
    config = model.config
    model = model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps `to` and loses its type
    _test_itself(model, directory, causal, special=tokenizer.all_special_ids)
    edits = sidecar.get("algorithm") == "edit_flows"
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
        new_tokens=new_tokens,
        edit_heads=load_edit_heads(directory, model) if edits else None,
    )


def for_inference(backbone: Backbone, *, mixed: bool = False) -> Backbone:
    """The backbone as scoring and sampling use it; mixed: with bf16 matrix products in the layers.

    The weights of these products are then held in bf16, and all others, those of the LM head among them, in fp32.
    On a device without fast bf16 the products are fp32 instead, and weights that are held in bf16 are widened to fp32,
    in place; that is said in one line.
    """
    reuse_memory(backbone.device.type)
    half = any(p.dtype == torch.bfloat16 for p in backbone.model.parameters())
    if has_fast_bf16(backbone.device):
        if not mixed:
            return backbone
        hold_products_in_bf16(backbone.model, base_of(backbone.model))
        return replace(backbone, compute=torch.bfloat16)
    if half:
        backbone.model.float()
    if half or mixed:
        print("no fast bf16 on this device, so matrix products are computed in fp32", file=sys.stderr)
    return backbone


def read_sidecar(directory: str | Path) -> dict:
    """The sidecar of a checkpoint; empty if dLLM did not train it. Raises ValueError if it is damaged."""
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


@torch.no_grad()
def give_new_tokens_the_mean(model: nn.Module, old: int, new: int) -> None:
    """Embeddings and LM head rows of tokens `old` to `new` of a vocabulary: the mean of all rows before them.

    The tables grow, to a multiple of 8, only if they have no rows to spare. The mean is where a new token disturbs
    a trained model least (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    end = new
    if new > model.get_input_embeddings().num_embeddings:
        end = -(-new // 8) * 8
        model.resize_token_embeddings(end, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:  # a tied head is the embedding, and is given the same mean twice
            layer.weight[old:end] = layer.weight[:old].mean(0)


def longest_row(config) -> int:
    """Longest row in tokens that a model's positions allow."""
    positions = getattr(config, "max_position_embeddings", None) or 2048
    return positions - config.pad_token_id - 1 if config.model_type in COUNTS_FROM_PADDING else positions


def new_model(entry: ModelEntry, tokenizer, *, like: Path | None = None) -> nn.Module:
    """A stock model with seeded random weights, sized by `entry.new`, with the tokenizer's vocabulary.

    An empty `entry.new` takes the config.json of the checkpoint `like` as it is, the size of its vocabulary too.
    Raises ValueError, one line, for an unknown architecture or setting.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForMaskedLM if entry.family == "encoder" else AutoModelForCausalLM
    if not entry.new:
        config = stock_config_of(Path(str(like)), None)
        return _drawn(entry.seed, lambda: auto.from_config(config, dtype=torch.float32))
    settings = dict(entry.new)
    kind = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind)
    except ValueError:
        raise ValueError(
            f"new.model_type = {kind!r} is not an architecture of transformers; e.g. bert, modernbert"
        ) from None
    unknown = sorted(k for k in settings if not hasattr(config, k))
    if unknown:
        raise ValueError(
            f"new.{unknown[0]} = {settings[unknown[0]]!r} is not a setting of {kind}; see its config class"
        )
    end, tokens = tokenizer.convert_tokens_to_ids(entry.end_token), {}
    for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
        tokens[key] = end
    if tokenizer.cls_token_id is not None:
        tokens |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    tokens["vocab_size"] = -(-len(tokenizer) // 8) * 8
    try:
        return _drawn(entry.seed, lambda: auto.from_config(AutoConfig.for_model(kind, **settings | tokens)))
    except (ValueError, TypeError, LookupError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"new: no {kind} as {entry.family} can be made of these settings ({reason[:200]})") from None


def _drawn(seed: int, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What `make` makes with weights drawn from a seed.

    Stock classes draw from the CPU's global generator, which is put back; other devices' are left alone.
    """
    state = torch.random.get_rng_state()
    try:
        torch.random.default_generator.manual_seed(seed)
        return make()
    finally:
        torch.random.set_rng_state(state)


def save_stand_in(entry: ModelEntry, tokenizer, directory: Path) -> None:
    """Write a published checkpoint in miniature: seeded random weights in the family's names, config.json, tokenizer.

    entry.published names the family and entry.new is what its config.json says, but for the tokens, which follow from
    the tokenizer: it is given the family's special tokens, and a template that ends answers as the family does. Random
    weights have the spread `initializer_range` (`init_std`). Raises ValueError, one line, for unusable settings.
    """
    from transformers import AutoModelForCausalLM

    family = (FAMILIES | OWN_CLASS)[entry.published]
    template = chat_template(family.template or "bert").replace("[/Answer]", family.end_of_turn)
    special = [family.mask_token, family.end_token, family.end_of_turn, *re.findall(r"<\|\w+\|>", template)]
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(special))})
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = family.end_token
    tokenizer.mask_token, tokenizer.chat_template = family.mask_token, template
    tokenizer.save_pretrained(directory)
    if family.loader is not None:
        _drawn(entry.seed, lambda: new_diffusion_gemma(entry.new or {}, tokenizer)).save_pretrained(directory)
        return
    vocabulary = next(name for name, stock in family.settings.items() if stock == "vocab_size")
    raw = dict(entry.new) | {
        "architectures": [family.architectures[0]],
        vocabulary: -(-len(tokenizer) // 8) * 8,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = stock_config(family, raw)
    config.initializer_range = raw.get("initializer_range") or raw.get("init_std") or config.initializer_range
    (directory / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    save_published(_drawn(entry.seed, lambda: AutoModelForCausalLM.from_config(config)), directory, like=directory)


def local_directory(path_or_hub_id: str | Path, revision: str | None) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith((".", "/", "~")):
        raise ValueError(f"{path_or_hub_id}: no checkpoint there; give a directory with config.json, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if why := unusable_cache(error):
            raise ValueError(f"{path_or_hub_id}: {why}") from None
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path_or_hub_id}: neither a directory here nor available from the hub ({first}); "
            "check the name, the revision and the network"
        ) from None


def _test_itself(model: nn.Module, directory: Path, causal: bool, special: list[int]) -> None:
    """Raise ValueError, one line, if the model attends to the left only, or if its logits would be wrong."""
    if not causal and not is_bidirectional(model, special):
        if getattr(model.config, "is_decoder", False) and "MaskedLM" in type(model).__name__:
            raise ValueError(
                f"{directory}/config.json: has is_decoder: true, with which {type(model).__name__} attends to the left "
                "only; set it to false if the model was trained to fill in masks"
            )
        raise ValueError(
            f"{directory}: {type(model).__name__} attends to the left only although is_causal is off; "
            "diffusion needs a bidirectional model: use another attention implementation or transformers >= 5.2"
        )
    try:
        whole = head_is_whole(model, special)
    except FloatingPointError as error:
        raise ValueError(f"{directory}: {error}; its weights are damaged, or its training diverged") from None
    if not whole:
        raise ValueError(
            f"{directory}: the LM head of {type(model).__name__} is more than its last linear layer, so that its "
            "logits would be wrong; add its model type to dllm.models.heads.HEADS"
        )


def _tokenizer(
    directory: Path, entry: ModelEntry | None, model: nn.Module, causal: bool, published: Family | None
) -> tuple[Any, tuple[int, int]]:
    """The tokenizer as the entry wants it, and the ids that are new to it; the model is given them."""
    tokenizer = read_tokenizer(directory)
    words, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if entry is not None:
        set_up_tokenizer(tokenizer, entry, directory, mask=not causal)
    if tokenizer.mask_token_id is None and not causal:
        raise ValueError(f"{directory}: the tokenizer has no mask token; set mask_token in the model's entry")
    if words > rows or (published and len(tokenizer) > rows):
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {rows}; "
            "they are not from the same checkpoint"
        )
    if published:
        stated = published_config(directory).get("mask_token_id")
        if stated is not None and stated != tokenizer.mask_token_id:
            raise ValueError(
                f"{directory}: config.json has mask_token_id = {stated}, the tokenizer has {tokenizer.mask_token!r} "
                f"at {tokenizer.mask_token_id}; they are not from the same checkpoint: fetch it again"
            )
    elif len(tokenizer) > words:
        give_new_tokens_the_mean(model, words, len(tokenizer))
        return tokenizer, (words, len(tokenizer))
    return tokenizer, (0, 0)


def check_entry(entry: ModelEntry | None, published: Family, directory: Path) -> None:
    """Raise ValueError, one line, if a model entry says otherwise than the family of a published checkpoint."""
    for key, value in (("family", "decoder"), ("prediction", published.prediction)):
        if entry is not None and getattr(entry, key) != value:
            raise ValueError(
                f"{directory}: {key} = {getattr(entry, key)!r} of the model's entry is not that of {published.name}; "
                f"set {key}: {value}"
            )


def stock_config_of(directory: Path, published: Family | None):
    """The configuration of a checkpoint as transformers' class. Raises ValueError, one line, if there is none."""
    from transformers import CONFIG_MAPPING

    if not (directory / "config.json").exists():
        step = merge_first(directory)
        step = step or f"no config.json, {how_to_make(directory, 'so this is not a checkpoint directory')}"
        raise ValueError(f"{directory}: {step}")
    if not any((directory / name).exists() for name in WEIGHTS):
        raise ValueError(f"{directory}: no weights ({WEIGHTS[0]}); the checkpoint is incomplete: make it again")
    raw = published_config(directory)
    if published is not None and published.loader is None:
        refuse_other_routing(published, directory)
        try:
            return stock_config(published, raw)
        except ValueError as error:
            raise ValueError(f"{directory}/{error}") from None
    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        kind = (raw.get("architectures") or [raw.get("model_type")])[0]
        raise ValueError(
            f"{directory}/config.json: cannot be used: {kind!r} is not a class of transformers, and code beside a "
            f"checkpoint is never run; allowed beside those: {', '.join(FAMILIES)}; a further family "
            "is a row in dllm/families.py"
        )
    return plain_config_of(directory)


def plain_config_of(directory: Path):
    """The configuration in a directory as transformers reads it. Raises ValueError, one line, if it cannot."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{directory}/config.json: cannot be used ({first_sentence(error)})") from None
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{directory}/config.json: has a quantization_config; weights that are quantized are not read: take the "
            "checkpoint that they were made of"
        )
    return config


def _family(config) -> Literal["encoder", "decoder"]:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return "encoder" if "MaskedLM" in architecture or not architecture else "decoder"


def _model(
    directory: Path,
    config,
    family: str,
    dtype: torch.dtype | Literal["auto"] | None,
    causal: bool,
    published: Family | None,
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    if family == "decoder" and not causal:
        config.is_causal = False  # on the config: set on the modules, it would stay causal under padding
    auto: Any = AutoModelForMaskedLM if family == "encoder" else AutoModelForCausalLM
    try:
        options = {"config": config, "dtype": dtype or torch.float32, "output_loading_info": True}
        options["ignore_mismatched_sizes"] = True  # they are in the report, and named below
        if published is None:
            model, report = auto.from_pretrained(directory, trust_remote_code=False, **options)
        else:
            tensors = stock_tensors(published, config, read_tensors(directory))
            stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model, report = stock.from_pretrained(None, state_dict=tensors, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{directory}: the weights cannot be loaded ({first}); fetch or train them again") from None
    except (ArithmeticError, AssertionError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{directory}: no model can be built of its config.json and weights ({why}); fetch it again"
        ) from None
    if other := sorted(report["mismatched_keys"]):
        name, here, wanted = other[0]
        raise ValueError(
            f"{directory}: the weights have {name} of {_by(here)} ({len(other)} of another size in all), and "
            f"config.json says {_by(wanted)}; they are not from the same checkpoint: fetch or train it again"
        )
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and draws them at random
        raise ValueError(
            f"{directory}: the weights lack {missing[0]} ({len(missing)} in all) that {type(model).__name__} needs; "
            "this is another kind of checkpoint, or a damaged one: fetch or train it again"
        )
    if published and (extra := sorted(report["unexpected_keys"])):
        raise ValueError(
            f"{directory}: the weights have {extra[0]} ({len(extra)} in all) that {published.name} does not have; "
            "this is another kind of checkpoint, although its config.json says otherwise"
        )
    return model


def _by(shape: Sequence[int]) -> str:
    """A shape as a person writes it."""
    return " x ".join(map(str, shape))
