"""The pins of a configuration: the hub repository and commit of each entry, and the newest commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm.config import CONFIG_FILES, REVISION, read_yaml, with_scalar
from dllm.data.hub import one_line_errors
from dllm.provenance import write_atomically


@dataclass(frozen=True)
class Pin:
    """One entry that comes from the hub; `file` is where its commit is written. commit None: not pinned."""

    kind: str
    name: str
    repository: str
    commit: str | None
    licence: str
    file: Path


def read_pins(directory: str | Path, overlays: Sequence[str | Path] = ()) -> list[Pin]:
    """Every model and dataset from the hub, and every benchmark that lm-eval would fetch by itself.

    The entries of config/*.yaml with overlays on top. Raises ConfigError for a file that cannot be read.
    """
    entries: dict[tuple[str, str], dict] = {}
    written: dict[tuple[str, str], Path] = {}
    for file in [*(Path(directory) / f"{stem}.yaml" for stem in CONFIG_FILES), *map(Path, overlays)]:
        content = read_yaml(file)
        for section in ("models", "datasets", "benchmarks"):
            for name, entry in (content.get(section) or {}).items():
                key = section, name
                entries[key] = {} if entry is None else entries.get(key, {}) | entry
                if entry and entry.get("revision"):
                    written[key] = file
    pins = []
    for (section, name), entry in entries.items():
        source = entry.get("hub")
        if section == "benchmarks" and entry.get("task") and not entry.get("dataset"):
            source = f"lm-eval task {entry['task']}"
        if source:
            commit = str(entry.get("revision") or "")
            pins.append(
                Pin(
                    kind=section.removesuffix("s"),
                    name=name,
                    repository=source,
                    commit=commit if REVISION.match(commit) else None,
                    licence=entry.get("licence") or "see its card",
                    file=written.get((section, name), Path(directory) / f"{section}.yaml"),
                )
            )
    return pins


def newest(pin: Pin) -> str:
    """The newest commit of a pin's repository. Raises ValueError, one line; HubUnreachable without a network."""
    from huggingface_hub import HfApi

    with one_line_errors(pin.repository, pin.name, pin.kind, failed="the hub gave no answer"):
        return HfApi().repo_info(pin.repository, repo_type=pin.kind).sha


def write_pin(pin: Pin, commit: str) -> None:
    """Replace the commit of a pin in its file, and nothing else of the file."""
    write_atomically(pin.file, with_scalar(pin.file, (f"{pin.kind}s", pin.name, "revision"), commit))
