"""Every pin of a project, one after another: what the hub has, or what was downloaded, compared with its entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.checking.contents import (
    PLACEHOLDER,
    dataset_errors,
    has_weights,
    model_errors,
    task_errors,
    tokenizer_errors,
)
from dllm.checking.sketch import Rows, forget_sizes, sketch
from dllm.config import (
    WEIGHT_FILES,
    DownloadConfig,
    EvaluationConfig,
    Project,
    digest,
    download_configs,
    evaluation_configs,
)
from dllm.data.download import ARCHIVES, chosen_files, describe_alone, stated_licence, unpack
from dllm.data.hub import HubUnreachable, NoSuchCommit, one_line_errors
from dllm.provenance import VOLATILE, directory_digest, file_digest, read_record

AT_ONCE = 4
"""Repositories that are asked side by side."""


@dataclass
class Checked:
    """What there is of one pin, and a line for each thing that is wrong.

    directory: where its files, cut short, are.

    rows: of the files that were cut. counts: of each split; of a benchmark its tasks and documents.

    absent: it was never downloaded. result: what the table says where nothing is wrong.
    """

    kind: str
    name: str
    repository: str
    commit: str = ""
    directory: Path = Path()
    bytes: int | None = None
    rows: Rows = field(default_factory=dict)
    counts: Rows = field(default_factory=dict)
    licence: str = ""
    note: str = ""
    absent: bool = False
    result: str = "works"
    errors: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """Its line of the table: kind, name, repository, commit, size, rows, licence, result."""
        size = "" if self.bytes is None else f"{self.bytes / 1e6:,.1f} MB"
        rows = ", ".join(f"{split} {'?' if n is None else f'{n:,}'}" for split, n in self.counts.items())
        result = f"wrong: {len(self.errors)}" if self.errors else "not downloaded" if self.absent else self.result
        more = f"; {self.note}" if self.note else ""
        return self.kind, self.name, self.repository, self.commit[:8], size, rows, self.licence, result + more

    def add(self, errors: Iterable[str]) -> None:
        """Take over what is wrong; an error ends it and is the last line."""
        try:
            for line in errors:
                self.errors.append(line)
        except ValueError as error:
            self.errors.append(self.error_line(error))

    def error_line(self, error: ValueError) -> str:
        """An error without the name of the repository, which stands before it, and without the scratch directory."""
        text = str(error).replace(f"{self.directory}/", "").removeprefix(f"{self.directory}: ")
        return re.sub(rf"^{re.escape(self.repository)}(@\w+)?: ", "", text)


Pin = DownloadConfig | EvaluationConfig


def pins_of(project: Project, *, offline: bool = False) -> list[Pin]:
    """What the runs and evaluations of a project take from the hub, benchmarks last; offline: all that is downloaded.

    Each benchmark is there once, as its first row asks it, and its data only if there is such a row.
    """
    benchmarks: dict[str, EvaluationConfig] = {}
    for (_, name), config in evaluation_configs(project).items():
        benchmarks.setdefault(name, config)
    read = [*(c.data for c in benchmarks.values()), *(f"downloads/{s.questions}" for s in project.speed.values())]
    pins: list[Pin] = []
    for name, download in download_configs(project).items():
        unread = download.dataset and download.dataset.kind == "benchmark"
        unread = unread and not any(f"{path}/".startswith(f"downloads/{name}/") for path in read)
        if (offline or _entry(download).hub) and not unread:
            pins.append(download)
    return pins + [c for name, c in benchmarks.items() if project.benchmarks[name].tasks_from == "stock"]


def _entry(config: DownloadConfig) -> Any:
    """The entry of a model or of a dataset."""
    return config.model or config.dataset


def name_of(pin: Pin) -> str:
    """The name of its entry."""
    return pin.name if isinstance(pin, DownloadConfig) else pin.benchmark


def with_their_data(pins: list[Pin], names: list[str]) -> list[Pin]:
    """The pins of these names, with the data of benchmarks and whose tokenizer models have; all without names."""
    chosen = [pin for pin in pins if name_of(pin) in names or not names]
    data = {pin.data if isinstance(pin, EvaluationConfig) else pin.tokenizer_path for pin in chosen}
    return [p for p in pins if p in chosen or (isinstance(p, DownloadConfig) and f"downloads/{p.name}" in data)]


def check(project: Project, pins: list[Pin], scratch: Path, workdir: Path | None) -> Iterator[Checked]:
    """Each pin as soon as it has been looked at: at the hub, or without a network in a work directory.

    scratch: an empty directory, which is laid out as a work directory. Raises HubUnreachable if no repository answers.
    """
    import datasets
    import transformers  # noqa: F401  # here and not in a thread: its modules are filled in as they are asked for

    datasets.config.HF_DATASETS_CACHE = scratch / ".work" / "datasets"
    datasets.disable_progress_bars()
    downloads = [pin for pin in pins if isinstance(pin, DownloadConfig)]
    seen: dict[str, Checked] = {}
    if workdir is None and downloads:
        _ask(downloads[0])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tasks = [
            pool.submit(_published, pin, scratch)
            if workdir is None
            else pool.submit(_downloaded, pin, scratch, workdir)
            for pin in downloads
        ]
        for pin, one in _sharing_last(done.result() for done in as_completed(tasks)):
            if pin.model and pin.model.hub and not one.errors:
                one.add(model_errors(project, one.name, pin.model, one.directory))
                other = seen.get(pin.tokenizer_path or "")
                if other and not other.errors and not one.errors:
                    one.add(tokenizer_errors(pin.model, one.directory, other.directory))
            if pin.dataset and pin.dataset.hub and pin.dataset.kind != "benchmark" and not one.errors:
                entry = project.datasets[one.name]
                one.add(dataset_errors(one.name, entry, one.directory, one.rows, one.counts))
            seen[f"downloads/{one.name}"] = one
            yield one
    for config in pins:
        if isinstance(config, EvaluationConfig):
            yield _asked(config, scratch, seen)


def _sharing_last(results: Iterable[tuple[DownloadConfig, Checked]]) -> Iterator[tuple[DownloadConfig, Checked]]:
    """The results as they come, but for models with the tokenizer of another one, which has to be there first."""
    sharing = []
    for config, one in results:
        if config.tokenizer_path:
            sharing.append((config, one))
        else:
            yield config, one
    yield from sharing


def _asked(config: EvaluationConfig, scratch: Path, seen: dict[str, Checked]) -> Checked:
    """A benchmark, whose data has been looked at."""
    one = Checked("benchmark", config.benchmark, f"lm-eval {config.task}", config.revision or "")
    data = seen.get(config.data or "")
    if data is None:
        one.note = "lm-eval fetches its data itself: not looked at"
        if config.revision is None:
            one.errors.append("its data is not pinned, and evaluations run offline; give it a `dataset`")
    elif data.errors or data.absent:
        one.result = f"not asked before {data.name} works"
    else:
        one.directory, one.commit = data.directory, data.commit
        one.add(task_errors(config, scratch, data.rows, one.counts))
    return one


# --------------------------------------------------------------------------------------------------------------------
# At the hub


def _ask(config: DownloadConfig) -> None:
    """Raise HubUnreachable, one line, if there is no network; what else is wrong with a repository comes later."""
    try:
        _newest(config)
    except HubUnreachable:
        raise
    except ValueError:
        pass


def _newest(config: DownloadConfig) -> str:
    from huggingface_hub import HfApi

    hub = _entry(config).hub
    with one_line_errors(hub, config.name, config.what, failed="the hub gave no answer"):
        return HfApi().repo_info(hub, repo_type=config.what).sha or ""


def _published(config: DownloadConfig, scratch: Path) -> tuple[DownloadConfig, Checked]:
    """A repository at its commit, in small."""
    entry = _entry(config)
    one = Checked(config.what, config.name, entry.hub, entry.revision, scratch / "downloads" / config.name)
    one.directory.mkdir(parents=True)
    newest = ""
    try:
        newest = _newest(config)
        with one_line_errors(entry.hub, config.name, config.what, failed="the hub gave no answer"):
            _fetch(config, one)
    except NoSuchCommit:
        one.errors.append(f"the repository has no such commit; correct `revision`, its newest is {newest}")
    except ValueError as error:
        one.errors.append(one.error_line(error))
    if newest not in ("", entry.revision):
        one.note = f"its newest commit is {newest}"
    return config, one


def _fetch(config: DownloadConfig, one: Checked) -> None:
    from huggingface_hub import HfApi, HfFileSystem

    entry = _entry(config)
    info = HfApi().repo_info(entry.hub, revision=entry.revision, repo_type=config.what, files_metadata=True)
    patterns, wanted, facts = chosen_files(config, info, one.directory)
    one.bytes = sum(file.size or 0 for file in wanted)
    sizes = {file.rfilename: file.size or 0 for file in wanted} | facts.get("stream", {}).get("shards", {})
    names = [name for name in sizes if not name.endswith((*WEIGHT_FILES, "dataset_infos.json"))]
    files = HfFileSystem()
    root = f"{'datasets/' if config.dataset else ''}{entry.hub}@{entry.revision}"
    files.find(root)  # one listing, which spares a question for each file
    kept = {name: sizes[name] for name in names}
    one.rows = sketch(files, root, kept, one.directory, whole=config.model is not None)
    one.licence = stated_licence(one.directory) or ""
    if config.model:
        if has_weights(list(sizes)):
            (one.directory / PLACEHOLDER).touch()
        else:
            one.errors.append(
                "has no weights that are fetched (safetensors, or pytorch_model.bin); take another commit"
            )
    else:
        forget_sizes(one.directory)
        if patterns is ARCHIVES:
            unpack(one.directory)
        if config.dataset and config.dataset.config:
            describe_alone(one.directory / "README.md", config.dataset.config)
    one.errors += _licence_errors(entry.licence, one.licence)
    if getattr(info, "gated", False):
        one.licence += ", gated"


def _licence_errors(stated: str | None, found: str) -> list[str]:
    """The line for a licence of the card that is another one than the entry's; `other` says nothing."""
    ours, *theirs = (re.sub(r"[^a-z0-9.]+", "-", name.lower()) for name in (stated or "", *found.split(", ")))
    same = any(name in ours or ours in name for name in theirs)
    if same or not ours or found in ("", "other", "unknown"):
        return []
    return [f"licence {found!r} on its card, {stated!r} in its entry; read the card, and correct `licence`"]


# --------------------------------------------------------------------------------------------------------------------
# In a work directory


def _downloaded(config: DownloadConfig, scratch: Path, workdir: Path) -> tuple[DownloadConfig, Checked]:
    """What was downloaded, file by file, and data in small beside it."""
    from fsspec.implementations.local import LocalFileSystem

    entry = _entry(config)
    directory = workdir / "downloads" / config.name
    one = Checked(config.what, config.name, entry.hub or "not from the hub", entry.revision or "", directory)
    one.absent = not Path(f"{directory}.json").exists()
    if one.absent:
        return config, one
    try:
        record = read_record(f"{directory}.json")
    except ValueError as error:
        one.errors.append(str(error))
        return config, one
    found = directory_digest(directory, VOLATILE)
    one.bytes, one.licence = found["bytes"], stated_licence(directory) or ""
    if found["digest"] != record["digest"]:
        one.errors.append(f"{_damaged(directory)}; delete {directory}.json, and the workflow fetches it again")
    elif record["config_digest"] != digest(config):
        one.errors.append("was downloaded for another entry; the workflow fetches it again")
    elif config.dataset and entry.hub:
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        sizes = {name: (directory / name).stat().st_size for name in names if name != "dataset_infos.json"}
        one.directory = scratch / "downloads" / config.name
        one.rows = sketch(LocalFileSystem(), str(directory), sizes, one.directory)
        forget_sizes(one.directory)
    return config, one


def _damaged(directory: Path) -> str:
    """Which files of a download are not as they came, where its manifest tells."""
    try:
        stated = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, LookupError, AttributeError):
        stated = ()
    if (directory / "unpacked").is_dir():  # an archive, which is gone since
        stated = ()
    paths = {name: (directory / name, facts["sha256"]) for name, facts in stated}
    wrong = [name for name, (path, sha256) in paths.items() if not path.is_file() or file_digest(path) != sha256]
    return f"damaged: {', '.join(wrong)}" if wrong else "its files are not as they were downloaded"
