"""A checkpoint in a format that other tools load: stock classes of transformers, or a family's published layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.algorithms import trained_causally
from dllm.chat.settings import chat_context, chat_generation
from dllm.exporting.card import card
from dllm.exporting.lineage import Lineage, lineage_of
from dllm.families import FAMILIES, Family
from dllm.models.load import load_backbone, read_sidecar
from dllm.models.published import SIDECAR, family_of, published_config, read_tensors, save_published
from dllm.provenance import collect, replace_directory

if TYPE_CHECKING:
    from torch import dtype

    from dllm.models.backbone import Backbone

FORMATS = {
    "transformers": "stock classes of transformers, with dllm's sidecar beside them",
    "published": "names and config.json of the family that it was trained from, which SGLang and vLLM read",
}
"""What a checkpoint can be exported as."""

FACTS = "provenance.json"
"""The file of an export that says what it is, and what it was made from."""


def export(checkpoint: str | Path, kind: str = "transformers", output: str | Path | None = None) -> Path:
    """Write a checkpoint directory as `kind` of `FORMATS` and return where it is.

    output: the directory (None: `exports/<name>-<kind>` in the work directory of its run, or here). An earlier export
    there is replaced once the new one is complete. Weights keep their precision, and an adapter is merged, as training
    left it. Raises ValueError, one line, for a format that the checkpoint does not have, and for a directory that
    holds something else.
    """
    checkpoint = Path(checkpoint)
    lineage = lineage_of(checkpoint)
    family = _checked(checkpoint, lineage, kind)
    target = Path(output or (lineage.workdir or Path()) / "exports" / f"{lineage.name}-{kind}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not is_export(target):
        raise ValueError(f"{target}: holds something that is not an export; give another directory as --output")
    causal = trained_causally(read_sidecar(checkpoint).get("algorithm"))
    backbone: Any = load_backbone(checkpoint, dtype=_stored_dtype(checkpoint), causal=causal)
    if backbone.edit_heads is not None:
        raise ValueError(
            f"{lineage.name}: no other tool has the further heads of a model trained with edit_flows; share its "
            f"directory as it is ({checkpoint})"
        )
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if family is None:
        backbone.model.save_pretrained(scratch)
        if backbone.sidecar:
            text = json.dumps(backbone.sidecar, indent=1) + "\n"
            (scratch / SIDECAR).write_text(text, encoding="utf-8")
    else:
        save_published(backbone.model, scratch, like=lineage.root)
        _name_code(scratch / "config.json", lineage.base.get("hub"))
    backbone.tokenizer.save_pretrained(scratch)
    _write_hints(backbone, scratch)
    (scratch / "README.md").write_text(card(backbone, lineage, family), encoding="utf-8")
    facts = collect(export=kind, checkpoint=lineage.name, trained=[facts for _, facts in lineage.runs])
    (scratch / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    replace_directory(scratch, target)
    return target


def is_export(directory: str | Path) -> bool:
    """Whether a directory was written by `export`."""
    try:
        return json.loads((Path(directory) / FACTS).read_text(encoding="utf-8")).get("export") in FORMATS
    except (OSError, ValueError, AttributeError):
        return False


def _checked(checkpoint: Path, lineage: Lineage, kind: str) -> Family | None:
    """The family whose layout is written; None: that of a stock class. Raises ValueError for what cannot be."""
    if kind not in FORMATS:
        also = "; SGLang and vLLM read `published`" if kind in ("sglang", "vllm") else ""
        raise ValueError(f"--format {kind}: allowed: {', '.join(FORMATS)}{also}")
    if (family := family_of(checkpoint)) is not None and family.loader is not None:
        raise ValueError(
            f"{checkpoint}: {family.name} is a class of transformers as it was published, and SGLang reads it as it "
            "is; give them this directory"
        )
    if kind == "transformers":
        return None
    if not lineage.root.is_dir():
        raise ValueError(
            f"{lineage.root}: gone, and --format published takes the config.json from there; run the workflow so that "
            "it makes it, or take --format transformers"
        )
    family = family_of(lineage.root) if not read_sidecar(lineage.root) else None
    if family is None:
        what = (published_config(lineage.root).get("architectures") or ["an unknown class"])[0]
        raise ValueError(
            f"--format published is for models of {', '.join(FAMILIES)}, and {lineage.name} comes from {what}, a class "
            "of transformers; take --format transformers"
        )
    return family


def _stored_dtype(checkpoint: Path) -> dtype | None:
    """The precision of a checkpoint's weights; None if they are not in safetensors."""
    if not any(checkpoint.glob("*.safetensors")):
        return None
    return next(tensor.dtype for _, tensor in read_tensors(checkpoint))


def _name_code(path: Path, hub: str | None) -> None:
    """Let a config.json find the classes that it names in the repository where they are: an export has no code."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if hub and (named := config.get("auto_map")):
        config["auto_map"] = {auto: name if "--" in name else f"{hub}--{name}" for auto, name in named.items()}
        path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _write_hints(backbone: Backbone, directory: Path) -> None:
    """generation_config.json: the ids that sampling needs, and the length, passes and blocks that a chat samples with.

    Tools that know masked diffusion read these names; transformers' own `generate` writes from left to right.
    """
    from transformers import GenerationConfig

    sidecar = backbone.sidecar
    settings = chat_generation(sidecar, chat_context(sidecar, backbone.max_length))
    ids: dict[str, Any] = {"eos_token_id": backbone.eos_id, "pad_token_id": backbone.pad_id}
    if not trained_causally(sidecar.get("algorithm")):
        ids |= {
            "mask_token_id": backbone.mask_id,
            "steps": settings.max_new_tokens,
            "block_length": settings.block_size,
        }
    GenerationConfig(max_new_tokens=settings.max_new_tokens, **ids).save_pretrained(directory)
