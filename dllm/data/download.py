"""Fetch a pinned model or dataset from the hub and verify it; or make what the laptop configuration uses instead.

Everything after this step runs offline and is given paths: what was fetched by commit is never looked up by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from dllm.config import DownloadConfig, digest
from dllm.provenance import file_digest, read_record, replace_directory, write_record

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
DATASET_FILES = ["*.parquet", "*.json", "*.jsonl", "*.jsonl.gz", "*.csv", "*.txt", "README.md", "LICENSE*"]


def download(config: DownloadConfig, workdir: str | Path = ".") -> Path:
    """Fetch or make `downloads/<name>` and its record; returns the directory.

    Nothing is visible under the final name before all is there and verified. Raises ValueError, one line, for a
    repository, revision or file that cannot be had, and for a damaged one.
    """
    workdir = Path(workdir)
    target = workdir / "downloads" / config.name
    scratch = target.with_name(f".{config.name}.partial")
    inputs: dict[str, str] = {}
    if config.what == "dataset" and config.dataset.world:
        from dllm.data.world import build

        shutil.rmtree(scratch, ignore_errors=True)
        build(scratch, seed=config.dataset.seed)
    elif config.what == "model" and config.model.new is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        _make_model(config, workdir, scratch)
        inputs[config.tokenizer_path] = read_record(workdir / f"{config.tokenizer_path}.json")["digest"]
    else:
        _fetch(config, scratch)
    replace_directory(scratch, target)
    write_record(target, kind=config.what, name=config.name, config_digest=digest(config), inputs=inputs)
    return target


def _make_model(config: DownloadConfig, workdir: Path, scratch: Path) -> None:
    """A stock model with seeded random weights, beside its tokenizer; or such a model in a published layout."""
    from dllm.models.load import new_model, save_stand_in
    from dllm.models.tokenizers import load_tokenizer

    path = workdir / config.tokenizer_path / "tokenizer"
    if config.model.published:
        save_stand_in(config.model, load_tokenizer(path), scratch)
        return
    tokenizer = load_tokenizer(path, config.model)
    new_model(config.model, tokenizer).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)


def _fetch(config: DownloadConfig, scratch: Path) -> None:
    """Download a pinned snapshot with progress; files already complete from an earlier attempt are kept."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    entry = config.model or config.dataset
    pin = f"{entry.hub}@{entry.revision[:8]}"
    try:
        snapshot_download(
            entry.hub,
            revision=entry.revision,
            repo_type=config.what,
            local_dir=scratch,
            allow_patterns=MODEL_FILES if config.what == "model" else DATASET_FILES,
        )
        _verify(config, scratch)
    except GatedRepoError:
        raise ValueError(f"{pin}: gated; accept its terms on the hub and set HF_TOKEN, then run again") from None
    except RevisionNotFoundError:
        raise ValueError(f"{pin}: the repository has no such commit; correct `revision` of {config.name!r}") from None
    except LocalEntryNotFoundError as fault:  # also an EntryNotFoundError: nothing in the cache, and no network
        raise _broken_off(pin, fault) from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise ValueError(f"{pin}: no such {config.what} on the hub; correct `hub` of {config.name!r}") from None
    except HfHubHTTPError.__bases__ as fault:  # every error of the HTTP library, and OSError
        raise _broken_off(pin, fault) from None


def _broken_off(pin: str, fault: Exception) -> ValueError:
    first = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return ValueError(f"{pin}: the download broke off ({first}); check the network and run again")


def _verify(config: DownloadConfig, scratch: Path) -> None:
    """Compare every file with the size and hash the hub states, and write them to manifest.json.

    Raises ValueError naming the damaged file, which is removed so that the next attempt fetches it again.
    """
    from huggingface_hub import HfApi

    entry = config.model or config.dataset
    info = HfApi().repo_info(entry.hub, revision=entry.revision, repo_type=config.what, files_metadata=True)
    shutil.rmtree(scratch / ".cache", ignore_errors=True)
    known = {remote.rfilename for remote in info.siblings}
    for path in scratch.rglob("*"):  # left by an earlier attempt at another commit
        if path.is_file() and path.relative_to(scratch).as_posix() not in known:
            path.unlink()
    manifest = {}
    for remote in info.siblings:
        path = scratch / remote.rfilename
        if not path.exists():
            continue
        if remote.lfs is not None:
            good = file_digest(path) == remote.lfs.sha256
        else:
            content = path.read_bytes()
            good = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id
        if not good:
            path.unlink()
            raise ValueError(f"{entry.hub}: {remote.rfilename} arrived damaged and was removed; run again to fetch it")
        manifest[remote.rfilename] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    if not manifest:
        raise ValueError(f"{entry.hub}: has no file that a {config.what} needs; correct `hub` of {config.name!r}")
    facts = {"hub": entry.hub, "revision": entry.revision, "commit": info.sha, "files": manifest}
    (scratch / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
