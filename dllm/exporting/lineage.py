"""Where a checkpoint comes from: the runs behind it, the model at their root, the data, the scores it was given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.config import read_yaml
from dllm.provenance import directory_digest

Facts = dict[str, Any]


@dataclass(frozen=True)
class Lineage:
    """What is known of a checkpoint's origin; of one that was not trained here, its own directory is all there is.

    name: of its run, or of its directory. root: the directory of the model at the root. base: what that model's
    manifest says of it (hub, commit, licence), and its name. runs: config.yaml and provenance.json of every training,
    the oldest first. data: the sources of every prepared dataset, as their manifests describe them. scores: the
    records of evaluations of this very checkpoint.
    """

    name: str
    root: Path
    base: Facts
    workdir: Path | None = None
    runs: tuple[tuple[Facts, Facts], ...] = ()
    data: tuple[Facts, ...] = ()
    scores: tuple[Facts, ...] = field(default=())


def lineage_of(checkpoint: Path) -> Lineage:
    """The lineage of a checkpoint directory; a run's is `runs/<name>/model` below a work directory.

    What was deleted since is left out.
    """
    checkpoint = checkpoint.resolve()
    workdir = _workdir(checkpoint)
    if workdir is None:
        return Lineage(checkpoint.name, checkpoint, {"name": checkpoint.name} | _json(checkpoint / "manifest.json"))
    runs: list[tuple[Facts, Facts]] = []
    root = checkpoint
    while _workdir(root) == workdir:
        config = read_yaml(root.parent / "config.yaml")
        runs.insert(0, (config, _json(root.parent / "provenance.json") | {"steps": _steps(root.parent)}))
        root = workdir / config["init_path"]
    return Lineage(
        name=checkpoint.parent.name,
        root=root,
        base={"name": runs[0][0]["init"]} | _pinned(runs[0][0]["model"]) | _json(root / "manifest.json"),
        workdir=workdir,
        runs=tuple(runs),
        data=tuple(_data(runs, workdir)),
        scores=tuple(_scores(checkpoint, workdir)),
    )


def _workdir(checkpoint: Path) -> Path | None:
    """The work directory of a run's model, else None."""
    is_run = checkpoint.name == "model" and checkpoint.parent.parent.name == "runs"
    return checkpoint.parents[2] if is_run and (checkpoint.parent / "config.yaml").is_file() else None


def _json(path: Path) -> Facts:
    """The content of a JSON file; empty if it is gone or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _steps(run: Path) -> int | None:
    """How many steps a run took, by its last measurement."""
    try:
        return json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    except (OSError, ValueError, LookupError):
        return None


def _pinned(entry: Facts) -> Facts:
    return {key: entry[key] for key in ("hub", "revision") if entry.get(key)}


def _data(runs: list[tuple[Facts, Facts]], workdir: Path) -> Iterator[Facts]:
    """What each run was trained on, source by source, with the licence that its own card stated when it was fetched."""
    for path, name in {config["data_path"]: config["data"] for config, _ in runs}.items():
        sources = _json(workdir / path / "manifest.json").get("sources")
        for source in sources or [{"name": name}]:
            fetched = _json(workdir / "downloads" / source["name"] / "manifest.json")
            yield source | ({"licence": fetched["licence"]} if fetched.get("licence") else {})


def _scores(checkpoint: Path, workdir: Path) -> Iterator[Facts]:
    records = sorted(path for path in workdir.glob("evals/*/*.json"))
    digest = directory_digest(checkpoint)["digest"] if records else ""
    for path in records:
        record = _json(path)
        if record.get("inputs", {}).get("checkpoint") == digest:
            yield record
