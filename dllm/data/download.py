"""Fetch a pinned model or dataset from the hub and verify it; or copy one from this disk, or make a synthetic one.

Everything after this step runs offline and is given paths: what was fetched by commit is never looked up by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from dllm.config import WEIGHT_FILES, DownloadConfig, digest
from dllm.data.convert import FILES
from dllm.data.hub import one_line_errors
from dllm.provenance import file_digest, input_digest, replace_directory, write_record

CARDS = ["README.md", "LICENSE*"]
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *CARDS]
PICKLED = ["pytorch_model*.bin"]
"""Weights of a model whose repository has no safetensors; only tensors are read of them, no code."""
DATASET_FILES = ["*.parquet", "*.json", "*.jsonl", "*.jsonl.gz", "*.csv", "*.txt", *CARDS]
ARCHIVES = ["*.zip", *CARDS]
"""Files of a dataset without other data files: such repositories have a loading script, which is never run."""

SPLITS = ("train", "dev", "val", "valid", "validation", "test")
"""What an archive calls its splits."""

NO_DATA = [*CARDS, "dataset_infos.json"]

LARGE = 2**20
"""Bytes from which on a file is on the disk once, for all work directories."""


def store_of(workdir: str | Path) -> Path | None:
    """Where the downloads of work directories side by side have their files in common: `hub`, beside them.

    None, the cache of the hub's client, where the environment names one. Where the work directory is a disk of its own,
    or nothing may be written beside it, the store is inside.
    """
    if os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"):
        return None
    workdir = Path(workdir).resolve()
    beside = workdir.parent
    workdir.mkdir(parents=True, exist_ok=True)
    shared = os.access(beside, os.W_OK) and beside.stat().st_dev == workdir.stat().st_dev
    return (beside if shared else workdir / ".work") / "hub"


def download(config: DownloadConfig, workdir: str | Path = ".", store: Path | None = None) -> Path:
    """Fetch or make `downloads/<name>` and its record; returns the directory.

    store: a cache of the hub's client, where every file is fetched once for all work directories; None: its own.
    Nothing is visible under the final name before all is there and verified. Raises ValueError, one line, for a
    repository, revision or file that cannot be had, and for a damaged one.
    """
    workdir = Path(workdir)
    target = workdir / "downloads" / config.name
    scratch = target.with_name(f".{config.name}.partial")
    inputs: dict[str, str] = {}
    if config.what == "dataset" and config.dataset.world:
        from dllm.synthetic import build

        shutil.rmtree(scratch, ignore_errors=True)
        build(scratch, seed=config.dataset.seed)
    elif config.sources is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        _copy(config, workdir, scratch)
    elif config.what == "model" and config.model.new is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        _make_model(config, workdir, scratch)
        inputs[config.tokenizer_path] = input_digest(workdir / config.tokenizer_path)
    else:
        _fetch(config, scratch, store)
    if config.what == "model" and config.model.new is None and config.model.family == "encoder":
        _complete(scratch)
    if config.tokenizer_path and config.tokenizer_path not in inputs:
        inputs[config.tokenizer_path] = input_digest(workdir / config.tokenizer_path)
        _check_tokenizer(config, workdir, scratch)
    replace_directory(scratch, target)
    write_record(target, kind=config.what, name=config.name, config_digest=digest(config), inputs=inputs)
    return target


def _make_model(config: DownloadConfig, workdir: Path, scratch: Path) -> None:
    """A stock model with seeded random weights, beside its tokenizer; or such a model in a published layout."""
    from dllm.models.load import new_model, save_stand_in
    from dllm.models.tokenizers import load_tokenizer

    path = workdir / config.tokenizer_path
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path  # of the synthetic world, or of a model
    if config.model.published:
        save_stand_in(config.model, load_tokenizer(path), scratch)
        return
    tokenizer = load_tokenizer(path, config.model)
    new_model(config.model, tokenizer, like=path).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)


def _check_tokenizer(config: DownloadConfig, workdir: Path, scratch: Path) -> None:
    """Raise ValueError, one line, unless the tokenizer is that of the model whose token files this one shares."""
    from dllm.models.tokenizers import check_same_tokenizer

    try:
        check_same_tokenizer(scratch, workdir / config.tokenizer_path, config.model)
    except ValueError as error:
        raise ValueError(f"{config.name}: {str(error).removeprefix(f'{scratch}: ')}") from None


def _copy(config: DownloadConfig, workdir: Path, scratch: Path) -> None:
    """Copy files of this disk, so that what is made of them stays true to them whatever becomes of the originals.

    Raises ValueError, one line, for a file that is not what it was when the configuration was read.
    """
    from dllm.config import content_digest

    sources = [workdir / source for source in config.sources]
    try:
        changed = content_digest(sources) != config.content
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename}: no longer there; put it back, or correct the entry of {config.name!r}"
        ) from None
    if changed:
        raise ValueError(f"{config.name}: its files have changed since the configuration was read; start again")
    directory = scratch / FILES if config.what == "dataset" else scratch
    directory.mkdir(parents=True)
    counts = Counter(source.name for source in sources)
    for number, source in enumerate(sources, 1):
        target = directory / (source.name if counts[source.name] == 1 else f"{number}-{source.name}")
        _copy_file(source.resolve(), target, linked=source.suffix in WEIGHT_FILES)
    facts = {
        "content": config.content,
        "licence": stated_licence(scratch),
        "files": [source.name for source in sources],
    }
    (scratch / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _copy_file(source: Path, target: Path, *, linked: bool) -> None:
    """Copy a file; or, if `linked`, give it a second name instead, where the file system can do that."""
    if linked:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without such names
            pass
    shutil.copyfile(source, target)


def _complete(scratch: Path) -> None:
    """Give an encoder that was saved without an LM head one, and say so in the manifest."""
    from dllm.models.headless import give_head

    said = give_head(scratch)
    if said:
        manifest = scratch / "manifest.json"
        facts = json.loads(manifest.read_text(encoding="utf-8")) | {"head": said}
        manifest.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _fetch(config: DownloadConfig, scratch: Path, store: Path | None) -> None:
    """Put a pinned snapshot together of the files in the store, which are fetched there with progress if missing.

    The store is safe for several processes, and a file that broke off is taken up there where it ended.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    entry, store = config.model or config.dataset, store or Path(constants.HF_HUB_CACHE)
    pin: dict[str, Any] = {
        "repo_id": entry.hub,
        "revision": entry.revision,
        "repo_type": config.what,
        "cache_dir": store,
    }
    shutil.rmtree(scratch, ignore_errors=True)
    with one_line_errors(f"{entry.hub}@{entry.revision[:8]}", config.name, config.what):
        info = HfApi().repo_info(entry.hub, revision=entry.revision, repo_type=config.what, files_metadata=True)
        patterns, wanted, facts = chosen_files(config, info, scratch)
        _check_room(config, scratch, wanted, pin)
        snapshot = Path(snapshot_download(**pin, allow_patterns=patterns))
    shutil.rmtree(scratch, ignore_errors=True)
    for file in wanted:
        target = scratch / file.rfilename
        target.parent.mkdir(parents=True, exist_ok=True)
        # what a person may edit is copied: a file with two names would change under both
        _copy_file((snapshot / file.rfilename).resolve(), target, linked=(file.size or 0) > LARGE)
    files = _verified(entry.hub, scratch, wanted, snapshot)
    named = {"hub": entry.hub, "revision": entry.revision, "commit": info.sha, "licence": stated_licence(scratch)}
    if patterns is ARCHIVES:
        unpack(scratch)
    if config.dataset and config.dataset.config:
        describe_alone(scratch / "README.md", config.dataset.config)
    manifest = named | facts | {"files": files}
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def chosen_files(config: DownloadConfig, info, scratch: Path) -> tuple[list[str], list, dict[str, Any]]:
    """(patterns, files, facts of the manifest) of what is fetched of a repository; its card may come to `scratch`.

    info: what the hub says of the repository, with its files. Raises ValueError, one line, if it has nothing of use.
    """
    from huggingface_hub.utils import filter_repo_objects

    facts: dict[str, Any] = {"stream": _shards(config, info)} if config.dataset and config.dataset.stream else {}
    safe = any(file.rfilename.endswith(".safetensors") for file in info.siblings)
    choices = [MODEL_FILES + PICKLED * (not safe)] if config.what == "model" else [DATASET_FILES, ARCHIVES]
    choices = [[facts["stream"]["held_out"], *CARDS]] if facts else choices
    if not facts and (named := _files_of_configuration(config, scratch)):
        choices = [[*named, *CARDS]]
    for patterns in choices:
        wanted = list(filter_repo_objects(info.siblings, allow_patterns=patterns, key=lambda file: file.rfilename))
        if list(filter_repo_objects(wanted, ignore_patterns=NO_DATA, key=lambda file: file.rfilename)):
            return patterns, wanted, facts
    entry = config.model or config.dataset
    raise ValueError(f"{entry.hub}: has no file that a {config.what} needs; correct `hub` of {config.name!r}")


def _check_room(config: DownloadConfig, scratch: Path, wanted: list, pin: dict[str, Any]) -> None:
    """Raise ValueError if there is no room for the files that the store lacks, or for copies on another disk."""
    from huggingface_hub import try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in wanted}
    missing = sum(sizes[name] for name in sizes if not isinstance(try_to_load_from_cache(filename=name, **pin), str))
    scratch.mkdir(parents=True, exist_ok=True)
    pin["cache_dir"].mkdir(parents=True, exist_ok=True)
    places = {pin["cache_dir"]: missing}
    if pin["cache_dir"].stat().st_dev != scratch.stat().st_dev:
        places[scratch.parent] = sum(sizes.values())
    for place, needed in places.items():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"{config.name}: {needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free below {place}; make room, "
                "or set `workdir` to another disk"
            )


def _verified(repository: str, scratch: Path, wanted: list, snapshot: Path) -> dict[str, dict]:
    """Size and SHA-256 of every file, compared with the size and hash that the hub states.

    Raises ValueError naming the damaged file, which is removed from the store so that the next attempt fetches it.
    """
    found = {}
    for file in wanted:
        path = scratch / file.rfilename
        sha256 = file_digest(path)
        if file.lfs is not None:
            good = sha256 == file.lfs.sha256
        else:
            content = path.read_bytes()
            good = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id
        if not good:
            path.unlink()
            (snapshot / file.rfilename).resolve().unlink(missing_ok=True)
            raise ValueError(f"{repository}: {file.rfilename} arrived damaged and was removed; run again to fetch it")
        found[file.rfilename] = {"bytes": path.stat().st_size, "sha256": sha256}
    return found


def stated_licence(scratch: Path) -> str | None:
    """The licence that the card states, or None."""
    from huggingface_hub import RepoCard

    try:
        data = RepoCard.load(scratch / "README.md", ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None
    found = data.get("license_name") or data.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else found and str(found)


def unpack(scratch: Path) -> None:
    """Unpack archives of tables and describe them in the card, as `datasets` reads it.

    A table is `<split>/<configuration>.csv`, `<split>/<configuration>_<split>.csv`, or, in any folder,
    `<configuration>_<split>.csv`. Its cells are texts: nothing is left to a guess, under which 0.80 would become 0.8
    and a table whose splits look different could not be read. Raises ValueError, one line, for an archive that cannot
    be unpacked and for tables whose split is not known, or stated twice.
    """
    import zipfile

    from huggingface_hub import RepoCard

    for archive in scratch.rglob("*.zip"):
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(scratch / "unpacked")
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # torn, encrypted, unknown method
            raise ValueError(f"{archive.name}: cannot be unpacked ({error}); choose another `revision`") from None
        archive.unlink()
    tables: dict[str, dict[str, str]] = {}
    for path in sorted((scratch / "unpacked").rglob("*.csv")):
        if path.name.startswith(".") or "__MACOSX" in path.parts:  # what macOS adds to archives
            continue
        name, split = _configuration_and_split(path)
        if split in tables.setdefault(name, {}):
            raise ValueError(f"{path.name}: a second table of {name!r}, split {split!r}; choose another `revision`")
        tables[name][split] = _as_texts(path).relative_to(scratch).as_posix()
    card = RepoCard("---\n{}\n---\n")
    card.data["configs"] = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in tables.items()
    ]
    card.save(scratch / "README.md")


def _configuration_and_split(path: Path) -> tuple[str, str]:
    """What a table of an archive is called, and its split: its folder, or else the ending of its name."""
    folder, (stem, _, ending) = path.parent.name, path.stem.rpartition("_")
    if folder in SPLITS:
        return path.stem.removesuffix(f"_{folder}"), folder
    if stem and ending in SPLITS:
        return stem, ending
    raise ValueError(
        f"{path.name}: neither its name nor its folder says which split it is ({', '.join(SPLITS)}); choose another "
        "`revision`"
    )


def _as_texts(path: Path) -> Path:
    """A csv file as a parquet file of texts in its place. Raises ValueError that names the line of a torn row."""
    import csv

    import pyarrow
    import pyarrow.parquet

    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        names = [name or f"Unnamed: {number}" for number, name in enumerate(next(rows, []))]
        table = []
        for row in rows:
            if len(row) != len(names) and row:
                raise ValueError(f"{path}:{rows.line_num}: {len(row)} cells under {len(names)} columns; fetch it again")
            table += [row] if row else []
    columns = {name: pyarrow.array([row[i] for row in table], pyarrow.string()) for i, name in enumerate(names)}
    target = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    path.unlink()
    return target


def _files_of_configuration(config: DownloadConfig, scratch: Path) -> list[str] | None:
    """Patterns of the files that the card names for the entry's configuration; None: the card does not say."""
    from huggingface_hub import RepoCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    entry = config.dataset
    if entry is None or entry.config is None:
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        card = hf_hub_download(entry.hub, "README.md", revision=entry.revision, repo_type="dataset", local_dir=scratch)
    except EntryNotFoundError:
        return None
    stated = RepoCard.load(card, ignore_metadata_errors=True).data.get("configs") or []
    mine = [found for found in stated if isinstance(found, dict) and found.get("config_name") == entry.config]
    if stated and not mine:
        names = ", ".join(str(found.get("config_name")) for found in stated if isinstance(found, dict))
        raise ValueError(f"{entry.hub}: has no configuration {entry.config!r} ({names}); correct `config`")
    files = mine[0].get("data_files") if mine else None
    if files is None or mine[0].get("data_dir"):
        return None
    files = files if isinstance(files, list) else [files]
    paths = [file["path"] if isinstance(file, dict) else file for file in files]
    return [path for found in paths for path in (found if isinstance(found, list) else [found])]


def describe_alone(card: Path, name: str) -> None:
    """Leave one configuration in a card: `datasets` looks for the files of the first one, whichever is asked for."""
    from huggingface_hub import RepoCard

    described = RepoCard.load(card, ignore_metadata_errors=True) if card.exists() else RepoCard("")
    if stated := described.data.get("configs"):
        described.data["configs"] = [part for part in stated if part.get("config_name") == name]
        described.save(card)


def _shards(config: DownloadConfig, info) -> dict:
    """The shards of a set that is streamed: those to train on, with their sizes, and the one held out for testing.

    Raises ValueError if there are fewer than two.
    """
    from datasets import load_dataset_builder

    entry = config.dataset
    sizes = {file.rfilename: file.size for file in info.siblings}
    builder = load_dataset_builder(entry.hub, entry.config, revision=entry.revision)
    paths = [url.split(f"@{entry.revision}/", 1)[1] for url in builder.config.data_files["train"]]
    paths = sorted(path for path in paths if path.endswith(".parquet"))
    if len(paths) < 2:
        raise ValueError(
            f"{entry.hub}: {len(paths)} parquet shard(s), too few to stream (one is held out for testing); "
            f"set stream: false in the entry of {config.name!r}"
        )
    return {"shards": {path: sizes[path] for path in paths[:-1]}, "held_out": paths[-1], "bytes": sizes[paths[-1]]}
