"""What `datasets` makes of a benchmark's directory, read once for all its tasks and for all models that are asked.

A call of `load_dataset` compares all configurations of a card, even for rows that are in the cache already: 0.05 to 0.1
seconds of CPU. A group has up to 67 tasks, and a project asks them of a dozen models, each in a process of its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from dllm.config import digest
from dllm.provenance import write_atomically


@contextmanager
def tables_read_once(data: Path, cache: Path) -> Iterator[None]:
    """Inside, `datasets.load_dataset` of the directory `data` answers what it answered before, from its own files.

    cache: where `datasets` keeps them; it must belong to the content of the directory. What is found there is not
    compared with the directory again.
    """
    import datasets

    original: Any = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if Path(path).resolve() != data.resolve():
            return original(path, name, **options)
        asked = {"name": name, "options": options, "version": datasets.__version__}
        place = cache / "tables" / f"{digest(json.loads(json.dumps(asked, default=repr)))[:16]}.json"
        try:
            return _splits(cache, json.loads(place.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):  # not asked before, or its files were removed
            with cards_read_once(name):
                found = original(path, name, **options)
        if (stored := _files(cache, found)) is not None:
            write_atomically(place, json.dumps(stored))
        return found

    setattr(datasets, "load_dataset", load)  # noqa: B010 (a type checker knows the original only)
    try:
        yield
    finally:
        setattr(datasets, "load_dataset", original)  # noqa: B010


def _files(cache: Path, found: Any) -> dict[str, Any] | None:
    """{split: {its Arrow files, fingerprint}}; None unless these files are all that there is to know."""
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return None
    files = {name: [Path(file["filename"]).resolve() for file in split.cache_files] for name, split in found.items()}
    if not all(paths and all(p.is_relative_to(cache) for p in paths) for paths in files.values()):
        return None
    stored = {
        str(name): {"files": [str(p.relative_to(cache)) for p in paths], "fingerprint": found[name]._fingerprint}
        for name, paths in files.items()
    }
    again = _splits(cache, stored)
    same = all(len(again[name]) == len(found[name]) and again[name].features == found[name].features for name in found)
    return stored if same else None


def _splits(cache: Path, stored: dict[str, Any]) -> Any:
    """The splits that `_files` has noted, mapped into memory."""
    import datasets
    from datasets.table import MemoryMappedTable, concat_tables

    return datasets.DatasetDict(
        {
            name: datasets.Dataset(
                concat_tables([MemoryMappedTable.from_file(str(cache / file)) for file in split["files"]]),
                split=datasets.NamedSplit(name),
                fingerprint=split["fingerprint"],
            )
            for name, split in stored.items()
        }
    )


@contextmanager
def cards_read_once(name: str | None = None) -> Iterator[None]:
    """Inside, `datasets` parses the card of a directory once, and not for each of the tasks that read from it.

    A card with dozens of configurations takes half a second of CPU. name: the one configuration that will be asked for;
    the others are left out, since `datasets` makes a fingerprint of all that it finds.
    """
    from datasets import load

    original: Any = load.DatasetCard

    class Cards(original):
        """Cards by path; what is changed in one is not seen in the next."""

        @classmethod
        def load(cls, path, *more, **options):
            if not Path(path).is_file():
                return original.load(path, *more, **options)
            state = Path(path).stat()
            return _of_one(_parsed(str(path), state.st_mtime_ns, state.st_ctime_ns), name)

    load.DatasetCard = Cards
    try:
        yield
    finally:
        load.DatasetCard = original


@lru_cache(maxsize=8)
def _parsed(path: str, *state: int) -> Any:
    from huggingface_hub import DatasetCard

    return DatasetCard.load(path)


def _of_one(card: Any, name: str | None) -> Any:
    """A copy of a card that states one configuration, if it states that one at all."""
    found = copy.copy(card)
    found.data = copy.copy(card.data)
    for section in ("configs", "dataset_info"):
        entries = getattr(found.data, section, None)
        kept = [e for e in entries if e.get("config_name") == name] if isinstance(entries, list) else []
        if kept:
            setattr(found.data, section, kept)
    return copy.deepcopy(found)
