"""MODEL and DATA as a person types them become entries: a hub id, a directory, a file, or the name of an entry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from dllm.config import REVISION, checkpoint_directory, did_you_mean, read_yaml

Entry = dict[str, Any]

ENTRIES = Path("config")
"""Directory of the repository's entries, which are known where the command is given in the repository."""

LOOKED_AT = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Files of a hub model that are fetched before its entry is known: config and tokenizer."""

LONGEST_SLUG = 50
"""Letters that are taken of a file's or a model's name; other names are made with it."""


def find_model(name: str, known: dict[str, str]) -> tuple[str, dict[str, Entry], Path | None]:
    """(name of the entry, entries it takes, where its config and tokenizer are) of what a user calls a model.

    known: hub id -> commit, of an earlier start. The place is None for an entry that states its tokens itself. Raises
    ValueError, one line, for what is neither a directory, nor an entry, nor on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        directory = checkpoint_directory(str(path), Path.cwd(), "MODEL")
        return slug(_own_name(path)), {slug(_own_name(path)): {"path": as_text(directory.resolve())}}, directory
    entries = _entries("models")
    if name in entries:
        taken = {name: entries[name]}
        if (other := entries[name].get("tokenizer")) in entries:
            taken[other] = entries[other]
        return name, taken, None
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"MODEL = {name!r} is neither a directory, nor a hub id such as answerdotai/ModernBERT-base, nor an entry "
            f"of {ENTRIES / 'models.yaml'}. {did_you_mean(name, entries)}"
        )
    commit = known.get(name) or _newest(name, "model")
    entry = {"hub": name, "revision": commit}
    return slug(name.split("/")[1]), {slug(name.split("/")[1]): entry}, _glance(name, commit)


def find_data(
    names: Sequence[str], known: dict[str, str], wished: Entry, taken: Iterable[str] = ()
) -> dict[str, Entry]:
    """The dataset entries of what a user calls data: files together are one, each hub dataset or entry is one, and
    those of a mixture come with it.

    wished: settings of the files and hub datasets; taken: names that mean something else. Raises ValueError, one
    line, as above.
    """
    entries, files = _entries("datasets"), []
    datasets: dict[str, Entry] = {}
    repositories: dict[str, Entry] = {}
    for name in names:
        path = Path(name).expanduser()
        if name and path.exists() or any(letter in name for letter in "*?["):
            files.append(as_text(path.absolute()))
        elif name in entries:
            datasets |= {part: entries[part] for part in entries[name].get("mix") or () if part in entries}
            datasets[name] = entries[name] | _usable(name, entries[name], wished)
        elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix:
            entry = {"hub": name, "revision": known.get(name) or _newest(name, "dataset"), "kind": "auto"}
            repositories[name] = entry | {"drop_unusable": True} | wished
        else:
            raise ValueError(
                f"DATA = {name!r} is neither a file, nor a hub dataset such as HuggingFaceTB/smoltalk, nor an entry of "
                f"{ENTRIES / 'datasets.yaml'}. {did_you_mean(name, entries)}"
            )
    for name, entry in repositories.items():
        datasets[free_name(slug(name.split("/")[1]), [*datasets, *taken])] = entry
    if "config" in wished and not any(entry.get("hub") for entry in datasets.values()):
        raise ValueError(f"config = {wished['config']!r}: is for datasets of the hub, and none is named; leave it out")
    if files:
        own: Entry = {"files": files, "drop_unusable": True}
        own |= _usable(files[0], own, wished)
        datasets[free_name(slug(Path(files[0]).name.split(".")[0]), [*datasets, *taken])] = own
    return datasets


def as_one(datasets: dict[str, Entry], models: Iterable[str]) -> tuple[str, dict[str, Entry]]:
    """The name of the dataset that holds all of some, and the entries that it takes: a mixture, unless there is one.

    A mixture among them comes to its parts, each with as many rows as it takes of them. models: names that are taken.
    """
    called = {name: f"{name}-data" if name in models else name for name in datasets}
    datasets = {called[name]: entry for name, entry in datasets.items()}
    for name, entry in datasets.items():
        if entry.get("mix"):
            datasets[name] = entry | {"mix": [called.get(part, part) for part in entry["mix"]]}
    mixtures = {name: entry for name, entry in datasets.items() if entry.get("mix")}
    parts = {name: entry for name, entry in datasets.items() if name not in mixtures}
    if len(parts) == 1 and not mixtures:
        return next(iter(parts)), parts
    if len(mixtures) == 1 and {*next(iter(mixtures.values()))["mix"]} == {*parts}:
        return next(iter(mixtures)), datasets
    for entry in mixtures.values():
        for name in parts.keys() & entry["mix"] if entry.get("rows") else ():
            parts[name] = parts[name] | {"rows": min(entry["rows"], parts[name].get("rows") or entry["rows"])}
    name = free_name("data", parts)
    return name, parts | {name: {"mix": [*parts]}}


def _usable(name: str, entry: Entry, wished: Entry) -> Entry:
    """What a user states of the rows of an entry. Raises ValueError, one line, for what would be passed over."""
    whole = "is a mixture, whose parts say it" if entry.get("mix") else ""
    split = "has a test split of its own" if entry.get("test_split") else ""
    for key, why in (("kind", whole), ("test_share", whole or split)):
        if why and key in wished:
            raise ValueError(f"{key} = {wished[key]!r}: {name} {why}; leave it out")
    return {key: value for key, value in wished.items() if key != "config" or entry.get("hub")}


def tokenizer_datasets(models: dict[str, Entry]) -> dict[str, Entry]:
    """The entries of the datasets that bring the tokenizers of new models."""
    entries = _entries("datasets")
    named = {entry.get("tokenizer") for entry in models.values()} - models.keys()
    return {name: entries[name] for name in named if name in entries}


def slug(text: str) -> str:
    """A text as the name of an entry: lower-case letters, digits and hyphens, and not too long for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:LONGEST_SLUG].strip("-") or "data"


def free_name(name: str, taken: Iterable[str]) -> str:
    """The name, with a number where others have it."""
    numbered = (f"{name}-{number}" if number > 1 else name for number in count(1))
    return next(other for other in numbered if other not in {*taken})


def as_text(path: Path) -> str:
    """A path as it stands in a config. Raises ValueError, one line, for one that is no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{str(path)!r}: this path is no text in UTF-8; rename it, or set PYTHONUTF8=1 if the locale is not UTF-8"
        ) from None
    return str(path)


def _own_name(path: Path) -> str:
    """What a directory is called: of a run's `model`, the run."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _entries(section: str) -> dict[str, Entry]:
    """The entries of the repository's configuration; none outside of it."""
    path = ENTRIES / f"{section}.yaml"
    return read_yaml(path).get(section) or {} if path.is_file() else {}


def _newest(name: str, kind: str) -> str:
    """The commit that a repository of the hub is at. Raises ValueError, one line."""
    from huggingface_hub import HfApi

    from dllm.data.hub import one_line_errors

    with one_line_errors(name, name, kind, failed="the hub gave no answer"):
        commit = HfApi().repo_info(name, repo_type=kind).sha
    assert commit is not None and REVISION.match(commit)
    return commit


def _glance(name: str, commit: str) -> Path:
    """A directory with config and tokenizer of a hub model."""
    from huggingface_hub import snapshot_download

    from dllm.data.hub import one_line_errors

    with one_line_errors(f"{name}@{commit[:8]}", name, "model"):
        return Path(snapshot_download(name, revision=commit, allow_patterns=LOOKED_AT))
