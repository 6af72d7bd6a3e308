"""Files and checkpoints on this disk: which files they are, and the digest of their content."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from dllm.provenance import file_digest

DATA_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""Ends of the names of files with rows; all but parquet also as .gz."""

WEIGHT_FILES = (".safetensors", ".bin")
"""Ends of the names of files with weights."""

MODEL_FILES = (".json", *WEIGHT_FILES, ".txt", ".model", ".jinja", ".md")
"""Ends of the names of a checkpoint's files; those of a trainer's own state are among the .bin that are left out."""

NO_MODEL_FILES = ("optimizer.bin", "scheduler.bin", "training_args.bin", "trainer_state.json", "manifest.json")


def dataset_files(patterns: Iterable[str], root: Path, where: str) -> list[Path]:
    """The files that paths, patterns and directories name, each once; relative ones start from `root`.

    Of a directory with files for training, those for testing are left out: their rows are not to be learnt.
    where: how an error line names the setting. Raises ValueError, one line, if one names no file that can be read.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        whole = root / Path(pattern).expanduser()
        if whole.is_dir():
            paths = sorted(path for path in whole.iterdir() if is_data_file(path))
            paths = [path for path in paths if not _is_for_testing(path, paths)]
        elif whole.is_file():
            paths = [whole]
        else:
            paths = sorted(path for path in map(Path, glob.glob(str(whole), recursive=True)) if path.is_file())
        if not paths and whole.exists():
            what = "a directory without files that are read" if whole.is_dir() else "neither a file nor a directory"
            raise ValueError(f"{where} = {pattern!r}: {what}; allowed: {', '.join(DATA_FILES)}, also as .gz")
        if not paths:
            raise ValueError(f"{where} = {pattern!r}: no such file ({whole}); check the path")
        for path in paths:
            if not is_data_file(path):
                raise ValueError(
                    f"{where} = {pattern!r}: {path.name} is of no kind that is read; allowed: {', '.join(DATA_FILES)}, "
                    "also as .gz"
                )
            files[path] = None
    return list(files)


def _is_for_testing(path: Path, others: Iterable[Path]) -> bool:
    """Whether a file's name says that it is kept apart, where that of another one says that it is to be learnt."""

    def words(name: str) -> set[str]:
        return {*re.split(r"[^a-z]+", name.lower())}

    kept = {"test", "validation", "valid", "val", "dev", "eval"}
    return bool(words(path.name) & kept) and any("train" in words(other.name) for other in others)


def is_data_file(path: Path) -> bool:
    """Whether a file's name says that it has rows."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    return plain.endswith(DATA_FILES) and not (plain != name and plain.endswith(".parquet"))


def checkpoint_directory(path: str, root: Path, where: str) -> Path:
    """The directory with config.json that a path names: itself, or the `model` of a finished run.

    Raises ValueError, one line, if there is none.
    """
    whole = root / Path(path).expanduser()
    for directory in (whole, whole / "model"):
        if (directory / "config.json").is_file():
            return directory
    step = merge_first(whole) or f"no checkpoint there ({whole} has no config.json); check the path"
    raise ValueError(f"{where} = {path!r}: {step}")


def merge_first(directory: Path) -> str:
    """What to do about a directory with an adapter and no model of its own; empty if it is none."""
    try:
        adapter = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    return (
        f"an adapter{f' of {base}' if isinstance(base, str) else ''} without its model; merge the two (peft: "
        "merge_and_unload, then save_pretrained of model and tokenizer) and name the directory of the result"
    )


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of a checkpoint that are used, sorted."""
    known = (path for path in directory.iterdir() if path.is_file() and path.suffix in MODEL_FILES)
    files = sorted(path for path in known if path.name not in NO_MODEL_FILES)
    safe = any(path.suffix == ".safetensors" for path in files)
    return [path for path in files if not (safe and path.suffix == ".bin")]


def content_digest(paths: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 over names and contents, whatever directories the files are in."""
    total = hashlib.sha256()
    for path in paths:
        facts = path.stat()
        total.update(f"{path.name}\0{_digest(path, facts.st_size, facts.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=10_000)
def _digest(path: Path, size: int, changed: int) -> str:
    return file_digest(path)


def seen_from(path: Path, stated: str, workdir: Path) -> str:
    """How a job in `workdir` finds a file: by its absolute path if it was stated so, else relative to the directory."""
    if Path(stated).expanduser().is_absolute():
        return str(path)
    return os.path.relpath(os.path.realpath(path), os.path.realpath(workdir))
