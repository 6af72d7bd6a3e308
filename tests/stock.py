"""Tiny stock checkpoints of every family the forward pass knows, as the download step makes them."""

from __future__ import annotations

from pathlib import Path

from dllm.config import ModelEntry
from dllm.models.load import Backbone, load_backbone
from tests.training.conftest import entry_for, make_model

KINDS = ("bert", "roberta", "modernbert", "llama", "qwen2")
FIRST_WORD = 5
"""Token ids below are special."""


def stock_entry(kind: str) -> ModelEntry:
    """A two-layer model of a family, without dropout."""
    entry = entry_for("llama" if kind == "qwen2" else kind)
    return entry.model_copy(update={"new": entry.new | {"model_type": kind}})


def save_stock(directory: Path, kind: str) -> Path:
    """Write a checkpoint with its tokenizer; returns its directory."""
    make_model(directory / kind, stock_entry(kind))
    return directory / kind


def stock_backbone(directory: Path, kind: str, **options) -> Backbone:
    """The checkpoint of a family, made if it is not there; options of `load_backbone`."""
    if not (directory / kind / "config.json").exists():
        save_stock(directory, kind)
    return load_backbone(directory / kind, entry=stock_entry(kind), **options)
