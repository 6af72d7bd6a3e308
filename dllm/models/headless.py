"""An encoder that was saved without an LM head, such as a sentence embedder, is given one on its tied embeddings."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from dllm.models.published import published_config

HAS_HEAD = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForPreTraining", "WithLMHead")
"""Ends of the names of classes with an LM head; ELECTRA's ForPreTraining, a discriminator, is the exception."""

SEED = 0


def lacks_head(directory: Path) -> bool:
    """Whether config.json names a class of an encoder without an LM head, none at all, or DeBERTa's other head."""
    config = published_config(directory)
    name = (config.get("architectures") or [""])[0] if config else "ForMaskedLM"
    return name == "ElectraForPreTraining" or not name.endswith(HAS_HEAD) or config.get("legacy") is False


def give_head(directory: Path) -> str | None:
    """Replace the weights of an encoder without an LM head by those of its masked-LM class; the line that says so.

    The last layer of the head is the input embedding, and what comes before it is drawn from a seed. None if there is
    nothing to do. Raises ValueError, one line, if the encoder itself is not whole or has no masked-LM class.
    """
    if not lacks_head(directory):
        return None
    import torch
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForMaskedLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # loading it will report what is wrong
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"{directory}: {(config.architectures or ['it'])[0]} fills in no masks, and transformers has no masked-LM "
            f"class for model_type = {config.model_type!r}; take another encoder, or a causal model"
        )
    config.tie_word_embeddings = True
    if hasattr(config, "legacy"):
        config.legacy = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, report = AutoModelForMaskedLM.from_pretrained(
            directory, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    lost = sorted(key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if lost:
        raise ValueError(
            f"{directory}: the weights lack {lost[0]} ({len(lost)} in all) that {type(model).__name__} needs; "
            "fetch the checkpoint again"
        )
    if not report["missing_keys"]:
        return None
    before = (config.architectures or [f"this {config.model_type}"])[0]
    taken = hasattr(config, "legacy") and _take_deberta_head(directory, model)
    for path in [*directory.glob("*.safetensors*"), *directory.glob("pytorch_model*.bin*")]:
        path.unlink()
    (directory / "config.json").unlink()  # it may be a second name of somebody's file, which must stay as it is
    model.save_pretrained(directory)
    if taken:
        return f"{before} was saved with its LM head under other names, which is taken"
    return (
        f"{before} was saved without an LM head: it is given one on its tied embeddings, which training has to teach "
        "first"
    )


def _take_deberta_head(directory: Path, model: Any) -> bool:
    """Copy the LM head that DeBERTa's authors store as `lm_predictions`: the same function as the stock head.

    False if the checkpoint has none.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    config = deepcopy(model.config)
    config.legacy = False
    stored, report = AutoModelForMaskedLM.from_pretrained(
        directory, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"]:
        return False
    head, own = stored.lm_predictions.lm_head, model.cls.predictions
    own.transform.dense.load_state_dict(head.dense.state_dict())
    own.transform.LayerNorm.load_state_dict(head.LayerNorm.state_dict())
    with torch.no_grad():
        own.bias.copy_(head.bias)
    return True
